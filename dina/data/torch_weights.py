"""Tensors out of PyTorch weight files, without PyTorch and without running anything that the file says.

Both formats are read: the zip archive of `torch.save` since 1.6 and the older one, a row of pickles with raw bytes
behind them. A pickle may call anything that it can name; here it can name the few functions that put tensors together,
each a stand-in of this file, and every other name is refused before it is looked up.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pathlib
import pickle
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from dina.config import InputError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_TYPES = {
    "FloatStorage": np.dtype("<f4"), "DoubleStorage": np.dtype("<f8"), "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("<i1"), "ByteStorage": np.dtype("<u1"),
    "BoolStorage": np.dtype("?"),
}  # fmt: skip
# What damaged or hostile bytes make pickle, struct and zipfile raise.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError, OverflowError,
    RecursionError, MemoryError, ImportError, struct.error, zipfile.BadZipFile, NotImplementedError, RuntimeError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int  # values


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Knows ordered dicts, tensors and storages; tensors stay descriptions, their bytes may come later in the file."""

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        # Made anew for each file: a pickle may set attributes on what it names.
        tensor = lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, tuple(shape), tuple(strides))
        parameter = lambda data, *_: data
        self.known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): parameter,
        }

    def find_class(self, module, name):
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a tensor")
        return self.known[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _, size, *view = pid
        if kind != "storage" or any(part is not None for part in view) or not isinstance(dtype, np.dtype) or size < 0:
            raise pickle.UnpicklingError(f"unknown reference {pid!r}")
        return _Storage(str(key), dtype, int(size))


def read(path: str | pathlib.Path) -> Any:
    """The tree of a PyTorch weight file with numpy arrays in the place of tensors.

    Args:
        path: a file of `torch.save` (.pth, .pt, .bin) that holds tensors, plain values, lists and dicts.

    Returns:
        What was saved, usually {name: array}.

    Raises:
        InputError: no such file, not such a file, truncated, or a pickle that names anything but tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weight file")
    try:
        return (_read_zip if zipfile.is_zipfile(path) else _read_legacy)(path)
    except _DAMAGE as error:
        raise InputError(f"{path}: not a PyTorch weight file, damaged, or unsafe ({error}); fetch it again") from None


def _read_zip(path: pathlib.Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("the archive holds no single data.pkl")
        root = names[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("big-endian values")
        tree = _Unpickler(io.BytesIO(archive.read(names[0]))).load()
        return _filled(tree, _Lazy(lambda key: archive.read(f"{root}data/{key}")))


def _read_legacy(path: pathlib.Path) -> Any:
    with path.open("rb") as file:
        load = lambda: _Unpickler(file).load()
        if load() != _MAGIC or load() != _PROTOCOL or not load().get("little_endian"):
            raise ValueError("no legacy header")
        tree, keys, found = load(), load(), {}
        sizes = {storage.key: storage for storage in _storages(tree)}
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            if count != sizes[str(key)].size:
                raise ValueError(f"storage {key} has {count} values, its tensors say {sizes[str(key)].size}")
            length = count * sizes[str(key)].dtype.itemsize
            if length > path.stat().st_size:
                raise ValueError(f"storage {key} is larger than the file")
            found[str(key)] = file.read(length)
        return _filled(tree, found)


class _Lazy(dict):
    """A dict that fetches what it lacks."""

    def __init__(self, fetch):
        super().__init__()
        self.fetch = fetch

    def __missing__(self, key):
        self[key] = self.fetch(key)
        return self[key]


def _storages(tree: Any) -> list[_Storage]:
    if isinstance(tree, _Tensor):
        return [tree.storage]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [storage for part in parts for storage in _storages(part)]


def _filled(tree: Any, data) -> Any:
    if isinstance(tree, dict):
        return {key: _filled(value, data) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_filled(value, data) for value in tree)
    return _array(tree, data[tree.storage.key]) if isinstance(tree, _Tensor) else tree


def _array(tensor: _Tensor, data: bytes) -> np.ndarray:
    """The tensor's values, copied; one that reaches outside its storage, or repeats it (`expand`), is refused."""
    storage, (shape, strides) = tensor.storage, (tensor.shape, tensor.strides)
    whole = np.frombuffer(data, storage.dtype)
    if len(whole) != storage.size:
        raise ValueError(f"storage {storage.key} holds {len(whole)} values of {storage.size}: truncated?")
    if len(shape) != len(strides) or min((tensor.offset, *shape, *strides)) < 0 or math.prod(shape) > len(whole):
        raise ValueError(f"a tensor of shape {shape} and strides {strides} over {len(whole)} values")
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
    if math.prod(shape) and last >= len(whole):
        raise ValueError(f"a tensor of shape {shape} reaches outside its {len(whole)} values")
    steps = [stride * storage.dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(whole[tensor.offset :], shape, steps).copy()
