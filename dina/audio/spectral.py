"""Spectrograms at several resolutions and distances between waves by them, zero-padded so that a clip's end is nothing special.

Letters: B clips, N samples, T frames, F frequency bins, M mel bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dina.audio.features import frame, hann, mel_filters

OVERLAP = 4  # windows that cover a sample
FLOOR = 1e-5
MOST_BANDS = 80


def magnitude(x_BN: Float[Array, "B N"], n_fft: int) -> Float[Array, "B T F"]:
    """Magnitudes of ceil(N / hop) Hann windows of `n_fft` samples, one each hop = n_fft / 4."""
    hop = n_fft // OVERLAP
    edge = (n_fft - hop) // 2
    spectrum = jnp.fft.rfft(frame(jnp.pad(x_BN, ((0, 0), (edge, n_fft - hop - edge + -x_BN.shape[1] % hop))), n_fft, hop) * hann(n_fft))
    return jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)


def weights(samples_B: Int[Array, "B"], n_fft: int, frames: int) -> Float[Array, "B T"]:
    """One for frames of `magnitude` that begin within a clip."""
    return (jnp.arange(frames) * (n_fft // OVERLAP) < samples_B[:, None]).astype(jnp.float32)


def clip_means(value_BT: Float[Array, "B T"], weight_BT: Float[Array, "B T"]) -> Float[Array, " B"]:
    """Mean over each clip's own frames."""
    return jnp.sum(value_BT * weight_BT, axis=1) / jnp.maximum(jnp.sum(weight_BT, axis=1), 1.0)


def mel_distance(
    made_BN: Float[Array, "B N"], real_BN: Float[Array, "B N"], samples_B: Int[Array, "B"], rate: int, windows: Sequence[int]
) -> Float[Array, " B"]:
    """Mean absolute difference of ln mels, nepers, averaged over resolutions (Yamamoto et al. 2020; Kumar et al. 2023)."""
    total = 0.0
    for n_fft in windows:
        filters_FM = mel_filters(rate, n_fft, min(MOST_BANDS, n_fft // 16), 0.0, rate / 2)

        def ln_mel(x_BN, n_fft=n_fft, filters_FM=filters_FM):
            mel_BTM = jnp.einsum("btf,fm->btm", magnitude(x_BN, n_fft), filters_FM, precision=jax.lax.Precision.HIGHEST)
            return jnp.log(jnp.maximum(mel_BTM, FLOOR))

        away_BT = jnp.mean(jnp.abs(ln_mel(made_BN) - ln_mel(real_BN)), axis=-1)
        total += clip_means(away_BT, weights(samples_B, n_fft, away_BT.shape[1]))
    return total / len(windows)
