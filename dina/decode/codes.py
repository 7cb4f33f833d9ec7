"""Drawing the codes of one image cell or audio frame: level after level from a depth head, guided at every level.

Shapes: R rows of the batch, L levels, V classes of a level (its codes and the end class), D width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dina.decode import guidance, sampling
from dina.embed import level_rows
from dina.heads import depth

# Levels whose end class may be drawn (backbone.md §6). An image ends by its grid; speech ends at level 0; an end class
# at a deeper level cannot be decoded, so it is masked although the references leave audio's unmasked.
END_CLASSES = {"never": (-1,), "first_level": (0,)}


def draw(
    head: depth.DepthHead,
    head_params: Any,
    table_RD: Float[Array, "rows D"],
    bases: tuple[int, ...],
    h_RD: Float[Array, "R D"],
    key_R: Key[Array, "R"],
    step: Int[Array, ""],
    stream: int,
    how: sampling.Sampling,
    seen_RLV: Bool[Array, "R L V"],
    pairs: guidance.Pairs,
    end: str,
    order: str = "joint",
) -> Int[Array, "R L"]:
    """Codes of the next position for every row.

    Args:
        head: the depth head.
        head_params: its parameters.
        table_RD: joint table of raw rows.
        bases: first row of each level in it.
        h_RD: trunk hidden states.
        key_R: a key per request; both rows of a pair hold the same.
        step: step of the generation, folded into the keys.
        stream: number of the first level's random stream; level l uses stream + l.
        how: sampling settings per row.
        seen_RLV: codes that the repetition penalty applies to, per level.
        pairs: which rows are guided.
        end: which end classes may be drawn, a key of `END_CLASSES`.
        order: order of the filters, see `sampling.keep`.

    Returns:
        int32 codes; level 0 equal to its size is the end class, and the deeper levels then mean nothing.
    """
    most = max(head.sizes) + 1
    size_L, base_L = (jnp.asarray(x, jnp.int32) for x in (head.sizes, bases))
    class_V = jnp.arange(most)

    # One compiled body for all levels: unrolled, eight sorts and transformers a modality took most of the compilation.
    def body(carry, level_seen):
        row_RD, cache = carry
        level, seen_RV = level_seen
        logits_RV, cache = depth.step(head, head_params, level, row_RD, cache)
        logits_RV = guidance.combine(logits_RV, pairs)
        highest = size_L[level] - jnp.where(jnp.isin(level, jnp.asarray(END_CLASSES[end], jnp.int32)), 0, 1)
        logits_RV = jnp.where(class_V <= highest, logits_RV, -jnp.inf)
        keys = sampling.row_keys(key_R, step, stream + level)
        code_R = sampling.sample(keys, logits_RV, how, seen_RV, order)[pairs.cond_R]
        rows_R1 = jnp.where(code_R < size_L[level], base_L[level] + code_R, -1)[:, None]
        embedded_RD = level_rows(table_RD, rows_R1)[:, 0].astype(h_RD.dtype)
        return (jnp.where(level == 0, embedded_RD, row_RD + embedded_RD), cache), code_R

    levels = jnp.arange(len(head.sizes))
    start = (h_RD, depth.init_cache(head, len(h_RD)))
    return jax.lax.scan(body, start, (levels, jnp.moveaxis(seen_RLV, 1, 0)))[1].T


def mark_seen(
    seen_RLV: Bool[Array, "R L V"], codes_RL: Int[Array, "R L"], drawn_R: Bool[Array, "R"]
) -> Bool[Array, "R L V"]:
    """Adds the codes just drawn to what the penalty applies to."""
    rows_R1, level_L = jnp.arange(len(codes_RL))[:, None], jnp.arange(codes_RL.shape[1])
    return seen_RLV.at[rows_R1, level_L, codes_RL].max(drawn_R[:, None])
