"""A folder of the cache is there whole or not at all."""

import os
import threading
import time

import ml_collections
import pytest

from dina.config import InputError
from dina.data import cache


def _fill(work):
    (work / "part").write_text("x")
    (work / cache.MANIFEST).write_text("{}")


def test_built_once(tmp_path):
    calls = []
    build = lambda work: (calls.append(work), _fill(work))
    for _ in range(2):
        assert cache.build_once(tmp_path / "a" / "b", build) == tmp_path / "a" / "b"
    assert len(calls) == 1 and sorted(os.listdir(tmp_path / "a" / "b")) == ["manifest.json", "part"]
    assert os.listdir(tmp_path / "a") == ["b"]


def test_a_failure_leaves_nothing(tmp_path):
    def build(work):
        _fill(work)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        cache.build_once(tmp_path / "b", build)
    assert os.listdir(tmp_path) == []


def test_the_first_of_two_processes_wins(tmp_path):
    def build(work):
        _fill(work)
        cache.build_once(tmp_path / "b", lambda other: (_fill(other), (other / "part").write_text("first")))

    cache.build_once(tmp_path / "b", build)
    assert (tmp_path / "b" / "part").read_text() == "first" and os.listdir(tmp_path) == ["b"]


def test_what_killed_runs_left_is_removed_and_what_runs_is_not(tmp_path):
    for name, age in ((".b-old", 7200), (".b-new", 10), (".c-old", 7200)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cache.build_once(tmp_path / "b", _fill)
    assert sorted(os.listdir(tmp_path)) == [".b-new", ".c-old", "b"]


def test_a_long_build_outlives_its_time_and_a_dead_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_SIGN_SECONDS", 0.01)
    before = threading.active_count()

    def old(path):
        os.utime(path, (time.time() - 7200,) * 2)

    def build(work):
        _fill(work)
        old(work)
        (tmp_path / ".b-dead").mkdir()
        old(tmp_path / ".b-dead")
        for _ in range(1000):  # until it gives a sign of life
            if time.time() - work.stat().st_mtime < 60:
                break
            time.sleep(0.01)
        cache.build_once(tmp_path / "b", _fill)  # another process's
        assert (work / "part").is_file() and not (tmp_path / ".b-dead").exists()

    cache.build_once(tmp_path / "b", build)
    assert os.listdir(tmp_path) == ["b"] and threading.active_count() == before


def test_directory_from_config_then_environment(monkeypatch):
    config = ml_collections.ConfigDict({"run": {"data_dir": "one"}})
    monkeypatch.setenv("DINA_DATA", "two")
    assert [str(cache.directory(c)) for c in (config, ml_collections.ConfigDict())] == ["one", "two"]
    monkeypatch.delenv("DINA_DATA")
    assert str(cache.directory(ml_collections.ConfigDict())) == "runs/data"


def test_a_missing_package_is_named():
    with pytest.raises(InputError, match="the toys data set needs the package no-such-thing.*uv pip install no-such-thing"):
        cache.versions(["numpy", "no-such-thing"], "toys")


def test_files_are_listed_once_a_process(tmp_path):
    calls = []
    files = lambda root: (calls.append(root), list(root.rglob("*.txt")))[1]
    (tmp_path / "a.txt").write_text("x")
    first = cache.content(tmp_path, files)
    (tmp_path / "b.txt").write_text("x")
    assert cache.content(tmp_path, files) == first and calls == [tmp_path]
    cache.content.cache_clear()
    assert cache.content(tmp_path, files) != first
