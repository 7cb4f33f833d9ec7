"""The recordings data set: 13,000 human utterances with transcripts from Debian packages, 8 hours in 14 languages.

`prepare` fetches the packages (packages.py), finds recordings and transcripts (voices.py), decodes them (audio_files.py) and
writes clips (clips.py) with a manifest into `DIR/recordings-<key>/`. Splits share no utterance, no sound, no prompt in
any language, and no picture: a stamp's clips are where the stamp is in the pictures' data set, so that a text, its
picture and its recordings can be trained on together. Records of kind 'images' are that data set's.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from dina.config import InputError
from dina.data import audio_files, cache, clips, packages, pictures, prepared, splits, stamps, text_models, voices

KINDS = ("speech", "images")
PACKAGES = ("av", "soundfile", "soxr", "numpy", "array-record")
_FORMAT = 1  # of the clips; raise it when the code makes different clips from the same config
_HELD_OUT = ("test", "valid", "train")  # of recordings that say the same, those of the first of these are kept
_CHUNK = 256  # files decoded before the next are


def default_config() -> ml_collections.ConfigDict:
    """The experiment's `data` section.

    `packages`: of voices.SPOKEN. `limit`: recordings taken of each, spread over it; 0 for all. `max_seconds`: longer ones are
    left out. `shares`: of each package's recordings without a picture. `pictures`: the `data` section of the stamps data set
    whose splits the captions follow; empty where there are no pictures.
    """
    return ml_collections.ConfigDict({
        "name": "recordings", "seed": 0, "packages": tuple(voices.SPOKEN), "limit": 0, "max_seconds": 30.0,
        "shares": {"valid": 0.05, "test": 0.1}, "pictures": stamps.default_config(),
    })


def smoke_config() -> ml_collections.ConfigDict:
    """120 English prompts (a package of 11 MB), no pictures."""
    config = default_config()
    config.update({"packages": ("asterisk-en",), "limit": 120})
    config.pictures = ml_collections.ConfigDict()
    return config


def pictures_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict | None:
    """The experiment with the pictures' data set as its data; None if it has no pictures."""
    if not config.data.pictures:
        return None
    other = ml_collections.ConfigDict({"data": config.data.pictures.to_dict()})
    if "run" in config:
        other.run = config.run
    return other


def cache_path(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """The folder of this config's clips, made or not; raises InputError if a package to make or read them is missing."""
    seen = pictures_config(config)
    archives = {name: {role: package.sha256 for role, package in roles.items()} for name, roles in voices.SPOKEN.items()}
    identity = {"format": _FORMAT, "data": config.data.to_dict(), "archives": archives,
                "versions": cache.versions(PACKAGES, "recordings"),
                "pictures": stamps.cache_path(seen, data_dir).name if seen else ""}
    return pathlib.Path(data_dir or cache.directory(config)) / f"recordings-{cache.key(identity)}"


def prepare(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """Makes the clips, and the pictures before them, unless they are there; prints what there is.

    Args:
        config: the whole experiment; `data` counts.
        data_dir: parent folder of the cache and of the fetched packages; see `cache.directory` for the default.

    Returns:
        The folder: clips of each split, `manifest.json`, `left_out.json`.

    Raises:
        InputError: a package is missing and cannot be fetched, or the config asks for the impossible.
    """
    final, seen = cache_path(config, data_dir), pictures_config(config)
    if seen:
        stamps.prepare(seen, data_dir)
    cache.build_once(final, lambda work: _build(config, seen, final.parent, work))
    report = json.loads((final / cache.MANIFEST).read_text())
    for split, minutes in report["minutes"].items():
        table = ", ".join(f"{language} {report['clips'][split][language]} ({some:.1f})" for language, some in minutes.items())
        print(f"dina: data: {split}: {report['counts'][split]} recordings, {sum(minutes.values()):.1f} minutes: {table}", flush=True)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report["left_out"].items()))
    print(f"dina: data: left out: {reasons or 'nothing'}; named in {final / 'left_out.json'}", flush=True)
    return final


def open_records(config: ml_collections.ConfigDict, kind: str, split: str, data_dir: pathlib.Path | str | None = None,
                 skip: Sequence[str] = ()) -> clips.Clips | prepared.Records:
    """Clips (see `clips.Clips`), or the pictures of which `picture` of a clip is the `source`.

    Raises:
        InputError: not prepared, no such split, or no pictures in this data set.
    """
    if kind == "speech":
        return clips.Clips(cache.require(cache_path(config, data_dir), "recordings"), split, skip)
    seen = pictures_config(config)
    if seen is None:
        raise InputError("data kind 'images': config key data.pictures is empty, so these recordings have no pictures")
    return stamps.open_records(seen, kind, split, data_dir, skip)


def open_tokenizer(config: ml_collections.ConfigDict, specials=(), data_dir: pathlib.Path | str | None = None) -> text_models.Tokenizer:
    """The text tokenizer of the training transcripts, made at the first call; raises as `open_records`. See `text_models.of_transcripts`."""
    heard = open_records(config, "speech", "train", data_dir)
    return text_models.of_transcripts(config, cache_path(config, data_dir), heard.notes, specials)


def triples(config: ml_collections.ConfigDict, split: str, data_dir: pathlib.Path | str | None = None) -> list[tuple[int, int]]:
    """(number of a clip, number of the picture that it describes), for every clip of a split whose picture is in it too."""
    heard = open_records(config, "speech", split, data_dir)
    seen = open_records(config, "images", split, data_dir, ("image",))
    numbers = {seen[i]["source"]: i for i in range(len(seen))}
    return [(i, numbers[note["picture"]]) for i, note in enumerate(heard.notes) if note["picture"] in numbers]


def manifest(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> dict[str, Any]:
    """Names, versions, hashes and licences of everything the data came from, and its counts; raises if not prepared."""
    return json.loads((cache.require(cache_path(config, data_dir), "recordings") / cache.MANIFEST).read_text())


def assign(found: Sequence[voices.Recording], digests: Sequence[str], pictures_splits: Mapping[str, tuple[str, str]],
           shares: Mapping[str, float], seed: int) -> list[str | None]:
    """The split of every recording; None for one that says or sounds what a more held-out split has.

    Args:
        found: the recordings.
        digests: of their files.
        pictures_splits: source of every picture -> (its split, its caption).
        shares, seed: as of `splits.assign`, for recordings that no picture decides about.
    """
    by_caption = {}
    for split, caption in pictures_splits.values():
        by_caption.setdefault(pictures.normal_caption(caption), split)
    own = [pictures_splits[one.picture][0] if one.picture in pictures_splits
           else by_caption.get(pictures.normal_caption(one.caption)) if one.caption else None for one in found]
    same = [(f"sound/{digest}", f"said/{one.language}/{voices.said(one.text)}") for one, digest in zip(found, digests, strict=True)]
    keys = [[*both, *(f"{kind}/{key}" for kind, key in (("prompt", one.prompt), ("picture", one.picture),
                                                        ("caption", pictures.normal_caption(one.caption))) if key)]
            for one, both in zip(found, same, strict=True)]
    groups = splits.group(keys, np.zeros((len(found), 1), np.uint8), near=-1)
    held = _most_held_out(groups, own)
    drawn = splits.assign(groups, [one.source for one in found], [one.package for one in found], shares, seed)
    result = [mine or held.get(one) or rest for mine, one, rest in zip(own, groups, drawn, strict=True)]
    # Stamps of different splits may share a recording or a translation, which no assignment of whole stamps can mend.
    first = [_most_held_out([both[place] for both in same], result) for place in range(2)]
    return [split if all(first[place][both[place]] == split for place in range(2)) else None
            for split, both in zip(result, same, strict=True)]


def _most_held_out(names: Sequence[Any], found: Sequence[str | None]) -> dict[Any, str]:
    """Name -> the most held-out split among its members that have one."""
    best: dict[Any, str] = {}
    for name, split in zip(names, found, strict=True):
        if split is not None:
            best[name] = min(best.get(name, split), split, key=_HELD_OUT.index)
    return best


def _build(config: ml_collections.ConfigDict, seen: ml_collections.ConfigDict | None, data_dir: pathlib.Path,
           work: pathlib.Path) -> None:
    options, start = config.data, time.perf_counter()
    left_out: voices.LeftOut = collections.defaultdict(list)
    unknown = set(options.packages) - set(voices.SPOKEN)
    if unknown or not options.packages:
        raise InputError(f"config key data.packages: must be some of {', '.join(voices.SPOKEN)}; it is {options.packages}")
    found = []
    for name in options.packages:
        files = {role: packages.fetch(package, data_dir) for role, package in voices.SPOKEN[name].items()}
        every = voices.find(name, files, left_out)
        wanted = options.limit if 0 < options.limit < len(every) else len(every)
        found += [every[i * len(every) // wanted] for i in range(wanted)]
    fetched = time.perf_counter()
    digests = [hashlib.sha256(one.path.read_bytes()).hexdigest() for one in found]
    assigned = assign(found, digests, _picture_splits(seen, data_dir), options.shares.to_dict(), options.seed)
    with clips.Writer(work) as writer:
        for one, split, made in zip(found, assigned, _decoded(found, assigned, options.max_seconds), strict=True):
            if split is None:
                left_out["in two splits"].append(f"{one.source}: a more held-out split has this sound or text")
            elif isinstance(made, InputError):
                left_out["refused"].append(f"{one.source}: {made}")
            else:
                writer.add(split, clips.About(one.source, one.text, one.language, one.speaker, one.picture), made)
    report = writer.counts()
    if not all(report["counts"].values()):
        raise InputError(f"config section data: {len(found)} recordings are too few for splits of shares {options.shares.to_dict()};"
                         " raise data.limit or the shares")
    report |= {"left_out": {reason: len(lines) for reason, lines in left_out.items()},
               "seconds": {"fetch": fetched - start, "decode": time.perf_counter() - fetched},
               "versions": cache.versions(PACKAGES, "recordings"), "config": options.to_dict(),
               "sources": [dataclasses.asdict(package) for name in options.packages for package in voices.SPOKEN[name].values()]}
    (work / "left_out.json").write_text(json.dumps(left_out, indent=1, ensure_ascii=False))
    (work / cache.MANIFEST).write_text(json.dumps(report, indent=1, default=list))


def _picture_splits(seen: ml_collections.ConfigDict | None, data_dir: pathlib.Path) -> dict[str, tuple[str, str]]:
    """Source -> (split, caption) of every picture that is drawn, not of the photographs."""
    found = {}
    for split in stamps.SPLITS if seen else ():
        records = stamps.open_records(seen, "images", split, data_dir, ("image",))
        rows = (records[i] for i in range(len(records)))
        found |= {row["source"]: (split, row["caption"]) for row in rows}
    return found


def _decoded(found: Sequence[voices.Recording], assigned: Sequence[str | None], max_seconds: float) -> Iterator[Any]:
    """For each recording its packed clip, or what is wrong with it; None where it has no split."""

    def one(item):
        recording, split = item
        if split is None:
            return None
        try:
            return clips.pack(*audio_files.decode(recording.path.read_bytes(), recording.source + recording.path.suffix, max_seconds))
        except InputError as error:
            return error

    items = list(zip(found, assigned, strict=True))
    # Threads: decoding, resampling and compressing are done outside Python's lock.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(items), _CHUNK):
            yield from pool.map(one, items[start : start + _CHUNK])
