"""Attention of packed tokens against softmax written out, whole and in strips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.vision import attention


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 11, 4, 6))
    k, v = (jax.random.normal(key, (2, 11, 2, 6)) for key in keys[1:])
    segment = jnp.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11])
    window = jnp.array([[1, 1, 2, 2, 3, 3, 3, 4, 4, 0, 0], list(range(11))])
    return q, k, v, (segment, window)


def loss(q, k, v, ids):
    return jnp.sum(jnp.sin(attention.attend(q, k, v, ids)))


def test_equals_softmax_over_what_is_seen(case):
    q, k, v, (segment, window) = (np.asarray(x) if not isinstance(x, tuple) else map(np.asarray, x) for x in case)
    out = np.asarray(attention.attend(*case)).reshape(2, 11, 4, 6)
    for b, p, h in np.ndindex(2, 11, 4):
        seen = (segment[b] == segment[b, p]) & (window[b] == window[b, p])
        weight = np.exp(k[b, seen, h // 2] @ q[b, p, h])
        np.testing.assert_allclose(out[b, p, h], weight @ v[b, seen, h // 2] / weight.sum(), rtol=2e-5, atol=1e-6)


def test_strips_change_neither_values_nor_gradients(case, monkeypatch):
    q, k, v, ids = case
    both = lambda: jax.jit(jax.value_and_grad(lambda *x: loss(*x, ids), argnums=(0, 1, 2)))(q, k, v)
    whole = both()
    monkeypatch.setattr(attention, "QUERIES", 4)  # 11 tokens: three strips, the last of them filled up
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, both())
