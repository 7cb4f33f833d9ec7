"""Attention among the tokens of packed images, in memory that does not grow with the square of a large image.

Who sees whom is said by ids: two tokens do if all their ids are equal (the image they belong to, the window they lie in).
Beyond `QUERIES` tokens the queries take turns, so that of an image of 4,096 cells (16,384 patches, 1 GB of scores a head)
only a strip is there at once, in the backward pass too.

Letters: B packs, P tokens, H query heads, G key heads (H a multiple of G), K head width, Q queries at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

QUERIES = 2048
MASKED = -1e30  # finite, so that a row without any allowed key would stay finite too


def attend(
    q_BPHK: Float[Array, "B P H K"],
    k_BPGK: Float[Array, "B P G K"],
    v_BPGK: Float[Array, "B P G K"],
    ids: tuple[Int[Array, "B P"], ...],
) -> Float[Array, "B P HK"]:
    """Softmax attention in float32; heads of one group, side by side, share keys and values.

    Args:
        q_BPHK: queries, scaled.
        k_BPGK, v_BPGK: keys and values.
        ids: tokens see each other where all of these agree.

    Returns:
        Mixed values, heads side by side, in the dtype of `v_BPGK`.
    """
    b, p, heads, _ = q_BPHK.shape
    if p <= QUERIES:
        return _strip(q_BPHK, ids, k_BPGK, v_BPGK, ids)
    strips = -(-p // QUERIES)

    def cut(x):
        filled = jnp.pad(x, [(0, 0), (0, strips * QUERIES - p)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(filled.reshape(b, strips, QUERIES, *x.shape[2:]), 1, 0)

    one = jax.checkpoint(lambda strip: _strip(*strip, k_BPGK, v_BPGK, ids))
    out = jax.lax.map(one, (cut(q_BPHK), tuple(cut(x) for x in ids)))
    return jnp.moveaxis(out, 0, 1).reshape(b, strips * QUERIES, -1)[:, :p]


def _strip(q_BQHK, query_ids, k_BPGK, v_BPGK, ids):
    b, rows, heads, width = q_BQHK.shape
    groups = k_BPGK.shape[2]
    q = q_BQHK.reshape(b, rows, groups, heads // groups, width)
    scores = jnp.einsum("bqgrk,bpgk->bgrqp", q, k_BPGK, preferred_element_type=jnp.float32)
    seen = True
    for mine, theirs in zip(query_ids, ids, strict=True):
        seen &= mine[:, :, None] == theirs[:, None, :]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, MASKED), axis=-1).astype(v_BPGK.dtype)
    return jnp.einsum("bgrqp,bpgk->bqgrk", weights, v_BPGK).reshape(b, rows, heads * width)
