"""Plans of which token stands in which buffer row, moving rows by them, and rounds through a bounded buffer.

Legend: N tokens, D width, E experts (or devices: whatever keys count), K selections per token, C buffer rows per expert,
P = N*K pairs, Q rows of a buffer. An index of -1 means: no such row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from dina import sharding
from dina.backbone.config import ExpertsConfig


ROUTED = "routed"  # name of what experts return, and of rows that came from other devices, for `block.policy`
COUNTED = 512  # pairs of a block, in `counted`
AT_ONCE = 2**27  # values [N, K, D] that `collect` may hold: on a TPU, reading rows and adding them up are not one operation


class Plan(NamedTuple):
    """Where pairs go: buffer row -> its token and pair, and each token's selections -> buffer rows."""

    token_Q: Int[Array, " Q"]
    pair_Q: Int[Array, " Q"]
    row_NK: Int[Array, "N K"]


def margin(cfg: ExpertsConfig, tokens: int, mean: float) -> int:
    """Buffer rows for a count of that mean: times `capacity_factor`, and for few tokens three deviations more; a multiple of 8,
    at most one row per token."""
    return min(tokens, 8 * math.ceil(max(cfg.capacity_factor * mean, mean + 3 * math.sqrt(mean)) / 8))


def named(x: Array, name: str) -> Array:
    """A value that a rematerialised layer may keep by its name. Rows of a slow path have none (""): keeping room for those
    would cost what they are there to save."""
    return checkpoint_name(x, name) if name else x


def in_rounds(round_: Callable, waiting: Callable, most: int, axes: tuple[str, ...], w: Any, u_ND: Array, weight_NK: Array):
    """Sum over as many rounds as the busiest device needs; the exact slow path behind a fast first round.

    The first round is outside the conditional, so that its backward pass keeps nothing but the branch's inputs.

    Args:
        round_: (number, w, u_ND, weight_NK) -> (sum [N, D], overflow of what it runs).
        waiting: number -> how many rows no round before it has taken.
        most: rounds that the worst case needs.
        axes: mesh axes that must agree on how many there are.
        w, u_ND, weight_NK: what is differentiated.

    Returns:
        The sum in float32, and the rows that waited for a second round plus what rounds report.
    """

    def nothing(w, u_ND, weight_NK):
        del w, weight_NK
        return jnp.zeros(u_ND.shape, jnp.float32), jnp.int32(0)

    @jax.checkpoint  # keeps only the branch's inputs for its backward pass
    def slow(*args):
        @jax.checkpoint
        def more(total, number):
            some = sharding.psum(waiting(number), axes) > 0
            return jax.tree.map(jnp.add, total, jax.lax.cond(some, functools.partial(round_, number), nothing, *args)), None

        return jax.lax.scan(more, nothing(*args), jnp.arange(1, most))[0]

    beyond = waiting(1)
    y_ND, overflow = round_(0, w, u_ND, weight_NK)
    rest_ND, more_overflow = jax.lax.cond(sharding.psum(beyond, axes) > 0, slow, nothing, w, u_ND, weight_NK)
    return y_ND + rest_ND, beyond + overflow + more_overflow


def sort_pairs(experts: int, key_NK):
    """Pairs ordered by expert, with each expert's first place and number of pairs; an expert's are in order, but on a TPU first
    choices before second ones."""
    in_order = lambda key_NK: jnp.argsort(key_NK.reshape(-1), stable=True).astype(jnp.int32)
    order_P = jax.lax.platform_dependent(key_NK, tpu=functools.partial(counted, experts), default=in_order)
    count_E = jnp.sum(key_NK.reshape(-1)[:, None] == jnp.arange(experts), 0, dtype=jnp.int32)
    return order_P, jnp.cumsum(count_E) - count_E, count_E


def counted(experts: int, key_NK: Int[Array, "N K"]) -> Int[Array, " P"]:
    """Orders pairs by keys 0..experts by counting: a sort of 644,000 takes the TPU compiler 16 s, this 5, and 17 if it does not
    take one choice of all tokens after another (libtpu 0.0.52, for v5p).

    B: pairs of a block, M blocks.
    """
    tokens, choices = key_NK.shape
    block = min(tokens, COUNTED)
    key_MB = jnp.pad(key_NK.T, ((0, 0), (0, -tokens % block)), constant_values=experts + 1).reshape(-1, block)
    own_MBE = key_MB[..., None] == jnp.arange(experts + 2)  # what fills up the last block comes last
    within_MBE = jnp.cumsum(own_MBE, 1, dtype=jnp.int32)
    block_ME = within_MBE[:, -1]
    count_E = jnp.sum(block_ME, 0)
    before_ME = jnp.cumsum(block_ME, 0) - block_ME + jnp.cumsum(count_E) - count_E
    place_KN = jnp.sum(jnp.where(own_MBE, within_MBE - 1 + before_ME[:, None], 0), -1).reshape(choices, -1)
    pair_KN = jnp.arange(tokens, dtype=jnp.int32) * choices + jnp.arange(choices, dtype=jnp.int32)[:, None]
    return jnp.zeros(tokens * choices, jnp.int32).at[place_KN[:, :tokens].reshape(-1)].set(pair_KN.reshape(-1), unique_indices=True)


def inverse(order_P):
    """The inverse of a permutation."""
    return jnp.zeros_like(order_P).at[order_P].set(jnp.arange(len(order_P), dtype=order_P.dtype), unique_indices=True)


def buffer_plan(rows: int, key_NK, order_P, start_E, count_E) -> Plan:
    """Buffer row e * rows + c holds the c-th pair of expert e; a count may be negative."""
    place_C = jnp.arange(rows)
    source_EC = jnp.clip(start_E[:, None] + place_C, 0, len(order_P) - 1)
    pair_Q = jnp.where(place_C < count_E[:, None], order_P[source_EC], -1).reshape(-1)
    rank_NK = inverse(order_P).reshape(key_NK.shape) - jnp.append(start_E, 0)[key_NK]
    inside_NK = (key_NK < len(start_E)) & (rank_NK >= 0) & (rank_NK < rows)
    row_NK = jnp.where(inside_NK, key_NK * rows + rank_NK, -1)
    return Plan(jnp.where(pair_Q < 0, -1, pair_Q // key_NK.shape[1]), pair_Q, row_NK)


# `spread` and `collect` are each other's transpose. Told so, the backward pass gathers rows where automatic
# differentiation would scatter-add them one by one.


@jax.custom_vjp
def spread(x_ND: Array, token_Q: Array, row_NK: Array) -> Array:
    """y_q = x[token_q]; row_NK lists, for each token, the rows q that hold it."""
    del row_NK
    return jnp.where(token_Q[:, None] >= 0, x_ND[jnp.maximum(token_Q, 0)], 0)


@jax.custom_vjp
def collect(y_QD: Array, row_NK: Array, token_Q: Array) -> Array:
    """x_n = sum over k of y[row_nk]."""
    del token_Q
    read = lambda row: jnp.where(row[..., None] >= 0, y_QD[jnp.maximum(row, 0)], 0)
    if row_NK.size * y_QD.shape[1] <= AT_ONCE:
        return jnp.sum(read(row_NK), 1)
    zero_ND = jnp.zeros((len(row_NK), y_QD.shape[1]), y_QD.dtype)
    return jax.lax.scan(lambda sum_ND, row_N: (sum_ND + read(row_N), None), zero_ND, row_NK.T)[0]


def _no_gradient(index: Array) -> np.ndarray:
    return np.zeros(index.shape, jax.dtypes.float0)


def _transposed(other):
    def backward(indices, cotangent):
        a, b = indices
        return other(cotangent, b, a), _no_gradient(a), _no_gradient(b)

    return backward


spread.defvjp(lambda x, token, row: (spread(x, token, row), (token, row)), _transposed(lambda g, row, token: collect(g, row, token)))
collect.defvjp(lambda y, row, token: (collect(y, row, token), (row, token)), _transposed(lambda g, token, row: spread(g, token, row)))
