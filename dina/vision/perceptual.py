"""Distances between pictures in the features of a frozen network, for losses and for metrics.

`lpips_like` is NOT LPIPS: same form (unit-normalised feature maps, squared differences), but another network and no
learnt weights, so its numbers compare with nobody else's (dina/eval/fidelity.py gives them an id that says so).

A loss on feature maps needs pictures, and the pixel decoder makes packed patches. So windows of one static size are
cut at drawn places: one gather a window, out of one image only; what lies outside of the image is one constant in both
pictures and has weight 0. Draws are keyed by (seed, step, global row).

Letters: B rows, P patches, V values of a patch, I images, W windows of a row, n patches along a window, S = 14 n its
pixels, M = B W canvases; H, W pixels, C channels, L layers of feature maps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dina.config import InputError, check_name
from dina.vision import efficientnet
from dina.vision.preprocess import CLIP_MEAN, CLIP_STD, PATCH, TEMPORAL

PART = "perceptual"  # of the parameters: frozen weights travel with the run, so that a restart needs no download
POOLED = 1280
FILL = 0.5  # grey where a window has no image
_TINY = 1e-6  # under the root of a feature's length: flat surfaces have features near 0
_STREAM = 2**31 + 1  # beyond every example number: keys of windows meet no others of the step
_RANDOM_SEED, _RANDOM_CHANNELS = 7, (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network; hashable.

    Attributes:
        name: in `NETWORKS`.
        strides, channels: of its feature maps, fine to coarse.
        shapes: () -> tree of shapes of its parameters.
        run: (parameters, images [B, H, W, 3] in [0, 1]) -> (maps, pooled vector [B, 1280]).
    """

    name: str
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    shapes: Callable[[], dict]
    run: Callable[[Mapping, Array], tuple[tuple[Array, ...], Array]]

    def blank(self) -> dict:
        """Zeros in the shapes of the parameters, until dina/data/feature_weights.py gives the real ones."""
        return jax.tree.map(jnp.zeros, self.shapes(), is_leaf=lambda x: isinstance(x, tuple))


def random_shapes() -> dict:
    """Shapes of the network `random`: 3x3 convolutions of stride 2, and one dense layer."""
    widths = (3, *_RANDOM_CHANNELS)
    layers = {f"conv_{i}": {"kernel": (3, 3, a, b), "bias": (b,)} for i, (a, b) in enumerate(zip(widths, widths[1:]))}
    return layers | {"head": {"kernel": (widths[-1], POOLED), "bias": (POOLED,)}}


def random_weights() -> dict:
    """The parameters of the network `random`, equal on every machine."""
    rng = np.random.default_rng(_RANDOM_SEED)
    he = lambda shape: rng.normal(0, (2 / math.prod(shape[:-1])) ** 0.5, shape) if len(shape) > 1 else rng.normal(0, 0.1, shape)
    return jax.tree.map(lambda shape: he(shape).astype(np.float32), random_shapes(), is_leaf=lambda x: isinstance(x, tuple))


def _run_random(params, image_BHW3):
    x, maps = 2 * image_BHW3 - 1, []
    for layer in (params[f"conv_{i}"] for i in range(len(_RANDOM_CHANNELS))):
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + layer["bias"])
        maps.append(x)
    pooled = jax.nn.relu(jnp.einsum("bhwc,co->bhwo", x, params["head"]["kernel"]) + params["head"]["bias"])
    return tuple(maps), jnp.mean(pooled, axis=(1, 2))


NETWORKS = {
    "efficientnet_lite0": FeatureNetwork(
        "efficientnet_lite0", efficientnet.STRIDES, efficientnet.CHANNELS, efficientnet.shapes, efficientnet.run
    ),
    # Untrained: for tests, and for machines that can fetch nothing. Its distances are of edges and colours only.
    "random": FeatureNetwork("random", (2, 4, 8, 16), _RANDOM_CHANNELS, random_shapes, _run_random),
}


def network(name: str) -> FeatureNetwork:
    """The feature network called `name`; InputError if there is none."""
    check_name(name, NETWORKS, "feature network")
    return NETWORKS[name]


# ------------------------------------------------------------------------------------------------------------ distance
def unit(map_BHWC: Array) -> Array:
    """Feature vectors of length 1 (of length 0 where the feature is)."""
    return map_BHWC * jax.lax.rsqrt(jnp.sum(map_BHWC**2, -1, keepdims=True) + _TINY)


def cell_weights(mask_BHW: Array, strides: Sequence[int]) -> list[Array]:
    """For each feature map, the share of each position's stride x stride pixels that counts."""
    found = []
    for stride in strides:
        ends = [(0, -side % stride) for side in mask_BHW.shape[1:]]
        padded = jnp.pad(mask_BHW.astype(jnp.float32), [(0, 0), *ends])
        b, h, w = padded.shape
        found.append(padded.reshape(b, h // stride, stride, w // stride, stride).mean((2, 4)))
    return found


def layer_sums(
    maps_a: Sequence[Array], maps_b: Sequence[Array], weights: Sequence[Array]
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """(sums of weighted squared distances of unit features, sums of weights) of each picture and layer."""
    sums = [jnp.sum(jnp.sum((unit(a) - unit(b)) ** 2, -1) * w, (1, 2)) for a, b, w in zip(maps_a, maps_b, weights, strict=True)]
    return jnp.stack(sums, -1), jnp.stack([jnp.sum(w, (1, 2)) for w in weights], -1)


def map_distance(maps_a: Sequence[Array], maps_b: Sequence[Array], weights: Sequence[Array]) -> Float[Array, " B"]:
    """Mean over positions, then over layers; 0 for a picture without weight."""
    sums_BL, weight_BL = layer_sums(maps_a, maps_b, weights)
    return jnp.mean(sums_BL / jnp.maximum(weight_BL, 1e-6), -1)


def lpips_like(
    net: FeatureNetwork,
    params: Mapping,
    a_BHW3: Float[Array, "B H W 3"],
    b_BHW3: Float[Array, "B H W 3"],
    mask_BHW: Array | None = None,
) -> Float[Array, " B"]:
    """Perceptual distance of pictures, 0 (equal) to 4; not LPIPS, see above.

    Args:
        net, params: the feature network and its weights.
        a_BHW3, b_BHW3: pictures in [0, 1].
        mask_BHW: 1 where pixels count, 0 elsewhere; None = everywhere.
    """
    mask_BHW = jnp.ones(a_BHW3.shape[:3]) if mask_BHW is None else mask_BHW
    return map_distance(net.run(params, a_BHW3)[0], net.run(params, b_BHW3)[0], cell_weights(mask_BHW, net.strides))


# ------------------------------------------------------------------------------------------------------------- windows
class Windows(NamedTuple):
    """Where windows lie: `index` [B, W, n, n] of patches, `valid` alike (False outside of the image), `used` [B, W]."""

    index: Int[Array, "B W n n"]
    valid: Bool[Array, "B W n n"]
    used: Float[Array, "B W"]


def check_window(side: int) -> int:
    """Patches along a window of `side` pixels.

    Raises:
        InputError: not a multiple of 14.
    """
    if side < PATCH or side % PATCH:
        raise InputError(f"stage option window={side}: give a multiple of {PATCH} pixels")
    return side // PATCH


def draw_windows(
    key: Array, example_B: Int[Array, " B"], grid_BI2: Int[Array, "B I 2"], patches: int, count: int
) -> Windows:
    """Windows around patches drawn evenly from all of a row's, moved into the image where it is large enough.

    Args:
        key: of the step.
        example_B: global numbers of the rows.
        grid_BI2: (h, w) in cells of each image, (0, 0) = none; images lie in this order from the row's start.
        patches: n.
        count: W.
    """

    def one(example, grid_I2):
        area_I = grid_I2[:, 0] * grid_I2[:, 1]
        end_I = jnp.cumsum(area_I)
        row_key = jax.random.fold_in(jax.random.fold_in(key, _STREAM), example)
        total = 4 * end_I[-1]
        drawn_W = jnp.minimum((jax.random.uniform(row_key, (count,)) * total).astype(jnp.int32), jnp.maximum(total - 1, 0))
        image_W = jnp.minimum(jnp.sum(end_I <= drawn_W[:, None] // 4, axis=1), len(area_I) - 1)
        (h_W, w_W), start_W = grid_I2[image_W].T, (end_I - area_I)[image_W]
        cell_W, wide_W = drawn_W // 4 - start_W, jnp.maximum(w_W, 1)
        row_W, col_W = 2 * (cell_W // wide_W) + drawn_W % 4 // 2, 2 * (cell_W % wide_W) + drawn_W % 2
        near = lambda at_W, side_W: jnp.clip(at_W - patches // 2, 0, jnp.maximum(2 * side_W - patches, 0))
        row_Wn1 = near(row_W, h_W)[:, None, None] + jnp.arange(patches)[:, None]
        col_W1n = near(col_W, w_W)[:, None, None] + jnp.arange(patches)
        valid_Wnn = (row_Wn1 < 2 * h_W[:, None, None]) & (col_W1n < 2 * w_W[:, None, None])
        cell_Wnn = start_W[:, None, None] + row_Wn1 // 2 * w_W[:, None, None] + col_W1n // 2
        index_Wnn = 4 * cell_Wnn + row_Wn1 % 2 * 2 + col_W1n % 2  # merge-group order (preprocess.py)
        return Windows(jnp.where(valid_Wnn, index_Wnn, 0), valid_Wnn, jnp.full(count, total > 0, jnp.float32))

    return jax.vmap(one)(example_B, grid_BI2)


def cut(patches_BPV: Float[Array, "B P V"], windows: Windows) -> Float[Array, "M S S 3"]:
    """The windows' pixels in [0, 1] (temporal slice 0, un-normalised, not clipped), `FILL` outside of the image."""
    b, w, n, _ = windows.index.shape
    x_BPV = patches_BPV.reshape(*patches_BPV.shape[:2], 3, TEMPORAL, PATCH, PATCH)[:, :, :, 0]
    x_BKV = jnp.take_along_axis(x_BPV.reshape(*patches_BPV.shape[:2], -1), windows.index.reshape(b, -1, 1), axis=1)
    x = x_BKV.reshape(b * w, n, n, 3, PATCH, PATCH)
    scale, shift = (jnp.asarray(v, jnp.float32)[:, None, None] for v in (CLIP_STD, CLIP_MEAN))
    x = jnp.where(windows.valid.reshape(b * w, n, n, 1, 1, 1), x * scale + shift, FILL)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b * w, n * PATCH, n * PATCH, 3)


def window_mask(windows: Windows) -> Float[Array, "M S S"]:
    """1 where a window shows its image."""
    b, w, n, _ = windows.index.shape
    mask = (windows.valid & (windows.used > 0)[..., None, None]).astype(jnp.float32).reshape(b * w, n, n)
    return jnp.repeat(jnp.repeat(mask, PATCH, 1), PATCH, 2)


@functools.partial(jax.jit, static_argnums=0)
def features(net: FeatureNetwork, params: Mapping, image_BHW3: Array) -> Float[Array, "B 1280"]:
    """The pooled vectors of images in [0, 1], compiled once per shape."""
    return net.run(params, image_BHW3)[1]
