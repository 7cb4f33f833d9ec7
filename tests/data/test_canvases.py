"""Image records: reproducible, on their declared place, held-out pairs only in test."""

import io

import numpy as np
import pytest
from PIL import Image

from dina.data import canvases, digits, mnist, phrases


@pytest.fixture(scope="module")
def data():
    config = digits.default_config()
    config.mnist.update({"train": 300, "valid": 20, "test": 200})
    return config


@pytest.fixture(scope="module")
def rows(data):
    result = {}
    for split in mnist.SPLITS:
        result[split] = list(canvases.records(data, split))
        for row in result[split]:
            row["pixels"] = np.asarray(Image.open(row["image"]))
            row["canvas"] = tuple(side // 28 for side in row["pixels"].shape[:2])
    return result


def test_sources_are_disjoint(rows):
    sources = {split: {row["source"] for row in rows[split]} for split in rows}
    assert not sources["train"] & sources["test"] and not sources["train"] & sources["valid"]
    assert not sources["valid"] & sources["test"]


def test_digit_stands_in_its_box_and_nowhere_else(rows):
    for row in rows["test"] + rows["train"]:
        size, top, left = row["size"], row["top"], row["left"]
        outside = row["pixels"].astype(int).copy()
        assert outside[top:top + size, left:left + size].max() > 100
        outside[top:top + size, left:left + size] = 0
        assert outside.max() == 0
        assert (row["pixels"][..., 0] == row["pixels"][..., 2]).all()


def test_aligned_means_the_grammar_can_name_it(rows):
    for row in rows["train"] + rows["valid"] + rows["test"]:
        named = phrases.words(row["canvas"], row["size"], row["top"], row["left"])
        assert (named is not None) == bool(row["aligned"])


def test_held_out_pairs_are_only_in_test(rows):
    def held_out(split):
        return [row for row in rows[split] if phrases.is_held_out(row["digit"], row["canvas"])]

    assert not held_out("train") and not held_out("valid")
    assert len(held_out("test")) == 200 and all(row["aligned"] for row in held_out("test"))


def test_every_canvas_is_used_and_small_ones_more(rows):
    for split in ("train", "test"):
        canvas_of = [row["canvas"] for row in rows[split] if row["aligned"]]
        assert set(canvas_of) == set(phrases.CANVASES)
        cells = np.mean([a * b for a, b in canvas_of])
        assert cells < 6  # 7.2 if canvases were uniform


def test_train_placements_and_unaligned_share(rows, data):
    assert len(rows["train"]) == 300 * data.images.train.placements
    assert 0.15 < np.mean([row["aligned"] == 0 for row in rows["train"]]) < 0.25


def test_only_later_train_placements_are_augmented(rows):
    pixels, _ = mnist.load()

    def untouched(row):
        top, left, size = row["top"], row["left"], row["size"]
        return np.array_equal(row["pixels"][top:top + size, left:left + size, 0],
                              canvases.paste(pixels[row["source"]], (2, 2), size, 0, 0)[:size, :size])

    assert all(untouched(row) for row in rows["test"])
    assert all(untouched(row) for row in rows["train"][::4]) and not any(untouched(row) for row in rows["train"][1::4])


def test_records_repeat(data):
    def some():
        return [row["image"].getvalue() for row, _ in zip(canvases.records(data, "train"), range(20), strict=False)]

    assert some() == some()


def test_png_is_read_back():
    image_HW = np.arange(28 * 56, dtype=np.uint32).reshape(28, 56).astype(np.uint8)
    data = canvases._png(image_HW)
    assert isinstance(data, io.BytesIO)
    np.testing.assert_array_equal(np.asarray(Image.open(data))[..., 1], image_HW)


def test_straddle_weighs_placements_across_cell_borders_and_sizes_stay_alike_without_it():
    rng = np.random.default_rng(0)
    drawn = {weight: [canvases._aligned((3, 3), rng, weight) for _ in range(2000)] for weight in (1.0, 4.0)}

    def share(weight, keep):
        return np.mean([bool(keep(*placement)) for placement in drawn[weight]])

    # On 3 x 3 cells 5 of 9 places of a large digit cross a border and none of a small one do.
    assert share(1.0, lambda size, top, left: size == 56) == pytest.approx(0.5, abs=0.04)
    assert share(1.0, lambda size, top, left: top % 28 or left % 28) == pytest.approx(5 / 18, abs=0.04)
    assert share(4.0, lambda size, top, left: top % 28 or left % 28) == pytest.approx((20 / 9) / (1 + 24 / 9), abs=0.04)
