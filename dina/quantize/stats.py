"""What follows a batch without gradient: moving averages of codebooks, and the restart of dead codes.

`statistics` turns a batch into additive numbers (segment sums; no one-hot), `apply` turns their total into new books
(paper §1.4, reference/tokenizers.md C.2). Replacement vectors are drawn by a hash of (step, global token), not by
device, so that 1, 2 or 8 devices restart the same codes with the same vectors.

Legend: N vectors, D dimensions, E dimensions of a level's codes (D unless projected), L levels, K codes of one book, M vectors
of all levels of one book, R restart candidates of one book.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dina.quantize.coding import Stats, steps
from dina.quantize.config import RVQConfig
from dina.quantize.variables import published
from dina.sharding import psum

# A dead code restarts beside a live one, this far on the way to one of that code's vectors. A bare residual of many
# dimensions is nearest to hardly any other: on speech features of 384 dimensions usage of the eighth level went from
# 0.54 to 0.98 with this.
STEP_ASIDE = 0.25


def statistics(
    cfg: RVQConfig,
    stats: Stats,
    x_ND: Float[Array, "N D"],
    codes_NL: Int[Array, "N L"],
    mask_N: Array,
    key: PRNGKeyArray,
    axes: tuple[str, ...] = (),
) -> Stats:
    """Counts, sums and restart candidates of one batch.

    Args:
        cfg: the quantizer.
        stats: the statistics, or the `view`, that made `codes_NL`.
        x_ND: the quantised vectors (no gradient is taken).
        codes_NL: their codes; -1 = level absent.
        mask_N: 1 for real vectors.
        key: the step's key, or one key per vector (`rvq.token_keys`). With one key, vector i of device d counts as
            global token d * N + i, which is right when the batch is split evenly and in order.
        axes: mesh axes to sum over inside a shard_map; () outside.

    Returns:
        {'count': [K], 'sum': [K, E] ('ema' only), 'candidate': [R, E], 'weight': [R]}, each a dict over the stored
        books. Every leaf is global, and additive over micro-batches: candidates carry a power-of-two weight with a
        random exponent, so the ratio of two sums is one of the drawn vectors (exactly so with one micro-batch, to
        one part in 128 otherwise, but for equal exponents, which give a mean of two). What `stats` made of parameters
        is there too, with 'parts', the number of micro-batches that were added.
    """
    stats, x_ND = jax.lax.stop_gradient((stats, x_ND))
    vectors, code_vectors = zip(*steps(cfg, stats, x_ND.astype(jnp.float32), codes_NL), strict=True)
    errors = [jnp.sum((vector_NE - row_NE) ** 2, -1) for vector_NE, row_NE in zip(vectors, code_vectors, strict=True)]
    weights = [mask_N.astype(jnp.float32) * (codes_NL[:, level] >= 0) for level in range(cfg.levels)]
    bits_NL = token_bits(key, x_ND.shape[0], cfg.levels, axes)
    out = {name: {} for name in ("count", "candidate", "weight", *(("sum",) if cfg.books_are_averaged else ()))}
    for book, size in cfg.books.items():
        levels = [level for level in range(cfg.levels) if cfg.book(level) == book]
        pooled = (jnp.concatenate([parts[level] for level in levels]) for parts in (vectors, weights, errors))
        vectors_ME, weight_M, error_M = pooled
        code_M = jnp.maximum(jnp.concatenate([codes_NL[:, level] for level in levels]), 0)
        bits_M = jnp.concatenate([bits_NL[:, level] for level in levels])
        beside_ME = vectors_ME + (1 - STEP_ASIDE) * (stats["codebook"][book][code_M] - vectors_ME)
        candidate_RE, drawn_R = draw_candidates(beside_ME, weight_M * error_M, bits_M, restarts(cfg, size), axes)
        out["count"][book] = psum(jax.ops.segment_sum(weight_M, code_M, size), axes)
        out["candidate"][book], out["weight"][book] = candidate_RE, drawn_R
        if cfg.books_are_averaged:
            # Zeros that depend on the batch: XLA would make constant ones once, early, and a copy for every book, all at
            # once (16,384 codes of 3,584 dimensions, 8 levels, on a CPU: 1.9 GB).
            zeros_KE = jnp.full((size, cfg.width(book)), 0 * jnp.sum(weight_M))
            out["sum"][book] = psum(zeros_KE.at[code_M].add(vectors_ME * weight_M[:, None]), axes)
    seen = {name: stats[name] for name in published(cfg)}
    return out | seen | ({"parts": {"all": jnp.ones(())}} if seen else {})


def restarts(cfg: RVQConfig, size: int) -> int:
    """Most codes of a book of `size` that one update may restart: none of those that follow from others."""
    return 0 if cfg.kind != "rvq" else min(size, math.ceil(cfg.restart_cap * size))


def token_bits(key: Any, n: int, levels: int, axes: tuple[str, ...]) -> Array:
    """uint32 [N, L] that depend on the step and the global token only."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.ndim == (0 if typed else 1):
        start = jax.lax.axis_index(axes) * n if axes else 0
        key = jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(n))
    return jax.vmap(lambda k: jax.random.bits(k, (levels,), jnp.uint32))(key)


def draw_candidates(
    vectors_MD: Array, weight_M: Array, bits_M: Array, count: int, axes: tuple[str, ...]
) -> tuple[Array, Array]:
    """`count` vectors of the whole mesh, drawn in proportion to `weight_M`, times their power-of-two weights.

    Weights are squared errors, as in k-means++: drawn evenly, restarts split the densest cluster, where nothing is to
    gain, again and again. The vectors with the highest log(u) / weight are such a draw (Efraimidis and Spirakis 2006).
    Each device offers its own best `count`; the best of all offers are the best of all vectors.
    """
    if not count:
        return jnp.zeros((0, vectors_MD.shape[-1]), jnp.float32), jnp.zeros((0,), jnp.float32)
    uniform_M = ((bits_M >> 8).astype(jnp.float32) + 0.5) * 2.0**-24
    score_M = jnp.where(weight_M > 0, jnp.log(uniform_M) / jnp.maximum(weight_M, 1e-30), -jnp.inf)
    short = max(0, count - score_M.shape[0])
    score_M = jnp.pad(score_M, (0, short), constant_values=-jnp.inf)
    vectors_MD, bits_M = jnp.pad(vectors_MD, ((0, short), (0, 0))), jnp.pad(bits_M, (0, short))
    score_R, index_R = jax.lax.top_k(score_M, count)
    vectors_RD, bits_R = vectors_MD[index_R], bits_M[index_R]
    if axes:
        score_G, vectors_GD, bits_G = (jax.lax.all_gather(x, axes, tiled=True) for x in (score_R, vectors_RD, bits_R))
        score_R, index_R = jax.lax.top_k(score_G, count)
        vectors_RD, bits_R = vectors_GD[index_R], bits_G[index_R]
    # the lowest bits are independent of the rank; steps of 2**7 keep the lighter vectors of other micro-batches negligible
    exponent_R = (bits_R & 15).astype(jnp.float32) * 7
    drawn_R = jnp.where(score_R > -jnp.inf, jnp.exp2(exponent_R), 0.0)
    return vectors_RD * drawn_R[:, None], drawn_R


def apply(cfg: RVQConfig, stats: Stats, updates: Stats, key: PRNGKeyArray) -> Stats:
    """New statistics after one update (paper §1.4: N <- gN + (1-g)n, m <- gm + (1-g)s, e = m / smoothed N).

    A code whose average count is below `restart_fraction` of the mean restarts from a drawn vector, and its count and
    sum restart with it: the count at twice the threshold, so a code that stays unhit is tried again after
    ln 2 / (1 - decay) updates, and one that lives moves quickly to the vectors it serves. Codes of 'sgd' restart by
    their base; those of 'simvq' and 'fsq' never do.

    Args:
        cfg: the quantizer.
        stats: books and averages before the update.
        updates: from `statistics`, global.
        key: the update's key (equal on every device); orders the dead codes when more die than may restart.

    Returns:
        Statistics of the same structure. A book without a single valid vector in the update does not change, but for
        what follows from parameters: that is as `statistics` saw it.
    """
    out = {name: dict(parts) for name, parts in stats.items()}
    for name in published(cfg):
        out[name] = {book: part / updates["parts"]["all"] for book, part in updates[name].items()}
    for book in cfg.books:
        hits_K = updates["count"][book]
        decay = jnp.where(jnp.sum(hits_K) > 0, cfg.decay, 1.0)
        count_K = decay * stats["count"][book] + (1 - decay) * hits_K
        if cfg.kind != "rvq":
            out["count"][book] = count_K
        else:
            move = _average if cfg.books_are_averaged else _rebase
            new = move(cfg, book, out, updates, count_K, decay, _restarting(cfg, book, count_K, updates, key))
            for name, part in new.items():
                out[name][book] = part
    return out


def _restarting(cfg: RVQConfig, book: str, count_K: Array, updates: Stats, key: PRNGKeyArray) -> tuple[Array, Array, Array]:
    """(slots [R] of the codes that restart, out of range where none does; their vectors [R, E]; the threshold)."""
    size, drawn_R = cfg.books[book], updates["weight"][book]
    threshold = cfg.restart_fraction * jnp.sum(count_K) / size
    order_K = jax.random.uniform(jax.random.fold_in(key, int(book)), (size,))
    rank_K, slot_R = jax.lax.top_k(jnp.where(count_K < threshold, 1 + order_K, 0.0), drawn_R.shape[0])
    go_R = (rank_K >= 1) & (drawn_R > 0)
    fresh_RE = updates["candidate"][book] / jnp.where(drawn_R > 0, drawn_R, 1.0)[:, None]
    return jnp.where(go_R, slot_R, size), fresh_RE, threshold  # out of range: dropped by the scatter


def _average(cfg: RVQConfig, book: str, stats: Stats, updates: Stats, count_K: Array, decay: Array, restart) -> Stats:
    """One book of 'ema' by moving averages."""
    slot_R, fresh_RE, threshold = restart
    sum_KE = decay * stats["sum"][book] + (1 - decay) * updates["sum"][book]
    mass = jnp.sum(count_K)
    smooth_K = (count_K + cfg.eps) / (mass + cfg.books[book] * cfg.eps) * mass
    if slot_R.shape[0]:
        count_K, smooth_K = (parts_K.at[slot_R].set(2 * threshold, mode="drop") for parts_K in (count_K, smooth_K))
        # Only into the sums, and the book is made of them: scattering into both copied each once more.
        sum_KE = sum_KE.at[slot_R].set(fresh_RE * 2 * threshold, mode="drop")
    book_KE = sum_KE / jnp.maximum(smooth_K, 1e-30)[:, None]
    book_KE = jnp.where(jnp.sum(updates["count"][book]) > 0, book_KE, stats["codebook"][book])
    return {"codebook": book_KE, "count": count_K, "sum": sum_KE}


def _rebase(cfg: RVQConfig, book: str, stats: Stats, updates: Stats, count_K: Array, decay: Array, restart) -> Stats:
    """One book of 'sgd': the optimizer moves the codes, and a code that restarts gets another base."""
    del cfg, updates, decay
    slot_R, fresh_RE, threshold = restart
    book_KE = stats["codebook"][book]
    base_KE = stats["base"][book].at[slot_R].add(fresh_RE - book_KE[slot_R], mode="drop")
    book_KE = book_KE.at[slot_R].set(fresh_RE, mode="drop")
    return {"codebook": book_KE, "base": base_KE, "count": count_K.at[slot_R].set(2 * threshold, mode="drop")}
