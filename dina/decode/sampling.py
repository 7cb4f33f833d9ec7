"""Choosing one class from logits, with settings and random numbers of its own for every row.

Order (reference/backbone.md §6): repetition penalty, temperature, top-k and top-p, draw. The two filters are applied
jointly to one distribution (`joint`, the serving code) or one after the other with a renormalisation between them
(`hf`). Temperature 0 means the most likely class; the serving code reads it as 1, a quirk that is not copied.

Shapes: B rows, V classes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

ORDERS = ("joint", "hf")
# Setting -> (what changes nothing, lowest, highest).
RANGES = {
    "temperature": (1.0, 0.0, np.inf), "top_k": (0, 0, np.inf), "top_p": (1.0, 0.0, 1.0),
    "repetition": (1.0, 1e-6, np.inf),
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of one head, one entry per row.

    Attributes:
        temperature_B: 0 takes the most likely class.
        top_k_B: keep this many classes; 0 keeps all.
        top_p_B: keep the most likely classes until this mass is reached; 1 keeps all.
        repetition_B: divides positive and multiplies negative scores of classes seen before; 1 changes nothing.
    """

    temperature_B: Float[Array, "B"]
    top_k_B: Int[Array, "B"]
    top_p_B: Float[Array, "B"]
    repetition_B: Float[Array, "B"]


def settings(rows: list[dict[str, float]]) -> Sampling:
    """Stacks per-row settings; a missing key takes the value that changes nothing.

    Args:
        rows: one dict per row with any of temperature (default 1), top_k (0), top_p (1), repetition (1).

    Raises:
        ValueError: a key or a value is out of range; the message names both.
    """
    for row in rows:
        for name, value in row.items():
            if name not in RANGES:
                raise ValueError(f"sampling setting {name!r} does not exist; known: {', '.join(RANGES)}")
            _, low, high = RANGES[name]
            if not low <= value <= high:
                raise ValueError(f"sampling setting {name}={value} is outside [{low}, {high}]")

    def column(name):
        return [row.get(name, RANGES[name][0]) for row in rows]

    return Sampling(
        temperature_B=np.asarray(column("temperature"), np.float32),
        top_k_B=np.asarray(column("top_k"), np.int32),
        top_p_B=np.asarray(column("top_p"), np.float32),
        repetition_B=np.asarray(column("repetition"), np.float32),
    )


def row_keys(key_B: Key[Array, "B"], step: Int[Array, ""], stream: Int[Array, ""] | int) -> Key[Array, "B"]:
    """Keys of one draw: a row's numbers depend on its own key, the step and the stream (head and level) only."""
    return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, step), stream))(key_B)


def penalise(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], repetition_B: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Repetition penalty on the classes in `seen_BV`: scores below zero times r, others divided by r."""
    r_B1 = repetition_B[:, None]
    return jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * r_B1, logits_BV / r_B1), logits_BV)


def keep(
    probs_BV: Float[Array, "B V"], top_k_B: Int[Array, "B"], top_p_B: Float[Array, "B"], order: str = "joint"
) -> Bool[Array, "B V"]:
    """Which classes survive top-k and top-p; the most likely one always does.

    Args:
        probs_BV: a distribution per row.
        top_k_B: 0 keeps all.
        top_p_B: 1 keeps all.
        order: `joint` keeps rank < k and mass before it <= p, both on `probs_BV`; `hf` renormalises what top-k left
            and keeps mass before it < p. Of equal probabilities the lower id ranks first.
    """
    if order not in ORDERS:
        raise ValueError(f"sampling order {order!r} does not exist; known: {', '.join(ORDERS)}")
    classes = probs_BV.shape[-1]
    index_BV = jnp.argsort(probs_BV, axis=-1, descending=True, stable=True)
    sorted_BV = jnp.take_along_axis(probs_BV, index_BV, axis=-1)
    rank_V = jnp.arange(classes)
    top_BV = rank_V[None] < jnp.where(top_k_B > 0, top_k_B, classes)[:, None]
    if order == "hf":
        sorted_BV = jnp.where(top_BV, sorted_BV, 0)
        sorted_BV = sorted_BV / jnp.sum(sorted_BV, axis=-1, keepdims=True)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    # Without the exception for 1, rounding of the running sum would drop classes of a row that asked for no filter.
    off_B1 = top_p_B[:, None] >= 1
    inside_BV = off_B1 | (before_BV <= top_p_B[:, None] if order == "joint" else before_BV < top_p_B[:, None])
    kept_BV = (top_BV & inside_BV) | (rank_V == 0)[None]
    rows_B1 = jnp.arange(probs_BV.shape[0])[:, None]
    return jnp.zeros_like(kept_BV).at[rows_B1, index_BV].set(kept_BV, unique_indices=True)


def filtered_logits(
    logits_BV: Float[Array, "B V"], how: Sampling, seen_BV: Bool[Array, "B V"] | None = None, order: str = "joint"
) -> Float[Array, "B V"]:
    """Logits of the kept distribution: penalised, divided by the temperature, -inf where filtered out.

    Rows of temperature 0 keep temperature 1 here; `sample` takes their largest entry, which no filter removes.
    """
    scores_BV = logits_BV.astype(jnp.float32)
    if seen_BV is not None:
        scores_BV = penalise(scores_BV, seen_BV, how.repetition_B)
    scores_BV = scores_BV / jnp.where(how.temperature_B > 0, how.temperature_B, 1)[:, None]

    def narrow(scores_BV):
        kept_BV = keep(jax.nn.softmax(scores_BV, axis=-1), how.top_k_B, how.top_p_B, order)
        return jnp.where(kept_BV, scores_BV, -jnp.inf)

    # The sort is the dearest part of a step; a batch in which no row filters skips it.
    active = jnp.any((how.top_k_B > 0) | (how.top_p_B < 1))
    return jax.lax.cond(active, narrow, lambda scores_BV: scores_BV, scores_BV)


def sample(
    key_B: Key[Array, "B"],
    logits_BV: Float[Array, "B V"],
    how: Sampling,
    seen_BV: Bool[Array, "B V"] | None = None,
    order: str = "joint",
) -> Int[Array, "B"]:
    """Draws one class per row.

    Args:
        key_B: one key per row (`row_keys`); a row's draw does not depend on the other rows.
        logits_BV: raw scores; -inf bans a class.
        how: settings per row.
        seen_BV: classes that the repetition penalty applies to; None for no penalty.
        order: see `keep`.

    Returns:
        int32 class per row.
    """
    scores_BV = filtered_logits(logits_BV, how, seen_BV, order)
    # Gumbel noise per class, not one uniform against a running sum: the draw then does not depend on whether the
    # scores were sorted, and adding banned classes at the end of V changes no other class's number.
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, scores_BV.shape[1:], jnp.float32))(key_B)
    noise_BV = jnp.where((how.temperature_B > 0)[:, None], noise_BV, 0)
    return jnp.argmax(scores_BV + noise_BV, axis=-1).astype(jnp.int32)
