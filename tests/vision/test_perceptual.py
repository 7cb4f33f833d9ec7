"""Windows show one image only, exactly its pixels; distances are 0 for equal pictures, and nothing outside counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.config import InputError
from dina.vision import perceptual, preprocess

GRIDS = [[(1, 2), (3, 1)], [(2, 3)], [(1, 1), (1, 4)], []]
PATCHES, COUNT, CELLS = 3, 5, 6  # 3 patches: no multiple of a cell, higher than some images, lower than others
NET = perceptual.network("random")


@pytest.fixture(scope="module")
def setup():
    """(packs, the images of each row, feature network, jitted sums of distances of windows)."""
    rng = np.random.default_rng(0)
    images = [[rng.integers(0, 256, (28 * h, 28 * w, 3), dtype=np.uint8) for h, w in row] for row in GRIDS]
    rows = [preprocess.pack_images(row, CELLS, 3) for row in images]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {"example": np.arange(4, dtype=np.int32)}

    @jax.jit
    def run(params, patches, other, batch, key):
        windows = perceptual.draw_windows(key, batch["example"], batch["grid"], PATCHES, COUNT)
        mask = perceptual.window_mask(windows)
        a, b = perceptual.cut(patches, windows), perceptual.cut(other, windows)
        return perceptual.lpips_like(NET, params, a, b, mask), a, mask, windows

    return batch, images, perceptual.random_weights(), run


def _disturbed(batch, seed=1):
    return batch["patches"] + np.random.default_rng(seed).normal(size=batch["patches"].shape).astype(np.float32)


def test_windows_are_crops_of_one_image(setup):
    batch, images, params, run = setup
    seen = set()
    for step in range(8):
        _, canvas, mask, windows = run(params, batch["patches"], batch["patches"], batch, jax.random.key(step))
        canvas, mask, side = np.asarray(canvas), np.asarray(mask), PATCHES * 14
        for row in range(3):
            for window in range(COUNT):
                shown, pixels = mask[row * COUNT + window], canvas[row * COUNT + window]
                h, w = int(shown[:, 0].sum()), int(shown[0].sum())
                assert shown.sum() == h * w > 0 and (pixels[shown == 0] == perceptual.FILL).all()
                places = [
                    (number, top, left)
                    for number, image in enumerate(images[row])
                    if (min(image.shape[0], side), min(image.shape[1], side)) == (h, w)
                    for top in range(0, image.shape[0] - h + 1, 14)
                    for left in range(0, image.shape[1] - w + 1, 14)
                    if np.abs(image[top : top + h, left : left + w] / 255 - pixels[:h, :w]).max() < 1e-5
                ]
                assert len(places) == 1
                seen.add((row, *places[0]))
    # Every image, and every place of the one that is larger than a window in both directions.
    assert {(row, n) for row, n, *_ in seen} == {(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)}
    assert {place[2:] for place in seen if place[0] == 1} == {(t, u) for t in (0, 14) for u in (0, 14, 28, 42)}
    assert not np.asarray(windows.used)[3].any() and not mask[3 * COUNT :].any()


def test_padding_and_other_images_never_enter(setup):
    batch, _, params, run = setup
    key, other = jax.random.key(3), _disturbed(batch)
    distance, _, _, windows = run(params, batch["patches"], other, batch, key)
    total = jax.jit(jax.grad(lambda x, window: run(params, batch["patches"], x, batch, key)[0][window]))
    assert (np.asarray(distance)[: 3 * COUNT] > 0).all() and (np.asarray(distance)[3 * COUNT :] == 0).all()
    for row, window in ((0, 0), (0, 3), (2, 1)):
        own = np.zeros(batch["segment"].shape, bool)
        index = np.asarray(windows.index)[row, window][np.asarray(windows.valid)[row, window]]
        own[row, index] = True
        assert len(set(batch["segment"][row, index])) == 1 and batch["segment"][row, index[0]] > 0
        spoilt = [np.where(own[..., None], x, np.nan) for x in (batch["patches"], other)]
        found = np.asarray(run(params, *spoilt, batch, key)[0])
        assert found[row * COUNT + window] == distance[row * COUNT + window]
        grad = np.asarray(total(other, row * COUNT + window))
        assert (grad[~own] == 0).all() and (np.abs(grad[own]).max(-1) > 0).all()


def test_a_row_does_not_depend_on_its_batch(setup):
    batch, _, params, run = setup
    key, turned = jax.random.key(4), {name: x[::-1] for name, x in batch.items()}
    here, there = run(params, batch["patches"], _disturbed(batch), batch, key)[0], run(
        params, turned["patches"], _disturbed(batch)[::-1], turned, key)[0]
    np.testing.assert_allclose(here.reshape(4, -1), there.reshape(4, -1)[::-1], rtol=1e-5)
    other = run(params, batch["patches"], _disturbed(batch), batch | {"example": batch["example"] + 9}, key)[3]
    assert (np.asarray(other.index) != np.asarray(run(params, batch["patches"], batch["patches"], batch, key)[3].index)).any()


def test_distance_is_zero_for_equal_pictures_grows_with_noise_and_has_a_gradient(setup):
    batch, _, params, run = setup
    key, x = jax.random.key(5), batch["patches"]
    noise = _disturbed(batch) - x
    values = [np.asarray(run(params, x, x + scale * noise, batch, key)[0])[: 3 * COUNT].mean() for scale in (0, 0.1, 0.5, 2)]
    assert values[0] == 0 and values[0] < values[1] < values[2] < values[3] < 4
    flat = jnp.zeros((1, 28, 28, 3))
    grad = jax.jit(jax.grad(lambda a: perceptual.lpips_like(NET, params, a, flat)[0]))(flat)
    assert np.isfinite(grad).all()


def test_weights_of_positions_count_pixels():
    mask = np.zeros((1, 42, 42), np.float32)
    mask[:, :14, :42] = 1
    for stride, weights in zip((2, 4, 8, 16, 32), perceptual.cell_weights(mask, (2, 4, 8, 16, 32))):
        assert weights.shape == (1, -(-42 // stride), -(-42 // stride))
        assert float(weights.sum()) == pytest.approx(14 * 42 / stride**2)


@pytest.mark.parametrize("name", perceptual.NETWORKS)
def test_networks_state_their_maps_truly(name):
    net = perceptual.network(name)
    maps, pooled = jax.eval_shape(lambda x: net.run(net.blank(), x), jax.ShapeDtypeStruct((2, 45, 64, 3), jnp.float32))
    assert [m.shape for m in maps] == [(2, -(-45 // s), -(-64 // s), c) for s, c in zip(net.strides, net.channels)]
    assert pooled.shape == (2, perceptual.POOLED)


def test_bad_options_are_named():
    with pytest.raises(InputError, match="feature network 'efficientnet' does not exist; did you mean 'efficientnet_lite0'"):
        perceptual.network("efficientnet")
    with pytest.raises(InputError, match="window=100: give a multiple of 14"):
        perceptual.check_window(100)
