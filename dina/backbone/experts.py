"""The sparse block: router, real experts through a dispatch, identity experts in place.

Legend: B rows, S positions, N = B*S tokens, D width, E real experts, R all experts, F hidden width, G groups of tokens. Source: backbone.md §1.4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dina.backbone import dispatch
from dina.backbone.config import ExpertsConfig
from dina.backbone.linear import weight
from dina.backbone.norm import fan_in
from dina.backbone.router import Router


class RoutingStats(NamedTuple):
    """Local sums over valid tokens: selections per group and expert, squared log-partition, pairs over buffer capacity."""

    count_GR: Int[Array, "G R"]
    z_sum: Float[Array, ""]
    overflow: Int[Array, ""]


def serve(params: dict, dtype: str, few: bool) -> dict:
    """The block's parameters in the form that serving `few` or many rows wants, in the compute type."""
    stacked = dispatch.Experts(*(params[name].astype(dtype) for name in ("gate", "up", "down")))
    return {"router": params["router"], "served": dispatch.served(stacked, few)}


class SparseFFN(nn.Module):
    """Mixture of SwiGLU and identity experts. `gain` scales the variance of the output weights at initialisation."""

    cfg: ExpertsConfig
    dtype: str = "float32"
    gain: float = 1.0
    axes: tuple[str, ...] = ()
    groups: int = 1

    @nn.compact
    def __call__(
        self, u_BSD: Float[Array, "B S D"], bias_E: Float[Array, " R"], group_BS: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], RoutingStats]:
        """Applies the chosen experts; the output of padding is exactly zero.

        Args:
            u_BSD: normalised input.
            bias_E: selection bias of all experts, identity ones included.
            group_BS: 0 for padding, else as `Router` has it.
        """
        cfg, dtype, width = self.cfg, jnp.dtype(self.dtype), u_BSD.shape[-1]
        u_ND = u_BSD.reshape(-1, width)
        routing = Router(cfg, self.groups, name="router")(u_ND, bias_E, group_BS.reshape(-1))
        into = fan_in(1, 2, batch=(0,))
        if self.has_variable("params", "served"):
            weights = self.get_variable("params", "served")
        else:
            weights = jax.tree.map(lambda x: x.astype(dtype), dispatch.Experts(
                weight(self, "gate", into, (cfg.real, width, cfg.hidden)),
                weight(self, "up", into, (cfg.real, width, cfg.hidden)),
                weight(self, "down", fan_in(1, 2, batch=(0,), gain=self.gain), (cfg.real, cfg.hidden, width)),
            ))  # fmt: skip
        y_ND, overflow = dispatch.run(cfg, weights, u_ND.astype(dtype), routing.expert_NK, routing.weight_NK, self.axes)
        # Identity experts return the block's input under the same scaled weight (backbone.md §8.5).
        kept_N = jnp.sum(jnp.where(routing.expert_NK >= cfg.real, routing.weight_NK, 0.0), -1)
        y_ND = y_ND + kept_N[:, None] * u_ND.astype(jnp.float32)
        return y_ND.reshape(u_BSD.shape).astype(u_BSD.dtype), RoutingStats(routing.count_GE, routing.z_sum, overflow)
