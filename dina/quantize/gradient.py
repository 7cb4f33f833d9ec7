"""How gradient passes a quantizer: what stands for the derivative of a step function.

Legend: N vectors, D dimensions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALL = 1e-6  # lengths, relative to one, below which a direction means nothing


def through(x_ND: Float[Array, "N D"], q_ND: Float[Array, "N D"], gradient: str) -> Float[Array, "N D"]:
    """The value `q_ND` with gradient to `x_ND` by the rule `RVQConfig.gradient`.

    'straight_through': the gradient as it is. 'rotation': q = s R x with s = |q| / |x| and R the rotation that takes the
    direction of x to that of q within their plane, both held constant: R = I - 2 m m^T + 2 q' x'^T, m the unit vector
    half way between the unit vectors x' and q' (two Householder reflections; Fifty et al. 2024). Where x or q is zero or
    they are opposite there is no such plane, and the gradient passes as it is.
    """
    still = jax.lax.stop_gradient
    if gradient == "straight_through":
        return x_ND + still(q_ND - x_ND)
    x_N1, q_N1 = (jnp.sqrt(jnp.sum(still(v) ** 2, -1, keepdims=True)) for v in (x_ND, q_ND))
    from_ND, to_ND = (still(v) / jnp.maximum(length, 1e-30) for v, length in ((x_ND, x_N1), (q_ND, q_N1)))
    middle_ND = from_ND + to_ND
    middle_N1 = jnp.sqrt(jnp.sum(middle_ND**2, -1, keepdims=True))
    turns_N1 = (x_N1 > 0) & (q_N1 > 0) & (middle_N1 > SMALL)
    middle_ND = middle_ND / jnp.where(turns_N1, middle_N1, 1.0)
    along = lambda axis_ND: jnp.sum(axis_ND * x_ND, -1, keepdims=True)
    turned_ND = x_ND - 2 * middle_ND * along(middle_ND) + 2 * to_ND * along(from_ND)
    scale_N1 = jnp.where(turns_N1, q_N1 / jnp.where(turns_N1, x_N1, 1.0), 1.0)
    moved_ND = jnp.where(turns_N1, scale_N1 * turned_ND, x_ND)
    return still(q_ND) + (moved_ND - still(moved_ND))  # the value is q to the bit
