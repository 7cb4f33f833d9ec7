"""Griffin-Lim: the mel of its wave is the mel it was given, for tones and for moving sounds."""

import jax
import numpy as np
import pytest

from dina.audio import vocoder
from dina.audio.config import default_config
from dina.audio.features import ln_mel
from dina.config import InputError


def chirps():
    t = np.arange(12 * 480) / 24000
    voiced = sum(np.sin(2 * np.pi * k * (120 * t + 60 * t**2)) / k for k in range(1, 20))
    noise = np.random.default_rng(0).normal(size=t.size) * np.linspace(0, 1, t.size)
    return np.stack([0.2 * voiced, 0.1 * noise]).astype(np.float32)


def test_mel_survives_the_round_trip():
    audio = default_config()
    mel = np.asarray(ln_mel(chirps(), audio.target))
    wave = jax.jit(vocoder.make_vocoder(audio))(mel.swapaxes(1, 2))
    assert wave.shape == chirps().shape
    again = np.asarray(ln_mel(wave, audio.target))
    assert np.abs(again - mel)[:, 2:-2].mean() < 0.35
    audio.vocoder.iterations = 0
    rough = np.asarray(ln_mel(vocoder.make_vocoder(audio)(mel.swapaxes(1, 2)), audio.target))
    assert np.abs(rough - mel)[:, 2:-2].mean() > 1.3 * np.abs(again - mel)[:, 2:-2].mean()


def test_a_clip_does_not_depend_on_its_batch_and_seeds_differ():
    audio = default_config()
    audio.vocoder.iterations = 4
    mel = np.asarray(ln_mel(chirps(), audio.target)).swapaxes(1, 2)
    run = jax.jit(vocoder.make_vocoder(audio))
    both = run(mel)
    assert np.array_equal(both, run(mel))
    assert np.allclose(both[1], run(mel[::-1])[0], atol=1e-4)
    audio.vocoder.seed = 1
    assert not np.allclose(both, vocoder.make_vocoder(audio)(mel), atol=1e-2)


def test_inverse_spectrum_undoes_spectrum():
    x = np.random.default_rng(0).normal(size=(2, 1920 + 480 * 6)).astype(np.float32)
    back = vocoder.inverse_spectrum(vocoder.spectrum(x, 1920, 480), 1920, 480)
    assert np.allclose(back[:, 480:-480], x[:, 480:-480], atol=1e-4)


def test_linear_magnitude_is_non_negative_and_fits():
    audio = default_config()
    key = (24000, 1920, 80, 0.0, 8000.0)
    mel = np.exp(np.asarray(ln_mel(chirps(), audio.target)))
    linear = np.asarray(vocoder.linear_magnitude(mel, key))
    assert linear.min() >= 0
    assert np.abs(np.log(linear @ vocoder.mel_filters(*key) + 1e-5) - np.log(mel + 1e-5)).mean() < 0.1


def test_unknown_vocoder_is_refused():
    audio = default_config()
    audio.vocoder.name = "hifi"
    with pytest.raises(InputError, match="hifi"):
        vocoder.make_vocoder(audio)
