"""YIN on sounds whose pitch is known, noise and silence."""

import jax
import numpy as np

from dina.audio.f0 import yin

RATE, HOP = 24000, 480
RUN = jax.jit(lambda x: yin(x, RATE, HOP))


def voice(hz_N, rng):
    """Ten harmonics that fall with their number, phases at random."""
    phase = 2 * np.pi * np.cumsum(hz_N) / RATE
    return 0.2 * sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 11))


def test_pitch_is_found_and_noise_and_silence_have_none():
    rng = np.random.default_rng(0)
    n = 20 * HOP
    steady = [np.full(n, hz) for hz in (70.0, 131.0, 222.2, 451.0)]
    glide = np.linspace(120, 240, n)
    waves = [voice(hz, rng) for hz in (*steady, glide)]
    waves += [0.1 * rng.normal(size=n), np.zeros(n), 3e-4 * voice(steady[1], rng)]
    found = np.asarray(RUN(np.stack(waves).astype(np.float32)))
    assert found.shape == (8, 20)
    for row, hz in enumerate((*steady, glide)):
        centre = hz.reshape(20, HOP)[:, HOP // 2]
        np.testing.assert_allclose(found[row, 3:-3], centre[3:-3], rtol=0.02, err_msg=str(hz[0]))
    assert np.mean(found[5] > 0) < 0.1 and not np.any(found[6:])


def test_a_voiced_piece_is_voiced_where_it_is():
    rng = np.random.default_rng(1)
    x = np.zeros(20 * HOP)
    x[5 * HOP : 14 * HOP] = voice(np.full(9 * HOP, 180.0), rng)
    found = np.asarray(RUN(np.stack([x] * 8).astype(np.float32)))[0]
    assert np.all(found[6:13] > 170) and not np.any(found[:4]) and not np.any(found[16:])
