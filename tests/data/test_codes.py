import numpy as np
import pytest

from dina.config import InputError
from dina.data import codes


def speech(count, seed=0):
    rng = np.random.default_rng(seed)
    return [{"codes": rng.integers(0, 500, (rng.integers(1, 9), 3)), "word": f"wörd{i}", "voice": "en+m1", "digit": i % 10,
             "noisy": i % 2, "record": i} for i in range(count)]


def written(workdir, records, shards=2):
    for shard in range(shards):
        path = codes.shard_path(workdir, "speech", "train", shard, shards)
        codes.write_shard(path, "speech", records[shard::shards], "id", [f"shard {shard}: bad"] if shard else [])
    return codes.finish(workdir, "speech", 3, {"train": shards})


def test_records_come_back(tmp_path):
    records = speech(7)
    report = written(tmp_path, records)
    assert report == {"counts": {"train": 7}, "errors": ["shard 1: bad"]}
    table = codes.load_codes(tmp_path, "speech", "train")
    order = [*records[0::2], *records[1::2]]
    assert len(table) == 7 and table.flat.dtype == np.int32
    for i, record in enumerate(order):
        assert (table.codes(i) == record["codes"]).all()
        assert {name: column[i] for name, column in table.fields.items()} == {k: v for k, v in record.items() if k != "codes"}


def recorded(count):
    """Of a data set whose fields are others."""
    return [{"codes": np.full((i + 1, 3), i), "text": f"Él {i}", "language": "es", "speaker": "ana", "picture": "" if i else "dog", "noisy": 0,
             "record": i} for i in range(count)]  # fmt: skip


def test_fields_are_those_of_the_data_set(tmp_path):
    written(tmp_path, recorded(4))
    table, source = codes.load_codes(tmp_path, "speech", "train"), codes.open_codes(tmp_path, "speech", "train")
    assert list(table.fields) == ["text", "language", "speaker", "picture", "noisy", "record"] and "word" not in source[0]
    assert table.fields["text"] == ["Él 0", "Él 2", "Él 1", "Él 3"] and source[0]["picture"].decode() == table.fields["picture"][0] == "dog"
    assert table.fields["record"].tolist() == [0, 2, 1, 3]
    with pytest.raises(InputError, match="record 0: field 'word' is not in all records"):
        codes.write_shard(codes.shard_path(tmp_path, "speech", "train", 0, 2), "speech", [*recorded(1), *speech(1)], "id")


def test_tfds_reads_the_same(tmp_path):
    written(tmp_path, speech(5))
    source, table = codes.open_codes(tmp_path, "speech", "train"), codes.load_codes(tmp_path, "speech", "train")
    assert len(source) == len(table)
    for i in range(len(table)):
        assert (source[i]["codes"] == table.codes(i)).all()
        assert source[i]["word"].decode() == table.fields["word"][i] and source[i]["record"] == table.fields["record"][i]


def test_a_shard_counts_only_if_it_is_whole_and_of_this_identity(tmp_path):
    path = codes.shard_path(tmp_path, "speech", "train", 0, 1)
    assert codes.verify_shard(path, "id") is None
    codes.write_shard(path, "speech", speech(3), "id")
    assert codes.verify_shard(path, "id")["records"] == 3
    assert codes.verify_shard(path, "other") is None
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.note.json"]
    path.write_bytes(path.read_bytes()[:-1])
    assert codes.verify_shard(path, "id") is None


def test_the_same_records_make_the_same_file(tmp_path):
    for name in ("a", "b"):
        codes.write_shard(tmp_path / name, "speech", speech(4), "id")
    assert codes.verify_shard(tmp_path / "a", "id")["sha256"] == codes.verify_shard(tmp_path / "b", "id")["sha256"]


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(InputError, match="no speech codes"):
        codes.load_codes(tmp_path, "speech", "train")
    with pytest.raises(InputError, match="one of images, speech"):
        codes.load_codes(tmp_path, "video", "train")
    written(tmp_path, speech(4))
    with pytest.raises(InputError, match="no split 'valid'.*train"):
        codes.load_codes(tmp_path, "speech", "valid")
    path = codes.shard_path(tmp_path, "speech", "train", 1, 2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="00001-of-00002"):
        codes.load_codes(tmp_path, "speech", "train")


def test_codes_that_do_not_fit_are_refused(tmp_path):
    bad = speech(1)
    bad[0]["codes"] = np.full((2, 3), 2**16)
    with pytest.raises(InputError, match="record 0"):
        codes.write_shard(tmp_path / "x", "speech", bad, "id")
    assert not (tmp_path / "x").exists()


def test_fewer_shards_replace_more(tmp_path):
    written(tmp_path, speech(8), shards=4)
    written(tmp_path, speech(6, seed=1), shards=2)
    assert len(codes.load_codes(tmp_path, "speech", "train")) == 6
