"""Distances between waves by their spectra: zero for equals, larger for worse, blind to what lies beyond a clip's end."""

import jax
import numpy as np

from dina.audio import spectral

RUN = jax.jit(lambda made, real, samples: spectral.mel_distance(made, real, samples, 24000, (256, 1024)))


def test_distance_grows_with_the_difference_and_padding_changes_nothing():
    rng = np.random.default_rng(0)
    real = rng.normal(0, 0.1, (3, 4800)).astype(np.float32)
    real[1, 2000:] = 0
    samples = np.array([4800, 2000, 4800], np.int32)
    made = real + np.array([[0.0], [0.02], [0.1]], np.float32) * rng.normal(size=real.shape).astype(np.float32)
    made[1, 2000:] = 0
    away = np.asarray(RUN(made, real, samples))
    assert away[0] == 0 and 0.01 < away[1] < away[2]
    np.testing.assert_allclose(RUN(0.5 * real, real, samples), np.log(2), rtol=1e-2)  # nepers
    longer = lambda x: np.pad(x, ((0, 0), (0, 1024)))
    np.testing.assert_allclose(RUN(longer(made), longer(real), samples)[1:2], away[1:2], rtol=1e-5)


def test_frames_and_weights():
    x = np.zeros((2, 1000), np.float32)
    assert spectral.magnitude(x, 256).shape == (2, 16, 129)  # ceil(1000 / 64)
    weight = spectral.weights(np.array([1000, 65]), 256, 16)
    assert weight.sum(1).tolist() == [16, 2]
    assert np.allclose(spectral.clip_means(np.arange(32.0).reshape(2, 16), weight), [7.5, 16.5])
