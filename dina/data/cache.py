"""Folders that are made once and then only read: in a temporary folder, which appears under its name in one rename."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_collections

from dina.config import InputError

MANIFEST = "manifest.json"  # a folder counts only with it
_STALE_SECONDS = 3600  # since the last sign of life of a build
_SIGN_SECONDS = 60
_MODULES = {"pillow": "PIL", "espeakng-loader": "espeakng_loader", "tensorflow-datasets": "tensorflow_datasets",
            "array-record": "array_record", "resvg-py": "resvg_py", "scikit-image": "skimage", "scikit-learn": "sklearn"}


def directory(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Where caches live: config key run.data_dir, else the environment's DINA_DATA, else runs/data."""
    return pathlib.Path(config.get("run", {}).get("data_dir") or os.environ.get("DINA_DATA") or "runs/data")


def is_built(folder: pathlib.Path) -> bool:
    """Whether `build_once` has made the folder."""
    return (folder / MANIFEST).is_file()


def build_once(final: pathlib.Path, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Makes a folder unless it is there; all or nothing.

    Args:
        final: the folder.
        build: fills an empty folder, beside `final`, its `manifest.json` included; what it raises is passed on.

    Returns:
        `final`.
    """
    if is_built(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(final)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        with _signs_of_life(work):
            build(work)
        try:
            work.rename(final)
        except OSError:  # another process was first: what it made is the same
            if not is_built(final):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _remove_stale(final: pathlib.Path) -> None:
    """Removes what killed runs left half made; a run under way has given a sign of life since."""
    for left in final.parent.glob(f".{final.name}-*"):
        with contextlib.suppress(FileNotFoundError):  # it has been finished meanwhile
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _signs_of_life(work: pathlib.Path) -> Iterator[None]:
    """Keeps the time of a folder new: not a lock, which not every shared file system has for all hosts."""
    done = threading.Event()

    def touch() -> None:
        while not done.wait(_SIGN_SECONDS):
            with contextlib.suppress(OSError):  # a file system that is away for a while
                os.utime(work)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@functools.cache
def content(root: pathlib.Path, files: Callable[[pathlib.Path], Iterable[pathlib.Path]]) -> str:
    """A hash of names and sizes of `files(root)`, listed once a process: folders of users can have millions of files.

    `content.cache_clear()` has them listed again.
    """
    return key(sorted((path.relative_to(root).as_posix(), path.stat().st_size) for path in files(root)))


def sha256(path: pathlib.Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key(identity: Any) -> str:
    """A short hash of anything that JSON can hold, for the name of a folder."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode()).hexdigest()[:16]


def versions(packages: Sequence[str], what: str) -> dict[str, str]:
    """Version of Python and of every package that a data set comes from.

    Raises:
        InputError: a package is missing; the message says that `what` needs it, and how to install it.
    """
    found = {"python": platform.python_version()}
    for package in packages:
        if importlib.util.find_spec(_MODULES.get(package, package)) is None:
            raise InputError(f"the {what} data set needs the package {package}, which is not installed;"
                             f" install it with `uv pip install {package}`, or everything with `make setup`")
        found[package] = importlib.metadata.version(package)
    return found


def require(folder: pathlib.Path, what: str) -> pathlib.Path:
    """`folder`, which `build_once` must have made; `what` is the name of its data set.

    Raises:
        InputError: it is not there.
    """
    if not is_built(folder):
        raise InputError(f"data: no prepared records at {str(folder)!r} (config section data, key run.data_dir);"
                         f" dina.data.{what}.prepare makes them, as `make demo` and every training run do first")
    return folder
