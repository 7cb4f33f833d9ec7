"""Prepared speech: clips of one channel, kept as FLAC at 24 kHz and read at 16 and 24 kHz.

A folder holds, per split, `SPLIT.array_record` (one FLAC file a record, 16 bit) and `SPLIT.jsonl` (its text and origin, in the
same order): lossless, about 0.6 of the samples' bytes, random access, and some 1,300 times faster to read than to hear.
What kinds of recordings come in is the business of recordings.py and audio_sets.py.

Legend: N samples.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from jaxtyping import Float

from dina.config import InputError
from dina.data import audio_files

RATE_16, RATE_24 = 16_000, 24_000
SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class About:
    """What is known of a clip.

    Attributes:
        source: its unique name.
        text: transcript, '' if unknown.
        language: two-letter code, maybe with a country, '' if unknown.
        speaker: a name that two speakers do not share, '' if unknown.
        picture: name of the picture that the text describes (`source` of the picture's record), '' if there is none.
    """

    source: str
    text: str = ""
    language: str = ""
    speaker: str = ""
    picture: str = ""


def pack(wave_N: Float[np.ndarray, "N"], rate: int) -> tuple[bytes, dict[str, int]]:
    """(FLAC at 24 kHz, lengths at both rates) of a checked wave."""
    import soundfile

    wave24 = audio_files.to_int16(audio_files.resample(wave_N, rate, RATE_24))
    out = io.BytesIO()
    soundfile.write(out, wave24, RATE_24, format="FLAC", subtype="PCM_16")
    return out.getvalue(), {"samples16": len(_to_16(wave24)), "samples24": len(wave24)}


def _to_16(wave24: np.ndarray) -> np.ndarray:
    return audio_files.to_int16(audio_files.resample(wave24.astype(np.float32) / 32767, RATE_24, RATE_16))


class Writer:
    """Fills a folder with clips; use as a context.

    Attributes:
        seconds: (split, language) -> [clips, seconds] so far.
    """

    def __init__(self, folder: pathlib.Path, splits: Sequence[str] = SPLITS):
        self._folder, self.seconds = folder, {}
        self._waves = {s: array_record_module.ArrayRecordWriter(str(_waves(folder, s)), "group_size:1,uncompressed") for s in splits}
        self._notes = {s: _notes(folder, s).open("w", encoding="utf-8") for s in splits}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error) -> None:
        for writer in (*self._waves.values(), *self._notes.values()):
            writer.close()

    def add(self, split: str, about: About, packed: tuple[bytes, dict[str, int]]) -> None:
        """One clip, from `pack`."""
        data, lengths = packed
        self._waves[split].write(data)
        self._notes[split].write(json.dumps(dataclasses.asdict(about) | lengths, ensure_ascii=False) + "\n")
        count = self.seconds.setdefault((split, about.language), [0, 0.0])
        count[0], count[1] = count[0] + 1, count[1] + lengths["samples24"] / RATE_24

    def counts(self) -> dict[str, Any]:
        """For a manifest: `counts` split -> clips, `minutes` split -> language -> minutes, `clips` likewise."""
        table: dict[str, Any] = {"counts": dict.fromkeys(self._waves, 0), "clips": {}, "minutes": {}}
        for (split, language), (count, seconds) in sorted(self.seconds.items()):
            table["counts"][split] += count
            table["clips"].setdefault(split, {})[language] = count
            table["minutes"].setdefault(split, {})[language] = round(seconds / 60, 2)
        return table


def _waves(folder: pathlib.Path, split: str) -> pathlib.Path:
    return folder / f"{split}.array_record"


def _notes(folder: pathlib.Path, split: str) -> pathlib.Path:
    return folder / f"{split}.jsonl"


class Clips:
    """One split: `clips[i] -> dict` with audio16 and audio24 (int16), the fields of `About`, and split.

    Attributes:
        notes: per clip its fields, samples16 and samples24, without reading any sound.

    Args:
        folder: filled by `Writer`.
        split: one of its splits.
        skip: 'audio16' or 'audio24' to leave out.

    Raises:
        InputError: there is no such split, it is empty, or its two files do not belong together.
    """

    def __init__(self, folder: pathlib.Path, split: str, skip: Sequence[str] = ()):
        if not _notes(folder, split).is_file():
            there = ", ".join(sorted(path.stem for path in folder.glob("*.jsonl")))
            raise InputError(f"data split {split!r} of speech: must be one of {there}")
        with _notes(folder, split).open(encoding="utf-8") as file:
            self.notes = [json.loads(line) for line in file]
        if not self.notes:
            raise InputError(f"data split {split!r} of speech has no clips in {str(folder)!r}; see config key data.shares")
        self._path, self._split, self._skip = _waves(folder, split), split, set(skip)
        self._source = array_record_data_source.ArrayRecordDataSource([str(self._path)])
        if len(self._source) != len(self.notes):
            raise InputError(f"{self._path} has {len(self._source)} clips, its .jsonl {len(self.notes)}:"
                             " delete the folder and prepare it again")

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import soundfile

        record = {name: value for name, value in self.notes[index].items() if not name.startswith("samples")}
        try:
            wave24, _ = soundfile.read(io.BytesIO(self._source[int(index)]), dtype="int16")
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"data: clip {index} of {self._path} cannot be read ({error}); delete the folder and prepare it"
                             " again") from None
        if "audio16" not in self._skip:
            record["audio16"] = _to_16(wave24)
        if "audio24" not in self._skip:
            record["audio24"] = wave24
        return record | {"split": self._split}
