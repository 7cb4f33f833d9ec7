"""Small objects in a folder or a bucket, through which everything is committed: leases, manifests, scores.

One thing is asked of a storage: `create`, a conditional write, whole or not at all, which one of several writers wins.
Neither rename nor append nor locks are needed, so a bucket serves as well as a folder (DESIGN §4.15).
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Protocol

from dina.config import InputError


class Store(Protocol):
    """Objects by name; a name has no separators."""

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object unless there is one of this name; returns whether it did."""

    def write(self, name: str, data: bytes) -> None:
        """Writes or replaces an object."""

    def read(self, name: str) -> bytes | None:
        """An object's bytes, None if there is none."""

    def names(self) -> list[str]:
        """All names, sorted."""

    def delete(self, name: str) -> None:
        """Removes an object if it is there."""


class Folder:
    """Objects are files of a local folder. An object is durable when its write returns."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        """See Store. A hard link appears whole, and fails where the name is taken."""
        part = self._part(name, data)
        try:
            os.link(part, self.path / name)
        except FileExistsError:
            return False
        finally:
            part.unlink(missing_ok=True)
        self._settle()
        return True

    def write(self, name: str, data: bytes) -> None:
        """See Store."""
        self._part(name, data).replace(self.path / name)
        self._settle()

    def read(self, name: str) -> bytes | None:
        """See Store."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """See Store; what a killed writer left half-written is none."""
        return sorted(entry.name for entry in os.scandir(self.path) if entry.is_file() and not entry.name.startswith("."))

    def delete(self, name: str) -> None:
        """See Store."""
        (self.path / name).unlink(missing_ok=True)

    def _part(self, name: str, data: bytes) -> pathlib.Path:
        part = self.path / f".{name}.{os.getpid()}.{threading.get_ident()}.part"
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return part

    def _settle(self) -> None:
        """Makes the folder's entries durable, where the file system can."""
        with contextlib.suppress(OSError):
            handle = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


class Bucket:
    """Objects are those of a bucket below a prefix, through fsspec, whose file systems know a conditional write.

    Raises:
        InputError: fsspec, or its driver for the address, is not installed.
    """

    def __init__(self, address: str):
        try:
            import fsspec

            self.system, self.root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise InputError(f"{address} needs fsspec and its driver for this address ({error}); install them") from None
        self.root = self.root.rstrip("/")

    def create(self, name: str, data: bytes) -> bool:
        """See Store."""
        try:
            self.system.pipe_file(f"{self.root}/{name}", data, mode="create")
        except FileExistsError:
            return False
        return True

    def write(self, name: str, data: bytes) -> None:
        """See Store."""
        self.system.pipe_file(f"{self.root}/{name}", data)

    def read(self, name: str) -> bytes | None:
        """See Store."""
        try:
            return self.system.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """See Store."""
        self.system.invalidate_cache(self.root)
        try:
            found = self.system.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(item["name"].rsplit("/", 1)[1] for item in found if item["type"] == "file")

    def delete(self, name: str) -> None:
        """See Store."""
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(f"{self.root}/{name}")


def open_store(place: pathlib.Path | str) -> Store:
    """The store at a local path, or at an address such as gs://bucket/prefix."""
    return Bucket(str(place)) if "://" in str(place) else Folder(pathlib.Path(place))


@contextlib.contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Raises InputError for what only the owner of the storage can mend."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        raise InputError(f"storage of {place}: {error}; what was last committed stands; mend it, and run the same again") from error
