"""Residual vector quantisation: the door to the package, and the training-time forward pass.

A vector is written as a sum of codes, one per level, each level coding what the levels before left over
(paper §1.4, reference/tokenizers.md A.4, B.3). Codebooks are statistics, not parameters: no gradient reaches
them, `apply` moves them by moving averages and `kmeans_init` starts them.

    stats = rvq.kmeans_init(cfg, vectors_ND, mask_N, key)
    out = rvq.quantize(cfg, stats, x_ND, mask_N)                                  # in the loss
    updates = rvq.statistics(cfg, stats, x_ND, out.codes_NL, mask_N, key, axes)   # in the loss, summed over the mesh
    stats = rvq.apply(cfg, stats, updates, key)                                   # after the optimizer

Legend: N vectors, D dimensions, L levels, K codes of one book.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dina.quantize.init import kmeans_init
from dina.quantize.lookup import RVQConfig, Stats, decode, encode, from_codebooks, init_stats, nearest, rows
from dina.quantize.stats import apply, statistics
from dina.quantize.usage import code_counts, usage, usage_from_counts

__all__ = [
    "RVQConfig", "QuantizeOut", "Stats", "init_stats", "from_codebooks", "kmeans_init", "nearest", "encode", "decode",
    "quantize", "token_keys", "draw_depth", "statistics", "apply", "usage", "code_counts", "usage_from_counts",
]


@dataclasses.dataclass(frozen=True)
class QuantizeOut:
    """What `quantize` returns.

    Attributes:
        q_ND: straight-through sum of the first `depth_N` codes.
        codes_NL: all levels' codes, whatever the depth; -1 where masked.
        commit: commitment loss as (sum over vectors, number of vectors); mean over dimensions and levels inside.
        depth_N: levels used in `q_ND`.
        energy_L: (sum, weight) pair of arrays [L]: share of the vector's energy left after each level.
    """

    q_ND: Array
    codes_NL: Array
    commit: tuple[Array, Array]
    depth_N: Array
    energy_L: tuple[Array, Array]


jax.tree_util.register_dataclass(QuantizeOut, ["q_ND", "codes_NL", "commit", "depth_N", "energy_L"], [])


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
        stats: its codebooks (no gradient flows to them).
        x_ND: vectors; gradient flows through the straight-through sum and the commitment loss.
        mask_N: 1 for real vectors, 0 for padding, which enters no number.
        key: needed when dropout > 0: one key, or one key per vector (vectors with equal keys get equal depth, so an
            image's key repeated over its cells truncates whole images).
        dropout: probability that a vector's sum is cut at a random depth. All levels are searched all the same, so
            statistics and commitment do not starve the late levels.

    Returns:
        A QuantizeOut.

    Raises:
        ValueError: dropout without a key.
    """
    if dropout > 0 and key is None:
        raise ValueError("rvq.quantize: dropout > 0 needs a key")
    mask = mask_N.astype(jnp.float32)
    stats = jax.lax.stop_gradient(stats)
    x = x_ND.astype(jnp.float32)
    codes_NL = encode(cfg, stats, jax.lax.stop_gradient(x))
    depth_N = jnp.full(x.shape[0], cfg.levels, jnp.int32) if dropout == 0 else draw_depth(cfg, key, x.shape[0], dropout)
    partial_ND, used_ND, commit_N, energy = jnp.zeros_like(x), jnp.zeros_like(x), 0.0, []
    for level, row_ND in enumerate(rows(cfg, stats, codes_NL)):
        target_ND = x if cfg.commitment == "cumulative" or level == 0 else jax.lax.stop_gradient(x)
        partial_ND = partial_ND + row_ND
        used_ND = used_ND + jnp.where((level < depth_N)[:, None], row_ND, 0.0)
        error_N = jnp.mean((target_ND - partial_ND) ** 2, -1)
        commit_N = commit_N + error_N / cfg.levels
        energy.append(jnp.sum(jax.lax.stop_gradient(error_N) * mask))
    q_ND = x + jax.lax.stop_gradient(used_ND - x)
    total = jnp.sum(jnp.mean(jax.lax.stop_gradient(x) ** 2, -1) * mask)
    return QuantizeOut(
        q_ND=q_ND.astype(x_ND.dtype),
        codes_NL=jnp.where(mask[:, None] > 0, codes_NL, -1),
        commit=(jnp.sum(commit_N * mask), jnp.sum(mask)),
        depth_N=depth_N,
        energy_L=(jnp.stack(energy), jnp.full(cfg.levels, total)),
    )
