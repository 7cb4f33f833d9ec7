"""Codes to sound: lengths, independence of the batch, seeds, empty clips."""

import jax
import numpy as np
import pytest

from dina.audio import detokenizer
from tests.audio import toy


@pytest.fixture(scope="module")
def small():
    config = toy.experiment()
    variables = toy.variables(config)
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 8, (n, 3)).astype(np.int32) for n in (3, 0, 8, 5)]
    return config.audio, variables["params"], variables["stats"], detokenizer.make_detokenize(config.audio), codes


def test_lengths_and_silence(small):
    audio, params, stats, detokenize, codes = small
    waves = detokenizer.detokenize_codes(detokenize, audio, params, stats, codes, batch=4)
    assert [len(wave) for wave in waves] == [11 * 480, 0, 31 * 480, 19 * 480]
    assert all(np.isfinite(wave).all() and np.abs(wave).max() <= 1 for wave in waves if len(wave))


def test_a_clip_sounds_the_same_in_any_batch_and_other_seeds_differ(small):
    audio, params, stats, detokenize, codes = small
    batch = np.full((4, 8, 3), -1, np.int32)
    for row, clip in enumerate(codes):
        batch[row, : len(clip)] = clip
    lengths, example = np.array([3, 0, 8, 5], np.int32), np.array([10, 11, 12, 13], np.int32)
    one = detokenize(params, stats, batch, lengths, jax.random.key(1), example)
    turned = detokenize(params, stats, batch[::-1], lengths[::-1], jax.random.key(1), example[::-1])
    assert np.allclose(one.mel, turned.mel[::-1], atol=1e-5)
    assert np.allclose(one.wave[2], turned.wave[1], atol=1e-4)
    other = detokenize(params, stats, batch, lengths, jax.random.key(2), example)
    assert not np.allclose(one.mel[2], other.mel[2], atol=1e-2)
    assert np.allclose(one.mean, other.mean) and np.allclose(one.refined, other.refined)


def test_what_lies_beyond_a_clip_does_not_matter(small):
    audio, params, stats, detokenize, codes = small
    batch = np.zeros((4, 8, 3), np.int32)
    batch[0, :3] = codes[0]
    spoilt = batch.copy()
    spoilt[0, 3:] = 7
    lengths, example = np.array([3, 1, 1, 1], np.int32), np.arange(4, dtype=np.int32)
    a, b = (detokenize(params, stats, c, lengths, jax.random.key(0), example) for c in (batch, spoilt))
    assert np.array_equal(a.wave[0], b.wave[0]) and np.array_equal(a.mel[0], b.mel[0])
    assert np.all(np.asarray(a.wave)[0, 11 * 480 :] == 0) and np.any(np.asarray(a.wave)[0, : 11 * 480])
    assert np.allclose(a.mel[0, 11:], detokenizer.SILENT)


def test_too_long_codes_are_refused(small):
    audio, params, stats, detokenize, _ = small
    with pytest.raises(ValueError, match="codes 0: 9 frames"):
        detokenizer.detokenize_codes(detokenize, audio, params, stats, [np.zeros((9, 3), np.int32)], batch=4)
