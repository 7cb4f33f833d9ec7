"""The mel decoder: code vectors back to frames, and to a coarse and a refined mel (tokenizers.md B.5).

A transposed convolution (k3 s4) brings 12.5 Hz to 50 Hz, causal layers give the hidden frames H that the flow decoder
reads. A second one (k3 s2) gives a mel at 100 Hz, which is resized to the rate of `config.audio.recon` (coarse) and
corrected by a post-net (refined); both are trained targets. k < stride leaves every fourth frame with the bias alone
and the length at 4L - 1 (quirk Q17); the weights live with it.

Letters: B clips, U codes, T frames, D width, M mel bands, K kernel width.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dina.audio.encoder import Layer, attention_mask, in_stream, length_mask, mish, sinusoid
from dina.config import InputError

KERNEL = 3  # of both transposed convolutions
CODE, HALF = 4, 2  # their strides: hidden frames of a code, coarse frames of a hidden frame
STATISTICS = ("masked", "padded", "frame")
FRAME = (16000, 160)  # rate and hop of the frames that the coarse mel begins with


def grown_length(frames, kernel: int, stride: int):
    """Frames that `Upsample` makes of `frames`; zero for none. Numbers or arrays."""
    return ((frames - 1) * stride + min(kernel, stride)) * (frames > 0)


def hidden_length(codes, pool: int = CODE, kernel: int = KERNEL):
    """Hidden frames (50 Hz) of `codes` code vectors; zero for none. Numbers or arrays."""
    return grown_length(codes, kernel, pool)


def mel_length(
    codes, rate: int, hop: int, pool: int = CODE, kernel: int = KERNEL, stride: int = HALF, frame: tuple[int, int] = FRAME
) -> np.ndarray:
    """Frames of the coarse and refined mel of `codes` code vectors (host numbers): `stride` frames of `frame` per hidden
    frame, resized to `rate` / `hop`. In the reference's order of float32 operations, which at some lengths loses a frame."""
    fine = grown_length(hidden_length(np.asarray(codes), pool, kernel), kernel, stride)
    seconds = np.asarray(fine, np.float32) * np.float32(frame[1]) / np.float32(frame[0])
    return (seconds * np.float32(rate) / np.float32(hop)).astype(np.int32)


class GroupNorm(nn.Module):
    """One group over time and channels, eps 1e-5.

    statistics: 'masked' counts valid frames only, so padding changes nothing; 'padded' counts the whole batch row; 'frame'
    counts one frame's channels, so that a frame does not wait for those to come, which a stream needs.
    """

    statistics: str

    @nn.compact
    def __call__(self, x_BTD: Array, valid_BT: Array) -> Array:
        if self.statistics not in STATISTICS:
            raise InputError(f"audio.decoder.statistics {self.statistics!r} is not one of {', '.join(STATISTICS)}")
        scale_D = self.param("scale", nn.initializers.ones, (x_BTD.shape[-1],))
        bias_D = self.param("bias", nn.initializers.zeros, (x_BTD.shape[-1],))
        weight = valid_BT[..., None].astype(jnp.float32) if self.statistics == "masked" else jnp.ones((*x_BTD.shape[:2], 1))
        total = functools.partial(jnp.sum, axis=2 if self.statistics == "frame" else (1, 2), keepdims=True)
        count = jnp.maximum(total(weight) * x_BTD.shape[-1], 1.0)
        x32 = x_BTD.astype(jnp.float32)
        centred = x32 - total(x32 * weight) / count
        variance = total(centred**2 * weight) / count
        return (centred * jax.lax.rsqrt(variance + 1e-5) * scale_D + bias_D).astype(x_BTD.dtype)


def transposed(x_BTD: Array, kernel_KDE: Array, stride: int) -> Float[Array, "B T2 E"]:
    """out[t * stride + k] += x[t] W[k]; length (T - 1) * stride + K."""
    size, _, out = kernel_KDE.shape
    b, t, _ = x_BTD.shape
    groups = -(-size // stride)
    y = jnp.einsum("btd,kde->btke", x_BTD, kernel_KDE)
    y = jnp.pad(y, ((0, 0), (0, 0), (0, groups * stride - size), (0, 0)))
    total = 0
    for g in range(groups):
        part = y[:, :, g * stride : (g + 1) * stride].reshape(b, t * stride, out)
        total = total + jnp.pad(part, ((0, 0), (g * stride, (groups - 1 - g) * stride), (0, 0)))
    return total[:, : (t - 1) * stride + size]


class Upsample(nn.Module):
    """Transposed convolution, group norm, right trim of k - stride."""

    features: int
    stride: int
    statistics: str
    kernel: int = KERNEL
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Array, length_B: Int[Array, "B"]) -> Array:
        """`length_B`: valid input frames; the input must be zero beyond. Output beyond its length is garbage."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1)), (self.kernel, x_BTD.shape[-1], self.features))
        bias_D = self.param("bias", nn.initializers.zeros, (self.features,))
        y = transposed(x_BTD.astype(self.dtype), kernel.astype(self.dtype), self.stride) + bias_D
        # Statistics see the tail that is trimmed below, as the reference's do.
        grown_B = ((length_B - 1) * self.stride + self.kernel) * (length_B > 0)
        y = GroupNorm(self.statistics, name="norm")(y, length_mask(grown_B, y.shape[1]))
        return y[:, : y.shape[1] - max(0, self.kernel - self.stride)]


def resize(x_BTD: Array, length_in_B: Array, length_out_B: Array, frames_out: int, statistics: str) -> Array:
    """Nearest-neighbour resize along time, src = floor(i * in / out): by each clip's lengths ('masked') or the batch's."""
    at = jnp.arange(frames_out, dtype=jnp.float32)
    if statistics == "masked":
        scale = length_in_B.astype(jnp.float32) / jnp.maximum(length_out_B, 1).astype(jnp.float32)
        index_BT = (at * scale[:, None]).astype(jnp.int32)
    else:
        index_BT = jnp.broadcast_to((at * (x_BTD.shape[1] / frames_out)).astype(jnp.int32), (x_BTD.shape[0], frames_out))
    return jnp.take_along_axis(x_BTD, jnp.clip(index_BT, 0, x_BTD.shape[1] - 1)[..., None], axis=1)


class PostNet(nn.Module):
    """Convolutions (k5, group norm, Mish) whose output is added to the coarse mel."""

    channels: tuple[int, ...]
    statistics: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, mel_BTM: Array, valid_BT: Array) -> Array:
        keep = valid_BT[..., None] if self.statistics == "masked" else 1.0
        x = mel_BTM * keep
        for index, features in enumerate(self.channels[:-1]):
            x = nn.Conv(features, (5,), padding=2, dtype=self.dtype, name=f"conv{index}")(x)
            x = GroupNorm(self.statistics, name=f"norm{index}")(x, valid_BT)
            x = mish(x) * keep
        return mel_BTM + nn.Dense(mel_BTM.shape[-1], dtype=self.dtype, name="out")(x)


class FrameDecoder(nn.Module):
    """Upsampling and causal layers: code vectors to hidden frames at 50 Hz.

    Attributes:
        width, layers, heads, ff: sizes.
        statistics: of the group norm, see `GroupNorm`.
        pool, kernel: stride and width of the transposed convolution.
        activation: of the layers.
    """

    width: int
    layers: int
    heads: int
    ff: int
    statistics: str
    pool: int = CODE
    kernel: int = KERNEL
    activation: str = "gelu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BUD: Float[Array, "B U D"], codes_B: Int[Array, "B"], start=0, room: int = 0) -> Float[Array, "B T D"]:
        """Frames of U codes: all of a clip, or in a stream the next ones.

        Args:
            x_BUD: code vectors.
            codes_B: codes of the whole clip.
            start: frames before these, in a stream; then each code gives `pool` frames.
            room: frames of the longest stream.
        """
        x_BUD = x_BUD * length_mask(codes_B - start // self.pool, x_BUD.shape[1])[..., None]
        if in_stream(self):  # the code to come, which decides where the last one's frames end, adds nothing to them
            x_BUD = jnp.pad(x_BUD, ((0, 0), (0, 1), (0, 0)))
        x_BTD = Upsample(self.width, self.pool, self.statistics, self.kernel, self.dtype, name="dconv1")(x_BUD, codes_B)
        x_BTD = x_BTD[:, : self.pool * (x_BUD.shape[1] - 1)] if in_stream(self) else x_BTD
        place_T = start + jnp.arange(x_BTD.shape[1])
        x_BTD = (x_BTD + jnp.asarray(sinusoid(room or x_BTD.shape[1], self.width))[place_T]).astype(x_BTD.dtype)
        hidden_B = hidden_length(codes_B, self.pool, self.kernel)
        mask_BTS = attention_mask(length_mask(hidden_B, room or x_BTD.shape[1]), "causal", place_T)
        for index in range(self.layers):
            x_BTD = Layer(self.heads, self.ff, dtype=self.dtype, activation=self.activation, name=f"layer{index}")(x_BTD, mask_BTS)
        x_BTD = nn.LayerNorm(epsilon=1e-5, name="norm")(x_BTD)
        return jnp.where(length_mask(hidden_B - start, x_BTD.shape[1])[..., None], x_BTD, 0.0)


class MelHead(nn.Module):
    """Hidden frames to the coarse and the refined mel.

    Attributes:
        mels, rate, hop: of the mels.
        post_channels: of the post-net; the last entry is not used.
        statistics: of the group norms, see `GroupNorm`; 'padded' also resizes by the batch's lengths, as released.
        pool: of the frame decoder.
        kernel, stride: of the transposed convolution.
        frame: rate and hop of its frames.
    """

    mels: int
    rate: int
    hop: int
    post_channels: tuple[int, ...]
    statistics: str
    pool: int = CODE
    kernel: int = KERNEL
    stride: int = HALF
    frame: tuple[int, int] = FRAME
    dtype: jnp.dtype = jnp.float32

    @nn.nowrap
    def lengths(self, codes_B: Int[Array, "B"], codes: int) -> tuple[Int[Array, "B"], int]:
        """(mel frames of each clip, of a batch padded to `codes`)."""
        length_U = mel_length(np.arange(codes + 1), self.rate, self.hop, self.pool, self.kernel, self.stride, self.frame)
        return jnp.asarray(length_U)[codes_B], int(length_U[-1])

    @nn.compact
    def __call__(self, hidden_BTD: Float[Array, "B T D"], codes_B: Int[Array, "B"]) -> tuple[Array, Array]:
        hidden_B = hidden_length(codes_B, self.pool, self.kernel)
        codes = (hidden_BTD.shape[1] - min(self.kernel, self.pool)) // self.pool + 1
        fine_B = grown_length(hidden_B, self.kernel, self.stride)
        fine = Upsample(self.mels, self.stride, self.statistics, self.kernel, self.dtype, name="dconv2")(hidden_BTD, hidden_B)
        fine = jnp.where(length_mask(fine_B, fine.shape[1])[..., None], fine, 0.0)
        length_B, frames = self.lengths(codes_B, codes)
        valid_BT = length_mask(length_B, frames)
        coarse = resize(fine, fine_B, length_B, frames, self.statistics)
        refined = PostNet(self.post_channels, self.statistics, self.dtype, name="post_net")(coarse, valid_BT)
        return tuple(jnp.where(valid_BT[..., None], mel, 0.0) for mel in (coarse, refined))


class MelDecoder(nn.Module):
    """The part `audio_decoder`. Build it with `make_decoder`."""

    frames: FrameDecoder
    head: MelHead

    def hidden(self, x_BUD: Float[Array, "B U D"], codes_B: Int[Array, "B"], start=0, room: int = 0) -> Float[Array, "B T D"]:
        """Frames at 50 Hz for the flow decoder, [B, 4U - 1, D], zero beyond `hidden_length`; see `FrameDecoder` for streams."""
        return self.frames(x_BUD, codes_B, start, room)

    def __call__(self, x_BUD: Float[Array, "B U D"], codes_B: Int[Array, "B"]) -> tuple[Array, Array, Array]:
        """(hidden, coarse, refined); the mels [B, T', M] are normalised as config.audio.recon says, zero beyond `mel_length`.

        Args:
            x_BUD: what `proj_decoder` made of the codes.
            codes_B: valid codes of each clip.
        """
        hidden_BTD = self.frames(x_BUD, codes_B)
        return hidden_BTD, *self.head(hidden_BTD, codes_B)


def make_decoder(audio: ConfigDict) -> MelDecoder:
    """The decoder of a config's `audio` section; its `decoder` may also set kernel, stride and activation."""
    d, recon, pool = dict(audio.decoder), audio.recon, audio.bridge.pool
    channels, stride, kernel = tuple(d.pop("post_channels")), d.pop("stride", HALF), d.get("kernel", KERNEL)
    frame = (audio.features.rate, audio.features.hop)
    head = MelHead(recon.mels, recon.rate, recon.hop, channels, d["statistics"], pool, kernel, stride, frame, parent=None)
    return MelDecoder(FrameDecoder(**d, pool=pool, parent=None), head)
