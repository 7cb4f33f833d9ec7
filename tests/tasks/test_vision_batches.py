"""Packed image batches: a pure function of the step, every record once an epoch, digits bent in place."""

import gc
import weakref

import ml_collections
import numpy as np
import PIL.Image
import pytest

from dina.config import InputError
from dina.data import folders, sources
from dina.tasks import vision_batches
from dina.vision import preprocess
from dina.vision.config import encoder_config


def make_columns(count=40, seed=0):
    """Image records with one bright box each, on canvases of 1 to 6 cells."""
    rng = np.random.default_rng(seed)
    columns = {name: [] for name in ("image", *vision_batches.FIELDS)}
    for number in range(count):
        h, w = (int(n) for n in rng.integers(1, 4, 2) if n)
        h = min(h, 6 // w)
        image = np.zeros((28 * h, 28 * w, 3), np.uint8)
        top, left = (int(rng.integers(0, 28 * n - 28 + 1)) for n in (h, w))
        image[top + 4 : top + 24, left + 4 : left + 24] = rng.integers(100, 256, (20, 20, 1))
        fields = {"digit": number % 10, "size": 28, "top": top, "left": left, "aligned": 0, "source": number}
        for name, value in {"image": image, **fields}.items():
            columns[name].append(value)
    return columns


def make_config(batch=4, task="align", seed=0):
    vision = encoder_config()
    vision.pack.update(cells=8, images=4)
    return ml_collections.ConfigDict({"seed": seed, "vision": vision}), ml_collections.ConfigDict(
        {"task": task, "batch": batch}
    )


@pytest.fixture(scope="module")
def table():
    return vision_batches.make_table(make_columns(), 784, 16 * 784)


def test_rows_hold_each_record_once_within_budget():
    rng = np.random.default_rng(0)
    areas = rng.integers(1, 17, 700)
    rows = vision_batches.pack_rows(areas, rng.permutation(700), cells=16, max_images=5)
    used = rows[rows >= 0]
    assert sorted(used.tolist()) == list(range(700))
    totals = np.where(rows >= 0, areas[rows], 0).sum(axis=1)
    assert totals.max() <= 16 and (rows >= 0).sum(axis=1).max() <= 5
    assert totals.sum() / (16 * len(rows)) > 0.95
    with pytest.raises(InputError, match="an image of 16 cells does not fit a row of 15: .*vision.pack.cells .*options.cells"):
        vision_batches.pack_rows(np.array([16]), np.array([0]), 15, 2)


def test_batches_are_pure_and_cover_epochs(table):
    config, stage = make_config()
    ahead = vision_batches.VisionBatches(config, stage, table, "affine")
    late = ahead.batch(7)
    for name, array in vision_batches.VisionBatches(config, stage, table, "affine").batch(7).items():
        np.testing.assert_array_equal(array, late[name], err_msg=name)
    epoch = ahead._epoch(0)
    rows = np.concatenate([ahead.plan(step) for step in range(3 * len(epoch) // 4 + 1)])
    for number in range(2):  # the plan crosses epochs without losing or doubling a record
        start, stop = ahead._ends[number : number + 2]
        part = rows[start:stop]
        assert sorted(part[part >= 0].tolist()) == list(range(40))
    assert not np.array_equal(rows[: len(epoch)], rows[len(epoch) : 2 * len(epoch)])


def test_streams_differ_by_task_and_seed(table):
    streams = ({}, {"task": "pixels"}, {"seed": 1})
    plans = [vision_batches.VisionBatches(*make_config(**kw), table).plan(0) for kw in streams]
    assert not np.array_equal(plans[0], plans[1]) and not np.array_equal(plans[0], plans[2])


def test_large_canvases_can_be_thinned(table):
    config, stage = make_config()
    thin = vision_batches.VisionBatches(config, stage, table, canvas_power=-1.0)
    kept = np.concatenate([rows[rows >= 0] for rows in (thin._plan(epoch) for epoch in range(60))])
    share = np.bincount(kept, minlength=40) / 60
    np.testing.assert_allclose(share, 1 / thin.areas, atol=0.25)
    assert share[thin.areas == 1].min() == 1.0


def test_a_row_shows_its_records(table):
    config, stage = make_config()
    batch = vision_batches.VisionBatches(config, stage, table).batch(2)
    assert batch["patches"].shape == (4, 32, 1176) and batch["example"].tolist() == [8, 9, 10, 11]
    for row, slot in np.argwhere(batch["record"] >= 0):
        record = batch["record"][row, slot]
        patches = batch["patches"][row][batch["segment"][row] == slot + 1]
        image = preprocess.patches_to_image(patches, batch["grid"][row, slot])
        np.testing.assert_array_equal(image, table.images[record])
        assert batch["digit"][row, slot] == table.fields["digit"][record]
    empty = batch["record"] < 0
    assert (batch["digit"][empty] == -1).all() and (batch["grid"][empty] == 0).all()
    assert (np.count_nonzero(batch["segment"], axis=1) == 4 * batch["grid"].prod(-1).sum(-1)).all()


@pytest.mark.parametrize("parts, augment", [(2, "none"), (2, "affine"), (0, "zoom")])
def test_parts_and_zoom_go_together(table, parts, augment):
    options = ml_collections.ConfigDict(vision_batches.data_options() | {"parts": parts, "part_side": 1, "augment": augment})
    with pytest.raises(InputError, match=f"parts={parts} and augment='{augment}' do not go together"):
        vision_batches.make_batches(*make_config(), options, table).batch(0)
    options.update(parts=2, augment="zoom")
    assert vision_batches.make_batches(*make_config(), options, table).batch(0)["grid"].max() == 1


@pytest.fixture
def prepared(tmp_path):
    """A config of six pictures in files, of which preprocessing resizes half."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(6):
        side = 56 if number % 2 else 60
        PIL.Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(tmp_path / "in" / f"{number}.png")
        (tmp_path / "in" / f"{number}.txt").write_text(f"picture {number}")
    config, _ = make_config()
    config.data = folders.default_config()
    config.data.update(path=str(tmp_path / "in"), shares={"valid": 0.0, "test": 0.0})
    config.run = ml_collections.ConfigDict({"data_dir": str(tmp_path / "cache")})
    config.vision.update(min_pixels=784, max_pixels=16 * 784)
    sources.prepare(config)
    return config


def test_a_table_keeps_no_original_and_is_read_once(prepared, monkeypatch):
    originals, source = [], sources.open_source(prepared, "images", "train")

    class Watched:
        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            record = source[index]
            originals.append(weakref.ref(record["image"]))
            return record

    monkeypatch.setattr(sources, "open_source", lambda *_: Watched())
    table = vision_batches.image_table(prepared, "train")
    gc.collect()
    kept = [original() for original in originals if original() is not None]
    assert len(originals) == 6 and len(kept) == 3 and {image.shape for image in kept} == {(56, 56, 3)}
    assert vision_batches.image_table(prepared, "train") is table and len(originals) == 6
    wanted = vision_batches.make_table(sources.load_all(prepared, "images", "train"), 784, 16 * 784)
    np.testing.assert_array_equal(table.images, wanted.images)
    np.testing.assert_array_equal(table.grid, wanted.grid)
    assert table.captions == wanted.captions and sorted(table.captions) == [f"picture {n}" for n in range(6)]
    prepared.vision.max_pixels = 784
    assert vision_batches.image_table(prepared, "train").grid.max() == 1 and len(vision_batches._LAST) == 1
