"""The encoder: images of a pack do not see each other, windows, positions (the reference's numbers: tools/parity, case 04)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.vision import encoder, preprocess

NAMES = ("patches", "segment", "row", "col", "window")


def run(model, params, pack):
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda params, *arrays: model.apply({"params": params}, *arrays))
        return np.asarray(apply(params, *(jnp.asarray(pack[name])[None] for name in NAMES))[0])


@pytest.fixture(scope="module")
def small():
    model = encoder.VisionTransformer(width=16, depth=2, heads=2, ff=24, full_layers=(1,), window_patches=4)
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


def test_sorting_by_window_changes_neither_values_nor_gradients():
    model = encoder.VisionTransformer(width=16, depth=3, heads=2, ff=24, full_layers=(1,), window_patches=16)
    rng = np.random.default_rng(1)
    # Windows of 1, 2 and 4 cells; one image's windows are not beside each other; padding is longer than a window.
    images = [rng.integers(0, 256, (28 * h, 28 * w, 3)).astype(np.uint8) for h, w in ((5, 3), (2, 4), (3, 3))]
    pack = preprocess.pack_images(images, 38, 3, window_cells=2)
    args = [jnp.asarray(pack[name])[None] for name in NAMES]
    params = model.init(jax.random.key(0), *args)["params"]
    assert args[0].shape[1] >= encoder.SORTED * model.window_patches

    def loss(params, model):
        out = model.apply({"params": params}, *args)[0][:128]
        return (out**2).sum(), out

    found = [jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params, m) for m in (model, model.clone(window_patches=1000))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *found)


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


def test_pixels_are_rounded_to_bfloat16_on_request(small):
    model, params, _, pack = small
    rounded = dict(pack, patches=np.asarray(jnp.asarray(pack["patches"]).astype(jnp.bfloat16).astype(jnp.float32)))
    assert (rounded["patches"] != pack["patches"]).any()
    np.testing.assert_allclose(run(model.clone(pixels="bfloat16"), params, pack), run(model, params, rounded), atol=1e-6)
    with pytest.raises(ValueError, match="choose one of float32, bfloat16"):
        run(model.clone(pixels="float8"), params, pack)


def test_head_width_must_divide():
    with pytest.raises(ValueError, match="multiple of 4"):
        encoder.rotary_tables(jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), jnp.int32), 6)
