"""Health of codebooks over a window of codes: usage and perplexity per level.

Legend: N vectors, L levels, K codes of one level.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array


def usage(codes_NL, mask_N, sizes: tuple[int, ...]) -> dict[str, Array]:
    """Health of each level over a window of codes.

    Args:
        codes_NL: codes of the window, -1 or masked entries do not count.
        mask_N: 1 for real vectors.
        sizes: codes per level.

    Returns:
        {'usage': [L] share of codes hit at least once, 'perplexity': [L] exp of the entropy of the hits (1..K)}.
    """
    return usage_from_counts(code_counts(codes_NL, mask_N, sizes))


def code_counts(codes_NL, mask_N, sizes: tuple[int, ...]) -> tuple[Array, ...]:
    """Hits of every code, one [K] per level; additive over batches, micro-batches and devices."""
    codes_NL, mask_N = jnp.asarray(codes_NL), jnp.asarray(mask_N)
    out = []
    for level, size in enumerate(sizes):
        valid_N = ((codes_NL[:, level] >= 0) & (mask_N > 0)).astype(jnp.float32)
        out.append(jax.ops.segment_sum(valid_N, jnp.maximum(codes_NL[:, level], 0), size))
    return tuple(out)


def usage_from_counts(counts: tuple[Array, ...]) -> dict[str, Array]:
    """`usage` of already summed hits (one [K] per level)."""
    shares, perplexities = [], []
    for count_K in counts:
        p_K = count_K / jnp.maximum(jnp.sum(count_K), 1.0)
        entropy = -jnp.sum(jnp.where(p_K > 0, p_K * jnp.log(jnp.maximum(p_K, 1e-30)), 0.0))
        shares.append(jnp.mean((count_K > 0).astype(jnp.float32)))
        perplexities.append(jnp.exp(entropy))
    return {"usage": jnp.stack(shares), "perplexity": jnp.stack(perplexities)}
