"""Sums over the positions that have a loss, and over no others.

Positions that count are moved to the front (`front`), cut into chunks, and chunks without any are skipped at run time:
text pays nothing for the image head, and a buffer sized for the worst pack costs what is in it. With remat, a chunk's
activations exist once in the forward and once in the backward pass, so a whole batch's logits never do.

Shapes: N positions, C positions of a chunk, V classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def front(valid_N: Bool[Array, "N"]) -> Int[Array, "N"]:
    """Positions in an order that puts the valid ones first and keeps both groups' own order."""
    return jnp.argsort(~valid_N, stable=True)


def cut(arrays: Any, chunk: int) -> Any:
    """Leading dimensions N become [chunks, positions of a chunk], filled up with zeros; fewer than `chunk` are one chunk."""

    def one(x):
        size = min(chunk, len(x))
        chunks = -(-len(x) // size)
        filled = jnp.pad(x, [(0, chunks * size - len(x))] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(one, arrays)


def chunked_sums(
    fn: Callable[[Any, Any], Any], params: Any, arrays: Any, used: Int[Array, ""], chunk: int, remat: str = "full"
) -> Any:
    """Adds up `fn(params, one chunk of arrays)` over the chunks that hold one of the first `used` positions.

    Args:
        fn: returns a tree of sums; it weighs positions itself.
        params: passed to every chunk; differentiated like the arrays.
        arrays: tree of arrays with leading dimension N, the `used` ones first (`front`); the others, and the zeros
            that fill up the last chunk, must have weight 0 in `fn`.
        used: how many positions count.
        chunk: positions per chunk.
        remat: 'full' recomputes a chunk in the backward pass, 'none' keeps what it needs.

    Returns:
        The tree of sums.
    """
    pieces = cut(arrays, chunk)
    chunks, chunk = jax.tree.leaves(pieces)[0].shape[:2]
    step = {"full": jax.checkpoint(fn), "none": fn}[remat]
    if chunks == 1:
        return step(params, jax.tree.map(lambda x: x[0], pieces))
    shapes = jax.eval_shape(fn, params, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total, live_piece):
        live, piece = live_piece
        part = jax.lax.cond(live, step, lambda params, piece: zeros, params, piece)
        return jax.tree.map(jnp.add, total, part), None

    return jax.lax.scan(body, zeros, (jnp.arange(chunks) * chunk < used, pieces))[0]


def nll(
    logits_CV: Float[Array, "*C V"], labels_C: Int[Array, "*C"], classes: int | None = None
) -> tuple[Float[Array, "*C"], Bool[Array, "*C"]]:
    """Negative log-likelihood (float32 logsumexp) and whether the label has the largest logit.

    Args:
        logits_CV: scores.
        labels_C: class ids; negative ones read class 0 and must have weight 0.
        classes: true number of classes where V is padded; the rest is left out of the softmax.
    """
    logits_CV = logits_CV.astype(jnp.float32)
    if classes is not None and classes < logits_CV.shape[-1]:
        logits_CV = jnp.where(jnp.arange(logits_CV.shape[-1]) < classes, logits_CV, -jnp.inf)
    safe_C = jnp.maximum(labels_C, 0)
    chosen_C = jnp.take_along_axis(logits_CV, safe_C[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_CV, axis=-1) - chosen_C, jnp.argmax(logits_CV, axis=-1) == safe_C
