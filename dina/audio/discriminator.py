"""Judges of waveforms and their losses, for stage A3 (tokenizers.md C.1): multi-period and multi-resolution.

A period judge folds the wave into rows of its period, so that its convolutions see every p-th sample (Kong et al. 2020,
"HiFi-GAN"); a resolution judge sees a log spectrogram (Jang et al. 2021, "UnivNet"). Both give a logit a position and their
inner maps, with the weight of each position: what lies beyond a clip's end is zero in all maps and weighs nothing.

Letters: B clips, N samples, P a period, T time, F frequency bins, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dina.audio import spectral

PART = "wave_discriminator"
_SLOPE = 0.1
_GROWTH = (1, 4, 16, 32, 32)  # channels of a period judge's layers, in widths
_STRIDE = 3
_BAND_STRIDES = (1, 2, 2, 2)  # of a resolution judge's layers along frequency


@dataclasses.dataclass(frozen=True)
class Opinion:
    """What one judge makes of a batch.

    Attributes:
        logits: large = real.
        weights: of their positions.
        maps: inner activations, channels last.
        map_weights: of their positions.
    """

    logits: Array
    weights: Array
    maps: tuple[Array, ...]
    map_weights: tuple[Array, ...]


class PeriodJudge(nn.Module):
    """Strided convolutions over every `period`-th sample."""

    period: int
    width: int

    @nn.compact
    def __call__(self, x_BN: Float[Array, "B N"], samples_B: Int[Array, "B"]) -> Opinion:
        b, n = x_BN.shape
        valid_BN = (jnp.arange(n) < samples_B[:, None]).astype(jnp.float32)
        fold = lambda a: jnp.pad(a, ((0, 0), (0, -n % self.period))).reshape(b, -1, self.period).swapaxes(1, 2)
        keep = fold(valid_BN)  # [B, P, T]
        x, maps, weights = fold(x_BN)[..., None] * keep[..., None], [], []
        for index, growth in enumerate(_GROWTH):
            stride = _STRIDE if index < len(_GROWTH) - 1 else 1
            conv = nn.Conv(self.width * growth, (5,), strides=stride, padding=2, name=f"conv{index}")
            keep = keep[:, :, ::stride]
            x = nn.leaky_relu(conv(x), _SLOPE) * keep[..., None]
            maps.append(x)
            weights.append(keep)
        return Opinion(nn.Conv(1, (3,), padding=1, name="out")(x)[..., 0], keep, tuple(maps), tuple(weights))


class ResolutionJudge(nn.Module):
    """Convolutions over the log spectrogram with windows of `n_fft`, strided along frequency."""

    n_fft: int
    width: int

    @nn.compact
    def __call__(self, x_BN: Float[Array, "B N"], samples_B: Int[Array, "B"]) -> Opinion:
        level_BTF = jnp.log(jnp.maximum(spectral.magnitude(x_BN, self.n_fft), spectral.FLOOR))
        weight_BT = spectral.weights(samples_B, self.n_fft, level_BTF.shape[1])
        keep = weight_BT[..., None, None]
        x, maps = level_BTF[..., None] * keep, []
        for index, stride in enumerate(_BAND_STRIDES):
            conv = nn.Conv(self.width, (3, 9), strides=(1, stride), padding=((1, 1), (4, 4)), name=f"conv{index}")
            x = nn.leaky_relu(conv(x), _SLOPE) * keep
            maps.append(x)
        logits = nn.Conv(1, (3, 3), padding=1, name="out")(x)[..., 0]
        weights = [jnp.broadcast_to(weight_BT[..., None], a.shape[:3]) for a in (logits, *maps)]
        return Opinion(logits, weights[0], tuple(maps), tuple(weights[1:]))


class Judges(nn.Module):
    """The part `wave_discriminator`: one judge a period and one a window.

    Attributes:
        periods: in samples.
        windows: in samples.
        width: channels of the first layer of a period judge, and of all of a resolution judge's.
    """

    periods: tuple[int, ...]
    windows: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, x_BN: Float[Array, "B N"], samples_B: Int[Array, "B"]) -> tuple[Opinion, ...]:
        judges = [PeriodJudge(p, self.width, name=f"period{p}") for p in self.periods]
        judges += [ResolutionJudge(w, self.width, name=f"window{w}") for w in self.windows]
        return tuple(judge(x_BN, samples_B) for judge in judges)


def _means(value: Array, weight: Array) -> Float[Array, " B"]:
    """Mean over each clip's positions that count; `value` may have channels, `weight` has none."""
    value = value.reshape(*weight.shape, -1).mean(-1)
    axes = tuple(range(1, weight.ndim))
    return jnp.sum(value * weight, axes) / jnp.maximum(jnp.sum(weight, axes), 1.0)


def _mean_of(judged: Sequence[Array]) -> Float[Array, " B"]:
    return sum(judged) / len(judged)


def discriminator_loss(real: Sequence[Opinion], made: Sequence[Opinion]) -> Float[Array, " B"]:
    """Least squares (Mao et al. 2017): (1 - real)^2 + made^2 of each clip, averaged over judges."""
    return _mean_of([_means((1 - r.logits) ** 2, r.weights) + _means(m.logits**2, m.weights) for r, m in zip(real, made, strict=True)])


def adversarial_loss(made: Sequence[Opinion]) -> Float[Array, " B"]:
    """(1 - made)^2 of each clip, averaged over judges."""
    return _mean_of([_means((1 - m.logits) ** 2, m.weights) for m in made])


def feature_loss(real: Sequence[Opinion], made: Sequence[Opinion]) -> Float[Array, " B"]:
    """Mean absolute difference of inner maps of each clip, summed over a judge's maps, averaged over judges; real ones get no gradient."""
    away = lambda r, m, w: _means(jnp.abs(jax.lax.stop_gradient(r) - m), w)
    return _mean_of([sum(map(away, r.maps, m.maps, r.map_weights)) for r, m in zip(real, made, strict=True)])
