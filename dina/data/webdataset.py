"""WebDataset shards as LAION, COYO and DataComp have them: tar files of KEY.jpg, KEY.txt, KEY.json, read where they are.

A tar file has no index, so it is walked once, header by header; after that every image is random access. Compressed shards
have no places to go to and are refused by name.
"""

from __future__ import annotations

import pathlib
import tarfile
from collections.abc import Iterator

import ml_collections

from dina.data import collected
from dina.data.collected import Found, Place, Problem


def default_config() -> ml_collections.ConfigDict:
    """The experiment's `data` section; `captions`: 'txt' (KEY.txt), 'json' (KEY.json, key data.json_key), or 'none'.

    `path` is the folder of the shards, at any depth; with `split` 'folder' the top folder of a shard is its split.
    """
    config = collected.default_config()
    config.update({"name": "webdataset", "captions": "txt"})
    return config


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in root.rglob("*.tar*") if path.is_file())


def _scan(root: pathlib.Path, options: ml_collections.ConfigDict) -> Iterator[Found | Problem]:
    for path in sorted(_files(root)):
        yield from _scan_shard(root, path, options)


def _scan_shard(root: pathlib.Path, path: pathlib.Path, options: ml_collections.ConfigDict) -> Iterator[Found | Problem]:
    shard = path.relative_to(root).as_posix()
    members: dict[str, dict[str, Place]] = {}
    for name, place in _walk(path, shard):
        if isinstance(place, Problem):
            yield place
            continue
        # A key ends at the first dot of a member's own name: 000.seg.png is no image of 000.
        folder, _, own = name.rpartition("/")
        stem, _, ending = own.partition(".")
        parts = members.setdefault(f"{folder}/{stem}".lstrip("/"), {})
        if ending.lower() in parts:
            yield Problem(f"{shard}/{name}", "duplicate key", "the shard has a member of this name above")
        else:
            parts[ending.lower()] = place
    top, _, below = shard.partition("/")
    for key, parts in members.items():
        image = next((parts[ending[1:]] for ending in collected.ENDINGS if ending[1:] in parts), None)
        if image is None:
            yield Problem(f"{shard}/{key}", "no image", f"it has {', '.join(parts)}")
        else:
            yield Found(f"{shard}/{key}", key, top if below else "", image, parts.get(options.captions))


def _walk(path: pathlib.Path, shard: str) -> Iterator[tuple[str, Place | Problem]]:
    """(name, place) of every file of a tar; damage ends the walk with a problem, for what follows it cannot be found."""
    last, size = "its begin", path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # it would remember them all
                if member.offset_data + member.size > size:
                    yield shard, Problem(f"{shard}/{member.name}", "corrupt", "the shard ends within it")
                    return
                if member.isfile():
                    yield member.name, Place(shard, member.offset_data, member.size)
                last = member.name
    except (tarfile.TarError, OSError, ValueError) as error:
        yield shard, Problem(shard, "corrupt", f"after {last}: {error}; shards are plain, uncompressed tar files")


DATA_SET = collected.Collection("webdataset", ("txt", "json", "none"), _files, _scan)
