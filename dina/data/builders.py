"""tfds builders of the embedded default data set: images, speech and text as ArrayRecord, without TensorFlow.

The builders only name fields and splits; canvases.py, spoken.py and corpus.py make the records. Waves are stored as
bytes (`Encoding.BYTES`): as integer lists a record takes six times longer to write.

`python -m dina.data.builders KIND DIR`, with the data config as JSON on its standard input, makes one kind and prints
what it made as JSON: digits.py runs one such process per kind.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable
from typing import Any

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from dina.config import run_main
from dina.data import canvases, corpus, mnist, spoken


class _Records(tfds.core.GeneratorBasedBuilder):
    """Common part: `data` is the data config; records keep the order in which they are made."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS: tuple[str, ...] = ()
    # Nothing is downloaded. The inherited property would look for a checksum file through importlib_resources, which
    # tfds 4.9.10 imports without depending on it.
    url_infos: dict[str, Any] = {}

    def __init__(self, *, data: ml_collections.ConfigDict, **options: Any) -> None:
        self.data = data
        self.dropped: list[str] = []
        super().__init__(file_format="array_record", **options)

    def _features(self) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} must define _features")

    def _records(self, split: str) -> Iterable[dict[str, Any]]:
        raise TypeError(f"{type(self).__name__} must define _records")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self._features()),
                                     disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split: str):
        yield from enumerate(self._records(split))


class DigitImages(_Records):
    """Digits on canvases: image, digit, source, size, top, left, aligned, split."""

    SPLITS = mnist.SPLITS

    def _features(self):
        numbers = ("digit", "source", "size", "top", "left", "aligned")
        return {"image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "split": tfds.features.Text(), **{name: tfds.features.Scalar(np.int32) for name in numbers}}

    def _records(self, split):
        return canvases.records(self.data, split)


class SpokenWords(_Records):
    """Single words at 16 and 24 kHz, 16-bit, with their speaker."""

    SPLITS = spoken.SPLITS

    def _features(self):
        wave = tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding=tfds.features.Encoding.BYTES)
        return {"audio16": wave, "audio24": wave, "word": tfds.features.Text(), "voice": tfds.features.Text(),
                **{name: tfds.features.Scalar(np.int32) for name in ("digit", "pitch", "rate")}}

    def _records(self, split):
        return spoken.records(self.data, split, self.dropped)


class PlainText(_Records):
    """Records of prose."""

    SPLITS = corpus.SPLITS

    def _features(self):
        return {"text": tfds.features.Text()}

    def _records(self, split):
        return corpus.records(self.data, split)


class CaptionedImages(_Records):
    """Pictures with captions: image, caption, source, native, split. Args: rows: split -> records."""

    def __init__(self, *, rows: dict[str, list[dict[str, Any]]], **options: Any) -> None:
        self.rows, self.SPLITS = rows, tuple(rows)
        super().__init__(data=ml_collections.ConfigDict(), **options)

    def _features(self):
        return {"image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                **{name: tfds.features.Text() for name in ("caption", "source", "split")},
                "native": tfds.features.Scalar(np.int32)}

    def _records(self, split):
        return self.rows[split]


BUILDERS = {"images": DigitImages, "speech": SpokenWords, "text": PlainText}


def build(kind: str, data: ml_collections.ConfigDict, folder: str) -> dict[str, Any]:
    """Makes all records of a kind.

    Returns:
        {'counts': {split: records}, 'dropped': [clip left out, ...], 'seconds': of work}.
    """
    start = time.perf_counter()
    builder = BUILDERS[kind](data=data, data_dir=folder)
    builder.download_and_prepare()
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    return {"counts": counts, "dropped": builder.dropped, "seconds": round(time.perf_counter() - start, 1)}


def write_captioned(rows: dict[str, list[dict[str, Any]]], folder: str) -> None:
    """Writes captioned pictures, split -> records, into a folder; `image` is the bytes of a PNG in a BytesIO."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):  # it announces a download; there is none
        CaptionedImages(rows=rows, data_dir=folder).download_and_prepare()


def main(argv: list[str]) -> None:
    """Command line."""
    kind, folder = argv
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):  # it announces a download; there is none
        made = build(kind, ml_collections.ConfigDict(json.load(sys.stdin)), folder)
    print(json.dumps(made))


if __name__ == "__main__":
    run_main(main)
