"""Refiner: conditions, packs, sampler against a known flow (the reference's numbers: tools/parity, 07b and 07c)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.vision import autoencoder, refiner
from tests.vision import packs


@pytest.fixture(scope="module")
def setup():
    vision = packs.tiny_config().vision
    params = refiner.init_refiner(vision, jax.random.key(0))["dit"]
    module, auto = refiner.make_refiner(vision), autoencoder.make_autoencoder(vision.refiner.autoencoder)
    batch = packs.batch(vision, [[(1, 2), (2, 2)]])
    return module, params, auto, batch


def _velocity(setup, x, cond, ref, keep_cond=(1, 1, 1), keep_ref=(1, 1, 1)):
    module, params, auto, batch = setup
    keep = {"cond": jnp.array([keep_cond], jnp.float32), "ref": jnp.array([keep_ref], jnp.float32)}
    t = jnp.array([[0.3, 0.6, 0.5]])
    return module.apply({"params": params}, x, t, cond, ref, batch, auto.layout(batch), keep)


def test_an_image_sees_only_its_own_noise_reference_and_codes(setup):
    module, params, auto, batch = setup
    key = jax.random.key(1)
    x = jax.random.normal(key, (1, 24, auto.token_dim))
    cond, ref = jax.random.normal(key, (1, 6, 6)), auto.encode({}, batch["patches"], batch)
    base = _velocity(setup, x, cond, ref)
    for changed in ((x.at[:, 8:].add(1.0), cond, ref), (x, cond.at[:, 2:].add(1.0), ref), (x, cond, ref.at[:, 8:].add(1.0))):
        out = _velocity(setup, *changed)
        np.testing.assert_allclose(out[:, :8], base[:, :8], atol=1e-4)
        assert float(jnp.abs(out[:, 8:] - base[:, 8:]).max()) > 1e-3


def test_dropped_conditions_are_not_seen(setup):
    module, params, auto, batch = setup
    key = jax.random.key(2)
    x = jax.random.normal(key, (1, 24, auto.token_dim))
    cond, ref = jax.random.normal(key, (1, 6, 6)), auto.encode({}, batch["patches"], batch)
    off = (0, 1, 1)
    a, b = (_velocity(setup, x, cond, r, keep_ref=off) for r in (ref, ref + 1))
    np.testing.assert_allclose(a[:, :8], b[:, :8], atol=1e-4)
    assert float(jnp.abs(a[:, 8:] - b[:, 8:]).max()) > 1e-3
    a, b = (_velocity(setup, x, c, ref, keep_cond=off) for c in (cond, cond + 1))
    np.testing.assert_allclose(a[:, :8], b[:, :8], atol=1e-4)


class _Linear:
    """A stand-in whose velocity is known: conditions add constants."""

    def apply(self, variables, x, t, cond, ref, pack, layout, keep, ref_layout):
        del variables, t, cond, ref, pack, layout, ref_layout
        return jnp.full(x.shape, 1.0) + keep["ref"][0, 0] * 10 + keep["cond"][0, 0] * 100


def test_sampler_integrates_and_guides():
    pack = {"grid": jnp.ones((1, 1, 2), jnp.int32)}
    x = jnp.zeros((1, 2, 3))
    plain = refiner.sample(_Linear(), None, x, None, None, pack, None, steps=4, cond_scale=1.0, ref_scale=1.0)
    np.testing.assert_allclose(plain, 111.0, rtol=1e-6)
    guided = refiner.sample(_Linear(), None, x, None, None, pack, None, steps=4, cond_scale=1.5, ref_scale=2.0)
    np.testing.assert_allclose(guided, 1 + 2 * 10 + 1.5 * 100, rtol=1e-6)


def test_clean_prediction_is_a_velocity(setup):
    module, params, auto, batch = setup
    x = jax.random.normal(jax.random.key(3), (1, 24, auto.token_dim))
    cond, ref = jnp.zeros((1, 6, 6)), jnp.zeros_like(x)
    t = jnp.array([[0.3, 0.6, 0.5]])
    keep = {"cond": jnp.ones((1, 3)), "ref": jnp.ones((1, 3))}
    layout = auto.layout(batch)
    clean = module.clone(prediction="velocity").apply({"params": params}, x, t, cond, ref, batch, layout, keep)
    v = module.apply({"params": params}, x, t, cond, ref, batch, layout, keep)
    np.testing.assert_allclose((x + 0.7 * v)[:, :8], clean[:, :8], atol=1e-4)
    np.testing.assert_allclose((x + 0.4 * v)[:, 8:], clean[:, 8:], atol=1e-4)


def test_correction_starts_at_the_reference():
    vision = packs.tiny_config().vision
    vision.refiner.prediction = "correction"
    module, auto = refiner.make_refiner(vision), autoencoder.make_autoencoder(vision.refiner.autoencoder)
    params = refiner.init_refiner(vision, jax.random.key(0))["dit"]
    own = module, params, auto, packs.batch(vision, [[(1, 2), (2, 2)]])
    x, ref = jax.random.normal(jax.random.key(3), (2, 1, 24, auto.token_dim))
    v = _velocity(own, x, jnp.zeros((1, 6, 6)), ref, keep_ref=(1, 0, 1))  # t is 0.3 and 0.6
    np.testing.assert_allclose((x + 0.7 * v)[:, :8], ref[:, :8], atol=1e-4)
    np.testing.assert_allclose((x + 0.4 * v)[:, 8:], 0, atol=1e-4)


def test_a_reference_may_have_another_size_than_the_noise(setup):
    module, params, auto, batch = setup
    x, ref = jax.random.normal(jax.random.key(4), (2, 1, 24, auto.token_dim))
    cond, t, layout = jnp.zeros((1, 6, 6)), jnp.full((1, 3), 0.4), auto.layout(batch)
    module = module.clone(prediction="velocity")
    keep = {"cond": jnp.ones((1, 3)), "ref": jnp.ones((1, 3))}
    apply = lambda ref, ref_layout: module.apply({"params": params}, x, t, cond, ref, batch, layout, keep, ref_layout)
    # Each image's last four reference tokens are missing: the same as a reference of that size, whatever stood there.
    left = np.r_[0:4, 8:20]
    fewer = {name: jnp.asarray(array)[:, left] for name, array in layout.items()}
    small = apply(ref[:, left], fewer)
    assert small.shape == x.shape
    np.testing.assert_allclose(apply(ref, layout), apply(ref, None), atol=1e-6)
    assert float(jnp.abs(small - apply(ref, layout))[:, :8].max()) > 1e-3
    _, ref_ids, noise_ids = refiner.token_positions(batch, layout, keep["ref"], fewer)
    assert ref_ids.shape == (1, 16, 3)
    # One patch row of the first image is left, two patches long, beside two cells; two of the second, four, beside four.
    assert noise_ids[0, 0].tolist() == [2 + 2, 0, 0] and noise_ids[0, 8].tolist() == [4 + 4, 0, 0]


def test_times_are_even_unless_shifted():
    np.testing.assert_allclose(refiner.times(4), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(refiner.times(4, 1600), refiner.times(4), atol=1e-6)  # 40 x 40 places
    assert (np.diff(refiner.times(4, 100)) > 0).all() and refiner.times(4, 100)[1] > 0.25
    assert refiner.times(4, 100)[[0, -1]].tolist() == [0, 1]


def test_rotary_axes_must_make_up_a_head(setup):
    module = setup[0]
    assert module.rotary_axes == (4, 4, 4) and module.clone(axes=(8, 2, 2)).rotary_axes == (8, 2, 2)
    for axes in ((4, 4, 2), (5, 5, 2)):
        with pytest.raises(ValueError, match="axes of pairs"):
            _ = module.clone(axes=axes).rotary_axes
