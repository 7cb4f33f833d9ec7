"""Finite scalar quantization: the codes are the points of a fixed grid, found by rounding (Mentzer et al. 2023).

Every dimension is bounded to [-1, 1] and takes evenly spaced values, the ends included. This is the symmetric form of
Parker et al. 2024 (Stable Codec), which needs no special case for an even number of values. Code k counts the points
with the first dimension running fastest.

Legend: N vectors, K codes, F dimensions of the grid.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MOST = 8  # values of a dimension at most, as in the paper's table


@functools.cache
def values(size: int) -> tuple[int, ...]:
    """How many values each dimension of a grid of exactly `size` points takes, falling; () if there is no such grid.

    The fewest dimensions of 2 to 8 values, then the most even ones. 240, 1000 and 15360 give the paper's (8, 6, 5),
    (8, 5, 5, 5) and (8, 8, 8, 6, 5); of powers of two 256 is (8, 8, 4), 1024 (8, 8, 4, 4) and 16384 (8, 8, 8, 8, 4).
    """

    def products(left: int, most: int):
        if left == 1:
            yield ()
        for value in range(min(left, most), 1, -1):
            if left % value == 0:
                yield from ((value, *rest) for rest in products(left // value, value))

    return min(products(size, MOST), key=lambda v: (len(v), -min(v), max(v)), default=()) if size > 1 else ()


def nearest_sizes(size: int) -> tuple[int, ...]:
    """The sizes next to `size` on both sides that a grid can have."""
    below = [other for other in range(size - 1, 1, -1) if values(other)][:1]
    above = next(other for other in range(max(size, 1) + 1, 2 * max(size, 1) + 1) if values(other))
    return (*below, above)


def points(size: int) -> Float[np.ndarray, "K F"]:
    """The grid: all codes as vectors in [-1, 1]."""
    digits, rest = [], np.arange(size)
    for value in values(size):
        digits.append(2.0 * (rest % value) / (value - 1) - 1)
        rest = rest // value
    return np.stack(digits, -1).astype(np.float32)


def nearest(z_NF: Float[Array, "N F"], size: int) -> Int[Array, " N"]:
    """The code of the grid's point nearest to `z_NF`, each dimension by itself."""
    value_F = np.array(values(size))
    step_F = np.concatenate([[1], np.cumprod(value_F)[:-1]])
    digit_NF = jnp.clip(jnp.round((z_NF + 1) / 2 * (value_F - 1)), 0, value_F - 1).astype(jnp.int32)
    return jnp.sum(digit_NF * step_F.astype(np.int32), -1).astype(jnp.int32)
