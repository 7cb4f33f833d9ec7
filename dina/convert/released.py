"""A folder of safetensors shards with an index, as model hubs store checkpoints: read tensor by tensor, written tensor by tensor.

Tensors are read one at a time or in blocks of rows, so a process holds little more than the tensor at hand. They are read
into memory and not mapped: a fresh mapping costs a fault every few pages (measured: 1.2 against 7.4 GB/s). The image detokenizers stand beside the index
in a file of their own, which is one more shard here.
Source of the layout: reference/backbone.md §1.5, tokenizers.md section 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import shutil
import struct

import ml_dtypes
import numpy as np
import safetensors

from dina.config import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What no index names: file -> how its tensors' names begin.
APART = {"image_decoder/image_decoder.safetensors": ("image_decoder.", "image_refiner.", "visual_model.")}
BLOCK_BYTES = 64 * 2**20  # compared at once
FLOATS = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# What tensors that are only carried along may be besides (buffers of the tokenizers).
DTYPES = FLOATS | {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
                   "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is and what it is; `dtype` is the file's own name of it, `offset` the place of its first byte there."""

    name: str
    shard: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0

    @property
    def numpy_dtype(self) -> np.dtype:
        """Raises InputError for a type that arrays do not have here."""
        if self.dtype not in DTYPES:
            raise InputError(f"{self.shard}: tensor {self.name} has dtype {self.dtype}; known: {', '.join(DTYPES)}")
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize


class Released:
    """A checkpoint folder.

    Raises InputError naming the file (and tensor): no index, an index that is no index, a missing or truncated shard, a
    tensor that the index names and its shard lacks, one that a shard holds and the index lacks, or one in two files.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        beside = [name for name in APART if (folder / name).exists()]
        listed = _index(folder, bool(beside))
        for name in beside:
            own = dict.fromkeys(_names(folder / name), name)
            twice = sorted(listed.keys() & own)
            if twice:
                raise InputError(f"{folder}: tensor {twice[0]} is in {listed[twice[0]]} and in {name}")
            listed |= own
        self.shards = tuple(sorted(set(listed.values())))
        self.tensors: dict[str, Tensor] = {}
        for shard in self.shards:
            if not (folder / shard).exists():
                raise InputError(f"{folder / shard} is missing, although {INDEX} names it")
            self.tensors |= {tensor.name: tensor for tensor in _listed(folder, shard)}
        for name, shard in listed.items():
            if name not in self.tensors or self.tensors[name].shard != shard:
                raise InputError(f"{folder / shard}: lacks tensor {name}, which {INDEX} places there")
        unlisted = sorted(set(self.tensors) - set(listed))
        if unlisted:
            first = self.tensors[unlisted[0]]
            raise InputError(f"{folder / first.shard}: holds tensor {first.name}, which {INDEX} does not list ({len(unlisted)} such)")

    def in_shard(self, shard: str) -> list[Tensor]:
        """Its tensors."""
        return [tensor for tensor in self.tensors.values() if tensor.shard == shard]

    def read(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """One tensor, or its rows from `first` to before `last`. Raises InputError for an unknown name or a file cut short."""
        if name not in self.tensors:
            raise InputError(f"{self.folder}: no tensor {name}")
        tensor = self.tensors[name]
        shape, offset, path = tensor.shape, tensor.offset, self.folder / tensor.shard
        if shape and (first or last is not None):
            shape = (len(range(*slice(first, last).indices(shape[0]))), *shape[1:])
            offset += first * (tensor.nbytes // max(1, tensor.shape[0]))
        out = np.empty(shape, tensor.numpy_dtype)
        into = memoryview(out.reshape(-1).view(np.uint8))
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(into):
                count = file.readinto(into[done:])
                if not count:
                    raise InputError(f"{path} ends within tensor {name}: it changed while it was read")
                done += count
        return out

    def config(self) -> dict:
        """Its config.json. Raises InputError if that is missing or no JSON."""
        return self.read_json("config.json")

    def read_json(self, name: str) -> dict:
        """One of its JSON files. Raises InputError if that is missing or no JSON."""
        return _json(self.folder / name)


def same_bits(one: Released, name: str, two: Released, other: str) -> bool:
    """Whether two tensors of one shape and type are equal as bytes (a NaN equals itself), read in blocks of the first axis."""
    tensor = one.tensors[name]
    if not tensor.shape:
        return one.read(name).tobytes() == two.read(other).tobytes()
    rows = max(1, BLOCK_BYTES * tensor.shape[0] // max(1, tensor.nbytes))
    blocks = ((start, start + rows) for start in range(0, tensor.shape[0], rows))
    return all(one.read(name, *block).tobytes() == two.read(other, *block).tobytes() for block in blocks)


def _json(path: pathlib.Path) -> dict:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no JSON ({error})") from None


def _index(folder: pathlib.Path, others: bool) -> dict[str, str]:
    """Tensor name -> shard; with `others`, files without an index, there may be none."""
    if (folder / INDEX).exists():
        listed = _json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InputError(f"{folder / INDEX} has no weight_map")
        return listed
    if not (folder / SINGLE).exists():
        if others:
            return {}
        raise InputError(f"{folder} holds neither {INDEX} nor {SINGLE}")
    return dict.fromkeys(_names(folder / SINGLE), SINGLE)


def _names(path: pathlib.Path) -> list[str]:
    return [tensor.name for tensor in _listed(path.parent, path.name)]


def _listed(folder: pathlib.Path, shard: str) -> list[Tensor]:
    """The tensors of one file, by its header; safetensors checks that the header and the file's length agree."""
    path = folder / shard
    try:
        with safetensors.safe_open(path, "numpy"), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except Exception as error:  # the reader's own error type, or what the system says
        raise InputError(f"{path} is truncated or no safetensors file ({error})") from None
    return [Tensor(name, shard, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
            for name, entry in header.items() if name != "__metadata__"]  # fmt: skip


def apart(name: str) -> str:
    """The file without an index that a tensor of this name stands in; '' for any other tensor."""
    return next((file for file, starts in APART.items() if name.startswith(starts)), "")


class Writer:
    """Writes a checkpoint folder shard by shard; nothing but the tensor at hand is in memory.

    Everything is written to `<folder>.part`, which becomes the folder when it is whole; what an interrupted writer left there
    is deleted.

    Args:
        folder: must not exist, or be empty.
        tensors: name -> (shape, dtype as numpy has it), in the order in which `add` will give them: those of a file of
            `APART` beside each other.
        shard_bytes: a shard is closed before it grows beyond this.
    """

    def __init__(self, folder: pathlib.Path, tensors: dict[str, tuple[tuple[int, ...], np.dtype]], shard_bytes: int):
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; choose another folder")
        self.final, self.folder, self.tensors = folder, folder.with_name(folder.name + ".part"), tensors
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.groups = _group(tensors, shard_bytes)
        self._opens = {group[0]: i for i, group in enumerate(self.groups)}
        self._file, self._left, self._number, self._done = None, [], 0, set()

    def shard_name(self, number: int) -> str:
        """File name of shard `number`, from 0."""
        own = [i for i, group in enumerate(self.groups) if not apart(group[0])]
        return apart(self.groups[number][0]) or f"model-{own.index(number) + 1:05d}-of-{len(own):05d}.safetensors"

    def add(self, name: str, array: np.ndarray) -> None:
        """The next tensor. Raises ValueError if it is not the expected one or has another shape or dtype."""
        if not self._left:
            self._number = self._opens[name]
            self._left = list(self.groups[self._number])
            path = self.folder / self.shard_name(self._number)
            path.parent.mkdir(exist_ok=True)
            self._file = path.open("wb")
            self._file.write(_header({n: self.tensors[n] for n in self._left}))
        shape, dtype = self.tensors[name]
        if self._left[0] != name or tuple(array.shape) != tuple(shape) or array.dtype != dtype:
            raise ValueError(f"expected {self._left[0]} {shape} {dtype}, got {name} {array.shape} {array.dtype}")
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._left.pop(0)
        if not self._left:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._done.add(self._number)

    def finish(self) -> None:
        """Writes the index and gives the folder its name. Raises ValueError if tensors are missing."""
        missing = [group[0] for i, group in enumerate(self.groups) if i not in self._done]
        if missing:
            raise ValueError(f"{len(missing)} shards were not written, first that of {missing[0]}")
        listed = {name: self.shard_name(i) for i, group in enumerate(self.groups) for name in group if not apart(name)}
        total = sum(math.prod(self.tensors[name][0]) * self.tensors[name][1].itemsize for name in listed)
        if listed:
            (self.folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": listed}, indent=1))
        if self.final.exists():
            self.final.rmdir()
        self.folder.rename(self.final)


def _group(tensors: dict[str, tuple[tuple[int, ...], np.dtype]], limit: int) -> list[list[str]]:
    groups, size = [], 0
    for name, (shape, dtype) in tensors.items():
        nbytes, file = math.prod(shape) * dtype.itemsize, apart(name)
        full = size + nbytes > limit and not file  # a file of its own is one whatever its size
        if not groups or full or file != apart(groups[-1][0]):
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    return groups


def _header(tensors: dict[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """The safetensors header: its length, then names, shapes and offsets as JSON, padded with spaces to 8 bytes."""
    names, offset = {dtype: name for name, dtype in DTYPES.items()}, 0
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # readers of the release ask for it
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
