"""Users' own speech: audio files in folders, in WebDataset shards, or in a tfds data set, prepared once as clips.

`prepare` walks everything, decodes it (audio_files.py), cuts what is longer than a chunk where nobody speaks (silence.py), and
writes clips (clips.py), a manifest, and a quarantine file that names what was left out and why. A transcript belongs to
a whole file, so pieces of a cut one have none.

Layouts. 'audio_folder': files at any depth, with NAME.txt beside NAME.wav, or metadata.jsonl in a folder: one object a
line with `file_name`, and text, language and speaker under the names of the config. 'audio_webdataset': shards of KEY.wav with
KEY.txt or KEY.json. 'audio_tfds': the folder of a tfds data set with a feature of samples.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import ml_collections
import numpy as np

from dina.config import InputError, check_name
from dina.data import audio_files, cache, clips, collected, folders, prepared, silence, text_models, voices, webdataset
from dina.data.collected import Place, Problem

SPLITS_BY = ("name", "text", "speaker", "folder")
PACKAGES = ("av", "soundfile", "soxr", "numpy", "array-record")
_FORMAT = 1  # of the clips; raise it when the code makes different clips from the same files
_CHUNK = 64  # files heard before the next are listed
_THREADS = 2  # each may hold a whole recording of `max_seconds`: at 192 kHz and half an hour, twice 1.4 GB
_BYTES_A_SECOND = 384_000  # 32-bit stereo at 48 kHz: a larger file is not even read
_TEXT_BYTES = 1 << 16  # of a transcript


@dataclasses.dataclass(frozen=True)
class Sound:
    """A recording of a data set.

    Attributes:
        source: its unique name.
        folder: of the data set, or its split where it has some.
        hear: reads it: (wave of one channel, rate).
        tell: reads what is known of it: text, language, speaker.
    """

    source: str
    folder: str
    hear: Callable[[], tuple[np.ndarray, int]]
    tell: Callable[[], Mapping[str, str]]


def default_config(name: str) -> ml_collections.ConfigDict:
    """The experiment's `data` section for the layout `name`.

    `path`: the folder. `transcripts`: 'txt', 'json' ('jsonl' in folders) or 'none'. `fields`: names of text, language and
    speaker in JSON, or of tfds features. `language`: of recordings that name none. `split`: by the hash of a recording's 'name', 'text' or 'speaker', or by the top
    'folder' (train, valid or val, test). `max_seconds`: a longer recording is refused. `max_corrupt`: share of refused ones above
    which nothing is prepared. `cut`: where longer ones are cut, see silence.default_config. tfds: `audio` is the feature of
    samples, at `rate` Hz.
    """
    data = ml_collections.ConfigDict({
        "name": name, "path": "", "transcripts": "txt", "fields": {"text": "text", "language": "language", "speaker": "speaker"},
        "language": "", "split": "name", "seed": 0, "shares": {"valid": 0.01, "test": 0.01}, "max_seconds": 1800.0, "max_corrupt": 0.01,
        "cut": silence.default_config(),
    })
    if name == "audio_tfds":
        data.update({"transcripts": "feature", "split": "folder", "audio": "audio", "rate": 16000})
    return data


@dataclasses.dataclass(frozen=True)
class AudioSet:
    """A data set of one layout, in the form that dina/data/sources.py wants.

    Attributes:
        name: config key data.name.
        transcripts: the layout's values of config key data.transcripts.
        files: root -> the files it is made of, for the cache key.
        scan: (root, data config) -> everything found, and everything that cannot be taken.
    """

    name: str
    transcripts: tuple[str, ...]
    files: Callable[[pathlib.Path], Iterable[pathlib.Path]]
    scan: Callable[[pathlib.Path, ml_collections.ConfigDict], Iterator[Sound | Problem]]
    KINDS: tuple[str, ...] = ("speech",)

    def cache_path(self, config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
        """The folder of the clips, made or not: its name is a hash of the config and of names and sizes of all files.

        Raises:
            InputError: there is no folder `data.path`, or an option or split is unknown.
        """
        options, root = config.data, collected.root_of(self.name, config)
        for key, allowed in {"transcripts": self.transcripts, "split": SPLITS_BY}.items():
            check_name(options[key], allowed, f"config key data.{key}: choice")
        for split in options.shares:
            check_name(split, clips.SPLITS, "config key data.shares: split")
        identity = {"format": _FORMAT, "data": {k: v for k, v in options.to_dict().items() if k != "path"},
                    "versions": cache.versions(PACKAGES, self.name), "files": cache.content(root.resolve(), self.files)}
        return pathlib.Path(data_dir or cache.directory(config)) / f"{self.name}-{cache.key(identity)}"

    def prepare(self, config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
        """Makes the clips unless they are there; all or nothing. Prints what there is and what was left out.

        Raises:
            InputError: as `cache_path`; no usable recording; or more damage than `data.max_corrupt` allows.
        """
        cache.content.cache_clear()
        final = cache.build_once(self.cache_path(config, data_dir), lambda work: self._build(config, work))
        report = json.loads((final / cache.MANIFEST).read_text())
        total = sum(sum(minutes.values()) for minutes in report["minutes"].values())
        print(f"dina: data: {', '.join(f'{split} {count}' for split, count in report['counts'].items())} clips, {total:.1f} minutes", flush=True)
        if report["left_out"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(report["left_out"].items()))
            print(f"dina: data: left out: {reasons}; named in {final / 'quarantine.jsonl'}", flush=True)
        return final

    def open_records(self, config: ml_collections.ConfigDict, kind: str, split: str,
                     data_dir: pathlib.Path | str | None = None, skip: Sequence[str] = ()) -> clips.Clips:
        """The clips of a split; raises InputError if they are not prepared, or the split is unknown or empty."""
        del kind
        return clips.Clips(cache.require(self.cache_path(config, data_dir), "sources"), split, skip)

    def open_tokenizer(self, config: ml_collections.ConfigDict, specials=(), data_dir: pathlib.Path | str | None = None) -> text_models.Tokenizer:
        """The text tokenizer of the training transcripts, made at the first call; see `text_models.of_transcripts`."""
        heard = self.open_records(config, "speech", "train", data_dir)
        return text_models.of_transcripts(config, self.cache_path(config, data_dir), heard.notes, specials)

    def _build(self, config: ml_collections.ConfigDict, work: pathlib.Path) -> None:
        options, root = config.data, collected.root_of(self.name, config)
        problems, scan, heard = [], self.scan(root, options), 0
        with clips.Writer(work) as writer, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            while chunk := list(itertools.islice(scan, _CHUNK)):
                for found in pool.map(functools.partial(_heard, options=options), chunk):
                    if isinstance(found, Problem):
                        problems.append(found)
                        continue
                    heard += 1
                    for about, packed in found[1]:
                        writer.add(found[0], about, packed)
        _refuse_damage(root, heard, problems, options.max_corrupt)
        with (work / "quarantine.jsonl").open("w") as file:
            file.writelines(json.dumps(dataclasses.asdict(problem)) + "\n" for problem in problems)
        report = writer.counts() | {"recordings": heard, "config": options.to_dict(), "root": str(root.resolve()),
                                    "left_out": dict(collections.Counter(problem.reason for problem in problems))}
        (work / cache.MANIFEST).write_text(json.dumps(report, indent=1, default=list))


def _heard(found: Sound | Problem, options: ml_collections.ConfigDict):
    """(split, clips ready to be written) of a recording, or what is wrong with it."""
    if isinstance(found, Problem):
        return found
    try:
        told = dict(found.tell())
        told["language"] = told["language"] or options.language
        wave, rate = found.hear()
    except (InputError, OSError, ValueError, RecursionError) as error:
        return Problem(found.source, "corrupt", str(error))
    split = _split(found, told, options)
    if isinstance(split, Problem):
        return split
    pieces = silence.cut(wave, rate, options.cut)
    whole = pieces == [(0, len(wave))]
    made = []
    for number, (first, end) in enumerate(pieces):
        source = found.source if whole else f"{found.source}#{number}"
        about = clips.About(source, **(told if whole else told | {"text": ""}))
        made.append((about, clips.pack(wave[first:end], rate)))
    return (split, made) if made else Problem(found.source, "silent", "nothing is louder than its pauses")


def _split(found: Sound, told: Mapping[str, str], options) -> str | Problem:
    key = {"text": voices.said(told["text"]), "speaker": told["speaker"]}.get(options.split) or found.source
    return collected.split_of(found.source, found.folder, key, options)


def _refuse_damage(root: pathlib.Path, heard: int, problems: Sequence[Problem], limit: float) -> None:
    first = "; ".join(f"{one.source}: {one.reason} {one.detail}".strip() for one in problems[:3])
    if not heard:
        raise InputError(f"data in {str(root)!r}: no usable recording ({', '.join(audio_files.ENDINGS)}){'; ' * bool(first)}{first}")
    if len(problems) > limit * (heard + len(problems)):
        raise InputError(f"data in {str(root)!r}: {len(problems)} of {heard + len(problems)} recordings cannot be used, more than"
                         f" data.max_corrupt = {limit} allows; the first: {first}")


def _hear(root: pathlib.Path, place: Place, name: str, max_seconds: float) -> tuple[np.ndarray, int]:
    if place.size > max_seconds * _BYTES_A_SECOND:
        raise InputError(f"audio {name}: {place.size} bytes are more than data.max_seconds = {max_seconds:g} s of 32-bit stereo at 48 kHz have")
    return audio_files.decode(place.read(root), name, max_seconds)


def _tell(root: pathlib.Path, place: Place | None, keys: Mapping[str, str], form: str) -> dict[str, str]:
    """Text, language and speaker from a place; '' for what is not there. Raises ValueError if that is no text or JSON."""
    empty = dict.fromkeys(("text", "language", "speaker"), "")
    if place is None:
        return empty
    if place.size > _TEXT_BYTES:
        raise ValueError(f"its transcript has {place.size} bytes, more than {_TEXT_BYTES}")
    text = place.read(root).decode()
    if form == "txt":
        return empty | {"text": text.strip()}
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("the JSON of its transcript is no object")
    return {name: str(values.get(keys[name]) or "").strip() for name in empty}


# ------------------------------------------------------------------------------------------------------------ layouts
def _folder_files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    known = {*audio_files.ENDINGS, ".txt"}
    return (path for path in root.rglob("*") if (path.suffix.lower() in known or path.name == folders.METADATA) and path.is_file())


def _scan_folder(root: pathlib.Path, options: ml_collections.ConfigDict) -> Iterator[Sound | Problem]:
    lines: dict[str, Place] = {}
    if options.transcripts == "jsonl":
        for path in sorted(root.rglob(folders.METADATA)):
            yield from folders.read_metadata(root, path, lines)
    for path in sorted(path for path in _folder_files(root) if path.suffix.lower() in audio_files.ENDINGS):
        source, note = path.relative_to(root).as_posix(), path.with_suffix(".txt")
        words = lines.pop(source, None)
        if options.transcripts == "txt" and note.is_file():
            words = folders.place_of(root, note)
        top, _, below = source.partition("/")
        form = "txt" if options.transcripts == "txt" else "json"
        yield Sound(source, top if below else "", functools.partial(_hear, root, folders.place_of(root, path), source, options.max_seconds),
                    functools.partial(_tell, root, words, options.fields, form))
    for source, place in lines.items():
        yield Problem(source, "no recording", f"{place.file} names it")


def _shards(root: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in root.rglob("*.tar*") if path.is_file())


def _scan_shards(root: pathlib.Path, options: ml_collections.ConfigDict) -> Iterator[Sound | Problem]:
    """A shard that cannot be walked to its end is one problem, whatever it has lost; what comes before is taken."""
    for path in sorted(_shards(root)):
        shard = path.relative_to(root).as_posix()
        members: dict[str, dict[str, Place]] = collections.defaultdict(dict)
        for name, place in webdataset.walk(path, shard):
            if isinstance(place, Problem):
                yield place
                continue
            folder, _, own = name.rpartition("/")
            stem, _, ending = own.partition(".")
            parts = members[f"{folder}/{stem}".lstrip("/")]
            if f".{ending.lower()}" in parts:
                yield Problem(f"{shard}/{name}", "duplicate key", "the shard has another of this name")
            else:
                parts[f".{ending.lower()}"] = place
        top, _, below = shard.partition("/")
        for key, parts in members.items():
            ending = next((one for one in audio_files.ENDINGS if one in parts), None)
            if ending is None:
                yield Problem(f"{shard}/{key}", "no recording", f"it has {', '.join(parts)}")
                continue
            hear = functools.partial(_hear, root, parts[ending], f"{shard}/{key}{ending}", options.max_seconds)
            tell = functools.partial(_tell, root, parts.get(f".{options.transcripts}"), options.fields, options.transcripts)
            yield Sound(f"{shard}/{key}", top if below else "", hear, tell)


def _scan_tfds(root: pathlib.Path, options: ml_collections.ConfigDict) -> Iterator[Sound | Problem]:
    info = root / "dataset_info.json"
    if not info.is_file():
        raise InputError(f"config key data.path: {str(root)!r} has no dataset_info.json; name the version's folder of a data set"
                         " that tfds has prepared with file_format='array_record'")
    for split in [one["name"] for one in json.loads(info.read_text())["splits"]]:
        again = f"prepare the data set in {str(root)!r} again"
        waves = prepared.Records(root, split, f"speech/{split}", (), (), again)
        check_name(options.audio, list(waves.features), "config key data.audio: feature")
        words = prepared.Records(root, split, f"speech/{split}", (), (options.audio,), again)
        for number in range(len(waves)):
            yield Sound(f"{split}/{number}", split, functools.partial(_tfds_wave, waves, number, options),
                        functools.partial(_tfds_about, words, number, options))


def _tfds_wave(records: prepared.Records, number: int, options) -> tuple[np.ndarray, int]:
    wave, name = np.asarray(records[number][options.audio]), f"{records.name}/{number}"
    if wave.ndim != 1:
        raise InputError(f"audio {name}: feature {options.audio!r} has shape {wave.shape}; one channel is read")
    # Integers are 16-bit samples, whatever the width of the feature.
    wave = wave.astype(np.float32) / (1 if wave.dtype.kind == "f" else 32768)
    return audio_files.check(wave, options.rate, name, options.max_seconds)


def _tfds_about(records: prepared.Records, number: int, options) -> dict[str, str]:
    record = records[number]
    names = options.fields if options.transcripts == "feature" else {}
    return {name: str(record.get(names.get(name), "")).strip() for name in ("text", "language", "speaker")}


SETS = {one.name: one for one in (
    AudioSet("audio_folder", ("txt", "jsonl", "none"), _folder_files, _scan_folder),
    AudioSet("audio_webdataset", ("txt", "json", "none"), _shards, _scan_shards),
    AudioSet("audio_tfds", ("feature", "none"), lambda root: root.iterdir(), _scan_tfds),
)}
