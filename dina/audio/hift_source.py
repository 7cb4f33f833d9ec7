"""What HiFT filters: sines at multiples of the pitch, and the short transforms around its filter (tokenizers.md B.7).

The sines' phases run on from frame to frame: each frame starts where the one before ended, whole cycles left out, so a
long clip loses no precision (the reference's running sum is rounded to float32 with all cycles since the start).

Letters: B clips, T mel frames, N samples, H sines, S frames of the short transform, F its values (real, then imaginary
bins), K samples of its window.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dina.audio.features import frame, hann
from dina.audio.mel_decoder import transposed

VOICED_HZ = 10.0
SINE, BREATH, HISS = 0.1, 0.003, 0.1 / 3  # amplitude of a sine; noise beside it; noise where there is none


def cycles(f0_BT: Float[Array, "B T"], sines: int, rate: int, hop: int) -> Float[Array, "B N H"]:
    """Where in its cycle each multiple of f0 is, in [0, 1): the sum of all steps up to and with each sample."""
    step_BTH = f0_BT[..., None] * np.arange(1, sines + 1, dtype=np.float32) / rate
    end_BTH = jax.lax.associative_scan(lambda a, b: (a + b) % 1.0, (hop * step_BTH) % 1.0, axis=1)
    start_BTH = jnp.pad(end_BTH, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    inside = np.arange(1, hop + 1, dtype=np.float32)[:, None] * step_BTH[:, :, None]
    return ((start_BTH[:, :, None] + inside) % 1.0).reshape(f0_BT.shape[0], -1, sines)


def draw(key: Array, example_B: Int[Array, "B"], frames: int, hop: int, sines: int, start=0) -> tuple[Array, Array]:
    """(phases [B, H] uniform in +-pi, normal noise [B, N, H]) of clips, or of their frames from `start` on.

    A frame's noise depends on key, example and its number alone, so a clip sounds the same however long its batch is.
    """

    def clip(example):
        own = jax.random.fold_in(key, example)
        phase_H = jax.random.uniform(jax.random.fold_in(own, 0), (sines,), minval=-jnp.pi, maxval=jnp.pi)
        noise = jax.vmap(lambda t: jax.random.normal(jax.random.fold_in(own, t), (hop, sines)))(1 + start + jnp.arange(frames))
        return phase_H, noise.reshape(frames * hop, sines)

    return jax.vmap(clip)(example_B)


class HarmonicSource(nn.Module):
    """Pitch to an excitation: voiced sines with a little noise, or more noise, merged to one channel.

    Attributes:
        sines: the pitch and its overtones.
        rate: samples a second.
        hop: samples a frame.
    """

    sines: int
    rate: int
    hop: int

    @nn.compact
    def __call__(self, f0_BT: Float[Array, "B T"], phase_BH: Float[Array, "B H"], noise_BNH: Float[Array, "B N H"]) -> Float[Array, "B N"]:
        """Samples in [-1, 1]. The first phase counts as 0; phases and noise broadcast over clips."""
        phase_BH = jnp.asarray(phase_BH).at[:, 0].set(0.0)
        sine_BNH = SINE * jnp.sin(2 * jnp.pi * cycles(f0_BT, self.sines, self.rate, self.hop) + phase_BH[:, None])
        voiced_BN1 = jnp.repeat((f0_BT > VOICED_HZ).astype(jnp.float32), self.hop, axis=1)[..., None]
        level_BN1 = BREATH * voiced_BN1 + HISS * (1.0 - voiced_BN1)
        merged = nn.Dense(1, name="merge")(sine_BNH * voiced_BN1 + level_BN1 * noise_BNH)
        return jnp.tanh(merged[..., 0])


@functools.cache
def _transforms(n_fft: int) -> tuple[np.ndarray, np.ndarray]:
    """(analysis [K, F], synthesis [K, F]) of windowed frames: the real DFT and its inverse as matrices."""
    bins = n_fft // 2 + 1
    angle = 2 * np.pi * np.outer(np.arange(n_fft), np.arange(bins)) / n_fft
    twice = np.full(bins, 2.0)
    twice[[0, -1]] = 1.0  # these have no mirror image
    window = hann(n_fft).astype(np.float64)[:, None]
    analysis = window * np.concatenate([np.cos(angle), -np.sin(angle)], axis=1)
    synthesis = analysis * np.tile(twice, 2) / n_fft
    return analysis.astype(np.float32), synthesis.astype(np.float32)


def spectrum(x_BN: Float[Array, "B N"], samples_B: Int[Array, "B"], n_fft: int, hop: int) -> Float[Array, "B S F"]:
    """Short spectrum of N // hop + 1 centred frames; each clip is reflected at its own ends."""
    at_M = jnp.arange(-(n_fft // 2), x_BN.shape[1] + n_fft // 2)
    last_B1 = samples_B[:, None] - 1
    index_BM = jnp.where(at_M > last_B1, 2 * last_B1 - at_M, jnp.abs(at_M))
    padded = jnp.take_along_axis(x_BN, jnp.clip(index_BM, 0, x_BN.shape[1] - 1), axis=1)
    return frame(padded, n_fft, hop) @ _transforms(n_fft)[0]


def inverse_spectrum(x_BSF: Float[Array, "B S F"], keep_BS1: Float[Array, "B S 1"], n_fft: int, hop: int) -> Float[Array, "B N"]:
    """Samples of the frames that `keep` marks: windowed overlap-add over the summed squared windows, N = (S - 1) * hop."""
    total = transposed(x_BSF * keep_BS1, jnp.asarray(_transforms(n_fft)[1][..., None]), hop)
    weight = transposed(keep_BS1, jnp.asarray(hann(n_fft)[:, None, None] ** 2), hop)
    wave_BM = (total / jnp.maximum(weight, 1e-6))[..., 0]
    return wave_BM[:, n_fft // 2 : wave_BM.shape[1] - n_fft // 2]
