"""Three equal ways to run real experts on the tokens that chose them; identity experts and padding never come here.

'dense' runs every expert on every token and masks: the truth. 'gather' moves chosen tokens into one bounded buffer
per expert, and what does not fit through the same buffers again, so no token is ever lost; tokens that choose few of many
experts, as in decoding, read the chosen ones only, and on a CPU served experts take turns. 'ragged' sorts the (token, expert) pairs by
expert and multiplies row groups (`lax.ragged_dot`; on some TPU generations that compiles to a dense loop over experts,
reference/tpu.md §4). Where a mesh splits the experts, these bring weights to the tokens; the ways of transport.py bring
tokens to 'gather' buffers of their experts' devices.

Legend: N tokens, D width, E real experts, K selections per token, C buffer rows per expert, F hidden width,
P = N*K pairs, Q rows of a buffer. An index of -1 means: no such row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dina import sharding
from dina.backbone import transport
from dina.backbone.config import ExpertsConfig
from dina.backbone.linear import Served
from dina.backbone.rows import ROUTED, Plan, buffer_plan, collect, in_rounds, inverse, margin, named, sort_pairs, spread


# `few` from so many experts a (token, expert) pair on. Its branches run one after another: 4 pairs of 32 small experts on an H100
# make 525 tokens/s, buffers of all experts 748. The release's 12 of 256 would read 32 times as much that way (not measured).
SPARSE = 16
TILE = 64  # rows of one expert that are multiplied together
PAIRS_EACH = 8  # (token, expert) pairs an expert up to which experts apart take them one by one: 64 tokens by 32 experts, 0.15 against 0.25 s


class Experts(NamedTuple):
    """SwiGLU weights of all real experts, in the compute type."""

    gate_EDF: Float[Array, "E D F"]
    up_EDF: Float[Array, "E D F"]
    down_EFD: Float[Array, "E F D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart(Served):
    """The same as decoding few rows on a CPU wants it: matrices of each expert for itself, gate and up side by side (G = 2 F)."""

    into_DG: tuple[Float[Array, "D G"], ...]
    down_FD: tuple[Float[Array, "F D"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InTurn(Served):
    """The same as many rows on a CPU want it: each expert works on its own rows, however many, and the next follows."""

    into_EDG: Float[Array, "E D G"]
    down_EFD: Float[Array, "E F D"]


def served(w: Experts, few: bool) -> Apart | InTurn:
    """Stacked experts as serving `few` or many rows wants them."""
    into_EDG = jnp.concatenate([w.gate_EDF, w.up_EDF], -1)
    return Apart(tuple(into_EDG), tuple(w.down_EFD)) if few else InTurn(into_EDG, w.down_EFD)


def gated(gate: Array, up: Array) -> Array:
    """silu(gate) * up, made in float32, in the type of `up`."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up).astype(up.dtype)


def run(cfg: ExpertsConfig, w: Experts, u_ND, expert_NK, weight_NK, axes: tuple[str, ...] = ()):
    """Weighted sum of the chosen real experts of each token.

    Args:
        cfg: `dispatch` names the way.
        w: expert weights; `sharding.Shard`s of them where tokens travel (transport.py).
        u_ND: tokens, in the compute type.
        expert_NK: chosen experts, distinct in a row; cfg.real and above are identity experts and are skipped.
        weight_NK: combination weights, float32; 0 exactly where a token is padding.
        axes: mesh axes over which the choice of the slow path must agree (DESIGN §4.6).

    Returns:
        The sum [N, D] in float32, and the number of pairs over capacity (int32, local; 0 for 'dense' and 'ragged').
    """
    # Padding is recognised by its zero weights; a real choice can only underflow to 0, and then adds nothing either.
    key_NK = jnp.where((expert_NK < cfg.real) & (weight_NK != 0), expert_NK, cfg.real)
    buffers = functools.partial(gather, axes=axes)
    if isinstance(w, Experts) and sharding.split(w):
        return transport.run(cfg, buffers, w, u_ND, key_NK, weight_NK, axes)
    return {"dense": dense, "ragged": ragged}.get(cfg.dispatch, buffers)(cfg, w, u_ND, key_NK, weight_NK)


def dense(cfg: ExpertsConfig, w: Experts, u_ND, key_NK, weight_NK):
    """Every expert on every token, one expert at a time so that memory holds [N, F] and never [N, E, F]."""

    @jax.checkpoint
    def one(sum_ND, expert):
        index, gate_DF, up_DF, down_FD = expert
        return sum_ND + _weighted(index, Experts(gate_DF, up_DF, down_FD), u_ND, key_NK, weight_NK), None

    zero_ND = jnp.zeros(u_ND.shape, jnp.float32)
    return jax.lax.scan(one, zero_ND, (jnp.arange(cfg.real), *w))[0], jnp.int32(0)


def _weighted(index, w: Experts, u_ND, key_NK, weight_NK):
    """Expert `index`, whose own matrices `w` holds, on every token, times the weight of those that chose it; float32."""
    weight_N = jnp.sum(jnp.where(key_NK == index, weight_NK, 0.0), -1)
    hidden_NF = gated(u_ND @ w.gate_EDF, u_ND @ w.up_EDF)
    return weight_N[:, None] * (hidden_NF @ w.down_EFD).astype(jnp.float32)


def capacity(cfg: ExpertsConfig, tokens: int) -> int:
    """Buffer rows per expert: the balanced expectation with its `margin`."""
    return margin(cfg, tokens, tokens * (cfg.target_top_k or cfg.top_k * cfg.real / cfg.total) / cfg.real)


def gather(cfg: ExpertsConfig, w: Experts, u_ND, key_NK, weight_NK, axes: tuple[str, ...], name: str = ROUTED):
    """Bounded buffers; pairs that find theirs full wait for the next round, so the sum is exact and rarely slow. `name` is what
    `rows.named` calls the first round's outputs."""
    if isinstance(w, Apart) and key_NK.size <= PAIRS_EACH * cfg.real:
        return pair_by_pair(cfg, w, u_ND, key_NK, weight_NK), jnp.int32(0)
    if isinstance(w, InTurn):
        return in_turn(cfg, w, u_ND, key_NK, weight_NK), jnp.int32(0)
    if isinstance(w, Experts) and SPARSE * key_NK.size <= cfg.real:  # reading weights is all the cost
        return few(cfg, w, u_ND, key_NK, weight_NK), jnp.int32(0)
    rows = capacity(cfg, len(u_ND))
    order_P, start_E, count_E = sort_pairs(cfg.real, key_NK)

    def round_(number, w, u_ND, weight_NK):
        plan = buffer_plan(rows, key_NK, order_P, start_E + number * rows, count_E - number * rows)
        x_ECD = spread(u_ND, plan.token_Q, plan.row_NK).reshape(cfg.real, rows, -1)
        if isinstance(w, Apart):
            hidden_ECF = [gated(*jnp.split(x_CD @ into_DG, 2, -1)) for x_CD, into_DG in zip(x_ECD, w.into_DG, strict=True)]
            y_QD = jnp.concatenate([h_CF @ down_FD for h_CF, down_FD in zip(hidden_ECF, w.down_FD, strict=True)])
            return combine(y_QD, weight_NK, plan), jnp.int32(0)
        hidden_ECF = gated(jnp.einsum("ecd,edf->ecf", x_ECD, w.gate_EDF), jnp.einsum("ecd,edf->ecf", x_ECD, w.up_EDF))
        y_ECD = named(jnp.einsum("ecf,efd->ecd", hidden_ECF, w.down_EFD), name if isinstance(number, int) else "")
        return combine(y_ECD.reshape(cfg.real * rows, -1), weight_NK, plan), jnp.int32(0)

    def waiting(number):
        return jnp.sum(jnp.maximum(count_E - number * rows, 0), dtype=jnp.int32)

    return in_rounds(round_, waiting, -(-len(u_ND) // rows), axes, w, u_ND, weight_NK)


def pair_by_pair(cfg: ExpertsConfig, w: Apart, u_ND, key_NK, weight_NK):
    """One row by one expert at a time, an expert's rows one after another so that only the first reads it from memory.

    XLA:CPU multiplies one row at the speed of memory (18 GB/s, [1, 512] x [512, 1024]), eight rows together at 3.
    """
    order_P = sort_pairs(cfg.real, key_NK)[0] if len(u_ND) > 1 else None  # a single token's experts are distinct

    def choose(key, matrices, x_1X):
        # A branch is a product and nothing else: 64 tokens by 32 experts in 0.15 s instead of 0.17.
        nothing = lambda x_1X: jnp.zeros((1, matrices[0].shape[1]), x_1X.dtype)
        return jax.lax.switch(key, [*(lambda x_1X, w=w: x_1X @ w for w in matrices), nothing], x_1X)

    def one(_, pair):
        key = key_NK.reshape(-1)[pair]
        gate_up_1G = choose(key, w.into_DG, u_ND[pair // key_NK.shape[1]][None])
        return None, choose(key, w.down_FD, gated(*jnp.split(gate_up_1G, 2, -1)))[0]

    if order_P is None:
        y_PD = jax.lax.scan(one, None, jnp.arange(key_NK.size))[1]
    else:
        y_PD = jax.lax.scan(one, None, order_P)[1][inverse(order_P)]
    return jnp.sum(y_PD.reshape(*key_NK.shape, -1).astype(jnp.float32) * weight_NK[..., None], 1)


def in_turn(cfg: ExpertsConfig, w: InTurn, u_ND, key_NK, weight_NK):
    """Expert after expert takes its rows, sorted by expert, tile by tile: no row waits, and none is multiplied in vain but in
    each expert's last tile, which may reach into the next expert's rows, and that one overwrites them.

    1,024 tokens that choose 4 of 32 real and 16 identity experts, unevenly as random weights do, fill two rounds of buffers.
    Has no gradient: the number of tiles is data.
    """
    order_P, start_E, count_E = sort_pairs(cfg.real, key_NK)
    tile = min(TILE, 8 * math.ceil(len(order_P) / cfg.total / 8))
    x_PD = jnp.pad(u_ND[order_P // key_NK.shape[1]], ((0, tile), (0, 0)))

    def expert(e, y_PD):
        into_DG, down_FD = (jax.lax.dynamic_index_in_dim(x, e, keepdims=False) for x in (w.into_EDG, w.down_EFD))

        def step(carry):
            done, y_PD = carry
            x_TD = jax.lax.dynamic_slice_in_dim(x_PD, start_E[e] + done, tile)
            y_TD = gated(*jnp.split(x_TD @ into_DG, 2, -1)) @ down_FD
            return done + tile, jax.lax.dynamic_update_slice_in_dim(y_PD, y_TD, start_E[e] + done, 0)

        return jax.lax.while_loop(lambda carry: carry[0] < count_E[e], step, (jnp.int32(0), y_PD))[1]

    y_PD = jax.lax.fori_loop(0, cfg.real, expert, jnp.zeros_like(x_PD))
    row_NK = jnp.where(key_NK < cfg.real, inverse(order_P).reshape(key_NK.shape), -1)
    y_NKD = jnp.where(row_NK[..., None] >= 0, y_PD[jnp.maximum(row_NK, 0)], 0)
    return jnp.sum(y_NKD.astype(jnp.float32) * weight_NK[..., None], 1)


def few(cfg: ExpertsConfig, w: Experts, u_ND, key_NK, weight_NK):
    """Each chosen expert is read once, by all tokens together."""
    key_P = jnp.sort(key_NK.reshape(-1))
    first_P = (key_P < cfg.real) & (key_P != jnp.concatenate([jnp.full(1, -1, key_P.dtype), key_P[:-1]]))

    def chosen(u_ND, key):
        own = Experts(*(jax.lax.dynamic_index_in_dim(x, key, keepdims=False) for x in w))
        return _weighted(key, own, u_ND, key_NK, weight_NK)

    @jax.checkpoint
    def one(sum_ND, at):
        key, first = at
        return sum_ND + jax.lax.cond(first, chosen, lambda u_ND, _: jnp.zeros(u_ND.shape, jnp.float32), u_ND, key), None

    return jax.lax.scan(one, jnp.zeros(u_ND.shape, jnp.float32), (key_P, first_P))[0]


def ragged(cfg: ExpertsConfig, w: Experts, u_ND, key_NK, weight_NK):
    """Sorted pairs and grouped products; rows behind the last group are skipped pairs and stay zero."""
    order_P, _, count_E = sort_pairs(cfg.real, key_NK)
    real_P = jnp.arange(len(order_P)) < jnp.sum(count_E)
    pair_P = jnp.where(real_P, order_P, -1)
    row_NK = jnp.where(key_NK < cfg.real, inverse(order_P).reshape(key_NK.shape), -1)
    plan = Plan(jnp.where(real_P, order_P // key_NK.shape[1], -1), pair_P, row_NK)
    x_PD = spread(u_ND, plan.token_Q, plan.row_NK)
    hidden_PF = gated(jax.lax.ragged_dot(x_PD, w.gate_EDF, count_E), jax.lax.ragged_dot(x_PD, w.up_EDF, count_E))
    y_PD = jnp.where(real_P[:, None], jax.lax.ragged_dot(hidden_PF, w.down_EFD, count_E), 0)
    return combine(y_PD, weight_NK, plan), jnp.int32(0)


def combine(y_QD, weight_NK, plan: Plan):
    """Weights every buffer row and sums the rows of each token, in float32."""
    weight_Q1 = spread(weight_NK.reshape(-1, 1), plan.pair_Q, plan.row_NK.reshape(-1, 1))
    return collect(y_QD.astype(jnp.float32) * weight_Q1, plan.row_NK, plan.token_Q)
