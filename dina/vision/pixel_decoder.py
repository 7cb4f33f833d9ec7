"""The pixel decoder: quantised cells to pixels, deterministic, at any resolution (reference/tokenizers.md A.6).

Each cell is spread over its four patches, a vision transformer with sub-layer norms and interleaved 2-D rotary
positions mixes the patches of one image, and a head predicts the patches' values in the order of preprocess.py.
The part `pixel_decoder`. Options keep the released weights' habits: `positions='raster'` numbers patches as if they
were in raster order although they are in merge-group order (Q4), `attn_scale='double'` scales twice (Q5). Other blocks of the
same family have a plain feed-forward, no sub-layer norms, other biases.

Letters: B packs, P patches, N = P/4 cells, D width of a code vector, W width, H heads, K head width, I images.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dina.vision.attention import attend
from dina.vision.encoder import RMSNorm

PART = "pixel_decoder"
CHILDREN = 4  # patches of a cell
ROPE_THETA = 1e4


def default_pixel_decoder_config() -> ConfigDict:
    """`config.vision.pixel_decoder`: released 32 layers of width 1,024 with 16 heads and 2,730; small here."""
    return ConfigDict(
        {
            "width": 128,
            "depth": 4,
            "heads": 4,
            "ff": 256,
            "eps": 1e-6,
            "positions": "block",
            "attn_scale": "single",
            "remat": "none",
        }
    )


default_config = default_pixel_decoder_config  # the name that dina/vision/config.py looks for


def segment_index(segment_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number of each token within its segment (segments are contiguous)."""
    at_T = jnp.arange(segment_BT.shape[1])
    change_BT = jnp.concatenate([jnp.ones_like(segment_BT[:, :1]), jnp.diff(segment_BT, axis=1)], axis=1) != 0
    return at_T - jax.lax.cummax(jnp.where(change_BT, at_T, 0), axis=1)


def positions(pack: Mapping[str, Array], order: str) -> tuple[Array, Array]:
    """(row, col) [B, P] that the rotary angles use.

    Args:
        pack: segment, row, col [B, P] and, for 'raster', grid [B, I, 2].
        order: 'block' (where the patch is) or 'raster' (patch k of an image of w patches a row: k // w, k % w).
    """
    if order == "block":
        return pack["row"], pack["col"]
    if order != "raster":
        raise ValueError(f"pixel_decoder.positions={order!r}: choose block or raster")
    width_BI = jnp.maximum(2 * pack["grid"][..., 1], 1)
    width_BP = jnp.take_along_axis(width_BI, jnp.maximum(pack["segment"] - 1, 0), axis=1)
    index_BP = segment_index(pack["segment"])
    return index_BP // width_BP, index_BP % width_BP


def rotary_tables(row_BP: Array, col_BP: Array, head_dim: int) -> tuple[Array, Array]:
    """cos, sin [B, P, 1, K]: half the head turns by row, half by column, each angle for an adjacent pair."""
    half = head_dim // 2
    frequency = ROPE_THETA ** (-jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    angles = jnp.concatenate([p[..., None].astype(jnp.float32) * frequency for p in (row_BP, col_BP)], axis=-1)
    angles = jnp.repeat(angles, 2, axis=-1)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate_pairs(x: Array, cos: Array, sin: Array) -> Array:
    """Turns adjacent pairs (a, b) -> (a cos - b sin, b cos + a sin), in float32."""
    x32 = x.astype(jnp.float32)
    a, b = x32[..., ::2], x32[..., 1::2]
    turned = jnp.stack([-b, a], axis=-1).reshape(x.shape)
    return (x32 * cos + turned * sin).astype(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a second norm before its output projection (sub-layer norm)."""

    heads: int
    ff: int
    eps: float
    scale: float
    norms: str = "sub"
    ffn: str = "swiglu"
    qkv_bias: str = "qv"

    @nn.compact
    def __call__(self, x_BPW, ids, rotary):
        w = x_BPW.shape[-1]
        split = lambda y: y.reshape(*y.shape[:2], self.heads, w // self.heads)
        h_BPW = RMSNorm(self.eps, name="norm1")(x_BPW)
        q, k, v = (split(nn.Dense(w, use_bias=name in self.qkv_bias, name=name)(h_BPW)) for name in "qkv")
        q, k = rotate_pairs(q, *rotary) * self.scale, rotate_pairs(k, *rotary)
        mixed_BPW = attend(q, k, v, ids)
        inner = lambda name, y: RMSNorm(self.eps, name=name)(y) if self.norms == "sub" else y
        x_BPW = x_BPW + nn.Dense(w, name="out")(inner("norm_attn", mixed_BPW))
        h_BPF = self.hidden(RMSNorm(self.eps, name="norm2")(x_BPW))
        return x_BPW + nn.Dense(w, name="w3")(inner("norm_ff", h_BPF)), None

    @nn.nowrap
    def hidden(self, h_BPW):
        h_BPF = nn.Dense(self.ff, name="w1")(h_BPW)
        if self.ffn == "gelu":
            return nn.gelu(h_BPF, approximate=False)
        return nn.silu(h_BPF) * nn.Dense(self.ff, name="w2")(h_BPW)


class PixelDecoder(nn.Module):
    """Sums of code vectors of packed images to patch values.

    Attributes:
        width, depth, heads, ff: W, layers, H, hidden width of feed-forward and head.
        out_dim: values of a patch.
        eps: of the norms (1e-6 in the unmerger, always).
        positions: 'block' or 'raster', see `positions`.
        attn_scale: 'single' (K^-1/2) or 'double' (K^-1).
        norms: 'sub' (one more norm before each output projection) or 'pre'.
        ffn: 'swiglu' or 'gelu'.
        qkv_bias: which of q, k and v have biases.
        remat: 'none' or 'block'.
    """

    width: int
    depth: int
    heads: int
    ff: int
    out_dim: int
    eps: float = 1e-6
    positions: str = "block"
    attn_scale: str = "single"
    norms: str = "sub"
    ffn: str = "swiglu"
    qkv_bias: str = "qv"
    remat: str = "none"

    @nn.compact
    def __call__(self, q_BND: Float[Array, "B N D"], pack: Mapping[str, Array]) -> Float[Array, "B P out"]:
        """Patch values (CLIP-normalised, both temporal slices) in pack order; padding is garbage.

        Args:
            q_BND: sums of code vectors.
            pack: segment, row, col [B, P]; grid [B, I, 2] for raster positions.
        """
        if self.norms not in ("sub", "pre") or self.ffn not in ("swiglu", "gelu"):
            raise ValueError(f"pixel_decoder: norms={self.norms!r} is sub or pre, ffn={self.ffn!r} is swiglu or gelu")
        b, n, _ = q_BND.shape
        x = RMSNorm(self.eps, name="post_quant_norm")(nn.Dense(self.width, name="post_quant")(q_BND))
        h = nn.Dense(CHILDREN * self.width, name="unmerge1")(RMSNorm(1e-6, name="unmerge_norm")(x))
        h = nn.Dense(CHILDREN * self.width, name="unmerge2")(nn.gelu(h, approximate=False))
        x_BPW = RMSNorm(self.eps, name="norm_in")(h.reshape(b, n * CHILDREN, self.width))
        head_dim = self.width // self.heads
        rotary = rotary_tables(*positions(pack, self.positions), head_dim)
        scale = head_dim ** {"single": -0.5, "double": -1.0}[self.attn_scale]
        block = {"none": Block, "block": nn.remat(Block, prevent_cse=False)}[self.remat]
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.depth,
        )(self.heads, self.ff, self.eps, scale, self.norms, self.ffn, self.qkv_bias, name="layers")
        x_BPW, _ = layers(x_BPW, (pack["segment"],), rotary)
        h = nn.gelu(nn.Dense(self.ff, name="head1")(RMSNorm(self.eps, name="norm_out")(x_BPW)), approximate=False)
        return nn.Dense(self.out_dim, name="head2")(h)


def make_pixel_decoder(config_vision: ConfigDict) -> PixelDecoder:
    """The pixel decoder of a config's `vision` section."""
    values = 3 * config_vision.temporal * config_vision.patch**2
    return PixelDecoder(out_dim=values, parent=None, **config_vision.pixel_decoder.to_dict())


def init_pixel_decoder(config_vision: ConfigDict, key: jax.Array) -> Mapping:
    """Parameters of the part `pixel_decoder`."""
    pack = {name: jnp.zeros((1, CHILDREN), jnp.int32) for name in ("segment", "row", "col")}
    pack["grid"] = jnp.ones((1, 1, 2), jnp.int32)
    return make_pixel_decoder(config_vision).init(key, jnp.zeros((1, 1, config_vision.quantizer.dim)), pack)["params"]
