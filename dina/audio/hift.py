"""HiFT, the neural vocoder (tokenizers.md B.7): pitch from the mel, a harmonic source, and a filter that upsamples the mel.

The filter works on the short spectra of the source: transposed convolutions bring the mel to their rate, each stage adds
the source's spectrum at its own rate, and blocks of snake convolutions shape the sum. Its output is a log magnitude and a
phase, which the inverse transform turns into samples. Convolutions see zeros beyond each clip's own frames, as they do at
the end of a clip alone, so padding changes nothing. All sizes come from `config.audio.vocoder`.

Letters: B clips, T frames (of the mel, or of a stage), M mel bands, C channels, N samples, H sines, S, F short spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dina.audio.config import hift_vocoder
from dina.audio.encoder import length_mask
from dina.audio.features import normalise
from dina.audio.hift_source import HarmonicSource, draw, inverse_spectrum, spectrum
from dina.audio.mel_decoder import transposed
from dina.config import InputError

PART = "vocoder"
SLOPE, LAST_SLOPE = 0.1, 0.01  # of leaky rectifiers; the reference leaves the last one at its framework's default
LOUDEST = 100.0  # bound of a magnitude
PEAK = 0.99
# sin^2(r) = r^2 P(r^2) for |r| <= pi / 2: Chebyshev fit of degree 6, off by 2.4e-7 in float32.
_SQUARED_SINE = (1.0, -1 / 3, 0.0444444194, -0.00317454292, 0.000141023469, -4.23353913e-06, 8.13145604e-08)
_HALF_TURN = (3.140625, np.pi - 3.140625)  # the first has so few bits that whole multiples are exact
_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # what the reference's framework starts from


def _conv(features: int, kernel: int, name: str, dilation: int = 1) -> nn.Conv:
    """A convolution that keeps the length."""
    edge = dilation * (kernel - 1) // 2
    return nn.Conv(features, (kernel,), padding=((edge, edge),), kernel_dilation=dilation, kernel_init=_INIT, name=name)


def keep_mask(length_B: Int[Array, "B"], frames: int) -> Float[Array, "B T 1"]:
    """One for each clip's own frames."""
    return length_mask(length_B, frames)[..., None].astype(jnp.float32)


class F0Predictor(nn.Module):
    """Five convolutions and a line: Hz of every mel frame, 0 or more."""

    channels: int

    @nn.compact
    def __call__(self, mel_BTM: Float[Array, "B T M"], keep_BT1: Float[Array, "B T 1"]) -> Float[Array, "B T"]:
        x = mel_BTM * keep_BT1
        for index in range(5):
            x = nn.elu(_conv(self.channels, 3, f"conv{index}")(x)) * keep_BT1
        return jnp.abs(nn.Dense(1, name="out")(x)[..., 0]) * keep_BT1[..., 0]


def squared_sine(x: Array) -> Array:
    """sin(x)^2 for |x| < 1e5, off by 3e-7; on a CPU in a fourteenth of the time of XLA's sine, which is a quarter of the network's."""
    turns = jnp.round(x * (1 / np.pi))
    rest = (x - turns * _HALF_TURN[0]) - turns * _HALF_TURN[1]
    z, total = rest * rest, _SQUARED_SINE[-1]
    for coefficient in _SQUARED_SINE[-2::-1]:
        total = total * z + coefficient
    return z * total


class Snake(nn.Module):
    """x + sin^2(a x) / a with a learned a per channel (Ziyin et al. 2020)."""

    @nn.compact
    def __call__(self, x_BTC: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        alpha_C = self.param("alpha", nn.initializers.ones, (x_BTC.shape[-1],))
        return x_BTC + squared_sine(alpha_C * x_BTC) * (1 / (alpha_C + 1e-9))


class ResBlock(nn.Module):
    """For each dilation: a dilated and a plain convolution after snakes, added to what went in."""

    kernel: int
    dilations: tuple[int, ...]

    @nn.compact
    def __call__(self, x_BTC: Float[Array, "B T C"], keep_BT1: Float[Array, "B T 1"]) -> Float[Array, "B T C"]:
        """`x_BTC` is zero where `keep` is, and so is the result."""
        width = x_BTC.shape[-1]
        for j, dilation in enumerate(self.dilations):
            h = _conv(width, self.kernel, f"conv1_{j}", dilation)(Snake(name=f"snake1_{j}")(x_BTC)) * keep_BT1
            x_BTC = x_BTC + _conv(width, self.kernel, f"conv2_{j}")(Snake(name=f"snake2_{j}")(h)) * keep_BT1
        return x_BTC


class Up(nn.Module):
    """Transposed convolution to `rate` times as many frames."""

    features: int
    kernel: int
    rate: int

    @nn.compact
    def __call__(self, x_BTC: Float[Array, "B T C"]) -> Float[Array, "B T2 E"]:
        kernel_KCE = self.param("kernel", _INIT, (self.kernel, x_BTC.shape[-1], self.features))
        bias_E = self.param("bias", nn.initializers.zeros, (self.features,))
        trim = (self.kernel - self.rate) // 2
        return transposed(x_BTC, kernel_KCE, self.rate)[:, trim : trim + x_BTC.shape[1] * self.rate] + bias_E


class Filter(nn.Module):
    """Mel and source to waveform.

    Attributes:
        channels: of the first convolution, halved at every stage.
        rates, up_kernels: of the upsampling stages.
        source_kernels: of the block that each stage's source goes through.
        kernels, dilations: of the blocks of a stage, whose mean is its output.
        n_fft, hop: of the short transform.
    """

    channels: int
    rates: tuple[int, ...]
    up_kernels: tuple[int, ...]
    source_kernels: tuple[int, ...]
    kernels: tuple[int, ...]
    dilations: tuple[int, ...]
    n_fft: int
    hop: int

    @nn.compact
    def __call__(self, mel_BTM: Float[Array, "B T M"], source_BN: Float[Array, "B N"], frames_B: Int[Array, "B"]) -> Float[Array, "B N"]:
        """Samples in +-0.99; those beyond a clip's frames are garbage."""
        samples_B = frames_B * math.prod(self.rates) * self.hop
        short_BSF = spectrum(source_BN, samples_B, self.n_fft, self.hop)
        short_BSF = short_BSF * keep_mask(samples_B // self.hop + 1, short_BSF.shape[1])
        keep = keep_mask(frames_B, mel_BTM.shape[1])
        x, length_B = _conv(self.channels, 7, "pre")(mel_BTM * keep) * keep, frames_B
        for i, rate in enumerate(self.rates):
            x = Up(self.channels >> (i + 1), self.up_kernels[i], rate, name=f"up{i}")(nn.leaky_relu(x, SLOPE))
            length_B = length_B * rate
            if i == len(self.rates) - 1:  # the short transform has one frame more than hops: reflected at the left
                x, length_B = jnp.concatenate([x[:, 1:2], x], axis=1), length_B + 1
            keep = keep_mask(length_B, x.shape[1])
            x = x * keep + self._source(i, short_BSF, keep)
            blocks = [ResBlock(k, self.dilations, name=f"block{i}_{j}")(x, keep) for j, k in enumerate(self.kernels)]
            x = sum(blocks) / len(blocks)
        out_BSF = _conv(self.n_fft + 2, 7, "post")(nn.leaky_relu(x, LAST_SLOPE))
        level, angle = jnp.split(out_BSF, 2, axis=-1)
        magnitude, phase = jnp.exp(jnp.minimum(level, math.log(LOUDEST))), jnp.sin(angle)
        polar = jnp.concatenate([magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)], axis=-1)
        return jnp.clip(inverse_spectrum(polar, keep, self.n_fft, self.hop), -PEAK, PEAK)

    def _source(self, i: int, short_BSF: Array, keep_BT1: Array) -> Array:
        """The source's short spectrum at the rate of stage `i`."""
        stride = math.prod(self.rates[i + 1 :])
        size, edge = (2 * stride, stride // 2) if stride > 1 else (1, 0)
        down = nn.Conv(
            self.channels >> (i + 1), (size,), strides=stride, padding=((edge, edge),), kernel_init=_INIT, name=f"down{i}"
        )
        return ResBlock(self.source_kernels[i], self.dilations, name=f"source_block{i}")(down(short_BSF) * keep_BT1, keep_BT1)


class Hift(nn.Module):
    """The part `vocoder`. Build it with `make_hift`."""

    f0: F0Predictor
    source: HarmonicSource
    filter: Filter

    def __call__(self, mel_BTM: Array, frames_B: Array, phase_BH: Array, noise_BNH: Array) -> tuple[Array, Array]:
        """(waves [B, N], pitch [B, T] in Hz), both zero beyond a clip's frames.

        Args:
            mel_BTM: normalised ln mel.
            frames_B: valid frames of each clip.
            phase_BH, noise_BNH: what the source is not told by the mel, see `draw`.

        The pitch gets no gradient from the waves: a sine's phase at sample n has n times the gradient of its first.
        """
        with jax.default_matmul_precision("highest"):
            f0_BT = self.f0(mel_BTM, keep_mask(frames_B, mel_BTM.shape[1]))
            source_BN = self.source(jax.lax.stop_gradient(f0_BT), phase_BH, noise_BNH)
            return self.filtered(mel_BTM, source_BN, frames_B), f0_BT

    def filtered(self, mel_BTM: Array, source_BN: Array, frames_B: Array) -> Float[Array, "B N"]:
        """Waves of a given source."""
        with jax.default_matmul_precision("highest"):
            wave_BN = self.filter(mel_BTM, source_BN, frames_B)
        return jnp.where(length_mask(frames_B * self.source.hop, wave_BN.shape[1]), wave_BN, 0.0)


def make_hift(audio: ConfigDict) -> Hift:
    """The module of a config's `audio` section.

    Raises:
        InputError: stages and hop that do not make up a mel frame, kernels that do not fit their stages.
    """
    v, target = audio.vocoder, audio.target
    lacks = [key for key in hift_vocoder() if key not in v]
    if lacks:
        raise InputError(f"audio.vocoder has no {lacks[0]!r}; an experiment takes dina.audio.config.hift_vocoder() whole")
    if math.prod(v.rates) * v.hop != target.hop:
        raise InputError(f"audio.vocoder: rates {tuple(v.rates)} times hop {v.hop} are not audio.target.hop {target.hop}")
    stages = {name: len(v[name]) for name in ("rates", "up_kernels", "source_kernels")}
    if len(set(stages.values())) > 1:
        raise InputError(f"audio.vocoder: rates, up_kernels and source_kernels have {tuple(stages.values())} stages; they must be as many")
    wrong = [k for k, rate in zip(v.up_kernels, v.rates, strict=True) if k < rate or (k - rate) % 2]
    if wrong:
        raise InputError(f"audio.vocoder.up_kernels: {wrong[0]} must be its stage's rate plus an even number, as it is trimmed on both sides")
    if v.channels % 2 ** len(v.rates):
        raise InputError(f"audio.vocoder.channels {v.channels} cannot be halved {len(v.rates)} times")
    source = HarmonicSource(v.harmonics + 1, target.rate, target.hop, parent=None)
    shape = {name: tuple(v[name]) for name in ("rates", "up_kernels", "source_kernels", "kernels", "dilations")}
    return Hift(F0Predictor(v.f0_channels, parent=None), source, Filter(v.channels, **shape, n_fft=v.n_fft, hop=v.hop, parent=None))


def vocode(
    audio: ConfigDict, params: Mapping[str, Any], mel_BMT: Float[Array, "B M T"], frames_B: Int[Array, "B"]
) -> Float[Array, "B N"]:
    """Waves of ln mels; phases and noise come from `audio.vocoder.seed`, the same for all clips, so a batch equals its clips."""
    hift, mel_BTM = make_hift(audio), normalise(mel_BMT.astype(jnp.float32).swapaxes(1, 2), audio.target)
    one = jnp.zeros(1, jnp.int32)
    drawn = draw(jax.random.key(audio.vocoder.seed), one, mel_BTM.shape[1], audio.target.hop, hift.source.sines)
    return hift.apply({"params": params[PART]}, mel_BTM, frames_B, *drawn)[0]
