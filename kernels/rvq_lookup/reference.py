"""The search in plain JAX: the truth that the kernel is compared with, in ids and in cost.

Legend: N vectors, D dimensions, L levels, K codes of one book, T codes of one tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TILE = 1024  # codes scored at once


def rvq_lookup(x_ND: Float[Array, "N D"], books_KD: list[Float[Array, "K D"]], levels: int) -> Int[Array, "N L"]:
    """See `kernels.rvq_lookup.rvq_lookup`; arguments are checked there."""
    residual_ND, codes = x_ND, []
    for level in range(levels):
        book_KD = books_KD[level % len(books_KD)]
        codes.append(_nearest(residual_ND, book_KD))
        residual_ND = residual_ND - book_KD[codes[-1]]
    return jnp.stack(codes, -1)


def _nearest(x_ND: Array, book_KD: Array) -> Array:
    """Ids [N], tile by tile with a running minimum: [N, K] never exists."""
    size = book_KD.shape[0]
    tiles = -(-size // TILE)
    book_iTD = jnp.pad(book_KD, ((0, tiles * TILE - size), (0, 0))).reshape(tiles, TILE, -1)

    def step(best, tile):
        index, book_TD = tile
        dot_NT = jnp.einsum("nd,td->nt", x_ND, book_TD, precision=jax.lax.Precision.HIGHEST)
        score_NT = jnp.sum(x_ND**2, -1)[:, None] + jnp.sum(book_TD**2, -1) - 2 * dot_NT
        score_NT = jnp.where(index * TILE + jnp.arange(TILE) < size, score_NT, jnp.inf)
        low_N, id_N = jnp.min(score_NT, -1), index * TILE + jnp.argmin(score_NT, -1).astype(jnp.int32)
        better = low_N < best[1]  # strict: an equal later code does not replace an earlier one
        return (jnp.where(better, id_N, best[0]), jnp.where(better, low_N, best[1])), None

    first = (jnp.zeros(x_ND.shape[0], jnp.int32), jnp.full(x_ND.shape[0], jnp.inf, jnp.float32))
    return jax.lax.scan(step, first, (jnp.arange(tiles), book_iTD))[0][0]
