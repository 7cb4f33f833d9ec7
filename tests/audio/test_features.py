"""Features: golden case 08a, length rules, what is refused, targets."""

import jax
import numpy as np
import pytest

from dina.audio import features
from dina.audio.config import default_config
from dina.config import InputError
from tests.golden_io import GOLDEN, relative_error


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "08a_audio_mel" / "data.npz") as npz:
        return {name: npz[name] for name in npz.files}


def feature_config(**changes):
    config = default_config().features
    config.update(changes)
    return config


RELEASED = dict(mels=128, max_frames=200, tail="drop", resample="linear")


def padded(wave, config):
    out = np.zeros((1, config.max_frames * config.hop), np.float32)
    out[0, : len(wave)] = wave[: out.shape[1]]
    return out


def test_filters_and_window_match_golden(golden):
    assert relative_error(features.mel_filters(16000, 400, 128, 0.0, 8000.0), golden["mel_filters"]) < 1e-5
    assert relative_error(features.hann(400), golden["hann_window"]) < 1e-6


def test_log_mel_matches_golden(golden):
    config = feature_config(**RELEASED)
    log_mel = jax.jit(lambda x, n: features.log_mel(x, n, config))
    wave = golden["waveform"]
    mel = log_mel(padded(wave, config), np.array([len(wave)]))[0].T
    assert relative_error(mel, golden["mel"]) < 1e-4
    assert features.valid_frames(len(wave), config) == golden["valid_frames"]
    assert not np.any(mel[:, int(golden["valid_frames"]) :])


def test_long_wave_is_cut_as_in_golden(golden):
    config = feature_config(**RELEASED)
    pieces = features.split_chunks(golden["long_waveform"].astype(np.float32), config)
    assert [len(piece) for piece in pieces] == list(golden["long_split_lens"])
    mel = features.log_mel(padded(pieces[0], config), np.array([len(pieces[0])]), config)[0].T
    assert features.valid_frames(len(golden["long_waveform"]), config) == golden["long_valid_frames"]
    assert relative_error(mel[:, -40:], golden["long_mel_last40"]) < 1e-4


def test_pieces_overlap_and_end_with_the_wave():
    x = np.arange(1000)
    for size, overlap in ((300, 0), (300, 100), (250, 0), (1000, 10), (2000, 10)):
        pieces = features.cut(x, size, overlap, 1)
        assert all(piece[0] == before[-1] + 1 - overlap for before, piece in zip(pieces, pieces[1:], strict=False))
        assert pieces[0][0] == 0 and pieces[-1][-1] == 999 and all(len(piece) == size for piece in pieces[:-1])
        assert all(piece[-1] < 999 for piece in pieces[:-1])  # no piece lies in the last one
    assert [len(piece) for piece in features.cut(x, 300, 0, 101)] == [300, 300, 300]
    with pytest.raises(InputError, match="pieces of 300 samples cannot overlap by 300"):
        features.cut(x, 300, 300, 1)


def test_length_table_matches_golden(golden):
    config = feature_config(max_frames=3000)
    frames = golden["len_in"]
    assert list(features.encoder_length(frames)) == list(golden["len_encoder"])
    assert list(features.code_length(features.encoder_length(frames))) == list(golden["len_bridge"])
    for samples, codes in ((160_000, 125), (480_000, 375), (480_001, 375), (400, 0)):  # tokenizers.md G
        assert features.code_length(features.encoder_length(features.valid_frames(samples, config))) == codes


def test_linear_resampling_matches_golden(golden):
    ours = features.resample(golden["stereo24k"], 24000, 16000, "linear").mean(0, keepdims=True)
    assert relative_error(ours, golden["resampled_mono16k"]) < 1e-5


def test_soxr_removes_what_the_lower_rate_cannot_hold():
    t = np.arange(24000) / 24000
    high = np.sin(2 * np.pi * 11000 * t).astype(np.float32)
    assert np.abs(features.resample(high, 24000, 16000)[200:-200]).max() < 0.01
    assert np.abs(features.resample(high, 24000, 16000, "linear")).max() > 0.3
    low = np.sin(2 * np.pi * 440 * t).astype(np.float32)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(features.resample(low, 24000, 16000) - expected)[200:-200].max() < 0.01
    with pytest.raises(InputError, match="cubic"):
        features.resample(low, 24000, 16000, "cubic")


def test_tail_pad_keeps_every_sample_in_whole_codes():
    config = feature_config()
    for samples in (400, 1279, 1280, 1281, 20000, 20480):
        piece = features.complete(np.ones(samples, np.float32), config)
        frames = features.valid_frames(len(piece), config)
        codes = features.code_length(features.encoder_length(frames))
        assert codes * 1280 == len(piece) >= samples > len(piece) - 1280
    dropped = features.split_chunks(np.ones(900, np.float32), feature_config(tail="drop"))
    assert dropped == []


@pytest.mark.parametrize(
    ("wave", "message"),
    [(np.ones(3), "3 samples"), (np.zeros(0), "0 samples"), (np.zeros(16000), "silent"), (np.full(1000, np.nan), "not finite")],
)
def test_bad_waves_are_refused_by_name(wave, message):
    with pytest.raises(InputError, match=f"clip 7.*{message}"):
        features.prepare_wave(wave.astype(np.float32), 16000, feature_config(), "clip 7")


def test_prepare_wave_mixes_channels():
    stereo = np.stack([np.full(2400, 0.5), np.full(2400, -0.1)]).astype(np.float32)
    wave = features.prepare_wave(stereo, 16000, feature_config(), "clip")
    assert wave.shape == (2400,) and np.allclose(wave, 0.2)


def test_ln_mel_of_a_tone_peaks_at_its_band_and_scales_with_gain():
    target = default_config().target
    tone = 0.3 * np.sin(2 * np.pi * 1000 * np.arange(9600) / 24000).astype(np.float32)
    mel = np.asarray(features.ln_mel(np.stack([tone, tone / 10]), target))
    assert mel.shape == (2, 20, 80)
    centres = features.mel_filters(24000, 1920, 80, 0.0, 8000.0).argmax(0) * 12.5
    assert abs(centres[mel[0, 10].argmax()] - 1000) < 40
    peak = mel[0, 10].argmax()
    assert np.allclose(mel[0, :, peak] - mel[1, :, peak], np.log(10), atol=1e-3)
    assert np.allclose(features.denormalise(features.normalise(mel, target), target), mel, atol=1e-5)


def test_frame_equals_plain_indexing():
    x = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    ours = np.asarray(features.frame(x, 400, 160))
    assert ours.shape[1] == 1 + (1000 - 400) // 160
    for t in range(ours.shape[1]):
        assert np.array_equal(ours[:, t], x[:, 160 * t : 160 * t + 400])
