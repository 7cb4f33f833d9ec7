"""HiFT: golden case 08e, padding, the phases of its sines, its short transforms, and settings that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dina.audio import hift, hift_source, vocoder
from dina.audio.config import default_config, hift_vocoder
from dina.config import InputError
from dina.convert import hift as released
from tests.golden_io import read_case, relative_error


@pytest.fixture(scope="module")
def golden():
    _, weights, data = read_case("08e_vocoder")
    read = released.folding(weights.__getitem__, weights)
    found = released.settings(read, weights)
    module = hift.make_hift(released.audio_config(found))
    params = jax.tree.map(jnp.asarray, released.parameters(read, weights, found))
    return module, params, data, jax.jit(lambda *inputs: module.apply({"params": params}, *inputs))


def drawn(data):
    return data["phase_vec_sampled"][..., 0], data["sine_noise"].swapaxes(1, 2)


def test_waveform_matches_golden(golden):
    _, _, data, run = golden
    mel = data["mel"].swapaxes(1, 2)
    wave, f0 = run(mel, np.array([mel.shape[1]], np.int32), *drawn(data))
    assert relative_error(f0, data["f0"]) < 1e-5
    assert relative_error(wave, data["waveform"]) < 1e-4
    silent = np.zeros_like(data["sine_noise"].swapaxes(1, 2))
    quiet, _ = run(mel, np.array([mel.shape[1]], np.int32), drawn(data)[0], silent)
    assert relative_error(quiet, data["waveform"]) > 1e-3  # the noise that was given is the noise that is heard


def test_padding_and_batch_change_nothing(golden):
    module, _, data, run = golden
    mel, hop = data["mel"].swapaxes(1, 2), module.source.hop
    other = np.random.default_rng(0).normal(-4, 2, (1, 11, mel.shape[2])).astype(np.float32)
    phase, noise = hift_source.draw(jax.random.key(1), jnp.array([5, 9]), 11, hop, module.source.sines)
    batch = np.concatenate([np.pad(mel, ((0, 0), (0, 4), (0, 0)), constant_values=3.0), other])
    both, f0 = run(batch, np.array([7, 11], np.int32), phase, noise)
    alone, f0_alone = run(mel, np.array([7], np.int32), phase[:1], noise[:1, : 7 * hop])
    assert relative_error(both[:1, : 7 * hop], alone) < 1e-5 and relative_error(f0[:1, :7], f0_alone) < 1e-6
    assert not np.any(both[0, 7 * hop :]) and not np.any(f0[0, 7:])
    turned, _ = run(batch[::-1], np.array([11, 7], np.int32), phase[::-1], noise[::-1])
    assert relative_error(turned[::-1], both) < 1e-5


def test_noise_of_a_clip_does_not_depend_on_its_batch():
    key = jax.random.key(0)
    long = hift_source.draw(key, jnp.array([4, 2]), 5, 6, 3)
    short = hift_source.draw(key, jnp.array([2]), 3, 6, 3)
    assert np.array_equal(long[0][1:], short[0]) and np.array_equal(long[1][1:, :18], short[1])
    assert np.abs(long[0]).max() < np.pi and not np.allclose(long[1][0], long[1][1])
    assert len(np.unique(long[1])) == long[1].size


def test_phases_run_on_exactly_over_a_long_clip():
    f0 = np.random.default_rng(0).uniform(60, 400, (1, 1500)).astype(np.float32)
    found = np.asarray(jax.jit(lambda f: hift_source.cycles(f, 3, 24000, 480))(f0))[0]
    step = np.repeat(f0[0].astype(np.float64), 480)[:, None] * np.arange(1, 4) / 24000
    away = np.abs(found - np.cumsum(step, axis=0) % 1)
    assert np.minimum(away, 1 - away).max() < 1e-3  # of 9,000 cycles at the pitch itself


def test_a_source_is_periodic_where_voiced_and_noise_elsewhere():
    module = hift_source.HarmonicSource(4, 24000, 480)
    params = {"merge": {"kernel": jnp.ones((4, 1)), "bias": jnp.zeros(1)}}
    noise = np.random.default_rng(0).normal(size=(1, 40 * 480, 4)).astype(np.float32)
    f0 = np.repeat([[200.0, 0.0]], 20, axis=1).astype(np.float32)
    x = np.asarray(jax.jit(module.apply)({"params": params}, f0, np.ones((1, 4), np.float32), noise))[0]
    voiced, rest = x[:9600], x[9600:]
    period = 24000 // 200
    assert np.abs(voiced[period:] - voiced[:-period]).mean() < 0.1 * np.abs(voiced).mean()
    assert np.allclose(rest, np.tanh(noise[0, 9600:].sum(-1) * 0.1 / 3), atol=1e-5)
    assert np.abs(np.corrcoef(rest[period:], rest[:-period])[0, 1]) < 0.1


def test_short_transforms_undo_each_other_up_to_each_clip_s_end():
    x = np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)
    samples = np.array([96, 60], np.int32)
    keep = hift.keep_mask(samples // 4 + 1, 25)
    back = hift_source.inverse_spectrum(hift_source.spectrum(x, samples, 16, 4), keep, 16, 4)
    assert np.allclose(back[0], x[0], atol=1e-5) and np.allclose(back[1, :60], x[1, :60], atol=1e-5)
    alone = hift_source.spectrum(x[1:, :60], samples[1:], 16, 4)
    assert np.allclose(hift_source.spectrum(x, samples, 16, 4)[1, :16], alone[0], atol=1e-5)


def test_squared_sine_and_its_slope():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-4, 4, 2000), rng.uniform(-1e3, 1e3, 2000), rng.normal(0, 1e-4, 100)]).astype(np.float32)
    run = jax.jit(jax.vmap(jax.value_and_grad(hift.squared_sine)))
    value, slope = run(x)
    np.testing.assert_allclose(value, np.sin(x.astype(np.float64)) ** 2, rtol=1e-5, atol=4e-7)
    np.testing.assert_allclose(slope, np.sin(2 * x.astype(np.float64)), atol=2e-6)


def toy():
    audio = default_config()
    audio.vocoder = hift_vocoder()
    audio.vocoder.update({"channels": 8, "f0_channels": 4, "kernels": (3,), "dilations": (1,)})
    return audio


def test_the_config_chooses_it_by_name():
    audio = toy()
    with audio.ignore_type():
        audio.vocoder.update({"rates": (120,), "up_kernels": (124,), "source_kernels": (3,)})  # one stage
    module, one = hift.make_hift(audio), jnp.ones(1, jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, 80)), one, jnp.zeros((1, 9)), jnp.zeros((1, 480, 9)))
    rng = np.random.default_rng(0)
    params = {"vocoder": jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes["params"])}
    assert vocoder.parts(audio) == ("vocoder",) and vocoder.parts(default_config()) == ()
    mel = rng.normal(-5, 2, (2, 80, 6)).astype(np.float32)
    assert jax.eval_shape(vocoder.make_vocoder(audio, params), mel).shape == (2, 6 * 480)
    run = jax.jit(lambda *inputs: vocoder.make_vocoder(audio, params)(*inputs))
    whole, part = run(mel, np.array([6, 6], np.int32)), run(mel[[0, 0]], np.array([6, 4], np.int32))
    assert np.abs(whole).max() <= 1 and not np.allclose(whole[0], whole[1], atol=1e-3)
    assert np.allclose(part[0], whole[0], atol=1e-5) and not np.any(part[1, 4 * 480 :]) and np.any(part[1, : 4 * 480])
    plain = default_config()
    plain.vocoder.name = "hift"
    with pytest.raises(InputError, match="has no 'channels'; an experiment takes"):
        hift.make_hift(plain)
    with pytest.raises(InputError, match="needs the trained part 'vocoder'"):
        vocoder.make_vocoder(audio)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rates": (8, 5, 4)}, "are not audio.target.hop 480"), ({"up_kernels": (16, 11)}, "must be as many"),
     ({"up_kernels": (16, 12, 7)}, "plus an even number"), ({"channels": 12}, "halved 3 times")],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(settings, message):
    audio = ConfigDict(toy())
    with audio.ignore_type():
        audio.vocoder.update(settings)
    with pytest.raises(InputError, match=message):
        hift.make_hift(audio)
