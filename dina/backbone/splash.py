"""Causal attention within segments by the splash kernel of `jax.experimental.pallas`, where a program is for a TPU.

The kernel keeps no scores and skips blocks after the diagonal. It is used for the shapes that it takes; every other
platform and shape runs what the caller gives. On the compiler's side it replaces, for 8,192 positions in blocks of 1,024,
eight products of different shapes forward and as many more backward for each that they have.

Legend: B rows, S positions, H heads, K values of a query, V of a value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float, Int

LANES = 128  # blocks are multiples of it
HEAD = 64  # sizes of heads are multiples of it


def takes(length: int, sizes: tuple[int, ...], block: int) -> bool:
    """Whether the kernel runs `length` positions of heads of `sizes` in blocks of `block`."""
    return block > 0 and block % LANES == 0 and length % block == 0 and all(size % HEAD == 0 for size in sizes)


def attend(
    otherwise: Callable, q_BSHK: Float[Array, "B S H K"], k_BSHK: Float[Array, "B S H K"], v_BSHV: Float[Array, "B S H V"],
    segment_BS: Int[Array, "B S"], block: int,
) -> Float[Array, "B S H V"]:  # fmt: skip
    """Attention of scaled queries.

    Args:
        otherwise: (q, k, v, segment) -> the same, for other platforms and shapes.
        q_BSHK, k_BSHK, v_BSHV: scaled queries, keys, values.
        segment_BS: a position sees those before it and itself in its own segment.
        block: queries and keys of a block.
    """
    if not takes(q_BSHK.shape[1], (q_BSHK.shape[-1], v_BSHV.shape[-1]), block):
        return otherwise(q_BSHK, k_BSHK, v_BSHV, segment_BS)
    return jax.lax.platform_dependent(q_BSHK, k_BSHK, v_BSHV, segment_BS, tpu=functools.partial(kernel, block), default=otherwise)


def kernel(block: int, q_BSHK: Array, k_BSHK: Array, v_BSHV: Array, segment_BS: Array, interpret: bool = False) -> Array:
    """The kernel on every row; `interpret` runs it anywhere, slowly."""
    length, heads = q_BSHK.shape[1:3]
    sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=min(block, 512), block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512), use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads)
    run = splash_attention.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    first = lambda x_BSHX: jnp.swapaxes(x_BSHX, 1, 2)

    def row(q_HSK, k_HSK, v_HSV, segment_S):
        return run(q_HSK, k_HSK, v_HSV, splash_attention.SegmentIds(segment_S, segment_S))

    y_BHSV = jax.vmap(row)(first(q_BSHK), first(k_BSHK), first(v_BSHV), segment_BS.astype(jnp.int32))
    return first(y_BHSV).astype(v_BSHV.dtype)
