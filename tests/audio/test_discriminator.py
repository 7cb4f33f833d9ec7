"""Judges of waves: what lies beyond a clip's end changes nothing, losses are what their formulas say, both kinds can learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.audio import discriminator
from dina.audio.discriminator import Judges, Opinion


@pytest.fixture(scope="module")
def setup():
    """(params, function (params, real, made, samples) -> losses of clips, the same jitted with the gradient of the judges' sum)."""
    judges = Judges((3,), (256,), 2, parent=None)
    shapes = jax.eval_shape(judges.init, jax.random.key(0), jnp.zeros((1, 480)), jnp.ones(1, jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(np.float32), shapes)

    def losses(params, real, made, samples):
        opinions = [judges.apply({"params": params}, x, samples) for x in (real, made)]
        return discriminator.discriminator_loss(*opinions), discriminator.adversarial_loss(opinions[1]), discriminator.feature_loss(*opinions)

    total = lambda *inputs: (lambda found: (found[0].sum(), found))(losses(*inputs))
    return params, losses, jax.jit(jax.value_and_grad(total, has_aux=True))


def waves():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.3, (2, 2, 960)).astype(np.float32)
    x[1] = np.cumsum(x[1], axis=-1) * 0.1
    return x, np.array([960, 500], np.int32)


def test_what_lies_beyond_a_clip_is_not_heard(setup):
    params, losses, run = setup
    (real, made), samples = waves()
    clean = [np.where(np.arange(960) < samples[:, None], x, 0) for x in (real, made)]
    whole = run(params, *clean, samples)[0][1]
    tail = [np.pad(x, ((0, 0), (0, 960))) for x in clean]
    for before, after in zip(whole, jax.jit(losses)(params, *tail, samples), strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-5)
    other = run(params, clean[0], np.roll(clean[1], 7, axis=-1), samples)[0][1]
    assert not np.allclose(whole[1], other[1], rtol=1e-3)


def test_judges_learn_to_tell_two_kinds_of_sound(setup):
    params, _, run = setup
    (real, made), samples = waves()
    history = []
    for _ in range(25):
        (loss, _), grads = run(params, real, made, samples)
        assert all(np.any(x) for x in jax.tree.leaves(grads))
        params = jax.tree.map(lambda p, g: p - 0.02 * np.sign(g), params, jax.device_get(grads))
        history.append(float(loss))
    assert min(history[-5:]) < 0.7 * history[0]


def test_losses_are_means_over_what_counts():
    weight = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    opinion = lambda logits, maps: Opinion(np.array(logits), weight, (np.array(maps)[..., None],), (weight,))
    real = [opinion([[1.0, 0.5, 9.0], [0.0, 9.0, 9.0]], [[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])]
    made = [opinion([[0.0, 2.0, 9.0], [1.0, 9.0, 9.0]], [[1.5, 2.0, 0.0], [1.0, 0.0, 0.0]])]
    assert np.allclose(discriminator.discriminator_loss(real, made), [0.125 + 2.0, 1.0 + 1.0])
    assert np.allclose(discriminator.adversarial_loss(made), [1.0, 0.0])
    assert np.allclose(discriminator.feature_loss(real, made), [0.25, 2.0])
