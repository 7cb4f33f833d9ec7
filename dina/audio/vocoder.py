"""Mel to waveform. A vocoder is a function (mel24 [B, M, T]) -> wave [B, T * hop]; `make_vocoder` chooses it by name.

'griffin_lim' needs no training: the mel is undone by a non-negative least-squares solution, and the phase is found by
alternating between a spectrogram that has the wanted magnitudes and one that a signal can have, with momentum (Perraudin
et al. 2013). It starts from a seeded phase, so equal mels give equal waves. The neural vocoder has the same signature.

Letters: B clips, M mel bands, T frames, F frequency bins, N samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dina.audio.features import frame, hann, mel_filters
from dina.config import InputError

Vocoder = Callable[[Float[Array, "B M T"]], Float[Array, "B N"]]
UPDATES = 20  # of the non-negative solution: the fit changes by < 1 % after ten


def make_vocoder(audio: ConfigDict) -> Vocoder:
    """The vocoder of a config's `audio` section, jit-compatible.

    Returns:
        A function of the natural-log mel at `audio.target` (not normalised); waves at `audio.target.rate` in [-1, 1].

    Raises:
        InputError: unknown name.
    """
    v, target = audio.vocoder, audio.target
    if v.name != "griffin_lim":
        raise InputError(f"audio.vocoder.name {v.name!r} is not one of griffin_lim")
    if target.n_fft % target.hop:
        raise InputError(f"audio.target.n_fft {target.n_fft} must be a multiple of hop {target.hop} for griffin_lim")
    mel = (target.rate, target.n_fft, target.mels, target.low, target.high)
    return functools.partial(griffin_lim, mel=mel, hop=target.hop, iterations=v.iterations, momentum=v.momentum, seed=v.seed)


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
