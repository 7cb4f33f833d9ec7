"""The release's refiner pipeline on one image: latents of the pixel decoder's image and noise to a sharper image (A.7).

Training and our own detokenizer pack many images into a row (detokenize.py); the release refines one at a time, in the
latent space of a convolutional autoencoder, which needs whole canvases.

Letters: B copies of an image, H W pixels, h w latent places, L latent channels, T latent tokens, C values of one, N cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dina.vision import refiner
from dina.vision.kl import KLAutoencoder

PATCH = 2  # latent places of a token's side


def canvas(image_BHWC: Float[Array, "B H W 3"], multiple: int) -> Float[Array, "B H2 W2 3"]:
    """The reference image in [-1, 1], its sides rounded up to `multiple`, bilinear without antialiasing.

    As in the release the range is guessed: above 1.5 pixels are 0 to 255, without a negative value 0 to 1 (Q11).
    """
    x = jnp.where(jnp.max(image_BHWC) > 1.5, image_BHWC / 255, image_BHWC)
    x = jnp.where((jnp.min(x) >= 0) & (jnp.max(x) <= 1), 2 * x - 1, x)
    b, height, width, channels = x.shape
    size = (max(multiple, math.ceil(side / multiple) * multiple) for side in (height, width))
    return jax.image.resize(jnp.clip(x, -1, 1), (b, *size, channels), "linear", antialias=False)


def to_tokens(z_BHWL: Float[Array, "B h w L"], patch: int = PATCH) -> Float[Array, "B T C"]:
    """Squares of latents as tokens in raster order; values in the order (row, column, channel)."""
    b, h, w, channels = z_BHWL.shape
    x = z_BHWL.reshape(b, h // patch, patch, w // patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * channels)


def from_tokens(x_BTC: Float[Array, "B T C"], height: int, width: int, patch: int = PATCH) -> Float[Array, "B h w L"]:
    """The inverse of `to_tokens` for latents of `height` x `width` places."""
    x = x_BTC.reshape(len(x_BTC), height // patch, width // patch, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(len(x_BTC), height, width, -1)


def token_layout(copies: int, height: int, width: int, patch: int = PATCH) -> dict[str, np.ndarray]:
    """segment, row and col [B, T] of the tokens of one image of `height` x `width` latent places a row."""
    row, col = np.indices((height // patch, width // patch)).reshape(2, 1, -1)
    return {name: np.broadcast_to(x, (copies, row.shape[1])) for name, x in (("segment", np.ones_like(row)), ("row", row), ("col", col))}


def cell_pack(copies: int, cells: int) -> dict[str, np.ndarray]:
    """What the refiner wants to know of the code vectors of one image a row."""
    return {"cell_segment": np.ones((copies, cells), np.int32), "grid": np.tile([[[1, cells]]], (copies, 1, 1))}


def refine(
    auto: KLAutoencoder,
    flow: refiner.Refiner,
    params: Mapping,
    cond_BND: Float[Array, "B N D"],
    image_BHWC: Float[Array, "B H W 3"],
    noise_BHWL: Float[Array, "B h w L"],
    posterior_BHWL: Array | float = 0.0,
    steps: int = 28,
    guidance: refiner.Guidance = refiner.Guidance(),
) -> Float[Array, "B H2 W2 3"]:
    """Refined pixels in [0, 1].

    Args:
        auto, flow, params: autoencoder and transformer, and the parameters of both ('autoencoder', 'dit').
        cond_BND: sums of code vectors.
        image_BHWC: the pixel decoder's image, see `canvas`.
        noise_BHWL: start of the flow, standard normal, of the latent canvas' size.
        posterior_BHWL: noise of the reference's latents, see `KLAutoencoder.encode`.
        steps, guidance: of the flow.

    Returns:
        The whole canvas: sides are those of the image rounded up (Q12).
    """
    z_BHWL = auto.encode(params["autoencoder"], canvas(image_BHWC, PATCH * auto.factor), posterior_BHWL)
    b, height, width, _ = z_BHWL.shape
    layout, pack = token_layout(b, height, width), cell_pack(*cond_BND.shape[:2])
    x_BTC = refiner.sample(
        flow, params["dit"], to_tokens(noise_BHWL), cond_BND, to_tokens(z_BHWL), pack, layout, steps, guidance.cond, guidance.ref
    )
    pixels = auto.decode(params["autoencoder"], from_tokens(x_BTC, height, width))
    return jnp.clip(pixels / 2 + 0.5, 0, 1)
