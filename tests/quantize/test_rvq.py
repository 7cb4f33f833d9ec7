"""Training forward: straight-through gradient, commitment forms, masks, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.quantize import rvq

CFG = rvq.RVQConfig(sizes=(16, 16, 8), dim=6)
STATS = rvq.init_stats(CFG, jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (20, 6))
ONES = jnp.ones(20)


def test_straight_through_value_and_gradient():
    out = rvq.quantize(CFG, STATS, X, ONES)
    np.testing.assert_allclose(out.q_ND, rvq.decode(CFG, STATS, out.codes_NL), atol=1e-6)
    w = jax.random.normal(jax.random.key(2), X.shape)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(rvq.quantize(CFG, STATS, x, ONES).q_ND * w))(X), w, atol=1e-6)
    grads = jax.grad(lambda s: jnp.sum(rvq.quantize(CFG, s, X, ONES).q_ND) + rvq.quantize(CFG, s, X, ONES).commit[0])(STATS)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(grads))


def test_commitment_forms_agree_in_value_and_differ_in_gradient():
    commit = lambda cfg: lambda x: rvq.quantize(cfg, STATS, x, ONES).commit[0]
    residual = rvq.RVQConfig(sizes=CFG.sizes, dim=6, commitment="residual")
    partial = [rvq.decode(CFG, STATS, rvq.encode(CFG, STATS, X), level + 1) for level in range(3)]
    expected = np.mean([((X - q) ** 2).mean(-1) for q in partial], 0).sum()
    np.testing.assert_allclose(commit(CFG)(X), expected, rtol=1e-5)
    np.testing.assert_allclose(commit(residual)(X), expected, rtol=1e-5)
    scale = 2 / (6 * 3)
    np.testing.assert_allclose(jax.grad(commit(residual))(X), scale * (X - partial[0]), atol=1e-5)
    np.testing.assert_allclose(jax.grad(commit(CFG))(X), scale * sum(X - q for q in partial), atol=1e-5)


def test_padding_enters_nothing():
    mask = (jnp.arange(20) < 12).astype(jnp.float32)
    short = rvq.quantize(CFG, STATS, X[:12], jnp.ones(12))
    padded = rvq.quantize(CFG, STATS, X.at[12:].set(1e3), mask)
    np.testing.assert_allclose(padded.commit, short.commit, rtol=1e-6)
    np.testing.assert_allclose(padded.energy_L[0], short.energy_L[0], rtol=1e-6)
    assert (padded.codes_NL[12:] == -1).all()
    grad = jax.grad(lambda x: rvq.quantize(CFG, STATS, x, mask).commit[0])(X)
    assert float(jnp.abs(grad[12:]).max()) == 0 < float(jnp.abs(grad[:12]).max())


def test_dropout_depth_is_keyed_by_vector():
    keys = jnp.repeat(jax.random.split(jax.random.key(3), 5), 4)  # five images of four cells
    out = rvq.quantize(CFG, STATS, X, ONES, key=keys, dropout=1.0)
    depth = np.asarray(out.depth_N).reshape(5, 4)
    assert (depth == depth[:, :1]).all() and depth.min() >= 1 and depth.max() <= 3 and len(np.unique(depth)) > 1
    np.testing.assert_allclose(out.q_ND, rvq.decode(CFG, STATS, out.codes_NL, out.depth_N), atol=1e-6)
    assert (out.codes_NL >= 0).all()
    half = rvq.quantize(CFG, STATS, X[10:], ONES[10:], key=keys[10:], dropout=1.0)
    np.testing.assert_array_equal(half.depth_N, out.depth_N[10:])  # does not depend on the neighbours
    with pytest.raises(ValueError, match="needs a key"):
        rvq.quantize(CFG, STATS, X, ONES, dropout=0.5)
