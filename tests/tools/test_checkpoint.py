"""The command that looks after checkpoints, on a stage that was trained twice with other seeds."""

import shutil
import types

import jax
import numpy as np
import pytest

from dina import checkpoint, promote, sharding, train
from dina.config import InputError
from tests import toy
from tools import checkpoint as tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    workdir, config = tmp_path_factory.mktemp("run"), toy.config()
    config.checkpoint.update({"every": 3, "keep": 9})
    train.train_stage(config, "one", workdir, sharding.make_mesh({"data": 1}, jax.devices()[:1]), types.SimpleNamespace(asked=False))
    return workdir / "one"


def test_steps_are_listed_and_verified(folder, tmp_path, capsys):
    assert tool.main(["list", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["3", "6", "9"] and lines[3].startswith("result of 10 steps")
    assert tool.main(["verify", str(folder)]) == 0 and capsys.readouterr().out.count("what was written") == 4
    damaged = shutil.copytree(folder, tmp_path / "one")
    next(damaged.glob("checkpoints/00000006.*/_METADATA")).unlink()
    next(damaged.glob("checkpoints/00000003.*.json")).unlink()
    assert tool.main(["verify", str(damaged)]) == 1
    said = capsys.readouterr().out
    assert "DAMAGED: _METADATA is missing" in said and "NOT USED: incomplete" in said
    with pytest.raises(InputError, match="has no checkpoints"):
        tool.main(["list", str(tmp_path)])


def test_steps_are_compared(folder, capsys):
    assert tool.main(["diff", f"{folder}:6", f"{folder}:6"]) == 0 and "nothing" in capsys.readouterr().out
    assert tool.main(["diff", f"{folder}:6", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "params/body/w: 100.0% of 48 numbers differ" in said
    with pytest.raises(InputError, match="no committed step 7; it has 3, 6, 9"):
        tool.main(["diff", f"{folder}:7", str(folder)])


def test_pruning_keeps_the_policy_and_a_used_folder_is_left_alone(folder, tmp_path, capsys):
    used = shutil.copytree(folder, tmp_path / "one")
    assert tool.main(["prune", str(used), "--keep=1", "--every=6"]) == 0
    assert capsys.readouterr().out.count("removed step 3 ") == 1
    assert [name.step for name in promote.names(used)] == [9, 6]
    assert promote.load(used, promote.names(used)[1])[1]["step"] == 6


def test_a_step_becomes_a_finished_stage_elsewhere(folder, tmp_path):
    name = promote.names(folder)[0]
    promote.promote(folder.parent, "one", name, tmp_path / "w")
    found, wanted = checkpoint.result(tmp_path / "w" / "one"), promote.load(folder, name)[0]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    identity = checkpoint.finished(folder)["identity"]
    assert checkpoint.finished(tmp_path / "w" / "one", identity)["steps"] == 9
