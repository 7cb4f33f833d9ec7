"""Health of codebooks over a window of codes: usage, perplexity, dead codes and residual energy of each level.

Usage and perplexity grow with the number of codes that are looked at, so a number without its window says nothing, and that
of a batch says little. A window is a plain tree of sums: add those of batches, devices and processes with `jax.tree.map`,
then `report`. For the logs of a training run, `roll` closes a window and opens the next.

Legend: N vectors, L levels, K codes of one level.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dina.quantize.usage import code_counts, usage_from_counts
from dina.sharding import psum

Window = dict[str, Any]  # 'hits': one [K] per level, 'vectors': [], and with energies 'left': [L], 'energy': [L]
DEAD_BELOW = 0.1  # of the level's mean hits: RVQConfig.restart_fraction's default


def observe(
    codes_NL: Int[Array, "N L"],
    mask_N: Array,
    sizes: tuple[int, ...],
    energy_L: tuple[Array, Array] | None = None,
    axes: tuple[str, ...] = (),
) -> Window:
    """A window of one batch.

    Args:
        codes_NL: its codes; -1 and masked ones do not count.
        mask_N: 1 for real vectors.
        sizes: codes per level.
        energy_L: `QuantizeOut.energy_L`, where the vectors are known.
        axes: mesh axes to sum over inside a shard_map; () outside.
    """
    hits = {str(level): count_K for level, count_K in enumerate(code_counts(codes_NL, mask_N, sizes))}
    window = {"hits": hits, "vectors": jnp.sum(jnp.asarray(mask_N).astype(jnp.float32))}
    if energy_L is not None:
        window |= {"left": energy_L[0], "energy": energy_L[1]}
    return psum(window, axes)


def report(window: Window, dead_below: float = DEAD_BELOW) -> dict[str, Array]:
    """The numbers of a window.

    Args:
        window: sums of `observe`.
        dead_below: a code is dead if it is hit less often than this share of its level's mean.

    Returns:
        'usage' [L] (share of codes hit at least once), 'perplexity' [L] (exp of the entropy of hits, 1..K), 'dead' [L]
        (number of dead codes), 'vectors' [] (of the window), and with energies 'energy' [L] (share of the vectors' energy left
        after each level).
    """
    counts = [window["hits"][str(level)] for level in range(len(window["hits"]))]
    out = usage_from_counts(tuple(counts)) | {"vectors": window["vectors"]}
    out["dead"] = jnp.stack([jnp.sum((count_K < dead_below * jnp.mean(count_K)).astype(jnp.float32)) for count_K in counts])
    if "left" in window:
        out["energy"] = window["left"] / jnp.maximum(window["energy"], 1e-30)
    return out


def rolling(sizes: tuple[int, ...]) -> dict[str, Window]:
    """Windows before the first code: 'open' grows, 'closed' is the last full one. Both with energies."""
    zeros = lambda: jnp.zeros(len(sizes))
    empty = lambda: {"hits": {str(level): jnp.zeros(size) for level, size in enumerate(sizes)}, "vectors": jnp.zeros(()),
                     "left": zeros(), "energy": zeros()}  # fmt: skip
    return {"open": empty(), "closed": empty()}


def roll(state: dict[str, Window], seen: Window, length: int) -> dict[str, Window]:
    """Adds a batch to the open window; as soon as it has `length` vectors it is closed, and an empty one opens."""
    grown = jax.tree.map(jnp.add, state["open"], seen)
    full = grown["vectors"] >= length
    return {
        "open": jax.tree.map(lambda x: jnp.where(full, 0.0, x), grown),
        "closed": jax.tree.map(lambda new, old: jnp.where(full, new, old), grown, state["closed"]),
    }


def latest(state: dict[str, Window]) -> Window:
    """The last full window; the open one while there is none ('vectors' tells)."""
    return jax.tree.map(lambda new, old: jnp.where(state["closed"]["vectors"] > 0, new, old), state["closed"], state["open"])
