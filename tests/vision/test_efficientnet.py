"""Folded batch norms and shifted depthwise filters against the plain forms; released weights (slow) against torch's numbers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import skimage

from dina.data import cache, feature_weights
from dina.vision import efficientnet

SMALL = {"STAGES": ((1, 3, 1, 1, 4), (2, 5, 2, 6, 8)), "TAPS": (0, 2), "STEM": 4, "HEAD": 12}
CONV = ("NHWC", "OIHW", "NHWC")


@pytest.fixture
def small(monkeypatch):
    """State dict of a two-stage network."""
    for name, value in SMALL.items():
        monkeypatch.setattr(efficientnet, name, value)
    rng = np.random.default_rng(0)
    tensors = {"_fc.weight": rng.normal(size=(5, 12)), "_fc.bias": rng.normal(size=5)}

    def layer(conv, norm, *shape):
        tensors[f"{conv}.weight"] = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{name}"] = rng.uniform(0.5, 1.5, shape[0])

    layer("_conv_stem", "_bn0", 4, 3, 3, 3)
    layer("_conv_head", "_bn1", 12, 8, 1, 1)
    for number, (kernel, _, width, hidden, out) in enumerate(efficientnet.blocks()):
        at = f"_blocks.{number}."
        if hidden != width:
            layer(f"{at}_expand_conv", f"{at}_bn0", hidden, width, 1, 1)
        layer(f"{at}_depthwise_conv", f"{at}_bn1", hidden, 1, kernel, kernel)
        layer(f"{at}_project_conv", f"{at}_bn2", out, hidden, 1, 1)
    return tensors


def _plain(tensors, x):
    """The network as its authors describe it: convolution, batch norm, ReLU6."""

    def conv(x, at, norm, stride=1, groups=1):
        kernel, strides = tensors[f"{at}.weight"].astype(np.float32), (stride, stride)
        y = jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=CONV, feature_group_count=groups)
        part = {name: tensors[f"{norm}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
        return (y - part["running_mean"]) / np.sqrt(part["running_var"] + 1e-3) * part["weight"] + part["bias"]

    x = jax.nn.relu6(conv((x * 255 - 127) / 128, "_conv_stem", "_bn0", 2))
    maps = []
    for number, (_, stride, width, hidden, out) in enumerate(efficientnet.blocks()):
        at = f"_blocks.{number}."
        h = jax.nn.relu6(conv(x, f"{at}_expand_conv", f"{at}_bn0")) if hidden != width else x
        h = jax.nn.relu6(conv(h, f"{at}_depthwise_conv", f"{at}_bn1", stride, hidden))
        h = conv(h, f"{at}_project_conv", f"{at}_bn2")
        x = x + h if stride == 1 and width == out else h
        maps += [x]
    return (maps[0], maps[2]), jax.nn.relu6(conv(x, "_conv_head", "_bn1")).mean((1, 2))


def test_folded_network_is_the_plain_one(small):
    params, classifier = efficientnet.fold(small)
    x = np.random.default_rng(1).random((2, 22, 17, 3), np.float32)  # odd sides: SAME pads unevenly
    found, wanted = jax.jit(efficientnet.run)(params, x), jax.jit(lambda x: _plain(small, x))(x)
    assert [m.shape[1:] for m in found[0]] == [(11, 9, 4), (6, 5, 8)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)
    np.testing.assert_array_equal(classifier["kernel"], small["_fc.weight"].T.astype(np.float32))


def test_other_tensors_are_refused(small):
    with pytest.raises(ValueError, match="shapes differ"):
        efficientnet.fold(small | {"_conv_head.weight": np.zeros((12, 7, 1, 1))})
    small.pop("_blocks.1._bn0.bias")
    with pytest.raises(KeyError):
        efficientnet.fold(small)


def test_released_sizes():
    leaves = jax.tree.leaves(efficientnet.shapes(), is_leaf=lambda x: isinstance(x, tuple))
    # 4,652,008 as released: the classifier is apart (1,281,000), and norms' 21,008 scales are folded in.
    assert len(efficientnet.blocks()) == 16 and sum(int(np.prod(shape)) for shape in leaves) == 3_350_000
    assert tuple(efficientnet.blocks()[i][-1] for i in efficientnet.TAPS) == efficientnet.CHANNELS


# Class and its logit as efficientnet-lite-pytorch 0.1.0 on torch 2.13 gives them for these crops.
PHOTOS = {"chelsea.png": (285, 9.01185), "coffee.png": (967, 10.98411), "motorcycle_left.png": (665, 9.06561)}


@pytest.mark.slow
def test_released_weights_name_photographs_as_torch_does():
    import ml_collections

    params, classifier = feature_weights.lite0(cache.directory(ml_collections.ConfigDict()))
    images = []
    for name in PHOTOS:
        image = PIL.Image.open(pathlib.Path(skimage.__file__).parent / "data" / name).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        crop = image.crop((left, top, left + side, top + side)).resize((224, 224), PIL.Image.Resampling.BICUBIC)
        images.append(np.asarray(crop, np.float32) / 255)
    pooled = np.asarray(jax.jit(efficientnet.run)(params, jnp.asarray(np.stack(images)))[1])
    logits = pooled @ classifier["kernel"] + classifier["bias"]
    for row, (index, logit) in zip(logits, PHOTOS.values()):
        assert row.argmax() == index and abs(row.max() - logit) < 1e-4
