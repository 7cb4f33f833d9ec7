"""Augmentation: views keep the whole digit and never show a forbidden pair; digits are bent inside their box."""

import numpy as np
import pytest

from dina.data import phrases
from dina.tasks import vision_augment, vision_batches
from tests.tasks.test_vision_batches import make_columns


@pytest.fixture(scope="module")
def table():
    return vision_batches.make_table(make_columns(), 784, 16 * 784)


def large_table():
    """One marked 28-px box at every place of the 4 x 4 canvas, for each digit."""
    columns = {name: [] for name in ("image", *vision_batches.FIELDS)}
    for digit in range(10):
        for size, top, left in phrases.placements((4, 4)):
            image = np.zeros((112, 112, 3), np.uint8)
            image[top : top + size, left : left + size] = np.arange(1, size + 1, dtype=np.uint8)[:, None, None]
            named = {"digit": digit, "size": size, "top": top, "left": left, "aligned": 1, "source": digit}
            for name, value in {"image": image, **named}.items():
                columns[name].append(value)
    return vision_batches.make_table(columns, 784, 16 * 784)


def test_views_hold_the_digit_at_a_named_place():
    table = large_table()
    both = vision_batches.with_views(table, 6, seed=0)
    count, seen = len(table.images), set()
    assert len(both.images) > 3 * count
    for index in range(count, len(both.images)):
        digit, size, top, left = (int(both.fields[name][index]) for name in ("digit", "size", "top", "left"))
        canvas = tuple(both.grid[index].tolist())
        assert canvas in phrases.CANVASES and not phrases.is_held_out(digit, canvas)
        assert both.fields["aligned"][index] == 1 and phrases.words(canvas, size, top, left) is not None
        box = both.images[index][top : top + size, left : left + size]
        assert box.shape == (size, size, 3) and (box == np.arange(1, size + 1)[:, None, None]).all()
        seen.add((canvas, size))
    assert {((1, 1), 28), ((2, 2), 56), ((3, 4), 28)} <= seen
    again = vision_batches.with_views(table, 6, seed=0)
    assert np.array_equal(again.grid, both.grid) and not np.array_equal(
        vision_batches.with_views(table, 6, seed=1).fields["top"][:999], both.fields["top"][:999]
    )


def test_unnamed_places_give_views_anywhere():
    draws = [(which, where) for which in (0.0, 0.7) for where in (0.0, 0.5, 0.99)]
    cut = {vision_augment._cut_axis(4, 28, 37, False, *draw) for draw in draws}
    assert (1, 0) in cut and len(cut) > 3
    for cells, offset in cut:
        assert 0 <= offset <= 28 * cells - 28 and 0 <= 37 - offset <= 112 - 28 * cells


def test_bending_stays_in_the_box_and_looks_like_the_digit(table):
    fields = {name: values[:12] for name, values in table.fields.items()}
    images = table.images[:12]
    before = [image.copy() for image in images]
    bent = vision_augment.bend_digits(images, fields, np.random.default_rng(3))
    changed = 0
    for i, (old, new) in enumerate(zip(images, bent, strict=True)):
        np.testing.assert_array_equal(old, before[i])
        top, left = fields["top"][i], fields["left"][i]
        outside = new.astype(int) - old
        outside[top : top + 28, left : left + 28] = 0
        assert not outside.any()
        changed += not np.array_equal(old, new)
        similar = np.corrcoef(old.ravel(), new.ravel())[0, 1]
        assert similar > 0.6, similar
    assert changed == 12


def test_no_map_is_the_identity():
    boxes = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3)).astype(np.uint8)
    still = vision_augment._warp(boxes, np.tile(np.eye(2), (2, 1, 1)), np.zeros((2, 2)), np.zeros((2, 2, 4, 4)))
    assert np.abs(still.astype(int) - boxes).max() <= 1
