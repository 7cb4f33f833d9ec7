"""Moving rows by a plan: there and back are each other's transpose, also where memory bounds what is held at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.backbone import rows

TOKENS, CHOICES, KEYS, CAPACITY, WIDTH = 20, 3, 4, 7, 5


def _plan(number=0):
    random = np.random.default_rng(0)
    key_NK = np.argsort(random.random((TOKENS, KEYS + 2)), 1)[:, :CHOICES].clip(max=KEYS).astype(np.int32)
    order_P, start_E, count_E = rows.sort_pairs(KEYS, jnp.asarray(key_NK))
    return key_NK, rows.buffer_plan(CAPACITY, jnp.asarray(key_NK), order_P, start_E + number * CAPACITY, count_E - number * CAPACITY)


def test_rounds_of_a_plan_hold_every_pair_once():
    seen = []
    for number in range(3):
        key_NK, plan = _plan(number)
        pair_Q = np.asarray(plan.pair_Q).reshape(KEYS, CAPACITY)
        for key, row in enumerate(pair_Q):
            live = row[row >= 0]
            assert np.all(key_NK.reshape(-1)[live] == key)
            seen += live.tolist()
    assert sorted(seen) == np.flatnonzero(key_NK.reshape(-1) < KEYS).tolist()


@pytest.mark.parametrize("tokens", [1, 511, 512, 1300])
def test_counting_orders_pairs_by_key_and_then_by_choice(tokens):
    key_NK = np.random.default_rng(tokens).integers(0, KEYS + 1, (tokens, CHOICES)).astype(np.int32)
    pair_KN = np.arange(tokens * CHOICES).reshape(tokens, CHOICES).T.reshape(-1)
    want = pair_KN[np.argsort(key_NK.T.reshape(-1), stable=True)]
    np.testing.assert_array_equal(rows.counted(KEYS, jnp.asarray(key_NK)), want)


@pytest.mark.parametrize("bound", [rows.AT_ONCE, 0])
def test_collect_is_the_transpose_of_spread(bound, monkeypatch):
    monkeypatch.setattr(rows, "AT_ONCE", bound)
    _, plan = _plan()
    random = np.random.default_rng(1)
    x, y = random.normal(size=(TOKENS, WIDTH)).astype(np.float32), random.normal(size=(KEYS * CAPACITY, WIDTH)).astype(np.float32)
    there = jax.jit(lambda x: rows.spread(x, plan.token_Q, plan.row_NK))
    back = jax.jit(lambda y: rows.collect(y, plan.row_NK, plan.token_Q))
    moved = there(x)
    live = np.asarray(plan.token_Q) >= 0
    np.testing.assert_array_equal(moved, np.where(live[:, None], x[np.maximum(plan.token_Q, 0)], 0))
    np.testing.assert_allclose(np.sum(np.asarray(moved) * y), np.sum(x * np.asarray(back(y))), rtol=1e-5)
    np.testing.assert_allclose(jax.vjp(there, x)[1](y)[0], back(y), rtol=1e-5)
    np.testing.assert_allclose(jax.vjp(back, y)[1](x)[0], moved, rtol=1e-5)
