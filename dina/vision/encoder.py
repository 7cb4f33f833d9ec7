"""The vision transformer: patches of packed images to features, shaped like Qwen2.5-VL's (tokenizers.md A.2).

Dense patch embedding without bias; pre-norm blocks of RMSNorm, fused-qkv attention with 2-D rotary positions and a
SwiGLU feed-forward, all with biases; most layers attend inside square windows, `full_layers` over the whole image;
no final norm and no merger (the bridge follows). Windows are ids in a mask. Where a pack is much longer than a window, tokens
are first sorted by window, as in the released code, and layers inside windows read neighbours only; features come out in
the order of the patches either way.

Letters: B packs, P patches of a pack, T = B*P all patches, D width, H heads, K head width, F feed-forward width.
Dense layers work on [T, D]: the CPU backend needs about twice as long for the weight gradient of a 3-D operand.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dina.vision.attention import attend, attend_near

ROPE_THETA = 1e4
PIXELS = ("float32", "bfloat16")
# Windows in a pack from which on it is sorted by them: three windows are read for one, and both forms are in the program. Two
# pictures of 504 x 504 pixels through the stamps' encoder: 0.57 instead of 0.93 s of processor, with gradient 1.9 instead of 3.3.
SORTED = 8


class RMSNorm(nn.Module):
    """x / rms(x) with float32 statistics, cast to x's dtype, then times a learned scale."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * scale_D.astype(x.dtype)


def rotary_angles(row: Int[Array, "B P"], col: Int[Array, "B P"], head_dim: int) -> Float[Array, "B P K/2"]:
    """The 2-D rotary angles, float32: a quarter of the head for rows, a quarter for columns.

    Raises:
        ValueError: `head_dim` is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head width {head_dim} must be a multiple of 4 for 2-D rotary positions")
    half = head_dim // 2
    frequency = ROPE_THETA ** (-jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    return jnp.concatenate([position[..., None] * frequency for position in (row, col)], axis=-1)


def rotary_tables(
    row: Int[Array, "B P"], col: Int[Array, "B P"], head_dim: int
) -> tuple[Float[Array, "B P 1 K"], Float[Array, "B P 1 K"]]:
    """cos and sin of `rotary_angles`, twice."""
    angles = rotary_angles(row, col, head_dim)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BPHK: Array, cos: Array, sin: Array) -> Array:
    """Rotates pairs (k, k + K/2) in float32, returns x's dtype."""
    x = x_BPHK.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    return (x * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x_BPHK.dtype)


class Block(nn.Module):
    """One pre-norm layer; `is_full` (traced, 0-d) says whether windows count, so that all layers share one program.

    `near`: patches of a window at most, if tokens are sorted by window; else 0.
    """

    heads: int
    ff: int
    depth: int
    dtype: jnp.dtype = jnp.float32
    near: int = 0

    @nn.compact
    def __call__(self, x_TD, is_full, ids, rotary):
        x_TD = x_TD + self.mix(RMSNorm(name="norm1")(x_TD), is_full, ids, rotary)
        h_TD = RMSNorm(name="norm2")(x_TD)
        gate_TF = nn.Dense(self.ff, dtype=self.dtype, name="gate")(h_TD)
        up_TF = nn.Dense(self.ff, dtype=self.dtype, name="up")(h_TD)
        return x_TD + self.branch_out("down", x_TD.shape[-1])(nn.silu(gate_TF) * up_TF), None

    @nn.nowrap
    def branch_out(self, name, width):
        """The last layer of a branch starts small, so that 2*depth branches add up to the size of one."""
        init = nn.initializers.variance_scaling(0.5 / self.depth, "fan_in", "truncated_normal")
        return nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)

    @nn.nowrap
    def mix(self, x_TD, is_full, ids, rotary):
        segment_BP, window_BP = ids
        b, p = segment_BP.shape
        d = x_TD.shape[-1]
        qkv = nn.Dense(3 * d, dtype=self.dtype, name="qkv")(x_TD).reshape(b, p, 3, self.heads, d // self.heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = rotate(q, *rotary) * (d // self.heads) ** -0.5, rotate(k, *rotary)
        if self.near:
            # Recomputed, because the backward pass would keep its scores for the layers that take the other branch too.
            full = jax.checkpoint(lambda q, k, v: attend(q, k, v, (segment_BP,)))
            out_BPD = jax.lax.cond(is_full, full, lambda q, k, v: attend_near(q, k, v, window_BP, self.near), q, k, v)
        else:
            out_BPD = attend(q, k, v, (segment_BP, jnp.where(is_full, 0, window_BP)))
        return self.branch_out("proj", d)(out_BPD.reshape(b * p, d))


class VisionTransformer(nn.Module):
    """Packs of patches to features.

    Attributes:
        width, depth, heads, ff: D, layers, H, F.
        full_layers: indices of the layers that attend over the whole image; the others stay inside windows.
        window_patches: patches of a window at most.
        pixels: 'float32', or 'bfloat16' as the released code rounds them, whatever the precision of the rest.
        remat: 'none' or 'block' (recompute each block in the backward pass).
        dtype: of the matrix products; norms, rotary angles and softmax are float32.
    """

    width: int
    depth: int
    heads: int
    ff: int
    full_layers: tuple[int, ...]
    window_patches: int
    pixels: str = "float32"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B P 1176"],
        segment: Int[Array, "B P"],
        row: Int[Array, "B P"],
        col: Int[Array, "B P"],
        window: Int[Array, "B P"],
    ) -> Float[Array, "B P D"]:
        """Features in the order of the patches (arrays of preprocess.pack_images, stacked); padding is garbage."""
        if self.pixels not in PIXELS:
            raise ValueError(f"encoder.pixels={self.pixels!r}: choose one of {', '.join(PIXELS)}")
        if self.pixels == "bfloat16":
            patches = jax.lax.reduce_precision(patches, exponent_bits=8, mantissa_bits=7)  # XLA drops a cast to and fro
        b, p, values = patches.shape
        embed = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="patch_embed")
        x_TD = embed(patches.reshape(b * p, values))
        near = self.window_patches if p >= SORTED * self.window_patches else 0
        if near:
            order_BP = jnp.argsort(window, axis=1, stable=True)
            x_TD = jnp.take_along_axis(x_TD.reshape(b, p, -1), order_BP[..., None], 1).reshape(b * p, -1)
            segment, row, col, window = (jnp.take_along_axis(x, order_BP, 1) for x in (segment, row, col, window))
        rotary = rotary_tables(row, col, self.width // self.heads)
        is_full_L = jnp.array([layer in self.full_layers for layer in range(self.depth)])
        block = {"none": Block, "block": nn.remat(Block, prevent_cse=False)}[self.remat]
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.depth,
        )(self.heads, self.ff, self.depth, self.dtype, near, name="blocks")
        x_TD, _ = blocks(x_TD, is_full_L, (segment, window), rotary)
        x_BPD = x_TD.reshape(b, p, self.width)
        return jnp.take_along_axis(x_BPD, jnp.argsort(order_BP, axis=1)[..., None], 1) if near else x_BPD
