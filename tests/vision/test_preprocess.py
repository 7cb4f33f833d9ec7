"""Preprocessing: sizes, patch order, packs and bad files (the reference's pixels: tools/parity, case 04)."""

import json
import pathlib

import numpy as np
import PIL.Image
import pytest

from dina.config import InputError
from dina.vision import preprocess

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/04_visual_encoder"


def random_image(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (28 * h, 28 * w, 3)).astype(np.uint8)


def test_smart_resize_table():
    config = json.loads((GOLDEN / "config.json").read_text())
    for h, w, *expected in config["smart_resize_table_h_w_hbar_wbar"]:
        size = preprocess.smart_resize(h, w, 28, config["min_pixels"], config["max_pixels"])
        assert list(size) == expected, (h, w)
    for h, w, *expected in config["smart_resize_table_processor_defaults_min3136_max1003520"]:
        assert list(preprocess.smart_resize(h, w, 28, 3136, 1003520)) == expected, (h, w)


def test_patches_round_trip():
    image = random_image(3, 2)
    patches = preprocess.image_to_patches(image)
    assert patches.shape == (24, 1176) and patches.dtype == np.float32
    np.testing.assert_array_equal(preprocess.patches_to_image(patches, (3, 2)), image)


def test_a_still_image_is_the_pair_of_itself_and_a_pair_has_both_frames():
    first, second = random_image(2, 3, 1), random_image(2, 3, 2)
    still = preprocess.image_to_patches(first)
    np.testing.assert_array_equal(still, preprocess.image_to_patches(np.stack([first, first])))
    pair = preprocess.image_to_patches(np.stack([first, second]))
    for frame, image in enumerate((first, second)):
        np.testing.assert_array_equal(preprocess.patches_to_image(pair, (2, 3), frame), image)
        np.testing.assert_array_equal(preprocess.patches_to_image(still, (2, 3), frame), first)
    values = pair.reshape(24, 3, 2, 14 * 14)  # (C, T, y x)
    np.testing.assert_array_equal(values[:, :, 0], still.reshape(values.shape)[:, :, 0])
    for array in (np.stack([first] * 3), first[..., :2]):
        with pytest.raises(ValueError, match="give an image"):
            preprocess.image_to_patches(array)


def test_frames_go_in_pairs_the_last_one_twice_where_they_are_odd():
    frames = [random_image(1, 1, seed) for seed in range(3)]
    pairs = preprocess.frame_pairs(frames)
    np.testing.assert_array_equal(pairs, [[frames[0], frames[1]], [frames[2], frames[2]]])
    np.testing.assert_array_equal(preprocess.frame_pairs(frames[:2]), pairs[:1])
    assert preprocess.frame_pairs([]) == []
    with pytest.raises(InputError, match="frame 1 is"):
        preprocess.frame_pairs([frames[0], random_image(1, 2)])


def test_patch_order_is_merge_groups():
    """Second patch is right of the first, third below it, fifth starts the next cell."""
    image = np.zeros((56, 56, 3), np.uint8)
    for value, (y, x) in enumerate([(0, 0), (0, 14), (14, 0), (14, 14), (0, 28)], start=1):
        image[y : y + 14, x : x + 14] = value * 10
    means = preprocess.image_to_patches(image)[:5].mean(axis=1)
    assert (np.diff(means) > 0).all()
    positions = preprocess.patch_positions(2, 2, 4)
    assert positions[:5, :2].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]


def test_windows_of_an_uneven_grid():
    """37 x 37 cells in 4 x 4 windows: 81 whole, 18 of 4 cells, 1 of 1 cell (tokenizers.md G)."""
    sizes = np.bincount(preprocess.patch_positions(37, 37, 4)[:, 2]) // 4
    assert sorted(sizes) == [1] + [4] * 18 + [16] * 81
    assert len(np.unique(preprocess.patch_positions(8, 8, 4)[:, 2])) == 4


def test_pack_separates_images_and_pads():
    images = [random_image(2, 1, 1), random_image(1, 3, 2)]
    pack = preprocess.pack_images(images, cells=7, max_images=3, window_cells=2)
    assert pack["segment"].tolist() == [1] * 8 + [2] * 12 + [0] * 8
    assert pack["cell_segment"].tolist() == [1, 1, 2, 2, 2, 0, 0]
    assert pack["grid"].tolist() == [[2, 1], [1, 3], [0, 0]]
    assert pack["window"].tolist() == [1] * 8 + [2] * 8 + [3] * 4 + [0] * 8
    np.testing.assert_array_equal(preprocess.patches_to_image(pack["patches"][8:20], (1, 3)), images[1])
    assert not pack["patches"][20:].any()


def test_pack_refuses_too_much():
    with pytest.raises(ValueError, match="do not fit"):
        preprocess.pack_images([random_image(2, 2)], cells=3, max_images=1)
    with pytest.raises(ValueError, match="multiples of 28"):
        preprocess.image_to_patches(np.zeros((30, 28, 3), np.uint8))


@pytest.mark.parametrize(
    "shape, message", [((1, 5000), "aspect ratio"), ((16, 16), "at most 256"), ((5000, 30), "cannot be fitted")]
)
def test_sizes_that_are_refused(shape, message):
    with pytest.raises(InputError, match=message):
        preprocess.resize_image(np.zeros((*shape, 3), np.uint8), 28, 784, 31360)


def test_open_image(tmp_path):
    image = random_image(2, 2)
    PIL.Image.fromarray(image).save(tmp_path / "good.png")
    np.testing.assert_array_equal(preprocess.open_image(tmp_path / "good.png"), image)


def bad_files(folder):
    PIL.Image.fromarray(random_image(4, 4)).save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"not an image at all")
    PIL.Image.fromarray(np.zeros((1, 5000, 3), np.uint8)).save(folder / "long.png")
    messages = {"missing.png": "no such", "truncated.png": "truncated", "empty.png": "0 bytes"}
    return messages | {"text.png": "not an image", "long.png": "1x5000"}


def test_open_image_names_the_bad_file(tmp_path):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(InputError, match=message) as caught:
            preprocess.open_image(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
