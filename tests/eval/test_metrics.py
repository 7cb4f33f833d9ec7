"""Intervals, picture and spectrogram distances, codebook statistics, confusions."""

import numpy as np
import pytest
from scipy import stats

from dina.eval import metrics


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (3, 10), (10, 10), (564, 600)])
def test_wilson_interval_is_where_the_score_test_stops_rejecting(correct, n):
    """The ends are the p at which |p_hat - p| is 1.96 of p's own standard deviations: the interval's definition."""
    score = metrics.wilson(correct, n)
    assert score["value"] == correct / n and score["n"] == n
    assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    for p in (score["low"], score["high"]):
        if 0 < p < 1:
            assert abs(correct / n - p) / np.sqrt(p * (1 - p) / n) == pytest.approx(1.96, rel=1e-6)


def test_wilson_of_nothing_is_nan_and_impossible_counts_are_refused():
    assert np.isnan(metrics.wilson(0, 0)["value"])
    with pytest.raises(ValueError, match="3 right answers of 2"):
        metrics.wilson(3, 2)


def test_bootstrap_is_seeded_and_near_the_normal_interval():
    values = np.random.default_rng(0).normal(5, 2, 400)
    first, again, other = metrics.bootstrap(values, 1), metrics.bootstrap(values, 1), metrics.bootstrap(values, 2)
    assert first == again != other
    low, high = stats.norm.interval(0.95, values.mean(), values.std() / 20)
    assert first["value"] == pytest.approx(values.mean())
    assert first["low"] == pytest.approx(low, abs=0.04) and first["high"] == pytest.approx(high, abs=0.04)
    with pytest.raises(ValueError, match="item 1"):
        metrics.bootstrap([1.0, np.nan], 0)


def test_psnr_of_a_known_error_and_of_equal_pictures():
    truth = np.full((28, 28, 3), 100, np.uint8)
    assert metrics.psnr_db(truth + np.uint8(10), truth) == pytest.approx(20 * np.log10(255 / 10))
    assert metrics.psnr_db(truth, truth) == 100.0


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (28, 56, 3)).astype(np.uint8)
    noisy = [np.clip(truth + rng.normal(0, s, truth.shape), 0, 255).astype(np.uint8) for s in (10, 60)]
    values = [metrics.ssim(image, truth) for image in (truth, *noisy)]
    assert values[0] == pytest.approx(1.0) and values[0] > values[1] > values[2]


def test_mel_distance_counts_missing_frames_as_silence():
    truth = np.full((10, 4), -2.0)
    assert metrics.mel_l1(truth + 0.5, truth) == pytest.approx(0.5)
    half = metrics.mel_l1(truth[:5], truth)
    assert half == pytest.approx(metrics.mel_l1(truth, truth[:5])) == pytest.approx(0.5 * (np.log(1e5) - 2.0), rel=1e-6)


def test_codebook_statistics_of_uniform_constant_and_absent_codes():
    codes = np.stack([np.arange(64) % 16, np.zeros(64), np.where(np.arange(64) < 32, -1, 3)], 1).astype(int)
    found = metrics.codebook_statistics(codes, (16, 8, 8))
    np.testing.assert_allclose(found["usage"], [1.0, 1 / 8, 1 / 8])
    np.testing.assert_allclose(found["perplexity"], [16, 1, 1], rtol=1e-5)
    assert found["window"] == 64 and found["sizes"] == [16, 8, 8]
    with pytest.raises(ValueError, match="level 1: code 15 in a codebook of 8"):
        metrics.codebook_statistics(codes, (8, 8, 8))


def test_confusion_counts_no_answer_in_its_own_column():
    table = metrics.confusion([0, 0, 1, 2], [0, None, 2, 2], 3)
    np.testing.assert_array_equal(table, [[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 0]])
