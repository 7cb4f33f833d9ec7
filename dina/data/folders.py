"""A folder of images, with captions beside them: NAME.txt for NAME.jpg, or one metadata.jsonl a folder.

metadata.jsonl is the layout that image-folder loaders share: one JSON object a line, `file_name` relative to the
folder of metadata.jsonl, and the caption under config key data.json_key.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import ml_collections

from dina.data import collected
from dina.data.collected import Found, Place, Problem

METADATA = "metadata.jsonl"


def default_config() -> ml_collections.ConfigDict:
    """The experiment's `data` section; `captions`: 'txt' beside each image, 'jsonl' (metadata.jsonl), or 'none'."""
    config = collected.default_config()
    config.update({"name": "folder", "captions": "txt", "json_key": "text"})
    return config


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    for path in root.rglob("*"):
        if path.suffix.lower() in collected.ENDINGS or path.suffix == ".txt" or path.name == METADATA:
            if path.is_file():
                yield path


def _scan(root: pathlib.Path, options: ml_collections.ConfigDict) -> Iterator[Found | Problem]:
    lines: dict[str, Place] = {}
    if options.captions == "jsonl":
        for path in sorted(root.rglob(METADATA)):
            yield from read_metadata(root, path, lines)
    for path in sorted(path for path in _files(root) if path.suffix.lower() in collected.ENDINGS):
        source = path.relative_to(root).as_posix()
        note = path.with_suffix(".txt")
        caption = lines.pop(source, None)
        if options.captions == "txt" and note.is_file():
            caption = place_of(root, note)
        top, _, below = source.partition("/")
        yield Found(source, source.removesuffix(path.suffix), top if below else "", place_of(root, path), caption)
    for source, place in lines.items():
        yield Problem(source, "no image", f"{place.file} names it")


def place_of(root: pathlib.Path, path: pathlib.Path) -> Place:
    """A whole file."""
    return Place(path.relative_to(root).as_posix(), 0, path.stat().st_size)


def read_metadata(root: pathlib.Path, path: pathlib.Path, lines: dict[str, Place]) -> Iterator[Problem]:
    """Fills `lines`: image or recording -> where its line is. A line that cannot be understood is a problem."""
    name, offset = path.relative_to(root).as_posix(), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place, offset = Place(name, offset, len(line)), offset + len(line)
            if not line.strip():
                continue
            try:
                image = (path.parent / json.loads(line)["file_name"]).relative_to(root).as_posix()
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                yield Problem(f"{name} line {number}", "corrupt", f"no JSON object with file_name below the folder ({error})")
                continue
            if image in lines:
                yield Problem(f"{name} line {number}", "duplicate key", f"{image} has a line above")
            else:
                lines[image] = place


DATA_SET = collected.Collection("folder", ("txt", "jsonl", "none"), _files, _scan)
