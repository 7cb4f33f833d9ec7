"""Latent spaces of the refiner: packed pixels to the tokens that it denoises, and back.

An autoencoder is a small object with
    token_dim                            values of a token
    tokens(cells)                        static tokens of a row of `cells` merged cells
    layout(pack)                         {'segment', 'row', 'col'} [B, T]: image and place of each token
    init(key)                            its parameters ({} if it has none)
    encode(params, patches_BPV, pack)    CLIP-normalised patches to tokens [B, T, C]
    decode(params, tokens_BTC, pack)     and back to patches, both temporal slices
'patch' is the small default: it rearranges pixels and loses nothing, so no latent model must be trained or fetched.
A convolutional one (the release's AutoencoderKL, reference/tokenizers.md A.7) unpacks `pack` into canvases inside
`encode` and chooses its own token grid in `layout`.

Letters: B packs, P patches, V values of a patch, T tokens of a pack, C values of a token, S = sub-squares per side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dina.vision.preprocess import CLIP_MEAN, CLIP_STD, PATCH, TEMPORAL


@dataclasses.dataclass(frozen=True)
class PatchAutoencoder:
    """Space-to-depth: a token is a square of `side` pixels in [-1, 1] (side divides the patch). Orthonormal.

    Attributes:
        side: 14 or 7 px.
    """

    side: int = PATCH

    def __post_init__(self):
        if PATCH % self.side:
            raise ValueError(f"refiner.autoencoder.side={self.side} does not divide the patch of {PATCH} px")

    @property
    def token_dim(self) -> int:
        return 3 * self.side**2

    @property
    def split(self) -> int:
        """Tokens along a patch's side (S)."""
        return PATCH // self.side

    def tokens(self, cells: int) -> int:
        return 4 * cells * self.split**2

    def init(self, key) -> dict:
        del key
        return {}

    def layout(self, pack: Mapping[str, Array]) -> dict[str, Array]:
        s = self.split
        spread = lambda x: jnp.repeat(jnp.asarray(x), s * s, axis=1)
        b, p = pack["segment"].shape
        inner = lambda x: jnp.broadcast_to(x.reshape(-1), (b, p, s * s)).reshape(b, -1)
        row, col = jnp.meshgrid(jnp.arange(s), jnp.arange(s), indexing="ij")
        return {
            "segment": spread(pack["segment"]),
            "row": spread(pack["row"]) * s + inner(row),
            "col": spread(pack["col"]) * s + inner(col),
        }

    def encode(self, params, patches_BPV: Float[Array, "B P V"], pack) -> Float[Array, "B T C"]:
        del params, pack
        b, p, _ = patches_BPV.shape
        s, side = self.split, self.side
        x = patches_BPV.reshape(b, p, 3, TEMPORAL, PATCH, PATCH)[:, :, :, 0]
        x = x * _per_channel(CLIP_STD) + _per_channel(CLIP_MEAN)
        x = (2 * x - 1).reshape(b, p, 3, s, side, s, side).transpose(0, 1, 3, 5, 4, 6, 2)
        return x.reshape(b, p * s * s, self.token_dim)

    def decode(self, params, tokens_BTC: Float[Array, "B T C"], pack) -> Float[Array, "B P V"]:
        del params, pack
        b, t, _ = tokens_BTC.shape
        s, side = self.split, self.side
        x = tokens_BTC.reshape(b, t // (s * s), s, s, side, side, 3).transpose(0, 1, 6, 2, 4, 3, 5)
        x = (x.reshape(b, t // (s * s), 3, PATCH, PATCH) + 1) / 2
        x = (x - _per_channel(CLIP_MEAN)) / _per_channel(CLIP_STD)
        x = jnp.broadcast_to(x[:, :, :, None], (*x.shape[:3], TEMPORAL, PATCH, PATCH))
        return x.reshape(b, t // (s * s), -1)


def _per_channel(values) -> Array:
    return jnp.asarray(values, jnp.float32)[:, None, None]


AUTOENCODERS = {"patch": PatchAutoencoder}


def make_autoencoder(config: ConfigDict) -> PatchAutoencoder:
    """Builds `config` ({'name': ..., further fields of that autoencoder}).

    Raises:
        ValueError: unknown name.
    """
    fields = config.to_dict()
    name = fields.pop("name")
    if name not in AUTOENCODERS:
        raise ValueError(f"refiner.autoencoder.name={name!r} is not one of {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[name](**fields)
