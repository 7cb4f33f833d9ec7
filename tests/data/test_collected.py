"""Users' images in folders and tar shards: the same records and splits whatever the layout, read where they lie."""

import pickle

import ml_collections
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from dina.config import InputError
from dina.data import cache, folders, sources, webdataset
from tests.data import layouts


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_record_is_read_where_it_lies(tmp_path, layout):
    config = layouts.make(tmp_path / "set", layout)
    sources.prepare(config, tmp_path)
    seen = []
    for split, columns in layouts.read(config, tmp_path).items():
        assert set(columns) == {"image", "caption", "source", "native", "split"} and set(columns["split"]) == {split}
        for image, caption, source in zip(columns["image"], columns["caption"], columns["source"], strict=True):
            kind, number = caption.split()
            np.testing.assert_array_equal(image, layouts.pixels(int(number)))
            assert kind == layout.split("-")[1].removesuffix("l").replace("txt", "text") and layouts.NAMES[int(number)] in source
            seen.append(int(number))
    assert sorted(seen) == list(range(60))
    assert layouts.quarantine(config, tmp_path) == set()


def test_splits_depend_on_the_name_alone_and_not_on_the_layout(tmp_path):
    per_layout = []
    for layout in ("folder-txt", "webdataset-txt"):
        config = layouts.make(tmp_path / layout, layout)
        sources.prepare(config, tmp_path)
        per_layout.append({split: sorted(columns["caption"]) for split, columns in layouts.read(config, tmp_path).items()})
    assert per_layout[0] == per_layout[1]
    fewer = layouts.make(tmp_path / "fewer", "folder-txt", range(30))
    sources.prepare(fewer, tmp_path)
    for split, columns in layouts.read(fewer, tmp_path).items():
        assert set(columns["caption"]) <= set(per_layout[0][split])


@pytest.mark.parametrize("layout", ["folder-txt", "webdataset-json"])
def test_folders_are_splits_if_the_config_says_so(tmp_path, layout):
    root = tmp_path / "set"
    for folder, numbers in {"train": range(10), "val": range(10, 14), "test": range(14, 20), "extra": range(20, 21)}.items():
        config = layouts.make(root, layout, numbers, folder)
    config.data.update({"split": "folder", "max_corrupt": 0.1})
    sources.prepare(config, tmp_path)
    columns = layouts.read(config, tmp_path)
    found = {split: sorted(int(caption.split()[1]) for caption in own["caption"]) for split, own in columns.items()}
    assert found == {"train": list(range(10)), "valid": list(range(10, 14)), "test": list(range(14, 20))}
    assert {reason for _, reason in layouts.quarantine(config, tmp_path)} == {"no split"}


def test_pictures_of_all_kinds_come_as_rgb_and_without_captions_if_none_are_asked_for(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for name, mode in {"a.jpg": "L", "b.webp": "RGB", "c.png": "RGBA", "d.png": "P", "e.JPEG": "CMYK"}.items():
        PIL.Image.new(mode, (40, 30)).save(root / name)
    config = folders.default_config()
    config.update({"path": str(root), "captions": "none", "shares": layouts.ALL, "max_corrupt": 0.0})
    config = ml_collections.ConfigDict({"data": config})
    sources.prepare(config, tmp_path)
    columns = layouts.read(config, tmp_path, ["train"])["train"]
    assert columns["source"] == ["a.jpg", "b.webp", "c.png", "d.png", "e.JPEG"] and columns["caption"] == [""] * 5
    assert {image.shape for image in columns["image"]} == {(30, 40, 3)}
    assert (columns["image"][2] == 255).all() and columns["native"].tolist() == [0] * 5


def test_header_is_enough_if_the_config_says_so_and_damage_is_then_met_when_read(tmp_path):
    root = tmp_path / "set"
    config = layouts.make(root, "folder-txt", range(3))
    (root / "00001.png").write_bytes(layouts.png(1)[:900])
    config.data.update({"verify": "header", "shares": layouts.ALL})
    sources.prepare(config, tmp_path)
    source = sources.open_source(config, "images", "train", tmp_path)
    assert len(source) == 3 and source[2]["caption"] == "text 2"
    with pytest.raises(InputError, match="record 1 of images/train .00001.png"):
        source[1]


def test_a_source_crosses_processes_and_keeps_bytes_if_asked(tmp_path):
    config = layouts.make(tmp_path / "set", "webdataset-txt", range(9))
    config.data.shares = layouts.ALL
    sources.prepare(config, tmp_path)
    source = pickle.loads(pickle.dumps(sources.Source(config, "images", "train", tmp_path, skip=["image"])))
    assert source[4]["image"] == layouts.png(int(source[4]["caption"].split()[1]))
    with pytest.raises(IndexError):
        source[9]


def test_the_index_follows_the_files_and_is_made_once(tmp_path):
    config = layouts.make(tmp_path / "set", "webdataset-txt", range(9))
    path = sources.prepare(config, tmp_path)
    before = (path / "train.npz").stat().st_mtime_ns
    assert sources.prepare(config, tmp_path) == path and (path / "train.npz").stat().st_mtime_ns == before
    layouts.tar(tmp_path / "set" / "new.tar", layouts.members(50))
    cache.content.cache_clear()  # as in another process
    assert sources.cache_path(config, tmp_path) != path
    with pytest.raises(InputError, match="no prepared records"):
        sources.open_source(config, "images", "train", tmp_path)
    assert sources.prepare(config, tmp_path) != path
    layouts.tar(tmp_path / "set" / "newer.tar", layouts.members(51))
    sources.prepare(config, tmp_path)  # looks for itself
    assert any(51 in map(int, (c.split()[1] for c in own["caption"])) for own in layouts.read(config, tmp_path).values())


def test_a_data_set_may_be_moved(tmp_path):
    config = layouts.make(tmp_path / "set", "webdataset-txt", range(9))
    path = sources.prepare(config, tmp_path)
    config.data.path = str((tmp_path / "set").rename(tmp_path / "elsewhere"))
    assert sources.prepare(config, tmp_path) == path
    assert sum(len(columns["image"]) for columns in layouts.read(config, tmp_path, ["train"]).values()) > 0


def test_photographs_are_upright_and_16_bit_grey_is_not_white(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    notes = PIL.Image.Exif()
    notes[PIL.ExifTags.Base.Orientation] = 6
    PIL.Image.new("RGB", (40, 30), "red").save(root / "a.jpg", exif=notes)
    PIL.Image.fromarray(np.full((30, 40), 257 * 100, np.uint16)).save(root / "b.png")
    config = folders.default_config()
    config.update({"path": str(root), "captions": "none", "shares": layouts.ALL})
    config = ml_collections.ConfigDict({"data": config})
    sources.prepare(config, tmp_path)
    turned, grey = layouts.read(config, tmp_path, ["train"])["train"]["image"]
    assert turned.shape == (40, 30, 3) and (grey == 100).all()


@pytest.mark.parametrize("key, value, message", [
    ("path", "nowhere", "data.path: 'nowhere'"), ("captions", "csv", "data.captions: 'csv'"),
    ("split", "random", "data.split: 'random'"), ("verify", "no", "data.verify: 'no'"), ("name", "fodler", "folder"),
    ("shares", {"vaild": 0.1}, "data.shares.*'vaild'.*'valid'"), ("shares", {"judge": 0.1}, "data.shares.*'judge'.*known: test, train"),
])
def test_bad_options_are_named(tmp_path, key, value, message):
    config = layouts.make(tmp_path / "set", "folder-txt", range(2))
    config.data[key] = value
    with pytest.raises(InputError, match=message):
        sources.prepare(config, tmp_path)


def test_nothing_to_read_is_an_error(tmp_path):
    (tmp_path / "set").mkdir()
    config = ml_collections.ConfigDict({"data": webdataset.default_config()})
    config.data.path = str(tmp_path / "set")
    with pytest.raises(InputError, match="no usable image"):
        sources.prepare(config, tmp_path)
    config = layouts.make(tmp_path / "other", "folder-txt", range(2))
    config.data.shares = layouts.ALL
    sources.prepare(config, tmp_path)
    with pytest.raises(InputError, match="'test' of images has no records"):
        sources.open_source(config, "images", "test", tmp_path)
