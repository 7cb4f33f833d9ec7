"""WebDataset shards as LAION, COYO and DataComp have them: tar files of KEY.jpg, KEY.txt, KEY.json, read where they are.

A tar file has no index, so it is walked once, header by header; after that every image is random access. The walk cannot go on
behind damage, so a broken shard loses an unknown number of images: that stops preparation unless the config says otherwise.
Compressed shards have no places to go to; they count as broken.
"""

from __future__ import annotations

import pathlib
import tarfile
from collections.abc import Iterator

import ml_collections

from dina.config import InputError, check_name
from dina.data import collected
from dina.data.collected import Found, Place, Problem


BROKEN_SHARDS = ("refuse", "keep")
_BLOCK = 512  # bytes of a header, and of the empty ones that close a tar file


def default_config() -> ml_collections.ConfigDict:
    """The experiment's `data` section; `captions`: 'txt' (KEY.txt), 'json' (KEY.json, key data.json_key), or 'none'.

    `path` is the folder of the shards, at any depth; with `split` 'folder' the top folder of a shard is its split.
    `broken_shards`: a shard that cannot be walked to its end is an error ('refuse'), or ('keep') what comes before the damage
    is taken and the shard counts as one damaged entry of `max_corrupt`, however many it has lost.
    """
    config = collected.default_config()
    config.update({"name": "webdataset", "captions": "txt", "broken_shards": "refuse"})
    return config


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in root.rglob("*.tar*") if path.is_file())


def _scan(root: pathlib.Path, options: ml_collections.ConfigDict) -> Iterator[Found | Problem]:
    check_name(options.broken_shards, BROKEN_SHARDS, "config key data.broken_shards: choice")
    for path in sorted(_files(root)):
        yield from _scan_shard(root, path, options)


def _scan_shard(root: pathlib.Path, path: pathlib.Path, options: ml_collections.ConfigDict) -> Iterator[Found | Problem]:
    shard = path.relative_to(root).as_posix()
    members: dict[str, dict[str, Place]] = {}
    for name, place in walk(path, shard):
        if isinstance(place, Problem):
            if options.broken_shards == "refuse":
                raise InputError(f"data in {str(root)!r}: {place.source}: {place.detail}; what the shard had behind that is lost:"
                                 " get the shard again, or go on without with config key data.broken_shards='keep'")
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


def walk(path: pathlib.Path, shard: str) -> Iterator[tuple[str, Place | Problem]]:
    """(name, place) of every file of a tar; damage ends the walk with a problem, for what follows it cannot be found."""
    last, size = "its begin", path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # it would remember them all
                if member.offset_data + member.size > size:
                    yield shard, Problem(f"{shard}/{member.name}", "broken shard", "the shard ends within it")
                    return
                if member.isfile():
                    yield member.name, Place(shard, member.offset_data, member.size)
                last = member.name
            # The library takes a header that it cannot read for the end.
            wrong = _behind(path, archive.offset)
    except (tarfile.TarError, OSError, ValueError) as error:
        wrong = f"{error}; shards are plain, uncompressed tar files"
    if wrong:
        yield shard, Problem(shard, "broken shard", f"after {last}: {wrong}")


def _behind(path: pathlib.Path, offset: int) -> str:
    """What is wrong with the end of a tar whose last member ends at `offset`: '' if an empty block and only zeros follow."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            return f"the file ends at byte {offset + len(block)} without the empty blocks that close a tar file"
        if block.strip(b"\0"):
            return f"the header at byte {offset} is damaged"
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                return f"the header at byte {offset} is empty, but the file goes on"
    return ""


DATA_SET = collected.Collection("webdataset", ("txt", "json", "none"), _files, _scan)
