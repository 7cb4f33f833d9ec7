"""Training forward: gradient, commitment and codebook losses, masks, dropout, projections."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.config import InputError
from dina.quantize import rvq
from dina.quantize.gradient import through

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
    with pytest.raises(InputError, match="needs a key"):
        rvq.quantize(CFG, STATS, X, ONES, dropout=0.5)


def test_rotation_turns_the_whole_sum():
    cfg, w = dataclasses.replace(CFG, gradient="rotation"), jax.random.normal(jax.random.key(2), X.shape)
    q = rvq.decode(CFG, STATS, rvq.encode(CFG, STATS, X), 2)
    expected = jax.grad(lambda x: jnp.sum(through(x, q, "rotation") * w))(X)
    keys = jax.random.split(jax.random.key(3), 20)
    depth = rvq.draw_depth(CFG, keys, 20, 1.0) == 2
    out, got = jax.vjp(lambda x: rvq.quantize(cfg, STATS, x, ONES, keys, 1.0).q_ND, X)
    np.testing.assert_allclose(out[depth], q[depth], atol=1e-6)
    np.testing.assert_allclose(got(w)[0][depth], expected[depth], atol=1e-5)
    assert int(depth.sum()) > 2


@pytest.mark.parametrize("codebook", ["separate", "shared"])
def test_codebook_loss_moves_codes_to_the_mean_of_their_vectors_and_nothing_else(codebook):
    cfg = rvq.RVQConfig(sizes=(8, 8), dim=6, update="sgd", codebook=codebook)
    params, stats = rvq.init(cfg, jax.random.key(0))
    mask = (jnp.arange(20) < 15).astype(jnp.float32)

    @jax.jit
    def losses(params, x):
        out = rvq.quantize(cfg, rvq.view(cfg, params, stats), x, mask)
        return out.codebook[0], out.commit[0] + jnp.sum(out.q_ND**2)

    by_params, by_x = jax.jacrev(losses, argnums=(0, 1))(params, X)[0]
    assert float(jnp.abs(by_x).max()) == 0
    assert float(jnp.abs(jax.grad(lambda p: losses(p, X)[1])(params)["code_table"]["0"]).max()) == 0
    seen = rvq.view(cfg, params, stats)
    averaged = dataclasses.replace(cfg, update="ema")
    moments = rvq.statistics(averaged, seen, X, rvq.encode(cfg, seen, X), mask, jax.random.key(1))
    for book in cfg.books:  # the gradient of sum |r - e|^2 / (D L)
        hits, total = moments["count"][book][:, None], moments["sum"][book]
        np.testing.assert_allclose(by_params["code_table"][book], 2 * (hits * stats["codebook"][book] - total) / 12, atol=1e-5)


def test_projections_that_change_nothing_give_the_numbers_of_none():
    plain = dataclasses.replace(CFG, commitment="residual")
    own = dataclasses.replace(plain, factor_dim=6)
    eye = {book: jnp.eye(6) for book in CFG.books}
    keys = jax.random.split(jax.random.key(3), 20)

    @jax.jit
    def both(x):
        run = lambda cfg, stats: rvq.quantize(cfg, stats, x, ONES.at[17:].set(0), keys, 0.5)
        return run(plain, STATS), run(own, STATS | {"in": eye, "out": eye})

    a, b = both(X)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5), a, b)


def test_a_grid_passes_gradient_through_its_projections():
    cfg = rvq.RVQConfig(sizes=(8,), dim=6, kind="fsq")
    params, stats = rvq.init(cfg, jax.random.key(0))
    w, into, out = jax.random.normal(jax.random.key(2), X.shape), params["in"]["0"], params["out"]["0"]
    got = rvq.quantize(cfg, stats, X, ONES)
    np.testing.assert_allclose(got.q_ND, rvq.decode(cfg, stats, got.codes_NL), atol=1e-6)
    assert float(got.commit[0]) == float(got.codebook[0]) == 0.0
    slope = 1 - np.tanh(X @ into) ** 2
    grad = jax.grad(lambda x: jnp.sum(rvq.quantize(cfg, stats, x, ONES).q_ND * w))(X)
    np.testing.assert_allclose(grad, ((w @ out.T) * slope) @ into.T, atol=1e-5)
