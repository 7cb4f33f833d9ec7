"""Residual vector quantisation: the door to the package, and the training-time forward pass.

A vector is written as a sum of codes, one per level, each level coding what the levels before left over
(paper §1.4, reference/tokenizers.md A.4, B.3). `RVQConfig` names how codes are made and learned; the calls are the same
for all choices:

    params, stats = rvq.start(cfg, vectors_ND, mask_N, key)                       # from real vectors; `rvq.init`: from none
    view = rvq.view(cfg, params, stats)                                           # in the loss: gradient reaches `params`
    out = rvq.quantize(cfg, view, x_ND, mask_N)
    updates = rvq.statistics(cfg, view, x_ND, out.codes_NL, mask_N, key, axes)    # summed over the mesh
    stats = rvq.apply(cfg, stats, updates, key)                                   # after the optimizer
    codes_NL = rvq.encode(cfg, stats, x_ND)
    q_ND = rvq.decode(cfg, stats, codes_NL)

Codebooks that follow by moving averages ('ema', the default) are statistics and no parameters: `params` is empty, the view
is the statistics, and no gradient reaches them. What else there is and where it is kept: variables.py.

Legend: N vectors, D dimensions, E dimensions of a level's codes, L levels, K codes of one book.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dina.config import InputError
from dina.quantize.coding import Stats, decode, encode, inward, outward, row, rows, tables
from dina.quantize.config import RVQConfig
from dina.quantize.gradient import through
from dina.quantize.init import kmeans_init, start
from dina.quantize.lookup import nearest
from dina.quantize.stats import apply, statistics
from dina.quantize.usage import code_counts, usage, usage_from_counts
from dina.quantize.variables import from_codebooks, init, init_stats, view

__all__ = [
    "RVQConfig", "QuantizeOut", "Stats", "init", "init_stats", "from_codebooks", "start", "kmeans_init", "view", "nearest",
    "encode", "decode", "tables", "quantize", "token_keys", "draw_depth", "statistics", "apply", "usage", "code_counts",
    "usage_from_counts",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class QuantizeOut:
    """What `quantize` returns.

    Attributes:
        q_ND: sum of the first `depth_N` codes, with gradient by the rule `cfg.gradient`.
        codes_NL: all levels' codes, whatever the depth; -1 where masked.
        commit: commitment loss as (sum over vectors, number of vectors); mean over dimensions and levels inside.
        depth_N: levels used in `q_ND`.
        energy_L: (sum, weight) pair of arrays [L]: share of the vector's energy left after each level.
        codebook: codebook loss |sg(r) - e|^2 as (sum, weight) like `commit`; zero where no gradient moves the codes.
    """

    q_ND: Array
    codes_NL: Array
    commit: tuple[Array, Array]
    depth_N: Array
    energy_L: tuple[Array, Array]
    codebook: tuple[Array, Array]


jax.tree_util.register_dataclass(QuantizeOut, ["q_ND", "codes_NL", "commit", "depth_N", "energy_L", "codebook"], [])


def token_keys(key: PRNGKeyArray, example_B: Int[Array, " B"], tokens: int) -> PRNGKeyArray:
    """Keys [B * tokens] of (step key, global example, token): the same on any number of devices."""

    def one(example):
        row_key = jax.random.fold_in(key, example)
        return jax.vmap(lambda i: jax.random.fold_in(row_key, i))(jnp.arange(tokens))

    return jax.vmap(one)(example_B).reshape((-1, *key.shape))


def is_batched(key: Any) -> bool:
    """Whether `key` holds one key per vector (typed or raw uint32 keys)."""
    return key.ndim == (1 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 2)


def draw_depth(cfg: RVQConfig, key: PRNGKeyArray, n: int, dropout: float) -> Int[Array, " N"]:
    """Quantizer dropout: with probability `dropout` a depth uniform in 1..L, else L. Equal keys, equal depth."""

    def one(k):
        a, b = jax.random.split(k)
        return jnp.where(jax.random.uniform(a) < dropout, jax.random.randint(b, (), 1, cfg.levels + 1), cfg.levels)

    return jax.vmap(one)(key if is_batched(key) else jax.random.split(key, n)).astype(jnp.int32)


def quantize(
    cfg: RVQConfig,
    stats: Stats,
    x_ND: Float[Array, "N D"],
    mask_N: Array,
    key: PRNGKeyArray | None = None,
    dropout: float = 0.0,
) -> QuantizeOut:
    """Quantises vectors for training.

    Args:
        cfg: the quantizer.
        stats: its statistics, or the `view` through which gradient reaches its parameters.
        x_ND: vectors; gradient flows through the quantised sum and the commitment loss.
        mask_N: 1 for real vectors, 0 for padding, which enters no number.
        key: needed when dropout > 0: one key, or one key per vector (vectors with equal keys get equal depth, so an
            image's key repeated over its cells truncates whole images).
        dropout: probability that a vector's sum is cut at a random depth. All levels are searched all the same, so
            statistics and commitment do not starve the late levels.

    Returns:
        A QuantizeOut.

    Raises:
        InputError: dropout without a key.
    """
    if dropout > 0 and key is None:
        raise InputError("rvq.quantize: dropout > 0 needs a key")
    mask, still = mask_N.astype(jnp.float32), jax.lax.stop_gradient
    stats = stats if cfg.books_are_trained else stats | {"codebook": still(stats["codebook"])}
    x = x_ND.astype(jnp.float32)
    codes_NL = encode(cfg, still(stats), still(x), beam=1)
    depth_N = jnp.full(x.shape[0], cfg.levels, jnp.int32) if dropout == 0 else draw_depth(cfg, key, x.shape[0], dropout)
    q_ND, commit_N, codebook_N, errors = (_in_own_spaces if cfg.projected else _in_one_space)(cfg, stats, x, codes_NL, depth_N)
    total = jnp.sum(jnp.mean(still(x) ** 2, -1) * mask)
    return QuantizeOut(
        q_ND=q_ND.astype(x_ND.dtype),
        codes_NL=jnp.where(mask[:, None] > 0, codes_NL, -1),
        commit=(jnp.sum(commit_N * mask), jnp.sum(mask)),
        depth_N=depth_N,
        energy_L=(jnp.stack([jnp.sum(still(error_N) * mask) for error_N in errors]), jnp.full(cfg.levels, total)),
        codebook=(jnp.sum(codebook_N * mask), jnp.sum(mask)),
    )


def _in_one_space(cfg: RVQConfig, stats: Stats, x: Array, codes_NL: Array, depth_N: Array):
    """(quantised sum, commitment [N], codebook loss [N], errors [N] after each level); codes are of the vectors' space."""
    still = jax.lax.stop_gradient
    partial_ND, used_ND = jnp.zeros_like(x), jnp.zeros_like(x)
    commit_N, codebook_N, errors = 0.0, jnp.zeros(len(x)), []
    for level, row_ND in enumerate(rows(cfg, stats, codes_NL)):
        target_ND = x if cfg.commitment == "cumulative" or level == 0 else still(x)
        if cfg.books_are_trained:
            codebook_N = codebook_N + jnp.mean((still(x) - partial_ND - row_ND) ** 2, -1) / cfg.levels
        row_ND = still(row_ND)
        partial_ND = partial_ND + row_ND
        used_ND = used_ND + jnp.where((level < depth_N)[:, None], row_ND, 0.0)
        error_N = jnp.mean((target_ND - partial_ND) ** 2, -1)
        commit_N = commit_N + error_N / cfg.levels
        errors.append(error_N)
    return through(x, used_ND, cfg.gradient), commit_N, codebook_N, errors


def _in_own_spaces(cfg: RVQConfig, stats: Stats, x: Array, codes_NL: Array, depth_N: Array):
    """The same with projections: what passes gradient is each level's code in its own space, and what it adds to the
    sum and takes from the residual is made of that (DAC). The grid of 'fsq' needs neither loss: it is bounded."""
    still = jax.lax.stop_gradient
    residual_ND, used_ND = x, jnp.zeros_like(x)
    commit_N, codebook_N, errors = jnp.zeros(len(x)), jnp.zeros(len(x)), []
    for level in range(cfg.levels):
        book = cfg.book(level)
        vector_NE, row_NE = inward(cfg, stats, book, residual_ND), row(stats["codebook"][book], codes_NL[:, level])
        if cfg.kind != "fsq":
            commit_N = commit_N + jnp.mean((vector_NE - still(row_NE)) ** 2, -1) / cfg.levels
        if cfg.books_are_trained:
            codebook_N = codebook_N + jnp.mean((still(vector_NE) - row_NE) ** 2, -1) / cfg.levels
        added_ND = outward(cfg, stats, book, through(vector_NE, row_NE, cfg.gradient))
        residual_ND = residual_ND - added_ND
        used_ND = used_ND + jnp.where((level < depth_N)[:, None], added_ND, 0.0)
        errors.append(jnp.mean(residual_ND**2, -1))
    return used_ND, commit_N, codebook_N, errors
