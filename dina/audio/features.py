"""From waveform to mel spectrograms, and the length rules that follow a clip through the tokenizer (tokenizers.md B.1, B.7).

Two kinds: `log_mel`, the encoder's input (Whisper's), and `ln_mel`, what decoders predict and vocoders read. Both are
jnp on batches, for use inside a compiled step; resampling and cutting waves is numpy (files are read by dina/data).

Letters: B clips, N (M) samples, C channels, T frames, F frequency bins, M mel bands.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import soxr
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dina.config import InputError

MIN_SAMPLES = 400  # one analysis window; shorter pieces are dropped by the released code
SILENCE = 1e-4  # peak below this is silence: 3 steps of 16-bit audio


def resample(x_N: Float[np.ndarray, "*C N"], rate_in: int, rate_out: int, method: str = "soxr") -> Float[np.ndarray, "*C M"]:
    """Changes the sample rate along the last axis.

    Args:
        x_N: one channel, or channels first.
        rate_in, rate_out: Hz.
        method: 'soxr' (band-limited), or 'linear': the released rule, int(N * out / in) points interpolated between
            the centres of samples without a low-pass (quirk Q14).
    """
    if rate_in == rate_out:
        return np.asarray(x_N, np.float32)
    if method == "soxr":
        return soxr.resample(np.asarray(x_N, np.float32).T, rate_in, rate_out, quality="HQ").T
    if method != "linear":
        raise InputError(f"audio.features.resample {method!r} is not one of soxr, linear")
    n = x_N.shape[-1]
    count = int(n * rate_out / rate_in)
    at = np.maximum((np.arange(count, dtype=np.float32) + np.float32(0.5)) * np.float32(n / count) - np.float32(0.5), 0)
    low = np.minimum(at.astype(np.int64), n - 1)
    weight = (at - low).astype(np.float32)
    high = np.minimum(low + 1, n - 1)
    return (x_N[..., low] * (1 - weight) + x_N[..., high] * weight).astype(np.float32)


def check_wave(x_N: Float[np.ndarray, "N"], where: str) -> None:
    """Raises InputError if a mono wave is shorter than one window, silent or not finite; `where` names it."""
    if x_N.size < MIN_SAMPLES:
        raise InputError(f"{where}: {x_N.size} samples at 16 kHz, at least {MIN_SAMPLES} are needed")
    peak = float(np.max(np.abs(x_N)))
    if not math.isfinite(peak):
        raise InputError(f"{where}: contains samples that are not finite")
    if peak < SILENCE:
        raise InputError(f"{where}: silent (peak {peak:.1e} of full scale)")


def prepare_wave(x_N: Float[np.ndarray, "*C N"], rate: int, features: ConfigDict, where: str) -> Float[np.ndarray, "M"]:
    """Wave (mono, or channels first) at any rate -> checked mono wave at the encoder's; `where` names it in errors.

    Raises:
        InputError: see `check_wave`.
    """
    x_N = resample(x_N, rate, features.rate, features.resample) if x_N.shape[-1] else x_N
    x_N = np.atleast_2d(x_N).mean(0)  # channels are averaged after resampling, as released
    check_wave(x_N, where)
    return x_N


def split_chunks(x_N: Float[np.ndarray, "N"], features: ConfigDict, overlap: int = 0) -> list[Float[np.ndarray, "n"]]:
    """Cuts a wave into pieces of at most one chunk, stepping back `overlap` samples; too short pieces are dropped.

    With `tail='pad'` each piece is completed with silence to whole codes.
    """
    pieces = cut(x_N, features.max_frames * features.hop, overlap, MIN_SAMPLES)
    pieces = [complete(piece, features) for piece in pieces]
    return [piece for piece in pieces if code_length(encoder_length(valid_frames(len(piece), features))) > 0]


def cut(x_N: Float[np.ndarray, "N"], size: int, overlap: int, shortest: int) -> list[Float[np.ndarray, "n"]]:
    """Consecutive pieces of at most `size` samples, each beginning `overlap` samples before the last one's end.

    Pieces of less than `shortest` samples are dropped. Raises InputError if pieces would not go forward.
    """
    if not 0 <= overlap < size:
        raise InputError(f"pieces of {size} samples cannot overlap by {overlap}")
    starts = range(0, max(1, len(x_N) - overlap), size - overlap)
    return [x_N[start : start + size] for start in starts if len(x_N[start : start + size]) >= shortest]


def complete(x_N: np.ndarray, features: ConfigDict, pool: int = 4) -> np.ndarray:
    """Applies `features.tail`: 'pad' adds silence up to a whole number of codes, 'drop' leaves the wave as it is."""
    if features.tail == "drop":
        return x_N
    if features.tail != "pad":
        raise InputError(f"audio.features.tail {features.tail!r} is not one of pad, drop")
    return np.pad(x_N, (0, -len(x_N) % (2 * pool * features.hop)))


def valid_frames(samples, features: ConfigDict):
    """Mel frames that a piece of `samples` fills: min(max_frames, samples // hop + 1). Numbers or arrays."""
    frames = samples // features.hop + 1
    return min(frames, features.max_frames) if isinstance(frames, int) else frames.clip(max=features.max_frames)


def encoder_length(frames, stride: int = 2):
    """Frames after the second convolution (k3 p1)."""
    return (frames - 1) // stride + 1


def code_length(encoder_frames, pool: int = 4):
    """Codes of `encoder_frames`; a trailing part of a group is dropped."""
    return encoder_frames // pool


@functools.cache
def mel_filters(rate: int, n_fft: int, mels: int, low: float, high: float) -> Float[np.ndarray, "F M"]:
    """Slaney's triangles, equal in area: linear below 1 kHz, logarithmic above (float32, computed in float64)."""
    step = np.log(6.4) / 27

    def to_mel(hz):
        return np.where(hz < 1000, 3 * hz / 200, 15 + np.log(np.maximum(hz, 1e-9) / 1000) / step)

    mel = np.linspace(to_mel(np.float64(low)), to_mel(np.float64(high)), mels + 2)
    edge = np.where(mel < 15, 200 * mel / 3, 1000 * np.exp(step * (mel - 15)))
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)[:, None]
    rising = (bins - edge[:-2]) / (edge[1:-1] - edge[:-2])
    falling = (edge[2:] - bins) / (edge[2:] - edge[1:-1])
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (edge[2:] - edge[:-2])).astype(np.float32)


@functools.cache
def hann(n: int) -> Float[np.ndarray, "n"]:
    """Periodic Hann window."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)).astype(np.float32)


def frame(x_BN: Float[Array, "B N"], size: int, hop: int) -> Float[Array, "B T size"]:
    """Overlapping frames, cut as slices of gcd(size, hop) samples: no gather."""
    unit = math.gcd(size, hop)
    count = (x_BN.shape[1] - size) // hop + 1
    units = x_BN[:, : x_BN.shape[1] // unit * unit].reshape(x_BN.shape[0], -1, unit)
    stride = hop // unit
    return jnp.concatenate([units[:, k : k + (count - 1) * stride + 1 : stride] for k in range(size // unit)], axis=-1)


def log_mel(x_BN: Float[Array, "B N"], samples_B: Int[Array, "B"], features: ConfigDict) -> Float[Array, "B T M"]:
    """The encoder's features (B.1), float32.

    Args:
        x_BN: waves at `features.rate`, zero-padded to N = max_frames * hop.
        samples_B: true samples of each; frames from `valid_frames` on are exactly 0 (quirk Q15).
        features: `config.audio.features`.
    """
    n_fft = features.n_fft
    padded = jnp.pad(x_BN, ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
    spectrum = jnp.fft.rfft(frame(padded, n_fft, features.hop)[:, :-1] * hann(n_fft))
    power_BTF = spectrum.real**2 + spectrum.imag**2
    filters_FM = mel_filters(features.rate, n_fft, features.mels, 0.0, features.rate / 2)
    mel_BTM = jnp.einsum("btf,fm->btm", power_BTF, filters_FM, precision=jax.lax.Precision.HIGHEST)
    level_BTM = jnp.log10(jnp.maximum(mel_BTM, 1e-10))
    level_BTM = (jnp.maximum(level_BTM, level_BTM.max((1, 2), keepdims=True) - 8.0) + 4.0) / 4.0
    valid_BT = jnp.arange(level_BTM.shape[1]) < valid_frames(samples_B, features)[:, None]
    return jnp.where(valid_BT[..., None], level_BTM, 0.0)


def magnitude(x_BN: Float[Array, "B N"], n_fft: int, hop: int) -> Float[Array, "B T F"]:
    """Magnitude spectrogram of N // hop frames: reflect padding of (n_fft - hop) / 2, no centring (B.7)."""
    edge = (n_fft - hop) // 2
    padded = jnp.pad(x_BN, ((0, 0), (edge, edge)), mode="reflect")
    spectrum = jnp.fft.rfft(frame(padded, n_fft, hop) * hann(n_fft))
    return jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)


def ln_mel(x_BN: Float[Array, "B N"], target: ConfigDict) -> Float[Array, "B T M"]:
    """The decoders' mel (B.7): ln of the mel magnitude, floor 1e-5, N // hop frames, float32.

    Args:
        x_BN: waves at `target.rate`.
        target: `config.audio.target` or `config.audio.recon`: rate, n_fft, hop, mels, low, high.
    """
    magnitude_BTF = magnitude(x_BN, target.n_fft, target.hop)
    filters_FM = mel_filters(target.rate, target.n_fft, target.mels, target.low, target.high)
    mel_BTM = jnp.einsum("btf,fm->btm", magnitude_BTF, filters_FM, precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(mel_BTM, 1e-5))


def normalise(mel: Float[Array, "*B M"], target: ConfigDict) -> Float[Array, "*B M"]:
    """ln mel -> the scale that networks work on."""
    return (mel - target.mean) / target.scale


def denormalise(mel: Float[Array, "*B M"], target: ConfigDict) -> Float[Array, "*B M"]:
    """The inverse of `normalise`."""
    return mel * target.scale + target.mean
