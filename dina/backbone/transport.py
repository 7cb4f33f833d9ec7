"""How tokens reach experts that other devices along the mesh axis `expert` hold, and how results come back.

A token goes to a device once, however many of its experts are there: with it go its choices and weights, and one row comes
back, their weighted sum. 'all_to_all' sends C rows to each device and what does not fit in further rounds. In
'ragged_all_to_all' rows of all devices share a buffer of n * C, which holds more uneven choices, and exactly the rows that
are there travel; where some device has more, all take the rounds. So no token is ever lost, and memory does not grow with
the worst case. XLA:CPU lacks the ragged collective: there, an all-gather and reading from it stand in.

Legend: N tokens, D width, K selections per token, n devices along the axis, E experts of one device, C rows for one device,
Q = n * C.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dina import sharding
from dina.backbone.config import ExpertsConfig
from dina.backbone.rows import ROUTED, Plan, buffer_plan, collect, in_rounds, inverse, margin, named, sort_pairs, spread


def places(cfg: ExpertsConfig, tokens: int, devices: int) -> int:
    """C: how many tokens choose an expert of one device if all experts are chosen equally often, and the usual margin."""
    chosen = cfg.target_top_k or cfg.top_k * cfg.real / cfg.total
    return margin(cfg, tokens, tokens * (1 - (1 - 1 / devices) ** chosen))


def destinations(key_NK: Int[Array, "N K"], own: int, devices: int) -> Int[Array, "N K"]:
    """The device of each choice, but `devices` for identity experts and for a device that stands further left already."""
    owner_NK = key_NK // own
    before_KK = jnp.tril(jnp.ones((key_NK.shape[1],) * 2, bool), -1)
    again_NK = jnp.any((owner_NK[:, :, None] == owner_NK[:, None, :]) & before_KK, -1)
    return jnp.where(again_NK, devices, jnp.minimum(owner_NK, devices)).astype(jnp.int32)


def run(cfg: ExpertsConfig, experts: Callable, w, u_ND, key_NK, weight_NK, axes: tuple[str, ...]):
    """Weighted sum over all devices' experts; see `dispatch.run`.

    Args:
        cfg: `dispatch` names the transport.
        experts: (cfg, w, u_ND, key_NK, weight_NK, name=) -> (sum, overflow) on the experts of one device.
        w: weights, `sharding.Shard`s along one mesh axis.
        u_ND: tokens.
        key_NK: chosen experts, cfg.real for none.
        weight_NK: float32.
        axes: mesh axes over which the choice of the slow path must agree; the experts' own is one of them.

    Returns:
        The sum [N, D] in float32, and how many pairs and rows, of this device, went a slow way.
    """
    ((_, (axis,)),) = w[0].splits
    devices, tokens = jax.lax.axis_size(axis), len(u_ND)
    own, rows = cfg.real // devices, places(cfg, tokens, devices)
    mean = tokens * (cfg.target_top_k or cfg.top_k * cfg.real / cfg.total) / (devices * rows)  # choices of a received row
    local = functools.partial(experts, dataclasses.replace(cfg, real=own, zero=0, target_top_k=mean))
    w = type(w)(*(x.part for x in w))
    to_NK = destinations(key_NK, own, devices)
    order_P, start_n, count_n = sort_pairs(devices, to_NK)

    def through(exchange, back, plan: Plan, to_Q, name, w, u_ND, weight_NK):
        """Sends a plan's rows, runs them where they arrive, and sums what comes back."""
        key_QK = jnp.where(plan.token_Q[:, None] >= 0, key_NK[jnp.maximum(plan.token_Q, 0)], cfg.real)
        key_QK = jnp.where(key_QK // own == to_Q[:, None], key_QK % own, own)
        sent = spread(u_ND, plan.token_Q, plan.row_NK), key_QK - own, spread(weight_NK, plan.token_Q, plan.row_NK)
        with jax.named_scope("dispatch"):
            x_QD, key_QK, weight_QK = (named(exchange(x), name) for x in sent)
        y_QD, overflow = local(w, x_QD, key_QK + own, weight_QK, name=name)  # a row that nobody sent is zero: it has no expert
        with jax.named_scope("return"):
            y_QD = back(y_QD.astype(u_ND.dtype))
        return collect(y_QD.astype(jnp.float32), plan.row_NK, plan.token_Q), overflow

    def round_(number, *args):
        plan = buffer_plan(rows, to_NK, order_P, start_n + number * rows, count_n - number * rows)
        equal = lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True)
        return through(equal, equal, plan, jnp.repeat(jnp.arange(devices), rows), ROUTED if isinstance(number, int) else "", *args)

    def waiting(number):
        return jnp.sum(jnp.maximum(count_n - number * rows, 0), dtype=jnp.int32)

    padded = functools.partial(in_rounds, round_, waiting, -(-tokens // rows), axes)
    if cfg.dispatch == "all_to_all":
        return padded(w, u_ND, weight_NK)
    count_nn = jax.lax.all_gather(count_n, axis)

    def at_once(*args):
        place_Q = jnp.arange(devices * rows)
        there_Q = place_Q < jnp.sum(count_n)
        pair_Q = jnp.where(there_Q, order_P[jnp.minimum(place_Q, len(order_P) - 1)], -1)
        row_NK = jnp.where(to_NK < devices, inverse(order_P).reshape(to_NK.shape), -1)
        plan = Plan(jnp.where(there_Q, pair_Q // to_NK.shape[1], -1), pair_Q, row_NK)
        to_Q = jnp.searchsorted(jnp.cumsum(count_n), place_Q, side="right")
        there, back = (functools.partial(ragged_all_to_all, count_nn=c, axis=axis) for c in (count_nn, count_nn.T))
        return through(there, back, plan, to_Q, "", *args)

    held = jnp.maximum(jnp.sum(count_n), jnp.sum(count_nn[:, jax.lax.axis_index(axis)]))
    beyond = jnp.maximum(held - devices * rows, 0).astype(jnp.int32)
    y_ND, overflow = jax.lax.cond(sharding.psum(beyond, axes) > 0, padded, jax.checkpoint(at_once), w, u_ND, weight_NK)
    return y_ND, overflow + beyond


def ragged_all_to_all(x_QX: Array, count_nn: Int[Array, "n n"], axis: str) -> Array:
    """Rows ordered by receiver become rows ordered by sender.

    Args:
        x_QX: the rows for device 0, those for device 1, and so on, and then anything.
        count_nn: how many go from device i to device j, the same on all; no sum over i or j is above Q.
        axis: mesh axis of the devices.

    Returns:
        As many rows; those that nobody sent are zero.
    """
    me = jax.lax.axis_index(axis)
    first = lambda count: jnp.cumsum(count, 0) - count
    send_n, receive_n = count_nn[me], count_nn[:, me]

    def collective(x_QX):
        # What arrives from `me` at device j stands behind what devices before `me` send there.
        at_n = first(count_nn)[me]
        return jax.lax.ragged_all_to_all(x_QX, jnp.zeros_like(x_QX), first(send_n), send_n, at_n, receive_n, axis_name=axis)

    def stand_in(x_QX):
        all_nQX = jax.lax.all_gather(x_QX, axis)
        place_Q = jnp.arange(len(x_QX))
        from_Q = jnp.minimum(jnp.searchsorted(jnp.cumsum(receive_n), place_Q, side="right"), len(receive_n) - 1)
        at_Q = first(count_nn.T)[me][from_Q] + place_Q - first(receive_n)[from_Q]
        found_QX = all_nQX[from_Q, jnp.clip(at_Q, 0, len(x_QX) - 1)]
        there_Q = (place_Q < jnp.sum(receive_n)).reshape(-1, *[1] * (x_QX.ndim - 1))
        return jnp.where(there_Q, found_QX, 0)

    return jax.lax.platform_dependent(x_QX, cpu=stand_in, default=collective)
