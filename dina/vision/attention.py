"""Attention among the tokens of packed images, in memory that does not grow with the square of a large image.

Who sees whom is said by ids: two tokens do if all their ids are equal (the image they belong to, the window they lie in).
Beyond `QUERIES` tokens the queries take turns, so that of an image of 4,096 cells (16,384 patches, 1 GB of scores a head)
only a strip is there at once, in the backward pass too. Where those that see each other lie beside each other, as windows do
once they are sorted, `attend_near` looks no further than it must.

Letters: B packs, P tokens, H query heads, G key heads (H a multiple of G), K head width, Q queries at once, N blocks of R tokens.
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


def attend_near(
    q_BPHK: Float[Array, "B P H K"], k_BPGK: Float[Array, "B P G K"], v_BPGK: Float[Array, "B P G K"], id_BP: Int[Array, "B P"], reach: int
) -> Float[Array, "B P HK"]:
    """`attend` where tokens of one id lie beside each other, at most `reach` of them; of a longer run each token sees a part.

    A block of `reach` queries reads its own keys and those of the blocks before and after it.
    """
    b, p, heads, _ = q_BPHK.shape
    blocks = -(-p // reach)

    def cut(x, fill=0):
        filled = jnp.pad(x, [(0, 0), (0, blocks * reach - p)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return filled.reshape(b, blocks, reach, *x.shape[2:])

    def near(x, fill=0):
        filled = jnp.pad(cut(x, fill), [(0, 0), (1, 1)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return jnp.concatenate([filled[:, :-2], filled[:, 1:-1], filled[:, 2:]], 2).reshape(b * blocks, 3 * reach, *x.shape[2:])

    flat = lambda x: x.reshape(b * blocks, reach, *x.shape[3:])
    # No token has the id of what fills up keys; queries that fill up see nothing and are cut off.
    out = _strip(flat(cut(q_BPHK)), (flat(cut(id_BP, -2)),), near(k_BPGK), near(v_BPGK), (near(id_BP, -1),))
    return out.reshape(b, blocks * reach, -1)[:, :p]


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
