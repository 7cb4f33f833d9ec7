"""Balancing experts without a loss: after each step the selection bias moves towards the wanted frequencies.

Legend: L logical layers, E experts (real first, then identity). Source: reference/backbone.md §7.3.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dina.backbone.config import BackboneConfig, ExpertsConfig


def init_router_bias(cfg: BackboneConfig) -> Float[Array, "L E"]:
    """The selection biases at the start: zero."""
    return jnp.zeros((cfg.layers, cfg.experts.total), jnp.float32)


def rate(cfg: ExpertsConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Step size of the bias at `step`: halved at fixed intervals, with a floor."""
    halvings = (jnp.asarray(step) // cfg.balance_half_life).astype(jnp.float32)
    return jnp.maximum(cfg.balance_rate * 0.5**halvings, cfg.balance_floor)


def update_bias(
    bias_LE: Float[Array, "L E"], counts_LE: Int[Array, "L E"], cfg: ExpertsConfig, step: Int[Array, ""] | int
) -> Float[Array, "L E"]:
    """Moves the biases of real experts by rate * (wanted - actual) selection frequency.

    Args:
        bias_LE: current biases.
        counts_LE: selections of the whole step, summed over micro-batches and devices.
        cfg: `target_top_k` of `top_k` selections should fall on real experts, evenly; the identity experts' biases
            then stay. Without a target or without identity experts, all frequencies should be 1/E.
        step: optimizer step, for the rate.

    Returns:
        New biases; a layer that routed nothing keeps its own.
    """
    counts = counts_LE.astype(jnp.float32)
    total_L1 = counts.sum(-1, keepdims=True)
    uniform = cfg.target_top_k == 0 or cfg.zero == 0
    wanted = 1.0 / cfg.total if uniform else cfg.target_top_k / cfg.top_k / cfg.real
    error_LE = wanted - counts / jnp.maximum(total_L1, 1.0)
    moves_E = jnp.ones(cfg.total, bool) if uniform else jnp.arange(cfg.total) < cfg.real
    direction_LE = jnp.sign(error_LE) if cfg.balance == "sign" else error_LE
    return bias_LE + jnp.where(moves_E & (total_L1 > 0), rate(cfg, step) * direction_LE, 0.0)
