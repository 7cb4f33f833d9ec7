"""The search in one book, tile by tile.

Legend: N vectors, D dimensions, K codes of one book, T codes of one search tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TILE = 1024  # codes scored at once: the score matrix never exceeds [N, TILE]
HIGHEST = jax.lax.Precision.HIGHEST


def scores(x_ND: Array, book_TD: Array) -> Array:
    """Squared distances [N, T], in the order of operations of the reference (A.4), full float32."""
    dot_NT = jnp.einsum("nd,td->nt", x_ND, book_TD, precision=HIGHEST)
    return (jnp.sum(x_ND**2, -1)[:, None] + jnp.sum(book_TD**2, -1)) - 2 * dot_NT


def nearest(
    x_ND: Float[Array, "N D"], book_KD: Float[Array, "K D"], metric: str = "euclidean"
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Nearest code of one book, first index on ties.

    Books larger than `TILE` are searched tile by tile with a running minimum, so that [N, K] never exists.

    Args:
        x_ND: vectors.
        book_KD: codes.
        metric: 'euclidean', or 'cosine': vectors and codes are scaled to unit length first.

    Returns:
        (ids int32 [N], squared distances float32 [N]).
    """
    x_ND, book_KD = x_ND.astype(jnp.float32), book_KD.astype(jnp.float32)
    if metric == "cosine":
        x_ND, book_KD = unit(x_ND), unit(book_KD)
    size = book_KD.shape[0]
    if size <= TILE:
        score_NK = scores(x_ND, book_KD)
        return jnp.argmin(score_NK, -1).astype(jnp.int32), jnp.min(score_NK, -1)

    def step(best, tile):
        first, book_TD = tile
        score_NT = tile_scores(x_ND, book_TD, first, size)
        low_N = jnp.min(score_NT, -1)
        id_N = first + jnp.argmin(score_NT, -1).astype(jnp.int32)
        better = low_N < best[1]  # strict: an equal later code does not replace an earlier one
        return (jnp.where(better, id_N, best[0]), jnp.where(better, low_N, best[1])), None

    start = (jnp.zeros(x_ND.shape[0], jnp.int32), jnp.full(x_ND.shape[0], jnp.inf, jnp.float32))
    return jax.lax.scan(step, start, tiled(book_KD))[0]


def unit(x_ND: Array) -> Array:
    """Vectors scaled to length one; zero stays zero."""
    return x_ND / jnp.maximum(jnp.sqrt(jnp.sum(x_ND**2, -1, keepdims=True)), 1e-12)


def tiled(book_KD: Array) -> tuple[Array, Array]:
    """(first code of each tile, tiles [i, T, D] of the book, the last padded with zeros)."""
    size, tiles = book_KD.shape[0], -(-book_KD.shape[0] // TILE)
    book_iTD = jnp.pad(book_KD, ((0, tiles * TILE - size), (0, 0))).reshape(tiles, TILE, -1)
    return jnp.arange(tiles) * TILE, book_iTD


def tile_scores(x_ND: Array, book_TD: Array, first: Array, size: int) -> Array:
    """Scores of one tile; infinite for the padding behind the book's `size` codes."""
    return jnp.where(first + jnp.arange(book_TD.shape[0]) < size, scores(x_ND, book_TD), jnp.inf)
