"""The Whisper-shaped encoder and the gated bridge: mel frames to one continuous vector per 80 ms (tokenizers.md B.2, B.3).

Two convolutions, sinusoid positions, pre-norm transformer layers that see the whole chunk, a final norm; the bridge
joins four frames, adds a gated convolution of them and normalises. Frames beyond a clip's length are masked in
attention and zero on the way out. `Layer` also serves the mel decoder and the flow's prenet.

Letters: B clips, T frames, S frames that are seen, D width, H heads, K head width, U codes (T / 4), Z = 4 D width of a
code's vector.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from dina.audio.features import encoder_length
from dina.config import check_name

MASKED = -1e30  # finite, so that a row without any allowed key stays finite
STREAM = "stream"  # the collection of what causal modules keep between the chunks of a stream
# Of feed-forward layers, by the names that transformers gives them.
ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}


def activation(name: str):
    """A function by its name in `ACTIVATIONS`. Raises InputError for another name."""
    check_name(name, ACTIVATIONS, "activation")
    return ACTIVATIONS[name]


def sinusoid(length: int, width: int) -> Float[np.ndarray, "T D"]:
    """Whisper's fixed positions: sines, then cosines, of geometrically falling frequencies (float32)."""
    half = width // 2
    frequency = np.exp(-np.log(1e4) / (half - 1) * np.arange(half))
    angle = np.arange(length)[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def length_mask(length_B: Int[Array, "B"], frames: int) -> Bool[Array, "B T"]:
    """True for the first `length` frames of each clip."""
    return jnp.arange(frames) < length_B[:, None]


def attention_mask(valid_BS: Bool[Array, "B S"], order: str, query_T: Int[Array, "T"] | None = None) -> Bool[Array, "B T S"]:
    """Which key (last axis) each query sees: valid ones; with order 'causal' no later ones, with 'both' all.

    query_T: positions of the queries; default: those of the keys.
    """
    key_S = jnp.arange(valid_BS.shape[1])
    query_T = key_S if query_T is None else query_T
    visible = jnp.ones((len(query_T), len(key_S)), bool) if order == "both" else key_S <= query_T[:, None]
    return visible & valid_BS[:, None, :]


def in_stream(module: nn.Module) -> bool:
    """Whether the module is applied to the next chunk of a stream: with `mutable=[STREAM]`."""
    return module.is_mutable_collection(STREAM) and not module.is_initializing()


def with_past(module: nn.Module, x_BTC: Array, frames: int, name: str = "left") -> tuple[Array, int]:
    """(x behind the last `frames` frames of the chunk before, 0) in a stream, else (x, frames): what is missing on the left."""
    if not in_stream(module):
        return x_BTC, frames
    left = module.variable(STREAM, name, jnp.zeros, (x_BTC.shape[0], frames, x_BTC.shape[2]), x_BTC.dtype)
    joined = jnp.concatenate([left.value, x_BTC], axis=1)
    left.value = joined[:, -frames:]
    return joined, 0


def with_past_keys(module: nn.Module, k_BTHK: Array, v_BTHK: Array, room: int) -> tuple[Array, Array]:
    """Keys and values of all frames so far, in arrays of `room` frames, in a stream; else those of the chunk, which is all."""
    if not in_stream(module):
        return k_BTHK, v_BTHK
    seen = module.variable(STREAM, "seen", jnp.zeros, (), jnp.int32)
    found = []
    for name, chunk in (("past_k", k_BTHK), ("past_v", v_BTHK)):
        kept = module.variable(STREAM, name, jnp.zeros, (chunk.shape[0], room, *chunk.shape[2:]), chunk.dtype)
        kept.value = jax.lax.dynamic_update_slice(kept.value, chunk, (0, seen.value, 0, 0))
        found.append(kept.value)
    seen.value = seen.value + k_BTHK.shape[1]
    return tuple(found)


def mish(x: Array) -> Array:
    """x tanh(softplus(x))."""
    return x * jnp.tanh(jax.nn.softplus(x))


class RMSNorm(nn.Module):
    """x / rms(x) in float32, times a learned scale."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)).astype(x.dtype) * scale_D


def make_norm(kind: str, name: str) -> nn.Module:
    """A norm over the last axis: 'layer' (eps 1e-5) or 'rms' (eps 1e-6)."""
    return RMSNorm(name=name) if kind == "rms" else nn.LayerNorm(epsilon=1e-5, name=name)


class Layer(nn.Module):
    """One pre-norm layer: attention (no bias on keys), then a two-matrix feed-forward (exact GELU by default)."""

    heads: int
    ff: int
    norm: str = "layer"
    dtype: jnp.dtype = jnp.float32
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], mask_BTS: Bool[Array, "B T S"]) -> Float[Array, "B T D"]:
        width = x_BTD.shape[-1]
        h_BTD = make_norm(self.norm, "attention_norm")(x_BTD)
        q, k, v = (
            nn.Dense(width, use_bias=name != "k", dtype=self.dtype, name=name)(h_BTD).reshape(*h_BTD.shape[:2], self.heads, -1)
            for name in ("q", "k", "v")
        )
        k, v = with_past_keys(self, k, v, mask_BTS.shape[-1])
        x_BTD = x_BTD + nn.Dense(width, dtype=self.dtype, name="out")(attend(q, k, v, mask_BTS))
        h_BTD = make_norm(self.norm, "ff_norm")(x_BTD)
        h_BTD = activation(self.activation)(nn.Dense(self.ff, dtype=self.dtype, name="fc1")(h_BTD))
        return x_BTD + nn.Dense(width, dtype=self.dtype, name="fc2")(h_BTD)


def attend(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, mask_BTS: Array) -> Float[Array, "B T HK"]:
    """Softmax attention, scale K^-1/2, softmax in float32, heads concatenated."""
    b, t, h, k = q_BTHK.shape
    score = jnp.einsum("bthk,bshk->bhts", q_BTHK * k**-0.5, k_BSHK, preferred_element_type=jnp.float32)
    weight = jax.nn.softmax(jnp.where(mask_BTS[:, None], score, MASKED), axis=-1).astype(v_BSHK.dtype)
    return jnp.einsum("bhts,bshk->bthk", weight, v_BSHK).reshape(b, t, h * k)


class WhisperEncoder(nn.Module):
    """Mel features to frames of 20 ms.

    Attributes:
        width, layers, heads, ff: sizes.
        stride: mel frames of an output frame.
        activation: of the layers; the convolutions have exact GELU.
        dtype: of the matrix products; norms and softmax are float32.
    """

    width: int
    layers: int
    heads: int
    ff: int
    stride: int = 2
    activation: str = "gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, mel_BTM: Float[Array, "B T M"], frames_B: Int[Array, "B"]) -> Float[Array, "B T2 D"]:
        """Args: mel with zeros from `frames_B` on. Returns [B, (T - 1) // stride + 1, D], zero beyond each length."""
        x = nn.Conv(self.width, (3,), padding=1, dtype=self.dtype, name="conv1")(mel_BTM)
        x = nn.gelu(x, approximate=False)
        x = nn.Conv(self.width, (3,), (self.stride,), padding=1, dtype=self.dtype, name="conv2")(x)
        x = nn.gelu(x, approximate=False)
        x_BTD = (x + sinusoid(x.shape[1], self.width)).astype(x.dtype)
        valid_BT = length_mask(encoder_length(frames_B, self.stride), x_BTD.shape[1])
        mask_BTT = attention_mask(valid_BT, "both")
        for index in range(self.layers):
            x_BTD = Layer(self.heads, self.ff, dtype=self.dtype, activation=self.activation, name=f"layer{index}")(x_BTD, mask_BTT)
        x_BTD = nn.LayerNorm(epsilon=1e-5, name="norm")(x_BTD)
        return jnp.where(valid_BT[..., None], x_BTD, 0.0)


class Bridge(nn.Module):
    """Joins `pool` frames: LayerNorm(down(silu(gate) * up) + frames), gate and up seeing the joined frames.

    The released k4 s4 convolutions without bias are matrix products on the joined frames.
    """

    pool: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B U Z"]:
        b, t, d = x_BTD.shape
        x_BUZ = jnp.pad(x_BTD, ((0, 0), (0, -t % self.pool), (0, 0))).reshape(b, -1, self.pool * d)

        def dense(name):
            return nn.Dense(self.pool * d, use_bias=False, dtype=self.dtype, name=name)

        h_BUZ = nn.silu(dense("gate")(x_BUZ)) * dense("up")(x_BUZ)
        return nn.LayerNorm(epsilon=1e-5, name="norm")(dense("down")(h_BUZ) + x_BUZ)


class AudioEncoder(nn.Module):
    """The part `audio_encoder`: encoder and bridge. Build it with `make_encoder`."""

    encoder: WhisperEncoder
    bridge: Bridge

    def __call__(self, mel_BTM: Float[Array, "B T M"], frames_B: Int[Array, "B"]) -> Float[Array, "B U Z"]:
        """Continuous vectors, 12.5 a second; those beyond `code_length(encoder_length(frames))` are garbage, mask them."""
        return self.bridge(self.encoder(mel_BTM, frames_B))


def make_encoder(audio: ConfigDict) -> AudioEncoder:
    """The encoder of a config's `audio` section; its `encoder` may set any field of `WhisperEncoder`."""
    return AudioEncoder(WhisperEncoder(**audio.encoder, parent=None), Bridge(audio.bridge.pool, parent=None))
