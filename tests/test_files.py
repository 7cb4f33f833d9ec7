"""Conditional writes in a folder and in a bucket."""

import concurrent.futures
import os
import threading

import pytest

from dina import files
from dina.config import InputError


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    yield files.open_store(tmp_path / "s" if request.param == "folder" else f"memory://{tmp_path.name}/s")


def test_objects_are_whole_and_the_first_writer_wins(store):
    assert store.names() == [] and store.read("a") is None
    assert store.create("a", b"one") and not store.create("a", b"two")
    assert store.read("a") == b"one"
    store.write("a", b"three")
    store.write("b", b"")
    assert store.read("a") == b"three" and store.names() == ["a", "b"]
    store.delete("a")
    store.delete("a")
    assert store.names() == ["b"] and store.create("a", b"four")


def test_of_many_contenders_one_gets_the_name(tmp_path):
    store, gate = files.Folder(tmp_path), threading.Barrier(8)

    def one(number):
        gate.wait()
        return store.create("claim", bytes([number]))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = list(pool.map(one, range(8)))
    assert sum(won) == 1 and store.read("claim") == bytes([won.index(True)])
    assert [path.name for path in tmp_path.iterdir()] == ["claim"]  # no half-written rest


def test_a_half_written_object_is_none(tmp_path):
    store = files.Folder(tmp_path)
    (tmp_path / ".a.1.2.part").write_bytes(b"x")
    assert store.names() == []


def test_an_address_without_driver_is_named():
    with pytest.raises(InputError, match="nowhere://x.*fsspec"):
        files.open_store("nowhere://x/y")


def test_storage_that_fails_is_told_from_a_bug(tmp_path):
    for number, raised in ((28, InputError), (5, InputError), (2, FileNotFoundError)):
        with pytest.raises(raised, match="No|Input"), files.storage_errors(str(tmp_path)):
            raise OSError(number, os.strerror(number))
