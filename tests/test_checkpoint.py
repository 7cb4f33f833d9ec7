"""Steps and finished stages on disk: what is damaged is named and passed over, what a late process commits is ignored."""

import json
import shutil

import jax
import numpy as np
import pytest

from dina import checkpoint, config as configs, files, lease, manifest
from dina.config import InputError
from tests import toy

TREE = {"params": {"a": {"w": np.arange(3.0)}, "b": {"w": np.ones(2)}}, "stats": {"a": {"n": np.zeros(())}}}
LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])), TREE)


def _state(step):
    return jax.tree.map(lambda x: jax.numpy.asarray(x) + step, TREE)


def _saved(folder, *steps, **how):
    saves = checkpoint.Checkpoints(folder, "i", **{"keep": 9} | how)
    for step in steps:
        saves.save(step, _state(step), step * 4, 1.0, {"loss": abs(step - 4.0)})
    saves.close()
    return saves


def _flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def _check(folder, step):
    saves = checkpoint.Checkpoints(folder, "i")
    assert saves.latest() == step
    if step is not None:
        state, meta = saves.restore(step, LIKE)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(_state(step)))
        assert meta["examples"] == 4 * step
    saves.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    _saved(folder, 2, 4, 6)
    return folder


def _files(root, step):
    (name,) = [path for path in root.iterdir() if path.is_dir() and path.name.startswith(f"{step:08d}.")]
    return [root / f"{name.name}.json", *sorted(path for path in name.rglob("*") if path.is_file())]


# --------------------------------------------------------------------------------------------------------------- steps
def test_damage_to_any_file_is_named_and_the_newest_good_step_is_taken(three, tmp_path, capsys):
    count = len(_files(three / "checkpoints", 6))
    assert count > 5
    for number in range(count):
        for kind in ("flip", "cut", "empty", "gone"):
            folder = shutil.copytree(three, tmp_path / f"{number}.{kind}")
            path = _files(folder / "checkpoints", 6)[number]
            if kind == "flip":
                _flip(path)
            elif kind == "gone":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[:-1] if kind == "cut" else b"")
            saves = checkpoint.Checkpoints(folder, "i")
            assert saves.latest() == 4, path
            said = capsys.readouterr().out
            assert "checkpoint of step 6" in said and (number == 0 or path.name in said or "manifest" in said), (path, said)
            saves.close()
    _check(folder, 4)


def test_several_damaged_steps_are_passed_over_and_none_good_is_none(three, tmp_path, capsys):
    folder = shutil.copytree(three, tmp_path / "s")
    for step in (6, 4):
        _flip(_files(folder / "checkpoints", step)[3])
    _check(folder, 2)
    assert capsys.readouterr().out.count("is damaged") == 2
    _flip(_files(folder / "checkpoints", 2)[0], 40)
    _check(folder, None)
    assert "no good checkpoint is left; the stage begins anew" in capsys.readouterr().out


def test_a_step_without_manifest_does_not_exist_and_goes_with_the_next_commit(three, tmp_path, capsys):
    folder = shutil.copytree(three, tmp_path / "s")
    _files(folder / "checkpoints", 6)[0].unlink()
    held = lease.acquire(folder / "lease", 5.0)
    saves = checkpoint.Checkpoints(folder, "i", 9, lease=held)
    assert saves.latest() == 4 and "step 6 (00000006.0.2) is not used: incomplete" in capsys.readouterr().out
    saves.save(6, _state(6), 24, 1.0)
    saves.close()
    held.release()
    assert not (folder / "checkpoints" / "00000006.0.2").exists()
    _check(folder, 6)


def test_policies_keep_what_they_say(tmp_path):
    saves = _saved(tmp_path, 1, 2, 3, 4, 5, 6, keep=1, keep_every=3, keep_best="min:loss")
    assert [name.step for name in saves.committed()] == [3, 4, 6]
    assert len([path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]) == 3


def test_another_config_is_refused_key_by_key_and_other_libraries_are_said(tmp_path, monkeypatch, capsys):
    config = toy.config()
    checkpoint.write_config(tmp_path, config)
    config.seed, config.log.every = 4, 7
    with pytest.raises(InputError, match="identity i, this config has j; seed was 3, is 4\\)"):
        checkpoint.check_identity(tmp_path, "i", "j", config)
    _saved(tmp_path, 2)
    with pytest.raises(InputError, match="another config"):
        checkpoint.Checkpoints(tmp_path, "j").restore(2, LIKE)
    monkeypatch.setattr(manifest, "versions", lambda: {"jax": "9.9"})
    checkpoint.Checkpoints(tmp_path, "i").restore(2, LIKE)
    assert f"jax {jax.__version__} then, 9.9 now" in capsys.readouterr().out


def test_what_a_process_commits_after_it_was_replaced_is_ignored(tmp_path, capsys):
    """Even where it asked for its lease in time and fell asleep between that and the commit."""
    first = lease.acquire(tmp_path / "lease", 0.4)
    late = checkpoint.Checkpoints(tmp_path, "i", 9, lease=first)
    late.save(2, _state(2), 8, 1.0)
    late.wait()
    first.release()
    second = lease.acquire(tmp_path / "lease", 0.4)
    saves = checkpoint.Checkpoints(tmp_path, "i", 9, lease=second)
    with pytest.raises(lease.Fenced):
        first._done.clear()
        first._beaten = -1e9
        late.save(4, _state(4), 16, 1.0)
    first.check = lambda: None
    late.save(4, _state(4), 16, 1.0)
    late.close()
    assert saves.latest() == 2 and "step 4" in (said := capsys.readouterr().out) and "had been taken over" in said
    saves.save(3, _state(3), 12, 1.0)
    saves.close()
    second.release()
    _check(tmp_path, 3)


def test_a_save_that_fails_leaves_what_there_was_and_the_next_may_succeed(tmp_path):
    saves = checkpoint.Checkpoints(tmp_path, "i", 9)
    saves.save(2, _state(2), 8, 1.0)
    saves.wait()
    create, saves.store.create = saves.store.create, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    saves.save(4, _state(4), 16, 1.0)
    with pytest.raises(checkpoint.SaveFailed, match="No space left"):
        saves.wait()
    assert saves.latest() == 2
    saves.store.create = create
    saves.save(6, _state(6), 24, 1.0)
    saves.close()
    _check(tmp_path, 6)


# ----------------------------------------------------------------------------------------------------- finished stages
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
    record = json.loads((tmp_path / "s" / "stage.json").read_text())
    for text in ("{", "[]", json.dumps(record | {"identity": "j"})):
        (tmp_path / "s" / "stage.json").write_text(text)
        with pytest.raises(InputError, match="damaged"):
            checkpoint.finished(tmp_path / "s")
    checkpoint.write_record(tmp_path / "s", record | {"more": 1})  # who writes a record again seals it
    assert checkpoint.finished(tmp_path / "s")["more"] == 1


def test_damage_to_any_file_of_a_result_is_named(tmp_path):
    checkpoint.finish(tmp_path / "s", TREE, {"identity": "i"})
    paths = sorted(path for path in (tmp_path / "s" / "result").rglob("*") if path.is_file())
    assert len(paths) > 4
    for path in paths:
        whole = path.read_bytes()
        _flip(path)
        with pytest.raises(InputError, match=f"damaged .*{path.name}"):
            checkpoint.result(tmp_path / "s")
        path.write_bytes(whole)
        assert checkpoint.result(tmp_path / "s")["params"].keys() == {"a", "b"}
        path.unlink()
        with pytest.raises(InputError, match=f"damaged .*{path.name} is missing"):
            checkpoint.result(tmp_path / "s")
        path.write_bytes(whole)
    assert configs.EXIT_INPUT == 2 and files.open_store(tmp_path / "s").names() == ["stage.json"]
