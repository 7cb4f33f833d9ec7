"""Flow-matching refinement: hidden frames to the vocoder's mel (tokenizers.md B.6, losses C.1).

The prenet turns hidden frames (50 Hz) into a first guess mu of the 24 kHz mel. The estimator, a U-Net of residual
blocks and block-causal transformer blocks, predicts the velocity that carries noise to the mel given mu; Euler steps
on a cosine grid with guidance integrate it. Each channel level but the last halves the time; the release has one level.

Letters: B clips, T frames, M mel bands, C channels, D width, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from dina.audio.encoder import Layer, RMSNorm, attend, attention_mask, in_stream, length_mask, mish, with_past, with_past_keys
from dina.audio.mel_decoder import resize, transposed
from dina.config import InputError, check_name

TIME_SCALE = 1000.0
RELEASED_CHUNK = 100  # frames of a block, which no released config says
SMALLEST_REST = 1e-3  # of the way from noise to mel, where a velocity is computed from its end
# Of the attention blocks' feed-forward: whether half of the first matrix is a gate, and whether GELU is the tanh form.
ACTS = {"gelu": (False, False), "gelu-approximate": (False, True), "geglu": (True, False)}


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
    activation: str = "gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden_BTD: Float[Array, "B T D"], length_B: Int[Array, "B"], start=0, room: int = 0) -> Float[Array, "B T M"]:
        """mu, zero beyond `flow_length(length_B, ratio)`.

        Args:
            hidden_BTD: all frames of a clip, or in a stream the next ones.
            length_B: frames of the whole clip.
            start: frames before these, in a stream; the ratio must be 1 there.
            room: frames of the longest stream.
        """
        frames = flow_length(hidden_BTD.shape[1], self.ratio)
        if frames != hidden_BTD.shape[1]:
            hidden_BTD = resize(hidden_BTD, length_B, flow_length(length_B, self.ratio), frames, "padded")
        x = nn.silu(nn.Dense(4 * self.width, dtype=self.dtype, name="in1")(hidden_BTD))
        x_BTD = nn.Dense(self.width, dtype=self.dtype, name="in2")(x)
        frames_B = flow_length(length_B, self.ratio)
        mask_BTS = attention_mask(length_mask(frames_B, room or frames), "causal", start + jnp.arange(frames))
        for index in range(self.layers):
            x_BTD = Layer(self.heads, self.ff, "rms", self.dtype, self.activation, name=f"layer{index}")(x_BTD, mask_BTS)
        mu_BTM = nn.Dense(self.mels, use_bias=False, dtype=self.dtype, name="out")(RMSNorm(name="norm")(x_BTD))
        return jnp.where(length_mask(frames_B - start, frames)[..., None], mu_BTM, 0.0)


def flow_length(frames, ratio: float):
    """Mel frames of `frames` hidden frames: int(frames * ratio) in float32. Numbers or arrays."""
    if ratio == 1.0:
        return frames
    if hasattr(frames, "astype"):
        return (frames.astype(np.float32) * np.float32(ratio)).astype(np.int32)
    return int(np.float32(frames) * np.float32(ratio))


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
        x, missing = with_past(self, x_BTC * valid_BT1, 2)
        x = nn.Conv(self.channels, (3,), padding=((missing, 0),), dtype=self.dtype, name="conv")(x)
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
    """Pre-norm attention (q, k, v without bias) and a feed-forward of 4x with one of `ACTS`; the time does not enter."""

    heads: int
    head_dim: int
    act: str = "gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTC: Array, mask_BTS: Array) -> Array:
        channels = x_BTC.shape[-1]
        h = nn.LayerNorm(epsilon=1e-5, name="norm1")(x_BTC)
        q, k, v = (
            nn.Dense(self.heads * self.head_dim, use_bias=False, dtype=self.dtype, name=name)(h).reshape(
                *h.shape[:2], self.heads, self.head_dim
            )
            for name in ("q", "k", "v")
        )
        k, v = with_past_keys(self, k, v, mask_BTS.shape[-1])
        x_BTC = x_BTC + nn.Dense(channels, dtype=self.dtype, name="out")(attend(q, k, v, mask_BTS))
        check_name(self.act, ACTS, "audio.flow.estimator.act")
        gated, tanh = ACTS[self.act]
        h = nn.LayerNorm(epsilon=1e-5, name="norm2")(x_BTC)
        h = nn.Dense((8 if gated else 4) * channels, dtype=self.dtype, name="fc1")(h)
        value, gate = jnp.split(h, 2, -1) if gated else (1.0, h)
        return x_BTC + nn.Dense(channels, dtype=self.dtype, name="fc2")(value * nn.gelu(gate, approximate=tanh))


def block_causal_mask(valid_BS: Bool[Array, "B S"], chunk: int, query_T: Int[Array, "T"] | None = None) -> Bool[Array, "B T S"]:
    """Query i sees valid keys before the end of its own block of `chunk` frames (quirk Q20); `query_T`: see `attention_mask`."""
    key_S = jnp.arange(valid_BS.shape[1])
    end_T = ((key_S if query_T is None else query_T) // chunk + 1) * chunk
    return (key_S < end_T[:, None]) & valid_BS[:, None, :]


class TwiceAsLong(nn.Module):
    """Transposed convolution k4 s2 p1."""

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTC: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1)), (4, x_BTC.shape[-1], self.channels))
        bias_C = self.param("bias", nn.initializers.zeros, (self.channels,))
        return transposed(x_BTC.astype(self.dtype), kernel.astype(self.dtype), 2)[:, 1:-1] + bias_C


class Estimator(nn.Module):
    """v(x, mu, t): down (res, attention, conv), `middle` x (res, attention), up (skip, res, attention, conv), out.

    Attributes:
        channels: of each level; the convolution after a level halves the time, after the last one it leaves it.
        middle, blocks, heads, head_dim: sizes; `blocks` attention blocks follow each residual block.
        chunk: frames of a block of the block-causal mask, on every level.
        act: of the feed-forwards, one of `ACTS`.
    """

    channels: tuple[int, ...]
    middle: int
    blocks: int
    heads: int
    head_dim: int
    chunk: int
    act: str = "gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x_BTM: Float[Array, "B T M"], mu_BTM: Float[Array, "B T M"], t_B: Float[Array, "B"], valid_BT: Bool[Array, "B T"],
        start=0, room: int = 0,
    ) -> Float[Array, "B T M"]:  # fmt: skip
        """The velocity.

        Args:
            x_BTM, mu_BTM, valid_BT: all frames of a clip, or in a stream the next ones.
            t_B: times.
            start: frames before these, in a stream; all of them are valid in a clip that goes on.
            room: frames of the longest stream.

        Raises:
            InputError: a stream with several levels, whose halved time sees beyond a chunk.
        """
        if in_stream(self) and len(self.channels) > 1:
            raise InputError(f"audio.flow.estimator.channels has {len(self.channels)} levels; a stream needs one")
        mels, last, wide = x_BTM.shape[-1], len(self.channels) - 1, 4 * self.channels[0]
        time = nn.Dense(wide, dtype=self.dtype, name="time1")(time_features(t_B, 2 * mels).astype(self.dtype))
        time_BC = nn.Dense(wide, dtype=self.dtype, name="time2")(nn.silu(time))
        valid = [valid_BT[:, :: 2**level] for level in range(last + 1)]
        keep = [valid_bt[..., None].astype(x_BTM.dtype) for valid_bt in valid]
        masks = [block_causal_mask(valid_bt, self.chunk) for valid_bt in valid]
        if in_stream(self):
            seen_BS = length_mask(start + valid_BT.sum(1), room)
            masks = [block_causal_mask(seen_BS, self.chunk, start + jnp.arange(valid_BT.shape[1]))]

        def stage(x, level, channels, name):
            x = ResBlock(channels, self.dtype, name=f"{name}_res")(x, keep[level], time_BC)
            for index in range(self.blocks):
                block = AttentionBlock(self.heads, self.head_dim, self.act, self.dtype, name=f"{name}_attention{index}")
                x = block(x, masks[level])
            return x

        def conv(x, channels, name):
            x, missing = with_past(self, x, 2, f"{name}_left")
            return nn.Conv(channels, (3,), padding=((missing, 0),), dtype=self.dtype, name=name)(x)

        x, skips = jnp.concatenate([x_BTM, mu_BTM], axis=-1), []
        for level, channels in enumerate(self.channels):
            skips.append(stage(x, level, channels, f"down{level}"))
            x, name = skips[-1] * keep[level], f"down{level}_conv"
            halve = nn.Conv(channels, (3,), 2, padding=1, dtype=self.dtype, name=name) if level < last else None
            x = halve(x) if halve else conv(x, channels, name)
        for index in range(self.middle):
            x = stage(x, last, self.channels[last], f"middle{index}")
        for level in reversed(range(last + 1)):
            channels = self.channels[max(level - 1, 0)]
            x = jnp.concatenate([x[:, : skips[level].shape[1]], skips[level]], axis=-1)
            x = stage(x, level, channels, f"up{level}") * keep[level]
            x = TwiceAsLong(channels, self.dtype, name=f"up{level}_conv")(x) if level else conv(x, channels, "up0_conv")
        x = CausalBlock(self.channels[0], self.dtype, name="final_block")(x, keep[0])
        return nn.Dense(mels, dtype=self.dtype, name="final")(x * keep[0]) * keep[0]


class Flow(nn.Module):
    """The part `flow`: prenet and estimator. Build it with `make_flow`."""

    prenet: Prenet
    estimator: Estimator
    prediction: str = "velocity"  # what the estimator gives: 'velocity' as released, or 'clean': the mel minus mu

    def mean(self, hidden_BTD: Array, length_B: Array, start=0, room: int = 0) -> Array:
        """mu of hidden frames."""
        return self.prenet(hidden_BTD, length_B, start, room)

    def velocity(self, x_BTM: Array, mu_BTM: Array, t_B: Array, valid_BT: Array, start=0, room: int = 0) -> Array:
        """The velocity at one point, by one call of the estimator."""
        out_BTM = self.estimator(x_BTM, mu_BTM, t_B, valid_BT, start, room)
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
    """The flow decoder of a config's `audio` section; `flow.estimator.channels` is one number, or one for each level."""
    estimator = dict(audio.flow.estimator)
    channels = estimator.pop("channels")
    channels = (channels,) if isinstance(channels, int) else tuple(channels)
    prenet = Prenet(**audio.flow.prenet, mels=audio.target.mels, parent=None)
    estimator = Estimator(channels, **estimator, parent=None)
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


def time_grid(steps: int, grid: str = "float32", spacing: str = "cosine") -> Float[Array, "steps+1"]:
    """Times from 0 to 1.

    Args:
        steps: of the solver.
        grid: 'bfloat16' rounds them as the release does (quirk Q19).
        spacing: 'cosine', 1 - cos(k / steps * pi / 2), or 'linear'.
    """
    check_name(spacing, ("cosine", "linear"), "audio.flow.spacing")
    t = jnp.linspace(0.0, 1.0, steps + 1)
    t = 1.0 - jnp.cos(t * (jnp.pi / 2)) if spacing == "cosine" else t
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
    keeping = lambda _, *point: (velocity(*point), None)
    return solve_keeping(keeping, mu_BTM, noise_BTM, valid_BT, grid_S, guidance, None)[0]


def solve_keeping(velocity, mu_BTM: Array, noise_BTM: Array, valid_BT: Array, grid_S: Array, guidance: float, kept) -> tuple[Array, Any]:
    """The same with a state for each step; see `solve`.

    Args:
        velocity: function (state, x, mu, t, valid) -> (v, state).
        kept: states of all steps, stacked along the first axis; None for none.

    Returns:
        (mel, states).
    """
    b = mu_BTM.shape[0]

    def step(x, inputs):
        t, following, state = inputs
        if guidance == 0:
            v, state = velocity(state, x, mu_BTM, jnp.full((b,), t), valid_BT)
        else:
            both = jnp.concatenate([mu_BTM, jnp.zeros_like(mu_BTM)])
            point = jnp.concatenate([x, x]), both, jnp.full((2 * b,), t), jnp.concatenate([valid_BT, valid_BT])
            v, state = velocity(state, *point)
            v = (1.0 + guidance) * v[:b] - guidance * v[b:]
        return x + (following - t) * v, state

    x_BTM, kept = jax.lax.scan(step, noise_BTM, (grid_S[:-1], grid_S[1:], kept))
    return jnp.where(valid_BT[..., None], x_BTM, 0.0), kept
