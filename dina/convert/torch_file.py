"""Writes float32 tensors as `torch.save` does since 1.6, without PyTorch: the counterpart of dina/data/torch_weights.py.

The file is a zip archive of one pickle, which names tensors by their place in storages, and of the storages' bytes.
"""

from __future__ import annotations

import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

DICT, TENSOR, STORAGE = (f"{module}\n{name}\n".encode() for module, name in (
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage")))  # fmt: skip
EMPTY_DICT = pickle.GLOBAL + DICT + pickle.EMPTY_TUPLE + pickle.REDUCE


def write(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Saves {name: array} as a state dict of float32 tensors, one storage each."""
    arrays = {name: np.asarray(array, "<f4", order="C") for name, array in tensors.items()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(arrays))
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def _pickled(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An ordered dict of calls that make the tensors; protocol 2, as torch writes it."""
    parts = [pickle.PROTO, b"\x02", EMPTY_DICT, pickle.MARK]
    for key, (name, array) in enumerate(arrays.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        storage = _tuple(_text("storage"), pickle.GLOBAL + STORAGE, _text(str(key)), _text("cpu"), _number(array.size)) + pickle.BINPERSID
        made = _tuple(storage, _number(0), _numbers(array.shape), _numbers(strides), pickle.NEWFALSE, EMPTY_DICT)
        parts += [_text(name), pickle.GLOBAL, TENSOR, made, pickle.REDUCE]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _text(text: str) -> bytes:
    raw = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def _number(number: int) -> bytes:
    return pickle.BININT + struct.pack("<i", number)


def _numbers(numbers: tuple[int, ...]) -> bytes:
    return _tuple(*map(_number, numbers))
