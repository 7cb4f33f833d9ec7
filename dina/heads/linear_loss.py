"""Cross-entropy of a linear classifier that keeps no logits: gradients are formed where the logits are.

The loss is a weighted sum, so its gradient is known up to one factor as soon as a chunk of logits exists. The forward
pass of a differentiated call therefore returns d(hidden), d(kernel), d(bias) as residuals, and the backward pass
scales them: no logits are stored, none are computed twice, and `chunk` bounds how many exist at once.

Legend: M rows, W width, V stored classes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PADDED_LOGIT = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def linear_cross_entropy(
    hidden_MW: Float[Array, "M W"],
    kernel_WV: Float[Array, "W V"],
    bias_V: Float[Array, " V"] | None,
    label_M: Int[Array, " M"],
    weight_M: Float[Array, " M"],
    classes: int = 0,
    chunk: int = 0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over rows of the cross-entropy (nats) and of correct argmax choices.

    Args:
        hidden_MW: inputs; also the type of the products, sums are float32.
        kernel_WV: classifier.
        bias_V: its bias, or None.
        label_M: true classes; ignored where the weight is 0.
        weight_M: row weights; no gradient flows to them.
        classes: usable classes if fewer than V; the rest never get probability. 0: all.
        chunk: rows whose logits exist at once; chunks without weight are skipped. 0: all.

    Returns:
        (sum of weight * loss, sum of weight * correct), float32; only the first has a gradient.
    """
    return _run(hidden_MW, kernel_WV, bias_V, label_M, weight_M, classes, chunk, gradients=False)[0]


def _run(hidden_MW, kernel_WV, bias_V, label_M, weight_M, classes, chunk, gradients):
    """((loss, correct), (d hidden, d kernel, d bias)) over all chunks; the gradients are None unless asked for."""
    one = functools.partial(_chunk, kernel_WV, bias_V, classes, gradients)
    rows = len(hidden_MW)
    if not chunk or rows <= chunk:
        sums, d_hidden, d_rest = one(hidden_MW, label_M, weight_M)
        return sums, (d_hidden, *d_rest)
    count = -(-rows // chunk)
    fill = lambda x: jnp.pad(x, [(0, count * chunk - rows)] + [(0, 0)] * (x.ndim - 1)).reshape(count, chunk, *x.shape[1:])

    parts = (fill(hidden_MW), fill(label_M), fill(weight_M))
    shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], parts))
    nothing = lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def step(total, part):
        sums, d_hidden, d_rest = jax.lax.cond(jnp.any(part[2] != 0), one, nothing, *part)
        return jax.tree.map(jnp.add, total, (sums, d_rest)), d_hidden

    first = nothing()
    (sums, d_rest), d_hidden = jax.lax.scan(step, (first[0], first[2]), parts)
    d_hidden = None if d_hidden is None else d_hidden.reshape(-1, hidden_MW.shape[1])[:rows]
    return sums, (d_hidden, *d_rest)


def _chunk(kernel_WV, bias_V, classes, gradients, hidden_MW, label_M, weight_M):
    """Sums and, if asked, gradients of one chunk of rows."""
    logits_MV = jnp.dot(hidden_MW, kernel_WV.astype(hidden_MW.dtype), preferred_element_type=jnp.float32)
    logits_MV = logits_MV if bias_V is None else logits_MV + bias_V
    class_V = jnp.arange(logits_MV.shape[1])
    if classes:
        logits_MV = jnp.where(class_V < classes, logits_MV, PADDED_LOGIT)
    weight_M = weight_M.astype(jnp.float32)
    top_M = jnp.max(logits_MV, -1)
    mass_MV = jnp.exp(logits_MV - top_M[:, None])
    total_M = jnp.sum(mass_MV, -1)
    picked_M = jnp.take_along_axis(logits_MV, jnp.maximum(label_M, 0)[:, None], 1)[:, 0]
    loss_M = jnp.where(weight_M != 0, jnp.log(total_M) + top_M - picked_M, 0.0)
    sums = (jnp.sum(weight_M * loss_M), jnp.sum(weight_M * (picked_M >= top_M)))
    if not gradients:
        return sums, None, (None, None)
    d_MV = mass_MV * (weight_M / total_M)[:, None] - jnp.where(class_V == label_M[:, None], weight_M[:, None], 0.0)
    d_bias_V = None if bias_V is None else jnp.sum(d_MV, 0)
    d_MV = d_MV.astype(hidden_MW.dtype)
    d_hidden_MW = jnp.dot(d_MV, kernel_WV.astype(hidden_MW.dtype).T)
    d_kernel_WV = jnp.dot(hidden_MW.T, d_MV, preferred_element_type=jnp.float32)
    return sums, d_hidden_MW, (d_kernel_WV, d_bias_V)


def _forward(hidden_MW, kernel_WV, bias_V, label_M, weight_M, classes, chunk):
    sums, (d_hidden, d_kernel, d_bias) = _run(hidden_MW, kernel_WV, bias_V, label_M, weight_M, classes, chunk, gradients=True)
    d_bias = None if bias_V is None else d_bias.astype(bias_V.dtype)
    return sums, (d_hidden, d_kernel.astype(kernel_WV.dtype), d_bias, label_M, weight_M)


def _backward(classes, chunk, residuals, cotangents):
    del classes, chunk
    *gradients, label_M, weight_M = residuals
    scaled = (None if g is None else (g * cotangents[0]).astype(g.dtype) for g in gradients)
    return *scaled, np.zeros(label_M.shape, jax.dtypes.float0), jnp.zeros_like(weight_M)


linear_cross_entropy.defvjp(_forward, _backward)
