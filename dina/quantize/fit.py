"""Maps and projections of a level from the second moments of its vectors, where training starts.

Legend: N vectors, D dimensions, E dimensions of a level's codes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GRID_SPREAD = 0.8  # tanh of a normal value of this deviation is nearly even on [-1, 1], so all points of a grid are used
HALVINGS = 60


def moments(x_ND: Array, mask_N: Array) -> Float[Array, "D D"]:
    """Second moments about zero, which is where residuals are measured from."""
    return (x_ND * mask_N[:, None]).T @ x_ND / jnp.maximum(jnp.sum(mask_N), 1.0)


def principal(x_ND: Float[Array, "N D"], mask_N: Array, width: int) -> Float[Array, "D E"]:
    """The `width` orthonormal directions that hold the most of the vectors."""
    return jnp.linalg.eigh(moments(x_ND, mask_N))[1][:, ::-1][:, :width]


def grid_scale(z_NE: Array, mask_N: Array) -> Float[Array, " E"]:
    """What gives each dimension the deviation that spreads its tanh over a grid."""
    return GRID_SPREAD / jnp.sqrt(jnp.maximum(jnp.diagonal(moments(z_NE, mask_N)), 1e-12))


def least_squares(row_NE: Array, x_ND: Array, mask_N: Array) -> Float[Array, "E D"]:
    """The projection out of the grid that leaves the least of the vectors."""
    row_NE = row_NE * mask_N[:, None]
    ridge_EE = 1e-4 * jnp.maximum(jnp.sum(mask_N), 1.0) * jnp.eye(row_NE.shape[1])
    return jnp.linalg.solve(row_NE.T @ row_NE + ridge_EE, row_NE.T @ x_ND)


def gaussian_map(x_NE: Float[Array, "N E"], mask_N: Array, codes: int) -> Float[Array, "E E"]:
    """The map that makes random codes of about unit length what a random code of normal vectors should be.

    For normal vectors of variances v a random code of log2(codes) bits is best with variances max(v - w, 0), where w is
    such that the sum of log2(v / w) / 2 over v > w is the bits (reverse water-filling: Cover and Thomas, Elements of
    Information Theory, 2006, 10.3.3). As spread as the vectors themselves, codes would be farther from them than zero is.
    """
    values_E, vectors_EE = jnp.linalg.eigh(moments(x_NE, mask_N))
    values_E = jnp.maximum(values_E, 1e-12)
    bits = lambda level: jnp.sum(jnp.maximum(0.5 * jnp.log2(values_E / level), 0.0))

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        return jax.tree.map(lambda a, b: jnp.where(bits(jnp.exp(middle)) > math.log2(codes), a, b), (middle, high), (low, middle))

    top = jnp.log(values_E[-1])
    water = jnp.exp(jax.lax.fori_loop(0, HALVINGS, halve, (jnp.log(values_E[0]) - 2 * math.log(2.0) * math.log2(codes), top))[1])
    return (vectors_EE * jnp.sqrt(jnp.maximum(values_E - water, 0.0) * len(values_E))) @ vectors_EE.T
