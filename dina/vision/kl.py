"""The release's latent space: a convolutional autoencoder with a Gaussian bottleneck (AutoencoderKL, tokenizers.md A.7).

Levels of residual blocks, half the size per level, one attention head over all places at the deepest one. The release's
is FLUX's, frozen: channels (128, 256, 512, 512), two blocks a level, 16 latent channels.

Letters: B images, H W places, C channels, L latent channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-6
LOG_VARIANCE = (-30.0, 20.0)  # the posterior's log variance is clipped to this


def _conv(channels: int, name: str, side: int = 3) -> nn.Conv:
    return nn.Conv(channels, (side, side), padding="SAME", name=name)


def _norm(groups: int, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=EPS, use_fast_variance=False, name=name)


class Resnet(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut."""

    channels: int
    groups: int

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        h = _conv(self.channels, "conv1")(nn.silu(_norm(self.groups, "norm1")(x_BHWC)))
        h = _conv(self.channels, "conv2")(nn.silu(_norm(self.groups, "norm2")(h)))
        return h + (x_BHWC if x_BHWC.shape[-1] == self.channels else _conv(self.channels, "shortcut", 1)(x_BHWC))


class Middle(nn.Module):
    """Residual block, attention of one head over all places, residual block."""

    groups: int

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        c = x_BHWC.shape[-1]
        x_BHWC = Resnet(c, self.groups, name="resnet_0")(x_BHWC)
        h_BPC = _norm(self.groups, "norm")(x_BHWC).reshape(len(x_BHWC), -1, c)
        q, k, v = (nn.Dense(c, name=name)(h_BPC) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bpc,bqc->bpq", q, k) * c**-0.5, axis=-1)
        h_BPC = nn.Dense(c, name="out")(jnp.einsum("bpq,bqc->bpc", weights, v))
        return Resnet(c, self.groups, name="resnet_1")(x_BHWC + h_BPC.reshape(x_BHWC.shape))


class Encoder(nn.Module):
    """Pixels to the means and log variances of latents."""

    cfg: KLAutoencoder

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B h w 2L"]:
        cfg = self.cfg
        x = _conv(cfg.channels[0], "conv_in")(x_BHWC)
        for level, channels in enumerate(cfg.channels):
            for layer in range(cfg.layers):
                x = Resnet(channels, cfg.groups, name=f"down_{level}_{layer}")(x)
            if level < len(cfg.channels) - 1:  # padded at the bottom and at the right only
                x = nn.Conv(channels, (3, 3), strides=2, padding=((0, 1), (0, 1)), name=f"down_{level}")(x)
        x = nn.silu(_norm(cfg.groups, "norm_out")(Middle(cfg.groups, name="mid")(x)))
        x = _conv(2 * cfg.latent, "conv_out")(x)
        return _conv(2 * cfg.latent, "point", 1)(x) if cfg.point_convs == "both" else x


class Decoder(nn.Module):
    """Latents to pixels."""

    cfg: KLAutoencoder

    @nn.compact
    def __call__(self, z_BHWL: Float[Array, "B h w L"]) -> Float[Array, "B H W 3"]:
        cfg = self.cfg
        x = _conv(cfg.latent, "point", 1)(z_BHWL) if cfg.point_convs == "both" else z_BHWL
        x = Middle(cfg.groups, name="mid")(_conv(cfg.channels[-1], "conv_in")(x))
        for level, channels in reversed(list(enumerate(cfg.channels))):
            for layer in range(cfg.layers + 1):
                x = Resnet(channels, cfg.groups, name=f"up_{level}_{layer}")(x)
            if level:
                x = _conv(channels, f"up_{level}")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return _conv(3, "conv_out")(nn.silu(_norm(cfg.groups, "norm_out")(x)))


@dataclasses.dataclass(frozen=True)
class KLAutoencoder:
    """Sizes, and both directions.

    Attributes:
        channels: of each level, the outermost first.
        layers: residual blocks of a level of the encoder; the decoder has one more.
        latent: L.
        groups: of the norms.
        scale, shift: latents as the refiner sees them are (z - shift) * scale.
        point_convs: 'both' (a 1x1 convolution on each side of the bottleneck) or 'none'.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent: int = 16
    groups: int = 32
    scale: float = 0.3611
    shift: float = 0.1159
    point_convs: str = "none"

    @property
    def factor(self) -> int:
        """Pixels of a latent place's side."""
        return 2 ** (len(self.channels) - 1)

    def encode(self, params: Mapping, x_BHWC: Float[Array, "B H W 3"], noise_BHWL: Array | float = 0.0) -> Float[Array, "B h w L"]:
        """Latents of pixels in [-1, 1].

        `noise_BHWL`: standard normal, for a sample of the posterior as in the release (Q10); 0: its mean.
        """
        moments = Encoder(self, parent=None).apply({"params": params["encoder"]}, x_BHWC)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        z = mean + jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE)) * noise_BHWL
        return (z - self.shift) * self.scale

    def decode(self, params: Mapping, z_BHWL: Float[Array, "B h w L"]) -> Float[Array, "B H W 3"]:
        """Pixels of latents, about in [-1, 1]."""
        return Decoder(self, parent=None).apply({"params": params["decoder"]}, z_BHWL / self.scale + self.shift)
