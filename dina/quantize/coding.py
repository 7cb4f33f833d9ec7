"""All levels: vectors to codes, codes to vectors.

Everything here reads a quantizer's statistics (variables.py): 'codebook' and, where levels have spaces of their own, 'in'
and 'out'.

Legend: N vectors, D dimensions, E dimensions of a level's codes (D unless projected), L levels, K codes of one book.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dina.quantize import beam as beams
from dina.quantize import fsq
from dina.quantize.config import RVQConfig
from dina.quantize.lookup import HIGHEST, nearest

Stats = dict[str, dict[str, Array]]  # plain nested dicts: what checkpoints and parameter paths are made of


def encode(cfg: RVQConfig, stats: Stats, x_ND: Float[Array, "N D"], beam: int | None = None) -> Int[Array, "N L"]:
    """Codes of all levels by residual search (A.4).

    Args:
        cfg: the quantizer.
        stats: its codebooks.
        x_ND: vectors, any float dtype; the search is float32.
        beam: paths kept from level to level (beam.py), None = `cfg.beam`. 1 takes the nearest code at each level.

    Returns:
        Codes int32 [N, L], each in [0, sizes[l]).
    """
    beam = cfg.beam if beam is None else beam
    residual_ND, codes = x_ND.astype(jnp.float32), []
    for level in range(cfg.levels):
        book = cfg.book(level)
        vector_NE = inward(cfg, stats, book, residual_ND)
        code_N = search(cfg, stats, book, vector_NE)
        residual_ND = residual_ND - outward(cfg, stats, book, row(stats["codebook"][book], code_N))
        codes.append(code_N)
    codes_NL = jnp.stack(codes, -1)
    if beam == 1:
        return codes_NL
    table_KD = tables(cfg, stats)
    return beams.improve([table_KD[cfg.book(level)] for level in range(cfg.levels)], x_ND, codes_NL, beam)


def search(cfg: RVQConfig, stats: Stats, book: str, vector_NE: Array) -> Int[Array, " N"]:
    """Code of one level for vectors of its own space."""
    if cfg.kind == "fsq":
        return fsq.nearest(vector_NE, cfg.books[book])
    return nearest(vector_NE, stats["codebook"][book], cfg.metric)[0]


def inward(cfg: RVQConfig, stats: Stats, book: str, residual_ND: Array) -> Float[Array, "N E"]:
    """A level's residual in the space of its codes: as it is, projected, or projected and bounded (FSQ)."""
    if not cfg.projected:
        return residual_ND
    vector_NE = jnp.matmul(residual_ND, stats["in"][book], precision=HIGHEST)
    return jnp.tanh(vector_NE) if cfg.kind == "fsq" else vector_NE


def outward(cfg: RVQConfig, stats: Stats, book: str, row_NE: Array) -> Float[Array, "N D"]:
    """Code vectors of a level as vectors: what is added to the sum and taken from the residual."""
    return jnp.matmul(row_NE, stats["out"][book], precision=HIGHEST) if cfg.projected else row_NE


def row(book_KD: Array, code_N: Array) -> Array:
    """The code vectors [N, D] of one level; zero where the code is -1."""
    return jnp.where(code_N[:, None] >= 0, book_KD[jnp.maximum(code_N, 0)], 0.0)


def rows(cfg: RVQConfig, stats: Stats, codes_NL: Int[Array, "N L"]) -> list[Float[Array, "N D"]]:
    """What each level adds to the sum; zero where the code is -1."""
    own = ((cfg.book(level), codes_NL[:, level]) for level in range(cfg.levels))
    return [outward(cfg, stats, book, row(stats["codebook"][book], code_N)) for book, code_N in own]


def tables(cfg: RVQConfig, stats: Stats) -> dict[str, Float[Array, "K D"]]:
    """What every code of each stored book adds to the sum."""
    return {book: outward(cfg, stats, book, stats["codebook"][book]) for book in cfg.books}


def steps(cfg: RVQConfig, stats: Stats, x_ND: Array, codes_NL: Int[Array, "N L"]) -> list[tuple[Array, Array]]:
    """(vector, code vector) of each level in the level's own space, on the way that `codes_NL` go."""
    residual_ND, out = x_ND, []
    for level in range(cfg.levels):
        book = cfg.book(level)
        row_NE = row(stats["codebook"][book], codes_NL[:, level])
        out.append((inward(cfg, stats, book, residual_ND), row_NE))
        residual_ND = residual_ND - outward(cfg, stats, book, row_NE)
    return out


def decode(
    cfg: RVQConfig, stats: Stats, codes_NL: Int[Array, "N L"], levels: int | Int[Array, " N"] | None = None
) -> Float[Array, "N D"]:
    """Sum of the codes of the first `levels` levels, level 0 added first.

    Args:
        cfg: the quantizer.
        stats: its codebooks.
        codes_NL: codes; -1 means that the level is absent.
        levels: how many levels to add: a number, one number per vector, or None for all.

    Returns:
        float32 [N, D].
    """
    depth = cfg.levels if levels is None else levels
    total_ND = jnp.zeros((codes_NL.shape[0], cfg.dim), jnp.float32)
    for level, row_ND in enumerate(rows(cfg, stats, codes_NL)):
        keep = jnp.asarray(level < depth)
        total_ND = total_ND + jnp.where(keep[..., None] if keep.ndim else keep, row_ND, 0.0)
    return total_ND
