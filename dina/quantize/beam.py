"""Beam search over levels: codes whose sum is nearer to the vector than those of the nearest code at every level.

A level's nearest code may leave a residual that later levels cannot reach. The beam keeps the best few paths from level to
level and ends with the best of them. It minimises the squared error of the sum, whatever `metric` the greedy search goes
by.

Legend: N vectors, D dimensions, L levels, K codes of one level, T codes of a tile, P paths before a level, B after it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dina.quantize import lookup


def improve(
    tables_KD: list[Float[Array, "K D"]], x_ND: Float[Array, "N D"], greedy_NL: Int[Array, "N L"], beam: int
) -> Int[Array, "N L"]:
    """The better of `greedy_NL` and the best path of a beam, vector by vector: no error grows.

    Args:
        tables_KD: what each code of each level adds to the sum.
        x_ND: vectors.
        greedy_NL: their codes by the nearest code at every level; they stay where the beam is not better.
        beam: paths kept.
    """
    x_ND = x_ND.astype(jnp.float32)
    n, residual_NPD = len(x_ND), x_ND[:, None]
    codes_NPL = jnp.zeros((n, 1, 0), jnp.int32)
    for table_KD in tables_KD:
        size, paths = len(table_KD), residual_NPD.shape[1]
        place_NB = best(residual_NPD, table_KD, min(beam, paths * size))
        path_NB, code_NB = place_NB // size, place_NB % size
        residual_NPD = jnp.take_along_axis(residual_NPD, path_NB[..., None], 1) - table_KD[code_NB]
        codes_NPL = jnp.concatenate([jnp.take_along_axis(codes_NPL, path_NB[..., None], 1), code_NB[..., None]], -1)
    error_NP = jnp.sum(residual_NPD**2, -1)
    first_N1 = jnp.argmin(error_NP, -1)[:, None]
    found_NL = jnp.take_along_axis(codes_NPL, first_N1[..., None], 1)[:, 0]
    left_ND = x_ND
    for level, table_KD in enumerate(tables_KD):
        left_ND = left_ND - table_KD[greedy_NL[:, level]]
    better_N = jnp.min(error_NP, -1) < jnp.sum(left_ND**2, -1)
    return jnp.where(better_N[:, None], found_NL, greedy_NL)


def best(residual_NPD: Float[Array, "N P D"], table_KD: Float[Array, "K D"], count: int) -> Int[Array, "N B"]:
    """The `count` pairs of a path and a code that leave the least, as path * K + code; [N P, T] scores at a time."""
    n, paths, dim = residual_NPD.shape
    size = len(table_KD)

    def step(kept, tile):
        first, table_TD = tile
        score_MT = lookup.tile_scores(residual_NPD.reshape(-1, dim), table_TD, first, size)
        score_NB, index_NB = _lowest(score_MT.reshape(n, -1), min(count, paths * len(table_TD)))
        place_NB = index_NB // len(table_TD) * size + first + index_NB % len(table_TD)
        score_NR, place_NR = (jnp.concatenate(pair, -1) for pair in zip(kept, (score_NB, place_NB), strict=True))
        score_NB, index_NB = _lowest(score_NR, count)
        return (score_NB, jnp.take_along_axis(place_NR, index_NB, -1)), None

    start = jnp.full((n, count), jnp.inf), jnp.zeros((n, count), jnp.int32)
    if size <= lookup.TILE:
        return step(start, (0, table_KD))[0][1]
    return jax.lax.scan(step, start, lookup.tiled(table_KD))[0][1]


def _lowest(score_NR: Array, count: int) -> tuple[Array, Array]:
    """The `count` lowest scores of each vector and their places, the first of equal ones first."""
    low_NB, index_NB = jax.lax.top_k(-score_NR, count)
    return -low_NB, index_NB
