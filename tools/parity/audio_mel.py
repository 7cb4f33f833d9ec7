"""Waves to the audio encoder's mel (case 08a): filters, window, cutting, lengths, and the resampling without a low-pass."""

from __future__ import annotations

import functools
import re

import jax
import ml_collections
import numpy as np

from dina.audio import features
from tools.parity.case import Case


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "mel_filters" in case and "len_bridge" in case


def settings(c) -> ml_collections.ConfigDict:
    """`config.audio.features` of a case's config."""
    frames = c["max_audio_seconds"] * c["sampling_rate"] // c["hop_length"]
    return ml_collections.ConfigDict({"rate": c["sampling_rate"], "n_fft": c["n_fft"], "hop": c["hop_length"], "mels": c["num_mel_bins"],
                                      "max_frames": frames, "resample": "linear", "tail": "drop"})  # fmt: skip


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    c, found = case.config, settings(case.config)
    case.compare("mel_filters", features.mel_filters(found.rate, found.n_fft, found.mels, 0.0, found.rate / 2))
    case.compare("hann_window", features.hann(found.n_fft))
    size = c["max_audio_seconds"] * found.rate
    log_mel = jax.jit(functools.partial(features.log_mel, features=found))

    def mel_of(wave_N: np.ndarray) -> np.ndarray:
        padded_BN = np.zeros((1, size), np.float32)
        padded_BN[0, : len(wave_N)] = wave_N[:size]
        return np.asarray(log_mel(padded_BN, np.array([len(wave_N)])))[0].T

    wave_N, long_N = (case.input(name).astype(np.float32) for name in ("waveform", "long_waveform"))
    case.compare("mel", mel_of(wave_N))
    for prefix, samples in (("", len(wave_N)), ("long_", len(long_N))):
        case.compare_ids(f"{prefix}valid_frames", features.valid_frames(samples, found))
    for name in case.arrays:
        if match := re.fullmatch(r"long_mel(?:_last(\d+))?", name):
            case.compare(name, mel_of(long_N)[:, -int(match[1] or 0) :])
    back = int(found.rate * c["split_overlap"])
    pieces = [long_N] if back < 0 else features.cut(long_N, size, back, found.n_fft)
    case.compare_ids("long_split_lens", [len(piece) for piece in pieces])
    frames = features.encoder_length(case.input("len_in"), c["stride_size"])
    case.compare_ids("len_encoder", frames)
    case.compare_ids("len_bridge", features.code_length(frames, c["avg_pooler"]))
    _resampled(case)


def _resampled(case: Case) -> None:
    """Stereo at one rate to mono at another; the arrays' names hold both rates."""
    rates = {kind: [(name, int(match[1])) for name in case.arrays if (match := re.fullmatch(rf"{kind}(\d+)k", name))]
             for kind in ("stereo", "resampled_mono")}  # fmt: skip
    for (stereo, rate), (mono, wanted) in zip(*rates.values(), strict=True):
        x_CN = features.resample(case.input(stereo), 1000 * rate, 1000 * wanted, "linear")
        case.compare(mono, x_CN.mean(0, keepdims=True))
