"""Finished stages: reading parts back, damage, unfinished folders."""

import numpy as np
import pytest

from dina import checkpoint
from dina.config import InputError

TREE = {"params": {"a": {"w": np.arange(3.0)}, "b": {"w": np.ones(2)}}, "stats": {"a": {"n": np.zeros(())}}}


def test_parts_come_back_and_missing_ones_are_named(tmp_path):
    checkpoint.finish(tmp_path / "s", TREE, {"identity": "i"})
    found = checkpoint.result(tmp_path / "s", {"params": ["a"], "stats": []})
    assert np.array_equal(found["params"]["a"]["w"], np.arange(3.0)) and "b" not in found["params"]
    with pytest.raises(InputError, match="no part.*'c'"):
        checkpoint.result(tmp_path / "s", {"params": ["c"]})


def test_an_unfinished_or_damaged_stage_is_named(tmp_path):
    with pytest.raises(InputError, match="'s' is not finished"):
        checkpoint.result(tmp_path / "s")
    checkpoint.finish(tmp_path / "s", TREE, {"identity": "i"})
    with pytest.raises(InputError, match="another config"):
        checkpoint.finished(tmp_path / "s", "j")
    (tmp_path / "s" / "stage.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        checkpoint.finished(tmp_path / "s")
