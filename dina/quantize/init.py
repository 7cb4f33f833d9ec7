"""The start of a quantizer from real vectors, level by level on what is left over.

Learned books start by k-means: Lloyd's iterations. Shared ones start from one small book per level laid side by side, then
run Lloyd's iterations on the residuals of all levels pooled, which is the moving-average update with decay 0
(reference/tokenizers.md C.2). Maps and projections start from the second moments of each level's residuals (fit.py).

Legend: N vectors, D dimensions, E dimensions of a level's codes (D unless projected), K codes of one book.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dina.config import InputError
from dina.quantize import fit
from dina.quantize.coding import Stats, encode, inward, outward, row, rows, search
from dina.quantize.config import RVQConfig
from dina.quantize.lookup import nearest
from dina.quantize.variables import Params, assemble, random_book

ITERATIONS = 12  # 10-20 Lloyd iterations are customary (C.2); the inertia moves < 1 % after ten


def start(
    cfg: RVQConfig,
    vectors_ND: Float[Array, "N D"],
    mask_N: Array,
    key: PRNGKeyArray,
    per_update: float | None = None,
    iterations: int = ITERATIONS,
) -> tuple[Params, Stats]:
    """Codebooks, maps and projections from real vectors.

    Args:
        cfg: the quantizer.
        vectors_ND: a sample of what will be quantised, about 8,000 vectors are plenty for K = 256.
        mask_N: 1 for real vectors.
        key: a PRNG key; the result depends on nothing else.
        per_update: vectors that one training update will bring. Counts are moving averages of hits per update, so
            they are scaled to it; None = as many as were given.
        iterations: Lloyd iterations.

    Returns:
        (parameters, statistics) like `rvq.init`.

    Raises:
        InputError: no valid vector.
    """
    mask_N = jnp.asarray(mask_N).astype(jnp.float32)
    total = float(jnp.sum(mask_N))
    if total < 1:
        raise InputError("rvq.start: no valid vector to start the codebooks from (the mask is all zero)")
    scale = (total if per_update is None else per_update) / total
    found = _fit(cfg, jnp.asarray(vectors_ND, jnp.float32), mask_N, key, iterations)
    return assemble(cfg, found, [count_K * scale for count_K in found["count"]])


def kmeans_init(cfg: RVQConfig, vectors_ND, mask_N, key, per_update=None, iterations: int = ITERATIONS) -> Stats:
    """The statistics of `start`, which are all there is of books that follow by moving averages."""
    return start(cfg, vectors_ND, mask_N, key, per_update, iterations)[1]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _fit(cfg: RVQConfig, x_ND: Array, mask_N: Array, key: Array, iterations: int) -> dict[str, list[Array]]:
    """Books, cluster sizes, maps and projections of all stored books."""
    shared, size = cfg.codebook == "shared", cfg.sizes[0]
    share = size // cfg.levels
    sizes = cfg.sizes if not shared else (size - share * (cfg.levels - 1), *[share] * (cfg.levels - 1))
    residual_ND, levels = x_ND, []
    for level, codes in enumerate(sizes):
        if not codes:
            continue
        found, row_ND = _fit_level(cfg, str(level), residual_ND, mask_N, jax.random.fold_in(key, level), codes, iterations)
        levels.append(found)
        residual_ND = residual_ND - row_ND
    found = {name: [level[name] for level in levels] for name in levels[0]}
    if not shared:
        return found
    book_KD, count_K = pooled_lloyd(cfg, jnp.concatenate(found["book"]), x_ND, mask_N, iterations)
    return {"book": [book_KD], "count": [count_K]}


def _fit_level(cfg: RVQConfig, book: str, residual_ND: Array, mask_N: Array, key: Array, codes: int, iterations: int):
    """(what one level starts with, what it then adds to each vector's sum)."""
    found: dict[str, Array] = {}
    if cfg.projected:
        in_DE = fit.principal(residual_ND, mask_N, cfg.width(book))
        found |= {"in": in_DE * fit.grid_scale(residual_ND @ in_DE, mask_N) if cfg.kind == "fsq" else in_DE, "out": in_DE.T}
    view = {name: {book: part} for name, part in found.items()}
    vector_NE = inward(cfg, view, book, residual_ND)
    if cfg.kind == "rvq":
        found["book"], found["count"], code_N = lloyd(vector_NE, mask_N, key, codes, iterations, cfg.metric)
        return found, outward(cfg, view, book, found["book"][code_N])
    found["book"] = book_KE = random_book(cfg, book, key)
    if cfg.kind == "simvq":
        found["map"] = fit.gaussian_map(vector_NE, mask_N, codes)
        book_KE = book_KE @ found["map"]
    view["codebook"] = {book: book_KE}
    code_N = search(cfg, view, book, vector_NE)
    found["count"] = jax.ops.segment_sum(mask_N, code_N, codes)
    row_NE = row(book_KE, code_N)
    if cfg.kind == "fsq":
        found["out"] = fit.least_squares(row_NE, residual_ND, mask_N)
        view["out"] = {book: found["out"]}
    return found, outward(cfg, view, book, row_NE)


def lloyd(
    x_ND: Array, mask_N: Array, key: Array, size: int, iterations: int, metric: str = "euclidean"
) -> tuple[Array, Array, Array]:
    """Lloyd's algorithm from `scattered` vectors.

    Returns:
        (centres [size, D], cluster sizes [size], assignment [N]).
    """
    pick_key, jitter_key = jax.random.split(key)
    pick_K = scattered(x_ND, mask_N, pick_key, size)
    spread = jnp.sqrt(jnp.sum(x_ND**2 * mask_N[:, None]) / (jnp.maximum(jnp.sum(mask_N), 1) * x_ND.shape[1]))
    # a hair of noise, so that fewer vectors than centres do not give identical centres
    start_KD = x_ND[pick_K] + 1e-4 * spread * jax.random.normal(jitter_key, (size, x_ND.shape[1]))

    def step(_, centre_KD):
        code_N, distance_N = nearest(x_ND, centre_KD, metric)
        return recentre(centre_KD, x_ND, code_N, mask_N, distance_N)[0]

    centre_KD = jax.lax.fori_loop(0, iterations, step, start_KD)
    code_N, _ = nearest(x_ND, centre_KD, metric)
    return centre_KD, jax.ops.segment_sum(mask_N, code_N, size), code_N


def scattered(x_ND: Array, mask_N: Array, key: Array, size: int) -> Int[Array, " K"]:
    """Indices of `size` vectors, each drawn in proportion to its squared distance from those before it (k-means++, Arthur
    and Vassilvitskii 2007): a cluster of many equal vectors, such as empty cells or silence, gets one centre, not most."""

    def pick(k, carry):
        pick_K, distance_N = carry
        logit_N = jnp.where(mask_N > 0, jnp.log(jnp.maximum(distance_N, 1e-30)), -jnp.inf)
        chosen = jax.random.categorical(jax.random.fold_in(key, k), logit_N)
        return pick_K.at[k].set(chosen), jnp.minimum(distance_N, jnp.sum((x_ND - x_ND[chosen]) ** 2, -1))

    start = jnp.zeros(size, jnp.int32), jnp.full(x_ND.shape[0], jnp.finfo(jnp.float32).max)
    return jax.lax.fori_loop(0, size, pick, start)[0]


def recentre(centre_KD: Array, x_ND: Array, code_N: Array, mask_N: Array, distance_N: Array) -> tuple[Array, Array]:
    """Means of the clusters; empty ones move to the vectors that are farthest from their centres.

    Returns:
        (centres [K, D], cluster sizes [K] before the move).
    """
    size = centre_KD.shape[0]
    count_K = jax.ops.segment_sum(mask_N, code_N, size)
    sum_KD = jax.ops.segment_sum(x_ND * mask_N[:, None], code_N, size)
    mean_KD = sum_KD / jnp.maximum(count_K, 1.0)[:, None]
    far_M = jnp.argsort(-jnp.where(mask_N > 0, distance_N, -1.0))
    empty_K = count_K == 0
    turn_K = jnp.cumsum(empty_K) - 1  # the i-th empty cluster takes the i-th farthest vector
    seed_KD = x_ND[far_M[jnp.clip(turn_K, 0, x_ND.shape[0] - 1)]]
    return jnp.where(empty_K[:, None], seed_KD, mean_KD), count_K


def pooled_lloyd(cfg: RVQConfig, book_KD: Array, x_ND: Array, mask_N: Array, iterations: int) -> tuple[Array, Array]:
    """Lloyd's iterations of one book over the residuals of all levels, encoded with that book."""
    mask_M = jnp.tile(mask_N, cfg.levels)

    def residuals(book):
        stats = {"codebook": {"0": book}}
        codes_NL = encode(cfg, stats, x_ND, beam=1)
        level_rows, residual_ND, parts = rows(cfg, stats, codes_NL), x_ND, []
        for row_ND in level_rows:
            parts.append(residual_ND)
            residual_ND = residual_ND - row_ND
        return jnp.concatenate(parts), codes_NL.T.reshape(-1), jnp.concatenate(level_rows)

    def step(_, book):
        vector_MD, code_M, row_MD = residuals(book)
        return recentre(book, vector_MD, code_M, mask_M, jnp.sum((vector_MD - row_MD) ** 2, -1))[0]

    book_KD = jax.lax.fori_loop(0, iterations, step, book_KD)
    _, code_M, _ = residuals(book_KD)
    return book_KD, jax.ops.segment_sum(mask_M, code_M, book_KD.shape[0])
