"""The bridge: four patch features to one cell vector; and the encoder as everyone else uses it (tokenizers.md A.3).

Letters: B packs, P patches, N = P/4 merged cells, D encoder width, Z width of a cell's feature.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dina.vision.encoder import RMSNorm, VisionTransformer

MERGED = 4  # patches of a 2x2 group, adjacent in merge-group order


class Bridge(nn.Module):
    """RMSNorm, then a two-layer perceptron (exact GELU) on the four concatenated patches of a group."""

    out_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B N Z"]:
        b, p, d = x_BPD.shape
        # Flat rows for the dense layers, as in the encoder.
        u = RMSNorm(name="ln_q")(x_BPD).reshape(b * p // MERGED, MERGED * d)
        u = nn.gelu(nn.Dense(MERGED * d, dtype=self.dtype, name="fc1")(u), approximate=False)
        # A bias of unit size: a cell that tells nothing is this vector and not zero, which quant_conv's norm would blow up.
        fc2 = nn.Dense(self.out_dim, dtype=self.dtype, bias_init=nn.initializers.normal(1.0), name="fc2")
        return fc2(u).reshape(b, p // MERGED, self.out_dim)


class VisionEncoder(nn.Module):
    """The part `vision_encoder`: transformer and bridge. Build it with `make_encoder`."""

    vit: VisionTransformer
    bridge: Bridge

    def __call__(self, pack: Mapping[str, Array]) -> Float[Array, "B N Z"]:
        """Continuous cell features of stacked packs; the features of padding cells are garbage, mask them."""
        return self.bridge(self.vit(*(pack[name] for name in ("patches", "segment", "row", "col", "window"))))


def make_encoder(config_vision: ConfigDict) -> VisionEncoder:
    """The encoder of a config's `vision` section."""
    encoder = config_vision.encoder
    vit = VisionTransformer(
        width=encoder.width,
        depth=encoder.depth,
        heads=encoder.heads,
        ff=encoder.ff,
        full_layers=tuple(encoder.full_layers),
        window_patches=encoder.window_cells**2 * MERGED,
        pixels=encoder.pixels,
        remat=encoder.remat,
        parent=None,
    )
    return VisionEncoder(vit, Bridge(config_vision.bridge.out_dim, parent=None))


def init_encoder(config_vision: ConfigDict, key: jax.Array) -> Mapping:
    """Parameters of the part `vision_encoder`; shapes depend on the config only, so a 1-cell pack is enough."""
    integers = jnp.zeros((1, MERGED), jnp.int32)
    pack = {name: integers for name in ("segment", "row", "col", "window")}
    pack["patches"] = jnp.zeros((1, MERGED, 3 * config_vision.temporal * config_vision.patch**2))
    return make_encoder(config_vision).init(key, pack)["params"]


@functools.partial(jax.jit, static_argnums=0)
def _encode(encoder, params, pack):
    return encoder.apply({"params": params}, pack)


def encode(config_vision: ConfigDict, params: Mapping, pack: Mapping[str, Array]) -> Float[Array, "B N Z"]:
    """Compiled forward pass outside training (sampling, offline tokenisation); extra keys of `pack` are ignored."""
    names = ("patches", "segment", "row", "col", "window")
    return _encode(make_encoder(config_vision), params, {name: pack[name] for name in names})
