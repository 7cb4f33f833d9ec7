"""The encoder: the reference's numbers, and images of a pack that do not see each other."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.vision import encoder, preprocess
from tests import golden_io
from tests.vision import golden

NAMES = ("patches", "segment", "row", "col", "window")


def golden_pack(cells):
    config = json.loads((golden.CASE / "config.json").read_text())
    data = np.load(golden.CASE / "data.npz")
    window = config["window_size"] // config["patch_size"] // config["spatial_merge_size"]
    images = [data[f"image{i}_resized_uint8"] for i in range(2)]
    pack = preprocess.pack_images(images, cells, 2, window)
    model = encoder.VisionTransformer(
        config["hidden_size"], config["depth"], config["num_heads"], config["intermediate_size"],
        tuple(config["fullatt_block_indexes"]),
    )  # fmt: skip
    params = golden.encoder_params(golden_io.read_safetensors(golden.CASE / "weights.safetensors"), config["depth"])
    return model, params, pack, data


def run(model, params, pack):
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda params, *arrays: model.apply({"params": params}, *arrays))
        return np.asarray(apply(params, *(jnp.asarray(pack[name])[None] for name in NAMES))[0])


def test_golden_features():
    """Window order is a permutation of groups of 4 patches; the released tensor is compared after undoing it."""
    model, params, pack, data = golden_pack(cells=24)
    features = run(model, params["vit"], pack)[:88].reshape(22, 4, -1)
    expected = np.zeros_like(features)
    expected[data["window_index"]] = data["fp32_features_windowed"].reshape(22, 4, -1)
    np.testing.assert_allclose(features, expected, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def small():
    model = encoder.VisionTransformer(width=16, depth=2, heads=2, ff=24, full_layers=(1,))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (28 * h, 28 * w, 3)).astype(np.uint8) for h, w in ((2, 2), (1, 3))]
    pack = preprocess.pack_images(images, 8, 2, window_cells=1)
    params = model.init(jax.random.key(0), *(jnp.asarray(pack[name])[None] for name in NAMES))["params"]
    return model, params, images, pack


def test_images_and_padding_do_not_mix(small):
    model, params, images, pack = small
    alone = run(model, params, preprocess.pack_images(images[1:], 3, 1, window_cells=1))
    noisy = dict(pack, patches=pack["patches"].copy())
    noisy["patches"][28:] = 100.0  # padding
    noisy["patches"][:16] *= -3.0  # the other image
    np.testing.assert_allclose(run(model, params, noisy)[16:28], alone, atol=1e-5)


def test_windows_limit_all_but_full_layers(small):
    """A change in one window reaches another only through the full layer."""
    model, params, _, pack = small
    changed = dict(pack, patches=pack["patches"].copy())
    changed["patches"][0] += 1.0
    outside = slice(4, 16)  # same image, other windows
    windowed = model.clone(full_layers=())
    assert np.array_equal(run(windowed, params, changed)[outside], run(windowed, params, pack)[outside])
    assert not np.allclose(run(model, params, changed)[outside], run(model, params, pack)[outside], atol=1e-4)


def test_position_matters_within_a_window(small):
    model, params, _, pack = small
    moved = dict(pack, row=pack["row"][::-1].copy())
    assert not np.allclose(run(model, params, moved)[:16], run(model, params, pack)[:16], atol=1e-3)


def test_remat_changes_nothing(small):
    model, params, _, pack = small
    args = [jnp.asarray(pack[name])[None] for name in NAMES]
    models = (model, model.clone(remat="block"))
    grads = [jax.jit(jax.grad(lambda p, m=m: (m.apply({"params": p}, *args) ** 2).sum()))(params) for m in models]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), *grads)


def test_head_width_must_divide():
    with pytest.raises(ValueError, match="multiple of 4"):
        encoder.rotary_tables(jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), jnp.int32), 6)
