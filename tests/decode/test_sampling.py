"""Sampling filters against their definitions, and the independence of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.decode import sampling


def _logits(rows=5, classes=23, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, classes)).astype(np.float32) * 2


def _keep_by_hand(probs, k, p, order):
    index = np.argsort(-probs, kind="stable")
    kept, mass = np.zeros(len(probs), bool), 0.0
    total = probs[index[:k]].sum() if order == "hf" else 1.0
    for rank, i in enumerate(index[:k]):
        if rank == 0 or (mass <= p if order == "joint" else mass < p) or p >= 1:
            kept[i] = True
        mass += probs[i] / total
    return kept


@pytest.mark.parametrize("order", sampling.ORDERS)
def test_keep_follows_the_definition(order):
    probs = np.asarray(jax.nn.softmax(_logits()))
    top_k, top_p = np.array([0, 3, 1, 23, 7]), np.array([0.6, 1.0, 0.5, 0.05, 0.8], np.float32)
    kept = np.asarray(sampling.keep(probs, top_k, top_p, order))
    for row in range(5):
        np.testing.assert_array_equal(kept[row], _keep_by_hand(probs[row], top_k[row] or 23, top_p[row], order))


def test_joint_and_hf_differ_where_renormalisation_matters():
    probs = np.array([[0.3, 0.28, 0.22, 0.2]], np.float32)
    joint = sampling.keep(probs, np.array([2]), np.array([0.5], np.float32), "joint")
    hf = sampling.keep(probs, np.array([2]), np.array([0.5], np.float32), "hf")
    assert np.asarray(joint).tolist() == [[True, True, False, False]]
    assert np.asarray(hf).tolist() == [[True, False, False, False]]


def test_ties_keep_the_lower_id():
    kept = sampling.keep(np.full((1, 4), 0.25, np.float32), np.array([2]), np.array([1.0], np.float32))
    assert np.asarray(kept).tolist() == [[True, True, False, False]]


def test_penalty_moves_seen_classes_down_whatever_their_sign():
    seen = np.array([[True, True, False]])
    out = sampling.penalise(np.array([[2.0, -2.0, 2.0]], np.float32), seen, np.array([2.0], np.float32))
    np.testing.assert_allclose(out, [[1.0, -4.0, 2.0]])


def test_temperature_zero_is_argmax_of_penalised_scores():
    logits, seen = np.array([[3.0, 2.0, 1.0]], np.float32), np.array([[True, False, False]])
    how = sampling.settings([{"temperature": 0, "repetition": 2.0, "top_k": 2}])
    keys = jax.random.split(jax.random.key(0), 1)
    assert sampling.sample(keys, logits, how).tolist() == [0]
    assert sampling.sample(keys, logits, how, seen).tolist() == [1]


def test_draws_follow_the_kept_distribution():
    logits = jnp.broadcast_to(_logits(1, 6)[0], (4000, 6))
    how = sampling.settings([{"temperature": 0.8, "top_k": 4, "top_p": 0.9}] * 4000)
    keys = sampling.row_keys(jax.random.split(jax.random.key(3), 4000), 0, 0)
    drawn = np.bincount(np.asarray(sampling.sample(keys, logits, how)), minlength=6) / 4000
    expected = np.asarray(jax.nn.softmax(sampling.filtered_logits(logits[:1], jax.tree.map(lambda x: x[:1], how))))[0]
    assert (drawn[expected == 0] == 0).all() and (expected == 0).any()
    np.testing.assert_allclose(drawn, expected, atol=0.03)


def test_a_row_draws_the_same_in_any_company():
    logits = _logits(8)
    rows = [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.5}, {}] * 2
    keys = sampling.row_keys(jax.random.split(jax.random.key(1), 8), 5, 2)
    together = np.asarray(sampling.sample(keys, logits, sampling.settings(rows)))
    for row in range(8):
        alone = sampling.sample(keys[row : row + 1], logits[row : row + 1], sampling.settings(rows[row : row + 1]))
        assert int(alone[0]) == together[row]


def test_banned_classes_are_never_drawn():
    logits = jnp.zeros((200, 5)).at[:, 3].set(-jnp.inf)
    keys = jax.random.split(jax.random.key(0), 200)
    drawn = np.asarray(sampling.sample(keys, logits, sampling.settings([{}] * 200)))
    assert set(drawn) == {0, 1, 2, 4}


@pytest.mark.parametrize("row", [{"top_p": 1.5}, {"temperature": -1}, {"topk": 3}, {"repetition": 0}])
def test_settings_refuse_what_they_do_not_know(row):
    with pytest.raises(ValueError, match=next(iter(row))):
        sampling.settings([row])
