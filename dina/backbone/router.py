"""Expert choice: softmax over real and identity experts, a bias that only selects, unbiased weights.

Legend: N tokens, D width, E experts (real first, then identity), K selected, G groups of tokens. Source: reference/backbone.md §1.4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dina.backbone.config import ExpertsConfig


class Routing(NamedTuple):
    """Chosen experts of each token. Invalid tokens have weight 0 and appear in no statistic."""

    expert_NK: Int[Array, "N K"]
    weight_NK: Float[Array, "N K"]
    probability_NE: Float[Array, "N E"]
    count_GE: Int[Array, "G E"]
    z_sum: Float[Array, ""]


class Router(nn.Module):
    """A linear classifier in float32 whatever the compute type is. `groups`: how many kinds of tokens are counted apart."""

    cfg: ExpertsConfig
    groups: int = 1

    @nn.compact
    def __call__(self, u_ND: Float[Array, "N D"], bias_E: Float[Array, " E"], group_N: Int[Array, " N"]) -> Routing:
        """Routes tokens.

        Args:
            u_ND: normalised input of the sparse block.
            bias_E: selection bias; it gets no gradient and never enters a weight.
            group_N: 0 for padding, else 1 + the group that a token counts in; it changes nothing else.

        Returns:
            Routing; weights are probability * cfg.scale, not renormalised; z_sum is the sum of logsumexp(z)^2.
        """
        cfg = self.cfg
        w_DE = self.param("classifier", nn.initializers.normal(0.02), (u_ND.shape[-1], cfg.total), jnp.float32)
        z_NE = jnp.dot(u_ND.astype(jnp.float32), w_DE, precision=jax.lax.Precision.HIGHEST)
        p_NE = jax.nn.softmax(z_NE, axis=-1)
        expert_NK = jax.lax.top_k(jax.lax.stop_gradient(p_NE + bias_E), cfg.top_k)[1]
        valid_N = group_N > 0
        chosen_NKE = expert_NK[..., None] == jnp.arange(cfg.total)
        weight_NK = cfg.scale * jnp.where(valid_N[:, None], jnp.sum(jnp.where(chosen_NKE, p_NE[:, None], 0.0), -1), 0.0)
        counted = lambda group: jnp.sum(chosen_NKE & (group_N == group)[:, None, None], (0, 1), dtype=jnp.int32)
        count_GE = jnp.stack([counted(1 + group) for group in range(self.groups)])
        z_sum = jnp.sum(jnp.where(valid_N, jnp.square(jax.nn.logsumexp(z_NE, -1)), 0.0))
        return Routing(expert_NK, weight_NK, p_NE, count_GE, z_sum)
