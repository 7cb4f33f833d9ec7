"""Records that tfds holds: the kinds of our own data sets, or what a user names (tfds_sets.py).

Only `data_source` is used: index-addressable, ArrayRecord, without TensorFlow.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from dina.config import InputError
from dina.data import rasters


class Records:
    """One split of a tfds folder: `len(records)`, `records[i] -> dict` of numpy arrays, ints and str.

    Args:
        folder: the folder with `dataset_info.json`.
        split: one of the builder's.
        name: what messages call it, such as 'images/train'.
        images: features that are images: they are decoded here, for the library's way asks for OpenCV first and warns
            that it is not there.
        skip: fields to leave undecoded (an image then is its PNG bytes).
        advice: what to do about a record that cannot be read.

    'valid' is what the builder has as 'validation' if it has no 'valid'.

    Raises:
        InputError: there is no such split.
    """

    def __init__(self, folder: pathlib.Path, split: str, name: str, images: Sequence[str] = ("image",),
                 skip: Sequence[str] = (), advice: str = "delete the folder and prepare it again") -> None:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        if split == "valid" and split not in builder.info.splits and "validation" in builder.info.splits:
            split = "validation"
        if split not in builder.info.splits:
            raise InputError(f"data split {split!r} of {name.split('/')[0]}:"
                             f" must be one of {', '.join(builder.info.splits)}")
        self.name, self.features, self._advice = name, builder.info.features, advice
        images = [image for image in images if image in self.features]
        self._images, self._raw = set(images) - set(skip), set(images)
        decoders = {field: tfds.decode.SkipDecoding() for field in {*skip, *images}}
        self._source = builder.as_data_source(split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._source[int(index)]
            for field in self._images:
                record[field] = rasters.on_white(PIL.Image.open(io.BytesIO(record[field])))
        except (RuntimeError, ValueError, OSError, SyntaxError) as error:
            raise InputError(f"data: record {index} of {self.name} cannot be read ({error}); {self._advice}") from None
        return {field: self._plain(field, value) for field, value in record.items()}

    def _plain(self, field: str, value: Any) -> Any:
        if isinstance(value, bytes) and field not in self._raw:
            return value.decode()
        if isinstance(value, np.integer):
            return int(value)
        return value


def open_folder(root: pathlib.Path, kind: str, split: str, skip: Sequence[str] = ()) -> Records:
    """A kind of one of our data sets, which lies at `root`/kind; raises as `Records`."""
    found = sorted((root / kind).glob("*/*/dataset_info.json"))
    return Records(found[0].parent, split, f"{kind}/{split}", ("image",) if kind == "images" else (), skip)
