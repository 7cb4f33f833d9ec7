"""Augmentation: strengths are what they say, draws depend on seed, step and example only."""

import numpy as np

from dina.audio import augment
from dina.audio.config import default_config


def tone(n=8000):
    return (0.3 * np.sin(np.arange(n) / 7)).astype(np.float32)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_noise_has_the_asked_power_and_slope():
    x = tone()
    for snr_db in (0.0, 20.0):
        noise = augment.add_noise(rng(), x, snr_db, 1.0) - x
        measured = 10 * np.log10(np.mean(x**2) / np.mean(noise**2))
        assert abs(measured - snr_db) < 0.1
    for slope in (0.0, 2.0):
        power = np.abs(np.fft.rfft(augment.coloured_noise(rng(), 1 << 16, slope))) ** 2
        ratio = 10 * np.log10(power[1000:2000].mean() / power[10000:20000].mean())
        assert abs(ratio - 10 * slope) < 1


def test_room_keeps_length_power_and_spreads_a_click():
    x = np.zeros(8000, np.float32)
    x[1000] = 0.5
    y = augment.add_room(rng(), x, 0.2, 16000, 0.5)
    assert y.shape == x.shape and abs(np.mean(y**2) / np.mean(x**2) - 1) < 1e-3
    assert np.abs(y[:999]).max() < 1e-4 and np.mean(y[1040:3000] ** 2) > 100 * np.mean(y[5000:] ** 2)


def test_speed_changes_length_and_pitch():
    x = np.sin(2 * np.pi * 500 * np.arange(16000) / 16000).astype(np.float32)
    fast = augment.change_speed(x, 1.25)
    assert abs(len(fast) - 12800) <= 2
    peak = np.abs(np.fft.rfft(fast[:12800])).argmax() * 16000 / 12800
    assert abs(peak - 625) < 3


def test_draws_are_keyed_and_shares_are_kept():
    config = default_config().augment
    a, b = (augment.draw(augment.clip_rng(1, 2, 3), config) for _ in range(2))
    assert a == b and a != augment.draw(augment.clip_rng(1, 2, 4), config) != augment.draw(augment.clip_rng(1, 3, 3), config)
    draws = [augment.draw(augment.clip_rng(0, 0, i), config) for i in range(400)]
    for share, used in (
        (config.noise_share, [d.noise is not None for d in draws]),
        (config.reverb_share, [d.room is not None for d in draws]),
        (config.speed_share, [d.speed != 1 for d in draws]),
    ):
        assert abs(np.mean(used) - share) < 0.08
    assert all(config.speed[0] <= d.speed <= config.speed[1] or d.speed == 1 for d in draws)


def test_overlay_without_anything_is_the_clip_and_never_leaves_full_scale():
    x = tone()
    assert np.array_equal(augment.overlay(rng(), x, augment.Draw(), 16000), x)
    loud = augment.overlay(rng(), 3 * x, augment.Draw(noise=(0.0, 0.0), room=(0.2, 0.5)), 16000)
    assert np.abs(loud).max() <= 1 and not np.allclose(loud, np.clip(3 * x, -1, 1), atol=0.1)
