"""The mesh, where arrays live on it, and the one place where local code meets it.

Outside, everything is placed explicitly: `jax.make_mesh` gives Explicit axes, state and batches carry NamedShardings
and a wrong placement is a trace-time error. Inside, one `jax.shard_map` runs a task's loss on each device's own
examples (`on_batch_shards`), with parameters gathered on entry; reductions over devices are written where they are
meant (`psum`). The alternative, Explicit axes through every gather, scatter and reshape of the model, needs an
`out_sharding=` on each and leaves expert-parallel exchanges to be written by hand in a `shard_map` anyway.

Mesh axes from least to most communication: replica, data, expert, seq, model (DESIGN §4.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from dina.config import InputError

AXES = ("replica", "data", "expert", "seq", "model")
BATCH_AXES = ("replica", "data", "expert")


def make_mesh(sizes: Mapping[str, int], devices=None) -> jax.sharding.Mesh:
    """Builds the mesh of a config.

    Args:
        sizes: axis name -> size; axes left out have size 1; one size may be -1 (all remaining devices).
        devices: the devices to use, default all.

    Returns:
        A Mesh with all axes of `AXES`, all Explicit.

    Raises:
        InputError: unknown axis, or sizes that do not multiply to the number of devices.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise InputError(f"config.mesh has unknown axes {unknown}; known: {', '.join(AXES)}")
    devices = jax.devices() if devices is None else devices
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if -1 in shape:
        shape[shape.index(-1)] = len(devices) // max(1, math.prod(size for size in shape if size > 0))
    if math.prod(shape) != len(devices):
        raise InputError(f"config.mesh {dict(sizes)} asks for {math.prod(shape)} devices, this job has {len(devices)}")
    return jax.make_mesh(tuple(shape), AXES, devices=devices)


def psum(x, axes: tuple[str, ...]):
    """Sum over mesh axes inside a shard_map; the identity when `axes` is empty."""
    return jax.lax.psum(x, axes) if axes else x


def batch_spec() -> P:
    """Leading dimension split over the batch axes."""
    return P(BATCH_AXES)


def on_batch_shards(fn: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """Wraps `fn(replicated, batch) -> (replicated, batch)` to run on each device's slice of `batch`.

    Args:
        fn: called with gathered (fully local) `replicated` and the local slice of `batch`; the first of what it returns
            must be equal on all devices (psum'd), the second is sliced as the batch is.
        mesh: the mesh that the arrays live on.
    """
    return jax.shard_map(fn, mesh=mesh, in_specs=(P(), P(BATCH_AXES)), out_specs=(P(), P(BATCH_AXES)), check_vma=False)


def storage_spec(shape: tuple[int, ...], mesh: jax.sharding.Mesh, minimum: int = 2**16) -> P:
    """FSDP placement of one array: its largest dimension that divides by `data` is split, small arrays are not."""
    size = mesh.shape["data"]
    if size == 1 or math.prod(shape) < minimum:
        return P()
    for dim in sorted(range(len(shape)), key=lambda d: -shape[d]):
        if shape[dim] % size == 0:
            return P(*[("data" if d == dim else None) for d in range(len(shape))])
    return P()


def place(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
    """Adds storage shardings to a tree of ShapeDtypeStructs."""

    def one(leaf):
        sharding = jax.sharding.NamedSharding(mesh, storage_spec(leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, abstract)


def gathered(tree: Any) -> Any:
    """All leaves replicated on the current mesh (the all-gather of FSDP; its transpose is a reduce-scatter)."""
    return jax.tree.map(lambda x: jax.reshard(x, P()), tree)


def put_batch(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Places a global batch (the same on every process) on the mesh, leading dimension over the batch axes."""
    sharding = jax.sharding.NamedSharding(mesh, batch_spec())
    return {name: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]) for name, x in batch.items()}
