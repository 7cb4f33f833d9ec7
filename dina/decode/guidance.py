"""Classifier-free guidance: what the unconditional row is told, and how two rows become one choice.

A guided request owns two rows of the batch. Both carry the same spans from the modality's start on; the second one's
prompt says nothing about what is wanted. At every level logits are lu + s (lc - lu), one code is drawn and written to
both rows (reference/backbone.md §4.1). Three forms of the silent prompt are known, so it is an option:

* `suffix`   only the tags that open the span (size tag and image start), positions from 0;
* `zeroed`   same length, every id before those tags is 0 and no codes are embedded;
* `literal`  same length, every id is 0, tags included: what one copy of the released code computes.

Shapes: S positions of one prompt, R rows of a batch, V classes, L levels.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

VARIANTS = ("suffix", "zeroed", "literal")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Which rows belong together.

    Attributes:
        cond_R: row that holds the request's conditional half; a row's own index where it is that half.
        uncond_R: row that holds the unconditional half; equal to `cond_R` where the request is not guided.
        scale_R: guidance scale s of the request; 1 gives the conditional logits.
    """

    cond_R: Int[Array, "R"]
    uncond_R: Int[Array, "R"]
    scale_R: Float[Array, "R"]


def combine(logits_RV: Float[Array, "R V"], pairs: Pairs) -> Float[Array, "R V"]:
    """Guided logits: the same for both rows of a pair; rows without a partner keep their own, bit for bit.

    Rounded to the logits' own type before the unconditional ones are added, as the serving code does (backbone.md §4.1).
    """
    cond_RV, uncond_RV = logits_RV[pairs.cond_R], logits_RV[pairs.uncond_R]
    guided_RV = uncond_RV + (pairs.scale_R[:, None] * (cond_RV - uncond_RV)).astype(logits_RV.dtype)
    return jnp.where((pairs.cond_R == pairs.uncond_R)[:, None], cond_RV, guided_RV)


def unconditional(prompt: dict[str, np.ndarray], opening: int, variant: str = "suffix") -> dict[str, np.ndarray]:
    """The silent prompt of one request.

    Args:
        prompt: tokens [S], transcript [S], codes [S, L] of the conditional row, without padding.
        opening: how many last positions open the span (size tag and start token); they stay said.
        variant: one of `VARIANTS`.

    Returns:
        The same arrays, `opening` positions long for `suffix`, S positions otherwise.

    Raises:
        ValueError: unknown variant, or an opening outside the prompt.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unconditional prompt {variant!r} does not exist; known: {', '.join(VARIANTS)}")
    length = len(prompt["tokens"])
    if not 0 < opening <= length:
        raise ValueError(f"an opening of {opening} positions does not fit a prompt of {length}")
    if variant == "suffix":
        return {name: array[length - opening :].copy() for name, array in prompt.items()}
    silent = length - opening if variant == "zeroed" else length
    out = {name: array.copy() for name, array in prompt.items()}
    out["tokens"][:silent] = 0
    out["transcript"][:silent] = -1
    out["codes"][:silent] = -1
    return out
