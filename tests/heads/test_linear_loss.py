"""The classifier's loss without logits equals the plain one, chunked or not, with its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.heads.linear_loss import linear_cross_entropy


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("bias", ["with", "without"])
def test_equals_plain_cross_entropy(chunk, bias):
    random = np.random.default_rng(0)
    rows, width, stored, classes = 10, 6, 8, 7
    hidden, kernel = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((rows, width), (width, stored)))
    offset = jnp.asarray(random.normal(size=stored), jnp.float32) if bias == "with" else None
    label, weight = jnp.asarray(random.integers(0, classes, rows)), jnp.asarray(random.choice([0.0, 1.0, 3.0], rows), jnp.float32)

    def plain(hidden, kernel, offset):
        logits = hidden @ kernel + (0 if offset is None else offset)
        return -jnp.sum(weight * jnp.take_along_axis(jax.nn.log_softmax(logits[:, :classes]), label[:, None], 1)[:, 0])

    ours = lambda *p: linear_cross_entropy(*p, label, weight, classes, chunk)[0]
    argnums = (0, 1) if offset is None else (0, 1, 2)
    a, b = (jax.value_and_grad(lambda *p, f=f: 0.5 * f(*p), argnums)(hidden, kernel, offset) for f in (ours, plain))
    np.testing.assert_allclose(ours(hidden, kernel, offset), plain(hidden, kernel, offset), rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)
    assert np.all(np.asarray(a[1][1][:, classes:]) == 0)


def test_a_row_of_weight_zero_may_hold_anything():
    hidden, kernel = jnp.array([[1.0, 0.0], [1e30, 1.0]]), jnp.eye(2)
    loss, _ = linear_cross_entropy(hidden, kernel, None, jnp.array([0, -1]), jnp.array([1.0, 0.0]), 0, 0)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-1.0)), rtol=1e-6)
