"""Losses of the heads by hand, the penalty against finite differences, and positions without weight that never count."""

import jax
import jax.numpy as jnp
import numpy as np

from dina.vision import discriminator, perceptual

NET, HEADS = perceptual.network("random"), discriminator.Heads(4)
SIZES = ((6, 6), (3, 3), (2, 2), (1, 1))
RNG = np.random.default_rng(0)
MAPS = [RNG.normal(size=(2, *size, c)).astype(np.float32) for size, c in zip(SIZES, NET.channels)]
WEIGHTS = [np.ones((2, *size), np.float32) for size in SIZES]


def test_losses_by_hand():
    flat = lambda values: [np.broadcast_to(np.float32(values)[:, None, None], (2, *size)) for size in SIZES[1:]]
    np.testing.assert_allclose(discriminator.hinge(flat([2, 0.5]), flat([-3, 1]), WEIGHTS), [0, 0.5 + 2], rtol=1e-6)
    real, made = jnp.array([1.0, -1.0]), jnp.array([0.5, 2.0])
    np.testing.assert_allclose(discriminator.lecam(real, made, 1.5, 0.0), [1 + 1, 0 + 0])
    values, weights = flat([1, 2]), [w.copy() for w in WEIGHTS]
    weights[1][0, :2], values[0] = 0, values[0].copy()
    values[0][0, :2] = 100  # without weight
    np.testing.assert_allclose(discriminator.window_means(values, weights), [1, 2], rtol=1e-6)


def test_inputs_have_mean_square_one():
    for x in discriminator.inputs(MAPS):
        np.testing.assert_allclose((x**2).mean(-1), 1, rtol=1e-4)


def test_penalty_is_the_squared_gradient():
    maps, weights = discriminator.inputs(MAPS[:2]), WEIGHTS[:2]  # one head: it is the compilation that takes time
    shapes = jax.eval_shape(lambda: HEADS.init(jax.random.key(0), maps))["params"]
    params = jax.tree.map(lambda x: RNG.normal(0, 0.3, x.shape).astype(np.float32), shapes)

    @jax.jit
    def run(maps):
        mean = lambda maps: discriminator.window_means(HEADS.apply({"params": params}, maps), weights)
        grads = jax.grad(lambda maps: mean(maps).sum())(maps)
        length = jnp.sqrt(sum(jnp.sum(g**2, (1, 2, 3)) for g in grads))
        along = [g / length[:, None, None, None] for g in grads]
        moved = lambda step: mean([m + step * a for m, a in zip(maps, along)])
        return discriminator.r1(HEADS, params, maps, weights), (moved(0.01) - moved(-0.01)) / 0.02

    penalty, slope = run(maps)
    np.testing.assert_allclose(penalty, slope**2, rtol=0.05)
    assert (penalty > 0).all()


def test_every_map_but_the_finest_has_a_head():
    params = jax.eval_shape(lambda: discriminator.init_heads(HEADS, NET, jax.random.key(0)))
    assert {name: x["kernel"].shape for name, x in params.items() if name.startswith("in_")} == {
        f"in_{i}": (c, 4) for i, c in enumerate(NET.channels[1:])}
