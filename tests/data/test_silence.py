"""Cutting by silence: nothing spoken is lost, nothing is longer than allowed, loudness does not matter."""

import numpy as np
import pytest

from dina.data import silence

RATE = 8000


def speech(parts, seed=0):
    """Noise for each (seconds, level)."""
    rng = np.random.default_rng(seed)
    return np.concatenate([level * rng.normal(size=int(seconds * RATE)) for seconds, level in parts]).astype(np.float32)


def options(**changes):
    config = silence.default_config()
    config.update({"longest": 2.0} | changes)
    return config


def test_pauses_cut_and_keep_their_edges():
    wave = speech([(1.0, 0.1), (0.5, 1e-5), (1.5, 0.1), (1.0, 1e-5), (0.8, 0.1)])
    pieces = silence.cut(wave, RATE, options())
    seconds = [(first / RATE, end / RATE) for first, end in pieces]
    np.testing.assert_allclose(seconds, [(0.0, 1.1), (1.4, 3.1), (3.9, 4.8)], atol=0.021)


@pytest.mark.parametrize("gain", [0.02, 1.0, 20.0])
def test_loudness_does_not_matter(gain):
    wave = speech([(1.0, 0.01), (0.5, 1e-5), (1.5, 0.01)])
    assert silence.cut(gain * wave, RATE, options(below_db=30.0)) == silence.cut(wave, RATE, options(below_db=30.0))


def test_short_recordings_are_left_alone_and_short_noises_left_out():
    assert silence.cut(speech([(0.5, 0.1), (1.0, 0), (0.5, 0.1)]), RATE, options()) == [(0, 2 * RATE)]
    pieces = silence.cut(speech([(1.0, 0.1), (1.0, 0), (0.1, 0.1), (1.0, 0), (1.0, 0.1)]), RATE, options())
    assert len(pieces) == 2
    assert silence.cut(np.zeros(4 * RATE, np.float32), RATE, options()) == []


def test_speech_without_pauses_is_cut_where_it_is_quietest():
    wave = speech([(1.6, 0.1), (0.06, 0.002), (1.2, 0.1), (0.2, 0.1), (2.3, 0.1)])
    pieces = silence.cut(wave, RATE, options())
    assert pieces[0][0] == 0 and pieces[-1][1] >= len(wave) - 0.02 * RATE
    assert all(one[1] == two[0] for one, two in zip(pieces, pieces[1:]))  # nothing is lost
    assert all(0 < end - first <= 2.0 * RATE for first, end in pieces)
    assert 1.6 <= pieces[0][1] / RATE <= 1.66


def test_random_recordings_keep_all_that_is_loud():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        wave = speech([(rng.uniform(0.05, 3), rng.choice([0.1, 0.1, 1e-6])) for _ in range(rng.integers(2, 9))], seed)
        loud, _ = silence.silent_frames(wave, RATE, 40.0)
        taken = np.zeros(len(wave), bool)
        for first, end in silence.cut(wave, RATE, options(shortest=0.0)):
            assert 0 <= first < end <= len(wave) and end - first <= 2.0 * RATE and not taken[first:end].any()
            taken[first:end] = True
        size = round(silence.FRAME * RATE)
        frames = taken[: len(loud) * size].reshape(-1, size).all(1)
        assert len(wave) <= 2 * RATE or frames[~loud].all()
