"""Reading: index-addressable records of the prepared data set, and audio files that a user names.

A record is read and decoded on demand through the tfds `data_source` (ArrayRecord), which grain takes as it is;
`load_all` keeps decoded columns in memory, which is what a laptop wants. Legend: N samples.
"""

from __future__ import annotations

import functools
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Float
from PIL import Image

from dina.config import InputError
from dina.data import digits

MIN_SAMPLES = 400  # one analysis window of the mel features at 16 kHz
_COLUMNS: dict[tuple[str, str, str], dict[str, Any]] = {}  # what `load_all` has read in this process
_SILENCE = 1e-4  # peak below which a 16-bit file holds at most its last three units of noise


class Source:
    """Records of one kind and split: `len(source)`, `source[i] -> dict` of numpy arrays, ints and str.

    Args:
        config: the whole experiment.
        kind: 'images', 'speech' or 'text'.
        split: 'train', 'valid', 'test', and for speech 'judge'.
        data_dir: as for `digits.prepare`.
        skip: fields to leave undecoded (an image then is its PNG bytes).

    Raises:
        InputError: the records are not prepared, or there is no such kind or split.
    """

    def __init__(self, config: ml_collections.ConfigDict, kind: str, split: str,
                 data_dir: pathlib.Path | str | None = None, skip: Sequence[str] = ()) -> None:
        if kind not in digits.KINDS:
            raise InputError(f"data kind {kind!r}: must be one of {', '.join(digits.KINDS)}")
        import tensorflow_datasets as tfds

        found = sorted((digits.require(config, data_dir) / kind).glob("*/*/dataset_info.json"))
        builder = tfds.builder_from_directory(found[0].parent)
        if split not in builder.info.splits:
            raise InputError(f"data split {split!r} of {kind}: must be one of {', '.join(builder.info.splits)}")
        self.name = f"{kind}/{split}"
        self._decode_image = kind == "images" and "image" not in skip
        # PNGs are decoded here: the library's way asks for OpenCV first and warns that it is not there.
        raw = {*skip, "image"} if kind == "images" else set(skip)
        self._source = builder.as_data_source(split, decoders={name: tfds.decode.SkipDecoding() for name in raw})

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._source[int(index)]
        except (RuntimeError, ValueError) as error:
            raise InputError(f"data: record {index} of {self.name} cannot be read ({error});"
                             " delete the folder and prepare it again") from None
        if self._decode_image:
            record["image"] = np.array(Image.open(io.BytesIO(record["image"])))
        return {name: _plain(name, value) for name, value in record.items()}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, bytes) and name != "image":
        return value.decode()
    if isinstance(value, np.integer):
        return int(value)
    return value


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
    key = (str(digits.require(config, data_dir)), kind, split)
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
