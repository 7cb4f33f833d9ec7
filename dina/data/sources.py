"""Reading: index-addressable records of the experiment's data set, and audio files that a user names.

A record is read and decoded on demand, through a random-access source that grain takes as it is;
`load_all` keeps decoded columns in memory, which is what a laptop wants. Legend: N samples.
"""

from __future__ import annotations

import pathlib
import typing
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Float

from dina.config import InputError, check_name
from dina.data import audio_sets, digits, folders, recordings, stamps, tfds_sets, webdataset

MIN_SAMPLES = 400  # one analysis window of the mel features at 16 kHz
_COLUMNS: dict[tuple[str, str, str], dict[str, Any]] = {}  # what `load_all` has read in this process
_SILENCE = 1e-4  # peak below which a 16-bit file holds at most its last three units of noise


class Opened(typing.Protocol):
    """Records of a kind and split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class DataSet(typing.Protocol):
    """What a data set is, be it a module or an object; `sources` is the way to it for all others.

    `cache_path` is the folder of `prepare`, made or not, and its name tells the content; `prepare` does nothing if it is
    there; `open_records` raises InputError if it is not, or there is no such split. One whose records hold text also has
    `open_tokenizer(config, specials, data_dir)`, for language stages.
    """

    KINDS: tuple[str, ...]

    def cache_path(self, config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path: ...

    def prepare(self, config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path: ...

    def open_records(self, config: ml_collections.ConfigDict, kind: str, split: str,
                     data_dir: pathlib.Path | str | None = None, skip: Sequence[str] = ()) -> Opened: ...


SETS: dict[str, DataSet] = {"digits": digits, "stamps": stamps, "folder": folders.DATA_SET,
                            "webdataset": webdataset.DATA_SET, "tfds": tfds_sets, "recordings": recordings,
                            **audio_sets.SETS}


def data_set(config: ml_collections.ConfigDict) -> DataSet:
    """The experiment's data set, by config key data.name; a config without it is of the digits.

    Raises:
        InputError: there is no such data set.
    """
    name = config.data.get("name", "digits")
    check_name(name, SETS, "data set")
    return SETS[name]


def prepare(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """Makes the records of the experiment's data set unless they are there; returns their folder."""
    return data_set(config).prepare(config, data_dir)


def cache_path(config: ml_collections.ConfigDict, data_dir: pathlib.Path | str | None = None) -> pathlib.Path:
    """The folder of `prepare`, made or not; its name tells the content."""
    return data_set(config).cache_path(config, data_dir)


def open_tokenizer(config: ml_collections.ConfigDict, specials=(), data_dir: pathlib.Path | str | None = None):
    """The text tokenizer that goes with the experiment's data set; `specials` as for `TextTokenizer`.

    Raises:
        InputError: the records are not prepared, or the data set has no text to learn words from.
    """
    found = data_set(config)
    if not hasattr(found, "open_tokenizer"):
        able = ", ".join(name for name, one in SETS.items() if hasattr(one, "open_tokenizer"))
        raise InputError(f"config key data.name: {config.data.name!r} has no text tokenizer, which language stages need; those with one: {able}")
    return found.open_tokenizer(config, specials, data_dir)


class Source:
    """Records of one kind and split: `len(source)`, `source[i] -> dict` of numpy arrays, ints and str.

    Args:
        config: the whole experiment.
        kind: 'images', 'speech' or 'text'; not every data set has all.
        split: 'train', 'valid', 'test', and what else the data set has: 'judge' for the digits' speech, 'photos' for stamps.
        data_dir: as for `prepare`.
        skip: fields to leave undecoded (an image then is its PNG bytes).

    Attributes:
        notes: of clips (clips.py) what is known without hearing them; None for other records.

    Raises:
        InputError: the records are not prepared, or there is no such kind or split.
    """

    def __init__(self, config: ml_collections.ConfigDict, kind: str, split: str,
                 data_dir: pathlib.Path | str | None = None, skip: Sequence[str] = ()) -> None:
        kinds = data_set(config).KINDS
        if kind not in kinds:
            raise InputError(f"data kind {kind!r}: must be one of {', '.join(kinds)}")
        self.name = f"{kind}/{split}"
        self._records = data_set(config).open_records(config, kind, split, data_dir, skip)
        self.notes: list[dict[str, Any]] | None = getattr(self._records, "notes", None)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]


def open_source(config: ml_collections.ConfigDict, kind: str, split: str,
                data_dir: pathlib.Path | str | None = None) -> Source:
    """Opens the records of a kind and split of the prepared data set; see `Source`."""
    return Source(config, kind, split, data_dir)


def load_all(config: ml_collections.ConfigDict, kind: str, split: str,
             data_dir: pathlib.Path | str | None = None) -> dict[str, Any]:
    """Every record of a kind and split as columns, decoded once per process.

    Returns:
        Field -> int32 array for numbers, list of str for text, list of arrays (ragged) for images and waves. Shared
        between callers: arrays are read-only.

    Raises:
        InputError: as `Source`.
    """
    source = Source(config, kind, split, data_dir)
    key = (str(cache_path(config, data_dir)), kind, split)
    if key not in _COLUMNS:
        _COLUMNS[key] = _columns([source[i] for i in range(len(source))])
    return _COLUMNS[key]


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name in rows[0]:
        column = [row[name] for row in rows]
        if isinstance(column[0], int):
            column = np.array(column, np.int32)
        for array in [column] if isinstance(column, np.ndarray) else column:
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        columns[name] = column
    return columns


def read_audio(path: pathlib.Path | str, min_samples: int = MIN_SAMPLES) -> tuple[Float[np.ndarray, "N"], int]:
    """Reads an audio file (WAV, FLAC, OGG, MP3) as one channel.

    Args:
        path: file.
        min_samples: shortest clip accepted.

    Returns:
        float32 wave (mean of the channels) and its rate in Hz.

    Raises:
        InputError: missing, empty, truncated or unknown file; too short; silent; not finite.
    """
    import soundfile

    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"audio file {str(path)!r}: there is no such file")
    if path.stat().st_size == 0:
        raise InputError(f"audio file {str(path)!r}: it is empty (0 bytes)")
    _refuse_truncated_wav(path)
    try:
        with soundfile.SoundFile(path) as file:
            promised, rate = file.frames, file.samplerate
            samples_NC = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise InputError(f"audio file {str(path)!r}: cannot be decoded ({error}); give WAV, FLAC, OGG or MP3") from None
    if len(samples_NC) < promised:
        raise InputError(f"audio file {str(path)!r}: truncated, {len(samples_NC)} of {promised} samples are there")
    if len(samples_NC) < min_samples:
        raise InputError(f"audio file {str(path)!r}: {len(samples_NC)} samples, at least {min_samples} are needed")
    wave_N = samples_NC.mean(1)
    if not np.isfinite(wave_N).all():
        raise InputError(f"audio file {str(path)!r}: sample {int(np.argmin(np.isfinite(wave_N)))} is not finite")
    if np.abs(wave_N).max() < _SILENCE:
        raise InputError(f"audio file {str(path)!r}: silent (peak {np.abs(wave_N).max():.1e})")
    return wave_N, rate


def _refuse_truncated_wav(path: pathlib.Path) -> None:
    """The decoder reads a cut WAV to its end without a word, so the header's size is compared with the file's."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        promised, there = int.from_bytes(head[4:8], "little") + 8, path.stat().st_size
        # 0xFFFFFFFF and 0 stand for 'unknown' in streamed files.
        if there < promised and promised - 8 not in (0, 0xFFFFFFFF):
            raise InputError(f"audio file {str(path)!r}: truncated, {there} of {promised} bytes are there")
