"""Flow-matching refinement: hidden frames to the vocoder's mel (tokenizers.md B.6, losses C.1).

The prenet turns hidden frames (50 Hz) into a first guess mu of the 24 kHz mel. The estimator, a U-Net of residual
blocks and block-causal transformer blocks, predicts the velocity that carries noise to the mel given mu; Euler steps
on a cosine grid with guidance integrate it. There is one channel level, as released, so time is never down-sampled.

Letters: B clips, T frames, M mel bands, C channels, D width, H heads, K head width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from dina.audio.encoder import Layer, RMSNorm, attend, attention_mask, length_mask, mish
from dina.audio.mel_decoder import resize
from dina.config import InputError

TIME_SCALE = 1000.0

SMALLEST_REST = 1e-3  # of the way from noise to mel, where a velocity is computed from its end


class Prenet(nn.Module):
    """Hidden frames to mu: a two-layer perceptron, causal RMSNorm layers, a projection without bias.

    The released positional table is stored there but never added (quirk Q18), so there is none here.
    """

    width: int
    layers: int
    heads: int
    ff: int
    mels: int
    ratio: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden_BTD: Float[Array, "B T D"], length_B: Int[Array, "B"]) -> Float[Array, "B T M"]:
        """mu, zero beyond `flow_length(length_B, ratio)`."""
        frames = flow_length(hidden_BTD.shape[1], self.ratio)
        if frames != hidden_BTD.shape[1]:
            hidden_BTD = resize(hidden_BTD, length_B, flow_length(length_B, self.ratio), frames, "padded")
        x = nn.silu(nn.Dense(4 * self.width, dtype=self.dtype, name="in1")(hidden_BTD))
        x_BTD = nn.Dense(self.width, dtype=self.dtype, name="in2")(x)
        valid_BT = length_mask(flow_length(length_B, self.ratio), frames)
        mask_BTT = attention_mask(valid_BT, "causal")
        for index in range(self.layers):
            x_BTD = Layer(self.heads, self.ff, "rms", self.dtype, name=f"layer{index}")(x_BTD, mask_BTT)
        mu_BTM = nn.Dense(self.mels, use_bias=False, dtype=self.dtype, name="out")(RMSNorm(name="norm")(x_BTD))
        return jnp.where(valid_BT[..., None], mu_BTM, 0.0)


def flow_length(frames, ratio: float):
    """Mel frames of `frames` hidden frames: int(frames * ratio). Numbers or arrays."""
    return frames if ratio == 1.0 else (frames * ratio).astype(jnp.int32) if hasattr(frames, "astype") else int(frames * ratio)


def time_features(t_B: Float[Array, "B"], width: int) -> Float[Array, "B width"]:
    """Sines then cosines of 1000 t at geometrically falling frequencies."""
    half = width // 2
    frequency = np.exp(-np.log(1e4) / (half - 1) * np.arange(half)).astype(np.float32)
    angle = TIME_SCALE * t_B.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class CausalBlock(nn.Module):
    """Causal convolution k3, LayerNorm over channels, Mish; input and output masked."""

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTC: Array, valid_BT1: Array) -> Array:
        x = nn.Conv(self.channels, (3,), padding=((2, 0),), dtype=self.dtype, name="conv")(x_BTC * valid_BT1)
        return mish(nn.LayerNorm(epsilon=1e-5, name="norm")(x)) * valid_BT1


class ResBlock(nn.Module):
    """Two causal blocks with the time embedding between them, and a 1x1 shortcut."""

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTC: Array, valid_BT1: Array, time_BC: Array) -> Array:
        h = CausalBlock(self.channels, self.dtype, name="block1")(x_BTC, valid_BT1)
        h = h + nn.Dense(self.channels, dtype=self.dtype, name="time")(mish(time_BC))[:, None]
        h = CausalBlock(self.channels, self.dtype, name="block2")(h, valid_BT1)
        return h + nn.Dense(self.channels, dtype=self.dtype, name="shortcut")(x_BTC * valid_BT1)


class AttentionBlock(nn.Module):
    """Pre-norm attention (q, k, v without bias) and a GELU feed-forward of 4x; the time does not enter."""

    heads: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTC: Array, mask_BTT: Array) -> Array:
        channels = x_BTC.shape[-1]
        h = nn.LayerNorm(epsilon=1e-5, name="norm1")(x_BTC)
        q, k, v = (
            nn.Dense(self.heads * self.head_dim, use_bias=False, dtype=self.dtype, name=name)(h).reshape(
                *h.shape[:2], self.heads, self.head_dim
            )
            for name in ("q", "k", "v")
        )
        x_BTC = x_BTC + nn.Dense(channels, dtype=self.dtype, name="out")(attend(q, k, v, mask_BTT))
        h = nn.LayerNorm(epsilon=1e-5, name="norm2")(x_BTC)
        h = nn.gelu(nn.Dense(4 * channels, dtype=self.dtype, name="fc1")(h), approximate=False)
        return x_BTC + nn.Dense(channels, dtype=self.dtype, name="fc2")(h)


def block_causal_mask(valid_BT: Bool[Array, "B T"], chunk: int) -> Bool[Array, "B T T"]:
    """Query i sees valid keys before the end of its own block of `chunk` frames (quirk Q20)."""
    frames = valid_BT.shape[1]
    end_T = (jnp.arange(frames) // chunk + 1) * chunk
    return (jnp.arange(frames) < end_T[:, None]) & valid_BT[:, None, :]


class Estimator(nn.Module):
    """v(x, mu, t): down (res, attention, conv), `middle` x (res, attention), up (skip, res, attention, conv), out.

    Attributes:
        channels, middle, blocks, heads, head_dim: sizes; `blocks` attention blocks follow each residual block.
        chunk: frames of a block of the block-causal mask.
    """

    channels: int
    middle: int
    blocks: int
    heads: int
    head_dim: int
    chunk: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x_BTM: Float[Array, "B T M"], mu_BTM: Float[Array, "B T M"], t_B: Float[Array, "B"], valid_BT: Bool[Array, "B T"]
    ) -> Float[Array, "B T M"]:
        mels, c = x_BTM.shape[-1], self.channels
        keep = valid_BT[..., None].astype(x_BTM.dtype)
        mask_BTT = block_causal_mask(valid_BT, self.chunk)
        time = nn.Dense(4 * c, dtype=self.dtype, name="time1")(time_features(t_B, 2 * mels).astype(self.dtype))
        time_BC = nn.Dense(4 * c, dtype=self.dtype, name="time2")(nn.silu(time))

        def stage(x, name):
            x = ResBlock(c, self.dtype, name=f"{name}_res")(x, keep, time_BC)
            for index in range(self.blocks):
                x = AttentionBlock(self.heads, self.head_dim, self.dtype, name=f"{name}_attention{index}")(x, mask_BTT)
            return x

        def conv(x, name):
            return nn.Conv(c, (3,), padding=((2, 0),), dtype=self.dtype, name=name)(x * keep)

        skip = stage(jnp.concatenate([x_BTM, mu_BTM], axis=-1), "down")
        x = conv(skip, "down_conv")
        for index in range(self.middle):
            x = stage(x, f"middle{index}")
        x = conv(stage(jnp.concatenate([x, skip], axis=-1), "up"), "up_conv")
        x = CausalBlock(c, self.dtype, name="final_block")(x, keep)
        return nn.Dense(mels, dtype=self.dtype, name="final")(x * keep) * keep


class Flow(nn.Module):
    """The part `flow`: prenet and estimator. Build it with `make_flow`."""

    prenet: Prenet
    estimator: Estimator
    prediction: str = "velocity"  # what the estimator gives: 'velocity' as released, or 'clean': the mel minus mu

    def mean(self, hidden_BTD: Array, length_B: Array) -> Array:
        """mu of hidden frames."""
        return self.prenet(hidden_BTD, length_B)

    def velocity(self, x_BTM: Array, mu_BTM: Array, t_B: Array, valid_BT: Array) -> Array:
        """The velocity at one point, by one call of the estimator."""
        out_BTM = self.estimator(x_BTM, mu_BTM, t_B, valid_BT)
        if self.prediction == "velocity":
            return out_BTM
        # A narrow estimator cannot pass 80 values of noise through; predicting the mel, it does not have to.
        left_B11 = jnp.maximum(1.0 - t_B, SMALLEST_REST)[:, None, None]
        return (mu_BTM + out_BTM - x_BTM) / left_B11

    def __call__(self, hidden_BTD: Array, length_B: Array, x_BTM: Array, t_B: Array) -> tuple[Array, Array]:
        """(mu, velocity); touches every parameter."""
        mu_BTM = self.prenet(hidden_BTD, length_B)
        valid_BT = length_mask(flow_length(length_B, self.prenet.ratio), x_BTM.shape[1])
        return mu_BTM, self.velocity(x_BTM, mu_BTM, t_B, valid_BT)


def make_flow(audio: ConfigDict) -> Flow:
    """The flow decoder of a config's `audio` section."""
    p, e = audio.flow.prenet, audio.flow.estimator
    prenet = Prenet(p.width, p.layers, p.heads, p.ff, audio.target.mels, p.ratio, parent=None)
    estimator = Estimator(e.channels, e.middle, e.blocks, e.heads, e.head_dim, e.chunk, parent=None)
    if audio.flow.prediction not in ("velocity", "clean"):
        raise InputError(f"config key audio.flow.prediction is {audio.flow.prediction!r}; known: velocity, clean")
    return Flow(prenet, estimator, audio.flow.prediction)


def noisy_pair(x1: Array, noise: Array, u_B: Float[Array, "B"], sigma_min: float) -> tuple[Array, Array, Array]:
    """A training point of conditional flow matching (C.1).

    Args:
        x1: mel [B, T, M]; noise: like it.
        u_B: uniform in [0, 1); the time is 1 - cos(u pi / 2), denser near the noise.

    Returns:
        (t [B], point y, velocity to predict).
    """
    t_B = 1.0 - jnp.cos(u_B * (jnp.pi / 2))
    t = t_B[:, None, None]
    return t_B, (1.0 - (1.0 - sigma_min) * t) * noise + t * x1, x1 - (1.0 - sigma_min) * noise


def time_grid(steps: int, grid: str = "float32") -> Float[Array, "steps+1"]:
    """1 - cos(k / steps * pi / 2); 'bfloat16' rounds it as the release does (quirk Q19)."""
    t = 1.0 - jnp.cos(jnp.linspace(0.0, 1.0, steps + 1) * (jnp.pi / 2))
    return t.astype(jnp.dtype(grid)).astype(jnp.float32)


def solve(
    velocity,
    mu_BTM: Float[Array, "B T M"],
    noise_BTM: Float[Array, "B T M"],
    valid_BT: Bool[Array, "B T"],
    grid_S: Float[Array, "S"],
    guidance: float,
) -> Float[Array, "B T M"]:
    """Euler integration from noise to mel with guidance towards mu: (1 + g) v(mu) - g v(0).

    Args:
        velocity: function (x, mu, t [B], valid) -> v; called once a step on both conditions stacked.
        grid_S: times from 0 to 1, see `time_grid`.
        guidance: g; 0 saves the second half of the work.
    """
    b = mu_BTM.shape[0]

    def step(x, times):
        t, following = times
        if guidance == 0:
            v = velocity(x, mu_BTM, jnp.full((b,), t), valid_BT)
        else:
            both = jnp.concatenate([mu_BTM, jnp.zeros_like(mu_BTM)])
            v = velocity(jnp.concatenate([x, x]), both, jnp.full((2 * b,), t), jnp.concatenate([valid_BT, valid_BT]))
            v = (1.0 + guidance) * v[:b] - guidance * v[b:]
        return x + (following - t) * v, None

    x_BTM, _ = jax.lax.scan(step, noise_BTM, (grid_S[:-1], grid_S[1:]))
    return jnp.where(valid_BT[..., None], x_BTM, 0.0)
