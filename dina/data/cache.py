"""Folders that are made once and then only read: in a temporary folder, which appears under its name in one rename."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from dina.config import InputError

MANIFEST = "manifest.json"  # a folder counts only with it
_STALE_SECONDS = 3600
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
    """Removes what killed runs left half made; a run under way is younger."""
    for left in final.parent.glob(f".{final.name}-*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


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
