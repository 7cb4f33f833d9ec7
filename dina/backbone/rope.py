"""Rotary positions on interleaved pairs: values (2j, 2j+1) of a head turn by position * theta^(-2j/R).

Legend: B batch, S positions, R rotary values per head, P = R/2 pairs. Source: reference/backbone.md §1.3.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def table(position_BS: Int[Array, "B S"], size: int, theta: float) -> tuple[Float[Array, "B S P"], Float[Array, "B S P"]]:
    """Cosines and sines, float32, of every pair's angle (radians) at every position."""
    frequency_P = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle_BSP = position_BS.astype(jnp.float32)[..., None] * frequency_P
    return jnp.cos(angle_BSP), jnp.sin(angle_BSP)


def rotate(x: Float[Array, "... R"], cos: Float[Array, "... P"], sin: Float[Array, "... P"]) -> Float[Array, "... R"]:
    """Turns adjacent pairs in place.

    The reference first gathers evens and odds into halves; both sides of a dot product would then be permuted alike,
    so scores are the same and a stored key stays in the weights' own order.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape).astype(x.dtype)
