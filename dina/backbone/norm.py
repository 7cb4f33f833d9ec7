"""Root-mean-square norm and the weight initialisers of the language side.

Legend: D the normalised dimension; leading dimensions are free.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), computed in float32, cast back, then times a learned scale (backbone.md §1.2)."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normalised input, same shape and dtype."""
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * scale_D.astype(x.dtype)


def fan_in(inputs: int | tuple[int, ...] = 0, outputs: int | tuple[int, ...] = -1, batch: tuple[int, ...] = (), gain: float = 1.0):
    """Truncated normal with variance gain / fan-in; the arguments name the dimensions of the weight."""
    return nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal", inputs, outputs, batch)
