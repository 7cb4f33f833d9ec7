"""Mel to waveform. A vocoder is a function (mel24 [B, M, T], frames [B]) -> wave [B, T * hop]; `make_vocoder` chooses it by name.

'griffin_lim' needs no training: the mel is undone by a non-negative least-squares solution, and the phase is found by
alternating between a spectrogram that has the wanted magnitudes and one that a signal can have, with momentum (Perraudin
et al. 2013). It starts from a seeded phase, so equal mels give equal waves. 'hift' is the trained one of hift.py.

Letters: B clips, M mel bands, T frames, F frequency bins, N samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dina.audio import hift
from dina.audio.encoder import length_mask
from dina.audio.features import frame, hann, mel_filters
from dina.config import InputError

Vocoder = Callable[..., Float[Array, "B N"]]
UPDATES = 20  # of the non-negative solution: the fit changes by < 1 % after ten


def parts(audio: ConfigDict) -> tuple[str, ...]:
    """Trained parts that the config's vocoder needs."""
    return (hift.PART,) if audio.vocoder.name == "hift" else ()


def make_vocoder(audio: ConfigDict, params: Mapping[str, Any] | None = None) -> Vocoder:
    """The vocoder of a config's `audio` section, jit-compatible.

    Args:
        audio: `config.audio`.
        params: {part: tree} that holds `parts(audio)`; may be traced.

    Returns:
        A function of the natural-log mel at `audio.target` (not normalised) and, optionally, the valid frames of each clip;
        waves at `audio.target.rate` in [-1, 1], zero beyond those frames.

    Raises:
        InputError: unknown name, a part that `params` lacks, settings that do not fit each other.
    """
    if audio.vocoder.name not in _MAKERS:
        raise InputError(f"audio.vocoder.name {audio.vocoder.name!r} is not one of {', '.join(_MAKERS)}")
    missing = [part for part in parts(audio) if part not in (params or {})]
    if missing:
        raise InputError(f"audio.vocoder.name {audio.vocoder.name!r} needs the trained part {missing[0]!r}: train a stage of task "
                         "vocoder or import one, or use griffin_lim")
    vocode = _MAKERS[audio.vocoder.name](audio, params)

    def whole(mel_BMT: Float[Array, "B M T"], frames_B: Int[Array, "B"] | None = None) -> Float[Array, "B N"]:
        if frames_B is None:
            frames_B = jnp.full(mel_BMT.shape[0], mel_BMT.shape[2], jnp.int32)
        wave_BN = vocode(mel_BMT, frames_B)
        return jnp.where(length_mask(frames_B * audio.target.hop, wave_BN.shape[1]), wave_BN, 0.0)

    return whole


def _make_griffin_lim(audio: ConfigDict, params: Mapping[str, Any] | None) -> Vocoder:
    v, target = audio.vocoder, audio.target
    if target.n_fft % target.hop:
        raise InputError(f"audio.target.n_fft {target.n_fft} must be a multiple of hop {target.hop} for griffin_lim")
    mel = (target.rate, target.n_fft, target.mels, target.low, target.high)
    run = functools.partial(griffin_lim, mel=mel, hop=target.hop, iterations=v.iterations, momentum=v.momentum, seed=v.seed)
    return lambda mel_BMT, frames_B: run(mel_BMT)


def _make_hift(audio: ConfigDict, params: Mapping[str, Any] | None) -> Vocoder:
    hift.make_hift(audio)  # its errors come here, not when the first mel does
    return functools.partial(hift.vocode, audio, params)


_MAKERS = {"griffin_lim": _make_griffin_lim, "hift": _make_hift}


@functools.cache
def mel_inverse(*mel) -> Float[np.ndarray, "M F"]:
    """Pseudo-inverse of the mel filters."""
    return np.linalg.pinv(mel_filters(*mel).astype(np.float64)).astype(np.float32)


def linear_magnitude(mel_BTM: Float[Array, "B T M"], mel: tuple) -> Float[Array, "B T F"]:
    """Non-negative magnitudes whose mel is (nearly) the given one: clipped pseudo-inverse, multiplicative updates."""
    filters_FM = jnp.asarray(mel_filters(*mel))
    start = jnp.maximum(mel_BTM @ mel_inverse(*mel), 1e-6)

    def update(_, x):
        return x * ((mel_BTM @ filters_FM.T) / jnp.maximum((x @ filters_FM) @ filters_FM.T, 1e-10))

    return jax.lax.fori_loop(0, UPDATES, update, start)


def spectrum(x_BN: Float[Array, "B N"], n_fft: int, hop: int) -> Array:
    """Complex spectrogram [B, T, F] of a signal that already holds the frames' edges."""
    return jnp.fft.rfft(frame(x_BN, n_fft, hop) * hann(n_fft))


def overlap_add(frames_BTn: Array, hop: int) -> Float[Array, "B N"]:
    """Sum of frames at multiples of `hop` (which divides their size)."""
    b, t, size = frames_BTn.shape
    parts = frames_BTn.reshape(b, t, size // hop, hop)
    total = sum(jnp.pad(parts[:, :, k], ((0, 0), (k, size // hop - 1 - k), (0, 0))) for k in range(size // hop))
    return total.reshape(b, -1)


def inverse_spectrum(s_BTF: Array, n_fft: int, hop: int) -> Float[Array, "B N"]:
    """Least-squares signal of a spectrogram: windowed overlap-add over the summed squared window."""
    window = hann(n_fft)
    frames = jnp.fft.irfft(s_BTF, n_fft) * window
    norm = overlap_add(jnp.broadcast_to(window**2, (1, *frames.shape[1:])), hop)
    return overlap_add(frames, hop) / jnp.maximum(norm, 1e-3)


def griffin_lim(
    mel_BMT: Float[Array, "B M T"], *, mel: tuple, hop: int, iterations: int, momentum: float, seed: int
) -> Float[Array, "B N"]:
    """Waves [B, T * hop] of ln mels.

    Args:
        mel_BMT: natural-log mel magnitudes.
        mel: (rate, n_fft, mels, low, high) of the filters.
        hop: samples per frame.
        iterations, momentum: of the phase search.
        seed: of the first phase; all clips start from the same one, so a batch equals its clips.
    """
    n_fft = mel[1]
    wanted_BTF = linear_magnitude(jnp.exp(mel_BMT.astype(jnp.float32)).swapaxes(1, 2), mel)
    angle = jax.random.uniform(jax.random.key(seed), wanted_BTF.shape[1:], maxval=2 * jnp.pi)
    phase = jnp.broadcast_to(jnp.exp(1j * angle), wanted_BTF.shape)

    def step(_, carry):
        phase, before = carry
        now = spectrum(inverse_spectrum(wanted_BTF * phase, n_fft, hop), n_fft, hop)
        moved = now + momentum * (now - before)
        return moved / jnp.maximum(jnp.abs(moved), 1e-8), now

    phase, _ = jax.lax.fori_loop(0, iterations, step, (phase, jnp.zeros_like(phase)))
    wave = inverse_spectrum(wanted_BTF * phase, n_fft, hop)
    edge = (n_fft - hop) // 2
    return jnp.clip(wave[:, edge : wave.shape[1] - edge], -1.0, 1.0)
