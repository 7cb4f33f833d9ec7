"""A discriminator on frozen features, and its losses (stage V3; reference/tokenizers.md C.2, I).

Small convolutional heads, one for each feature map of stride 4 and more, tell real windows from decoded ones. The maps
are those that the perceptual loss has made already, so an adversarial step costs the heads alone, where a discriminator
on pixels would cost a second network; and heads over features that do not move are hard to overpower (Sauer et al.
2021, "Projected GANs Converge Faster"). Each head judges every position: a patch discriminator (Isola et al. 2017).

Letters: M windows, H, W positions of a map, C its channels, L maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dina.vision.perceptual import FeatureNetwork, unit

PART = "discriminator"
FIRST = 1  # the map of stride 2 has a quarter of all positions' cost for 16 channels of edges
_SLOPE = 0.2


class Heads(nn.Module):
    """Unit-normalised feature maps to logits; large = real.

    Attributes:
        width: channels of a head.
    """

    width: int

    @nn.compact
    def __call__(self, maps: Sequence[Array]) -> tuple[Array, ...]:
        """Logits [M, H, W] of each map."""
        found = []
        for number, map_MHWC in enumerate(maps):
            x = nn.Dense(self.width, name=f"in_{number}")(map_MHWC)
            h = nn.Conv(self.width, (3, 3), name=f"conv_{number}")(nn.leaky_relu(x, _SLOPE))
            found.append(nn.Dense(1, name=f"out_{number}")(nn.leaky_relu(x + h, _SLOPE))[..., 0])
        return tuple(found)


def inputs(maps: Sequence[Array]) -> tuple[Array, ...]:
    """What the heads see of a network's feature maps: vectors of mean square 1."""
    return tuple(unit(map_MHWC) * map_MHWC.shape[-1] ** 0.5 for map_MHWC in maps[FIRST:])


def init_heads(heads: Heads, network: FeatureNetwork, key: Array) -> dict:
    """Parameters of the part `discriminator`."""
    return heads.init(key, [jnp.zeros((1, 3, 3, channels)) for channels in network.channels[FIRST:]])["params"]


def window_means(values: Sequence[Array], weights: Sequence[Array]) -> Float[Array, " M"]:
    """Mean over the positions that count, then over maps; `weights` are of all the network's maps."""
    means = [
        jnp.sum(value * weight, (1, 2)) / jnp.maximum(jnp.sum(weight, (1, 2)), 1e-6)
        for value, weight in zip(values, weights[FIRST:], strict=True)
    ]
    return jnp.mean(jnp.stack(means), 0)


def hinge(real: Sequence[Array], made: Sequence[Array], weights: Sequence[Array]) -> Float[Array, " M"]:
    """The discriminator's loss of each window: relu(1 - real) + relu(1 + made)."""
    return window_means([nn.relu(1 - x) for x in real], weights) + window_means([nn.relu(1 + x) for x in made], weights)


def r1(heads: Heads, params: dict, real_maps: Sequence[Array], weights: Sequence[Array]) -> Float[Array, " M"]:
    """Squared gradient of each window's mean logit by what the heads see of real windows.

    By features, not by pixels as in Mescheder et al. 2018: the network between them is frozen, and its second
    derivative would cost more than the step.
    """
    mean = lambda maps: jnp.sum(window_means(heads.apply({"params": params}, maps), weights))
    grads = jax.grad(mean)(tuple(real_maps))
    return sum(jnp.sum(grad**2, (1, 2, 3)) for grad in grads)


def lecam(real_M: Array, made_M: Array, real_mean: Array, made_mean: Array) -> Float[Array, " M"]:
    """Logits of each window held near the running mean of the other kind (Tseng et al. 2021)."""
    return nn.relu(real_M - made_mean) ** 2 + nn.relu(real_mean - made_M) ** 2
