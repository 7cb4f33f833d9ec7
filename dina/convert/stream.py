"""Released shards straight into an Orbax checkpoint and back, region by region.

A stacked tensor of the full model is tens of gigabytes, so it is never built: Orbax is given placeholders, and a handler
of its own writes each released tensor into its region of the array on disk, one chunk each, shard after shard. What is in
memory is a few tensors at a time.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers

from dina.config import InputError
from dina.convert.plan import Leaf
from dina.convert.released import Released, Tensor
from dina.convert.rules import Piece, join, sources
from dina.optim import flatten, unflatten

BLOCK_BYTES = 64 * 2**20  # a released tensor larger than this is copied in blocks of its first axis
READERS = 2  # threads that read regions and transpose them
STRIP = 32  # values of the last axis
IN_FLIGHT = 12  # regions being read or written at once


@dataclasses.dataclass(frozen=True)
class Placeholder:
    """An array that the handler writes itself."""

    leaf: Leaf
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return self.leaf.shape

    @property
    def nbytes(self) -> int:
        """Of the whole array; Orbax budgets its own memory by it, which the stream does not use."""
        return 0

    @property
    def chunk(self) -> tuple[int, ...]:
        """One released tensor, or a block of it, is one chunk, so that no write has to read first."""
        piece = self.leaf.pieces[0]
        lead = (1,) * len(piece.index)
        own = self.shape[len(lead) :]
        if not own:
            return lead
        rows = _block_rows(own, self.dtype)
        # Even blocks: the last one is stored in full as well.
        return (*lead, -(-own[0] // -(-own[0] // min(rows, own[0]))), *own[1:])


def _block_rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))


class _Handler(type_handlers.NumpyHandler):
    """Writes placeholders; reads like a NumPy array."""

    def __init__(self, checkpoint: Released):
        super().__init__()
        self.checkpoint = checkpoint

    async def serialize(self, values, infos, args=None):
        args = args or [type_handlers.SaveArgs()] * len(values)
        work = self._background_serialize(values, infos, args)
        return [ocp.future.CommitFutureAwaitingContractedSignals(work, name="released")]

    async def _background_serialize(self, values, infos, args=None):
        stores = await asyncio.gather(*map(_created, values, infos, args))
        targets: dict[str, list[tuple[Piece, Any, Placeholder]]] = {}
        for value, store in zip(values, stores, strict=True):
            for piece in sources(value.leaf.pieces):
                targets.setdefault(piece.name, []).append((piece, store, value))
        pending: list[asyncio.Task] = []
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            try:
                for tensor in (tensor for shard in self.checkpoint.shards for tensor in self.checkpoint.in_shard(shard)):
                    for piece, store, value in targets.get(tensor.name, ()):
                        for region, content in _regions(piece, value, tensor, self.checkpoint):
                            pending.append(asyncio.create_task(_put(pool, store[region], content)))
                            if len(pending) >= IN_FLIGHT:
                                await pending.pop(0)
                await asyncio.gather(*pending)
            finally:  # after an error none may go on writing into a folder that is being removed
                await asyncio.gather(*pending, return_exceptions=True)
        for value, store in zip(values, stores, strict=True):
            for region in _untouched(value):
                await store[region].write(np.zeros(store[region].shape, value.dtype))


async def _put(pool: concurrent.futures.Executor, region: Any, content: Callable[[], np.ndarray]) -> None:
    """Makes a region's content beside others, which reads it from the shard and may transpose it, and writes it."""
    await region.write(await asyncio.get_running_loop().run_in_executor(pool, content))


async def _created(value: Placeholder, info, arg):
    """The array on disk."""
    await info.await_path_creation()
    spec = type_handlers.get_json_tspec_write(
        info, use_ocdbt=info.is_ocdbt_checkpoint, global_shape=value.shape, local_shape=value.chunk, dtype=value.dtype,
        process_index=0 if info.is_ocdbt_checkpoint else None, arg=arg,
    )  # fmt: skip
    return await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)


def _untouched(value: Placeholder) -> list[tuple[slice, ...]]:
    """Chunks that hold padding only: a chunk that was never written reads as an error."""
    touched = np.zeros([-(-n // c) for n, c in zip(value.shape, value.chunk, strict=True)], bool)
    for piece in value.leaf.pieces:
        whole = [slice(i, i + 1) if isinstance(i, int) else i for i in piece.slices]
        touched[tuple(slice(s.start // c, -(-s.stop // c)) for s, c in zip(whole, value.chunk, strict=True))] = True
    return [tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(at, value.chunk, value.shape, strict=True))
            for at in np.argwhere(~touched).tolist()]


def _regions(piece: Piece, value: Placeholder, tensor: Tensor, checkpoint: Released) -> Iterator[tuple[tuple, Callable[[], np.ndarray]]]:
    """(region of ours, what makes its content) of one released tensor or its part; large ones in the blocks that ours is chunked in."""
    rows = value.chunk[len(piece.index)] if tensor.shape else 0
    first, last = piece.part or (0, tensor.shape[0] if tensor.shape else 0)
    if not _same_layout(piece) or piece.start % max(rows, 1) or last - first <= rows:
        yield piece.slices, lambda: in_order(piece.arrange(checkpoint.read(tensor.name, *(piece.part or ()))))
        return
    for start in range(first, last, rows):
        stop = min(start + rows, last)
        at = piece.start + start - first
        yield (*piece.index, slice(at, at + stop - start)), functools.partial(checkpoint.read, tensor.name, start, stop)


def in_order(view: np.ndarray) -> np.ndarray:
    """`view` in C order, copied where it is not.

    Strip by strip, as integers: NumPy transposes [32768, 3072] in bfloat16 at 0.15 GB/s, so at 0.76.
    """
    if view.flags.c_contiguous or not view.ndim:
        return view
    bits = view.view(f"u{view.itemsize}")
    out = np.empty(bits.shape, bits.dtype)
    for start in range(0, out.shape[-1], STRIP):
        out[..., start : start + STRIP] = bits[..., start : start + STRIP]
    return out.view(view.dtype)


def _same_layout(piece: Piece) -> bool:
    left, right = (side.split() for side in piece.axes.split("->"))
    return bool(left) and left == right


def write(folder: pathlib.Path, checkpoint: Released, leaves: Mapping[str, Leaf], fresh: Mapping[str, np.ndarray]) -> None:
    """Saves all leaves as the Orbax tree {'params': …, 'stats': …, 'carried': …}; atomic as any Orbax save.

    `fresh`: further arrays by path.
    """
    tree = {path: Placeholder(leaf, checkpoint.tensors[leaf.pieces[0].name].numpy_dtype) for path, leaf in leaves.items()}
    # Orbax keeps its array metadata only if it knows how to write a jax.Array, though there is none here.
    registry = type_handlers.create_type_handler_registry(
        (Placeholder, _Handler(checkpoint)), (np.ndarray, type_handlers.NumpyHandler()), (jax.Array, type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with ocp.Checkpointer(handler) as writer:
        writer.save(folder.absolute(), args=ocp.args.PyTreeSave(unflatten(tree | dict(fresh))), force=True)


class Stored:
    """Arrays of an Orbax checkpoint, opened but not read. Raises InputError if there is none at `folder`."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.absolute()
        if not (self.folder / "_METADATA").exists():
            raise InputError(f"{folder} is no finished checkpoint")
        with ocp.StandardCheckpointer() as reader:
            tree = reader.metadata(self.folder).item_metadata.tree
        self.shapes = {path: (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in flatten(tree).items()}
        self._ocdbt = type_handlers.is_ocdbt_checkpoint(self.folder)
        self._context = type_handlers.get_ts_context(use_ocdbt=self._ocdbt)
        self._open: dict[str, Any] = {}

    def region(self, path: str, index: tuple) -> np.ndarray:
        """One region of one array."""
        if path not in self._open:
            name = path.replace("/", ".")
            info = type_handlers.ParamInfo(name=name, parent_dir=epath.Path(self.folder), is_ocdbt_checkpoint=self._ocdbt, ts_context=self._context)
            spec = type_handlers.get_json_tspec_read(info, use_ocdbt=self._ocdbt)
            self._open[path] = ts.open(ts.Spec(spec), open=True, context=self._context).result()
        return self._open[path][index].read().result()


def released_tensor(stored: Mapping[str, Stored], pieces: list[Piece]) -> np.ndarray:
    """One released tensor from all its pieces; `stored`: path of ours -> where that is read."""
    return in_order(join(pieces, lambda piece: stored[piece.path].region(piece.path, piece.slices)))
