"""The identity of a stage follows the content of a user's data, wherever it is."""

import ml_collections
import pytest

from dina import stages
from dina.config import InputError, identity
from dina.data import cache, digits, sources, stamps, tfds_sets
from tests import toy
from tests.data import layouts


def _identity(data):
    config = toy.config()
    with config.unlocked():
        config.data = data
    return stages.stage_identity(config, "two")


@pytest.mark.parametrize("layout", ["folder-txt", "webdataset-json"])
def test_a_users_files_count_by_content_and_not_by_place(tmp_path, layout):
    data = layouts.make(tmp_path / "set", layout, range(4)).data
    before = _identity(data)
    data.path = str((tmp_path / "set").rename(tmp_path / "elsewhere"))
    assert _identity(data) == before
    data.native_pixels += 1
    assert _identity(data) != before
    data.native_pixels -= 1
    layouts.make(tmp_path / "elsewhere", layout, range(5))
    assert _identity(data) == before  # the files have been listed
    cache.content.cache_clear()
    assert _identity(data) != before
    data.path = str(tmp_path / "set")
    with pytest.raises(InputError, match="data.path"):
        _identity(data)


@pytest.mark.parametrize("data", [digits.smoke_config(), stamps.default_config(), ml_collections.ConfigDict()])
def test_our_own_data_counts_by_its_config_alone(data, monkeypatch):
    monkeypatch.setattr(sources, "cache_path", None)
    config = toy.config()
    with config.unlocked():
        config.data = data
    stage = config.stages.one.to_dict()
    del stage["accumulate"]
    whole = {"seed": config.seed, "stage": stage, "data": data, "text": {}, "sections": {}, "before": {}}
    assert stages.stage_identity(config, "one") == identity(ml_collections.ConfigDict(whole))


def test_tfds_data_counts_by_content_too(tmp_path):
    data, found = tfds_sets.default_config(), []
    for place, size in (("one", 1), ("two", 1), ("three", 2)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "dataset_info.json").write_text("{}")
        (tmp_path / place / "a.array_record").write_bytes(bytes(size))
        data.path = str(tmp_path / place)
        found.append(_identity(data))
    assert found[0] == found[1] != found[2]
