"""Captioned images in the files of a user: found once, checked, split, and then read where they lie.

folders.py and webdataset.py say where images and captions are; both are places, (file, offset, size), in files below one
folder, so a record is two reads at known places, whatever the layout. `prepare` leaves one index per split and a quarantine
file that names everything left out. Legend: R records.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np
import PIL.Image

from dina.config import InputError, check_name
from dina.data import cache, rasters

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = ("train", "valid", "test")
FOLDERS = {"train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid",
            "test": "test"}
_FORMAT = 2  # of the index
_CHUNK = 1024  # images checked before the next are listed
_USABLE = ("too small", "aspect ratio")  # reasons that are no damage, and do not count against data.max_corrupt
_NOWHERE = (-1, 0, 0)


@dataclasses.dataclass(frozen=True)
class Place:
    """Bytes `offset` to `offset` + `size` of a file, whose name is relative to the data set's folder."""

    file: str
    offset: int
    size: int

    def read(self, root: pathlib.Path) -> bytes:
        """The bytes; fewer if the file ends before. Opened anew each time: nothing to share between processes."""
        with (root / self.file).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclasses.dataclass(frozen=True)
class Found:
    """An image of a data set: its unique name, what splits are drawn by, the folder it is in, and where its bytes are."""

    source: str
    key: str
    folder: str
    image: Place
    caption: Place | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something left out: its name, one of a few reasons, and the details."""

    source: str
    reason: str
    detail: str = ""


def default_config() -> ml_collections.ConfigDict:
    """What all layouts share of the experiment's `data` section.

    `path`: the folder. `split`: 'hash' draws by the name of an image and `seed`, 'folder' takes the name of the top folder
    (train, valid or val, test). `verify`: 'decode' reads every image once, 'header' only its size. `max_corrupt`: share of
    damaged entries above which nothing is prepared. `json_key`: of the caption, where captions are in JSON.
    `native_pixels`, `min_side`, `max_aspect` as for stamps.
    """
    return ml_collections.ConfigDict({
        "path": "", "split": "hash", "seed": 0, "shares": {"valid": 0.01, "test": 0.01}, "verify": "decode",
        "max_corrupt": 0.01, "json_key": "caption", "native_pixels": 224 * 224, "min_side": 28, "max_aspect": 4.0,
    })


@dataclasses.dataclass(frozen=True)
class Collection:
    """A data set of one layout, in the form that dina/data/sources.py wants.

    Attributes:
        name: config key data.name.
        captions: the layout's values of config key data.captions: 'none', text files, or JSON if they start so.
        files: root -> the files it is made of, for the cache key.
        scan: (root, data config) -> everything found, and everything that cannot be taken.
    """

    name: str
    captions: tuple[str, ...]
    files: Callable[[pathlib.Path], Iterable[pathlib.Path]]
    scan: Callable[[pathlib.Path, ml_collections.ConfigDict], Iterator[Found | Problem]]
    KINDS: tuple[str, ...] = ("images",)

    def cache_path(self, config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
        """The folder of the index, made or not: its name is a hash of the config and of names and sizes of all files.

        Raises:
            InputError: there is no folder `data.path`, or an option or split is unknown.
        """
        options, root = config.data, root_of(self.name, config)
        for key, allowed in {"captions": self.captions, "split": ("hash", "folder"), "verify": ("decode", "header")}.items():
            if options[key] not in allowed:
                raise InputError(f"config key data.{key}: {options[key]!r} must be one of {', '.join(allowed)}")
        for split in options.shares:
            check_name(split, SPLITS, "config key data.shares: split")
        identity = {"format": _FORMAT, "data": {k: v for k, v in options.to_dict().items() if k != "path"},
                    "files": cache.content(root.resolve(), self.files)}
        return pathlib.Path(data_dir or cache.directory(config)) / f"{self.name}-{cache.key(identity)}"

    def prepare(self, config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
        """Makes the index unless it is there; all or nothing. A line says how much was left out, if anything was.

        The files are listed anew; all else in a process goes by its last listing.

        Returns:
            Its folder: one `.npz` per split, `quarantine.jsonl`, `manifest.json`.

        Raises:
            InputError: as `cache_path`; no usable image; or more damage than `data.max_corrupt` allows.
        """
        cache.content.cache_clear()
        final = cache.build_once(self.cache_path(config, data_dir), lambda work: self._build(config, work))
        report = json.loads((final / cache.MANIFEST).read_text())
        if report["left_out"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report["left_out"].items()))
            print(f"dina: data: {sum(report['counts'].values())} images; {sum(report['left_out'].values())} entries left out"
                  f" ({reasons}), named in {final / 'quarantine.jsonl'}", flush=True)
        return final

    def open_records(self, config: ml_collections.ConfigDict, kind: str, split: str,
                     data_dir: pathlib.Path | str | None = None, skip: Sequence[str] = ()) -> Records:
        """The records of a split.

        Raises:
            InputError: not prepared, or the split is unknown or empty.
        """
        folder = cache.require(self.cache_path(config, data_dir), "sources")
        counts = json.loads((folder / cache.MANIFEST).read_text())["counts"]
        if not counts.get(split):
            raise InputError(f"data split {split!r} of {kind} has no records in {str(root_of(self.name, config))!r};"
                             f" there are {counts}; see config keys data.split and data.shares")
        return Records(folder / f"{split}.npz", root_of(self.name, config), split, _json_key(config.data), skip)

    def _build(self, config: ml_collections.ConfigDict, work: pathlib.Path) -> None:
        options, root = config.data, root_of(self.name, config)
        indexes, problems = {split: _Index() for split in SPLITS}, []
        scan = self.scan(root, options)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            while chunk := list(itertools.islice(scan, _CHUNK)):
                for found, native in zip(chunk, pool.map(lambda one: _check(one, root, options), chunk), strict=True):
                    split = native if isinstance(native, Problem) else split_of(found.source, found.folder, found.key, options)
                    if isinstance(split, Problem):
                        problems.append(split)
                    else:
                        indexes[split].add(found, native)
        counts = {split: len(index.sources) for split, index in indexes.items()}
        _refuse_damage(root, counts, problems, options.max_corrupt)
        for split, index in indexes.items():
            index.write(work / f"{split}.npz")
        with (work / "quarantine.jsonl").open("w") as file:
            file.writelines(json.dumps(dataclasses.asdict(problem)) + "\n" for problem in problems)
        left_out = dict(collections.Counter(problem.reason for problem in problems))
        (work / cache.MANIFEST).write_text(json.dumps(
            {"config": options.to_dict(), "root": str(root.resolve()), "counts": counts, "left_out": left_out},
            indent=1, default=list))


class Records:
    """One split: `records[i] -> dict` with image (uint8 [H, W, 3] on white), caption, source, native and split."""

    def __init__(self, index: pathlib.Path, root: pathlib.Path, split: str, json_key: str, skip: Sequence[str]) -> None:
        with np.load(index) as arrays:
            self._arrays = dict(arrays)
        self._files = self._arrays["files"].tobytes().decode().split("\0")
        self._root, self._split, self._json_key, self._skip = root, split, json_key, skip

    def __len__(self) -> int:
        return len(self._arrays["native"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        first, last = self._arrays["source_start"][index : index + 2]
        source = self._arrays["source"][first:last].tobytes().decode()
        image, caption = (self._place(name, index) for name in ("image", "caption"))
        try:
            pixels = image.read(self._root)
            if "image" not in self._skip:
                pixels = rasters.on_white(PIL.Image.open(io.BytesIO(pixels)))
            text = read_caption(caption, self._root, self._json_key) if caption else ""
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise InputError(f"data: record {index} of images/{self._split} ({source} in {str(self._root)!r})"
                             f" cannot be read ({error})") from None
        return {"image": pixels, "caption": text, "source": source, "native": int(self._arrays["native"][index]),
                "split": self._split}

    def _place(self, name: str, index: int) -> Place | None:
        file, offset, size = self._arrays[name][index].tolist()
        return None if file < 0 else Place(self._files[file], offset, size)


class _Index:
    """Records of a split while they are collected."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.native: list[int] = []
        self.places: dict[str, list[tuple[int, int, int]]] = {"image": [], "caption": []}
        self.files: dict[str, int] = {}

    def add(self, found: Found, native: int) -> None:
        self.sources.append(found.source)
        self.native.append(native)
        for name, place in (("image", found.image), ("caption", found.caption)):
            where = (self.files.setdefault(place.file, len(self.files)), place.offset, place.size) if place else _NOWHERE
            self.places[name].append(where)

    def write(self, path: pathlib.Path) -> None:
        names = [source.encode() for source in self.sources]
        places = {name: np.array(rows, np.int64).reshape(-1, 3) for name, rows in self.places.items()}
        np.savez(path, source=np.frombuffer(b"".join(names), np.uint8), native=np.array(self.native, np.int8),
                 source_start=np.cumsum([0, *map(len, names)]), files=np.frombuffer("\0".join(self.files).encode(), np.uint8),
                 **places)


def read_caption(place: Place, root: pathlib.Path, json_key: str) -> str:
    """The text at a place, or if `json_key` is given what it has in the JSON object there; '' if that is no text.

    Raises:
        OSError: no such file.
        ValueError: it is not UTF-8, or not such JSON.
    """
    text = place.read(root).decode()
    if json_key:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("the JSON is no object")
        text = value.get(json_key)
    return text.strip() if isinstance(text, str) else ""


def _json_key(options: ml_collections.ConfigDict) -> str:
    return options.json_key if options.captions.startswith("json") else ""


def _check(found: Found | Problem, root: pathlib.Path, options) -> int | Problem:
    """Whether an image is native (0 or 1), or what is wrong with it."""
    if isinstance(found, Problem):
        return found
    try:
        with PIL.Image.open(io.BytesIO(found.image.read(root))) as image:
            width, height = image.size
            if options.verify == "decode":
                image.load()
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        return Problem(found.source, "corrupt", str(error))
    if options.captions != "none":
        try:
            caption = found.caption and read_caption(found.caption, root, _json_key(options))
        except (OSError, ValueError) as error:
            return Problem(found.source, "corrupt", f"its caption: {error}")
        if not caption:
            return Problem(found.source, "no caption")
    if max(height, width) > options.max_aspect * min(height, width):
        return Problem(found.source, "aspect ratio", f"{height}x{width} pixels")
    if min(height, width) < options.min_side:
        return Problem(found.source, "too small", f"{height}x{width} pixels")
    return rasters.is_native(height, width, options.native_pixels)


def root_of(name: str, config: ml_collections.ConfigDict) -> pathlib.Path:
    """The folder of users' data; raises InputError if there is none, or the section is another data set's than `name`."""
    if "path" not in config.data:
        raise InputError(f"config section data is of another data set; an experiment takes the default_config of {name!r} whole")
    root = pathlib.Path(config.data.path)
    if not config.data.path or not root.is_dir():
        raise InputError(f"config key data.path: {config.data.path!r} is no folder")
    return root


def split_of(source: str, folder: str, key: str, options) -> str | Problem:
    """The split of a record: by its top folder, or by the hash of `key`."""
    if options.split == "folder":
        split = FOLDERS.get(folder.lower())
        return split or Problem(source, "no split", f"folder {folder!r} is none of {', '.join(FOLDERS)}")
    # 52 bits are exact in a double.
    drawn = int(hashlib.sha256(f"{options.seed}/{key}".encode()).hexdigest()[:13], 16) / 2**52
    for split, share in sorted(options.shares.items()):
        if drawn < share:
            return split
        drawn -= share
    return "train"


def _refuse_damage(root: pathlib.Path, counts: dict[str, int], problems: list[Problem], limit: float) -> None:
    damaged = [problem for problem in problems if problem.reason not in _USABLE]
    total = sum(counts.values()) + len(problems)
    first = "; ".join(f"{one.source}: {one.reason} {one.detail}".strip() for one in (damaged or problems)[:3])
    if len(damaged) > limit * total:
        raise InputError(f"data in {str(root)!r}: {len(damaged)} of {total} entries are damaged, more than data.max_corrupt"
                         f" = {limit} allows; the first: {first}")
    if not sum(counts.values()):
        raise InputError(f"data in {str(root)!r}: no usable image ({', '.join(ENDINGS)}){'; ' * bool(first)}{first}")
