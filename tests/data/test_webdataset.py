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
    config.update({"path": str(root), "max_corrupt": 0.3, "shares": layouts.ALL, "broken_shards": "keep"})
    return ml_collections.ConfigDict({"data": config})


def test_damaged_shards_lose_what_is_damaged_and_name_it(tmp_path, capsys):
    config = _damaged_shards(tmp_path / "set")
    sources.prepare(config, tmp_path)
    columns = layouts.read(config, tmp_path, ["train"])["train"]
    assert sorted(columns["caption"]) == sorted(f"text {i}" for i in [*range(20), *range(30, 38)])
    np.testing.assert_array_equal(columns["image"][columns["caption"].index("text 3")], layouts.pixels(3))
    assert layouts.quarantine(config, tmp_path) == {
        ("a.tar/torn", "corrupt"), ("a.tar/mute", "no caption"), ("a.tar/note", "no image"), ("a.tar/00003.png", "duplicate key"),
        ("a.tar/empty", "no caption"), ("a.tar/latin", "corrupt"), ("zero.tar", "broken shard"),
        ("text.tar", "broken shard"), ("cut.tar/00038.png", "broken shard")}
    manifest = json.loads((sources.cache_path(config, tmp_path) / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 28, "valid": 0, "test": 0}
    assert manifest["left_out"] == {"broken shard": 3, "corrupt": 2, "no caption": 2, "no image": 1, "duplicate key": 1}
    said = capsys.readouterr().out
    assert "28 images; 9 entries left out (3 broken shard, 2 corrupt, " in said and said.endswith("/quarantine.jsonl\n")
    assert json.loads(open(said.split()[-1]).readline())["source"]


def test_more_damage_than_allowed_is_refused(tmp_path):
    config = _damaged_shards(tmp_path / "set")
    config.data.max_corrupt = 0.2  # 9 of 37
    with pytest.raises(InputError, match="9 of 37 entries are damaged.*data.max_corrupt") as caught:
        sources.prepare(config, tmp_path)
    assert "a.tar/" in str(caught.value) and list(tmp_path.glob("*webdataset-*")) == []


def _damage(path, how):
    """Damages the header of the sixth of ten members, or for 'first' of the first; returns how many are before it."""
    layouts.tar(path, [(f"{i}.png", layouts.png(i)) for i in range(10)])
    with tarfile.open(path) as archive:
        start = archive.getmembers()[0 if how == "first" else 5].offset
    data = bytearray(path.read_bytes())
    if how == "checksum":
        data[start + 148 : start + 156] = b"0000000\0"
    elif how == "garbage":
        data[start : start + 512] = np.random.default_rng(0).bytes(512)
    elif how in ("zeroed", "first"):
        data[start : start + 512] = bytes(512)
    else:
        del data[start + {"boundary": 0, "within": 100}[how] :]
    path.write_bytes(data)
    return 0 if how == "first" else 5


@pytest.mark.parametrize("how", ["checksum", "garbage", "zeroed", "first", "boundary", "within"])
def test_a_damaged_header_does_not_pass_for_the_end(tmp_path, how):
    before = _damage(tmp_path / "a.tar", how)
    options = webdataset.default_config()
    options.update({"captions": "none", "broken_shards": "keep"})
    problem, *found = webdataset.DATA_SET.scan(tmp_path, options)
    assert [one.source for one in found] == [f"a.tar/{i}" for i in range(before)]
    assert (problem.source, problem.reason) == ("a.tar", "broken shard")
    last = f"after {before - 1}.png" if before else "after its begin"
    assert problem.detail.startswith(last)
    options.broken_shards = webdataset.default_config().broken_shards
    with pytest.raises(InputError, match=f"a.tar: {last}.*data.broken_shards='keep'"):
        list(webdataset.DATA_SET.scan(tmp_path, options))


@pytest.mark.parametrize("blocks", [1, 2, 99])
def test_any_number_of_empty_blocks_closes_a_shard(tmp_path, blocks):
    path = layouts.tar(tmp_path / "a.tar", [("0.png", layouts.png(0))])
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(2 * 512 * 99, b"\0"))
    with tarfile.open(path) as archive:
        archive.getmembers()
        end = archive.offset
    path.write_bytes(path.read_bytes()[: end + 512 * blocks])
    options = webdataset.default_config()
    assert [one.source for one in webdataset.DATA_SET.scan(tmp_path, options)] == ["a.tar/0"]


def test_an_unknown_choice_for_broken_shards_is_named(tmp_path):
    config = _damaged_shards(tmp_path / "set")
    config.data.broken_shards = "kepe"
    with pytest.raises(InputError, match="data.broken_shards.*'kepe'.*'keep'"):
        sources.prepare(config, tmp_path)
