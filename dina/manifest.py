"""What makes a folder of files a committed one: a manifest, written last, with the size and hash of each of them.

A manifest carries a hash of itself, so that damage to it shows as well.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_READERS = 4  # hashing releases the interpreter


class Damaged(Exception):
    """A file is not what was written; the message names it and says how."""


@functools.cache
def versions() -> dict[str, str]:
    """The libraries that a result depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def other_versions(found: dict[str, str]) -> str:
    """How this process's libraries differ from those that wrote something, '' if they do not."""
    own = versions()
    return ", ".join(f"{name} {was} then, {own.get(name, 'none')} now" for name, was in found.items() if own.get(name) != was)


def digest(folder: pathlib.Path) -> dict[str, list]:
    """File below `folder` -> [bytes, sha256]; all of them are on disk when it returns."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda path: [path.stat().st_size, _sha256(path, durable=True)], paths)
        return {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, found, strict=True)}


def check(folder: pathlib.Path, files: dict[str, list]) -> None:
    """Raises Damaged naming the first file that is missing, cut or changed."""

    def wrong(item) -> str:
        name, (size, sha256) = item
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        return "" if _sha256(path) == sha256 else f"{name} has other bytes than were written"

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for message in pool.map(wrong, sorted(files.items())):
            if message:
                raise Damaged(message)


def seal(body: dict[str, Any]) -> bytes:
    """The bytes of a manifest."""
    text = json.dumps(body, sort_keys=True)
    return json.dumps({"body": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """What `seal` was given. Raises Damaged."""
    try:
        whole = json.loads(data)
        body = whole["body"]
        right = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() == whole["sha256"]
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise Damaged("its manifest is damaged")
    return body


def _sha256(path: pathlib.Path, durable: bool = False) -> str:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if durable:
            os.fsync(file.fileno())
        return found
