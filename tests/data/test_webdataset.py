"""Tar shards lose what is damaged, and name it."""

import json
import tarfile

import ml_collections
import numpy as np
import pytest

from dina.config import InputError
from dina.data import sources, webdataset
from tests.data import layouts


def _damaged_shards(root):
    good = [m for i in range(20) for m in layouts.members(i)]
    png = layouts.png
    bad = [("torn.png", png(21)[:900]), ("torn.txt", b"torn"), ("mute.png", png(22)), ("note.txt", b"alone"),
           ("00003.png", png(23)), ("empty.png", png(24)), ("empty.txt", b" \n"), ("latin.png", png(25)),
           ("latin.txt", b"\xff\xfe\xff"), ("00004.seg.png", png(26))]
    layouts.tar(root / "a.tar", good + bad)
    layouts.tar(root / "none.tar", [])
    (root / "zero.tar").write_bytes(b"")
    (root / "text.tar").write_bytes(b"no tar at all" * 99)
    cut = layouts.tar(root / "cut.tar", [m for i in range(30, 40) for m in layouts.members(i)])
    with tarfile.open(cut) as archive:
        ninth = archive.getmember("00038.png")
    cut.write_bytes(cut.read_bytes()[: ninth.offset_data + 50])
    config = webdataset.default_config()
    config.update({"path": str(root), "max_corrupt": 0.3, "shares": layouts.ALL})
    return ml_collections.ConfigDict({"data": config})


def test_damaged_shards_lose_what_is_damaged_and_name_it(tmp_path):
    config = _damaged_shards(tmp_path / "set")
    sources.prepare(config, tmp_path)
    columns = layouts.read(config, tmp_path, ["train"])["train"]
    assert sorted(columns["caption"]) == sorted(f"text {i}" for i in [*range(20), *range(30, 38)])
    np.testing.assert_array_equal(columns["image"][columns["caption"].index("text 3")], layouts.pixels(3))
    assert layouts.quarantine(config, tmp_path) == {
        ("a.tar/torn", "corrupt"), ("a.tar/mute", "no caption"), ("a.tar/note", "no image"), ("a.tar/00003.png", "duplicate key"),
        ("a.tar/empty", "no caption"), ("a.tar/latin", "corrupt"), ("zero.tar", "corrupt"), ("text.tar", "corrupt"),
        ("cut.tar/00038.png", "corrupt")}
    manifest = json.loads((sources.cache_path(config, tmp_path) / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 28, "valid": 0, "test": 0}
    assert manifest["left_out"] == {"corrupt": 5, "no caption": 2, "no image": 1, "duplicate key": 1}


def test_more_damage_than_allowed_is_refused(tmp_path):
    config = _damaged_shards(tmp_path / "set")
    config.data.max_corrupt = 0.2  # 9 of 37
    with pytest.raises(InputError, match="9 of 37 entries are damaged.*data.max_corrupt") as caught:
        sources.prepare(config, tmp_path)
    assert "a.tar/" in str(caught.value) and list(tmp_path.glob("*webdataset-*")) == []
