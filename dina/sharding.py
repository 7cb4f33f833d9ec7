"""The mesh, where arrays live on it, and the one place where local code meets it.

Outside, everything is placed explicitly: `jax.make_mesh` gives Explicit axes, state and batches carry NamedShardings
and a wrong placement is a trace-time error. Inside, one `jax.shard_map` runs a task's loss on each device's own
examples, and parameters come in as the parts that the device stores (`Shard`). Whoever needs a whole one gathers it right
there (`whole`), in the type that it computes in; so the backward pass gathers again where a layer is rematerialised, and
the gradient is reduce-scattered, for that is a gather's transpose. `columns` reads a table without gathering it. Where an
axis has one device nothing is split and nothing is exchanged. The alternative, Explicit axes through every gather, scatter
and reshape of the model, needs an `out_sharding=` on each and leaves expert-parallel exchanges to be written by hand in a
`shard_map` anyway.

Mesh axes from least to most communication: replica, data, expert, seq, model (DESIGN §4.2).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P

from dina.config import InputError

AXES = ("replica", "data", "expert", "seq", "model")
BATCH_AXES = ("replica", "data", "expert")


SPLIT_AXES = ("data", "expert")  # a parameter's parts lie along these; along the others it is the same
MINIMUM = 2**16  # values from which a parameter is split

Splits = tuple[tuple[int, tuple[str, ...]], ...]


class Rule(NamedTuple):
    """How parameters are stored whose path matches `pattern`.

    Attributes:
        stacked: leading dimensions that a loop goes over; they are never split.
        expert: dimension that is split over `expert`, from the end; 0: none.
        only: dimension that is split over what is left of `SPLIT_AXES`, from the end; 0: the largest that divides.
        wire: 'compute' travels in the type that products are made in, 'stored' as it is.
    """

    pattern: str
    stacked: int = 0
    expert: int = 0
    only: int = 0
    wire: str = "compute"


# The first that matches counts.
RULES = (
    Rule("embed/table", only=-1, wire="stored"),  # read by `columns`
    Rule("embed/*", wire="stored"),
    Rule("backbone/layers/experts/router/*", stacked=1, wire="stored"),
    Rule("backbone/layers/experts/*", stacked=1, expert=-3),
    Rule("backbone/layers/*", stacked=1),
    Rule("*"),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shard:
    """This device's part of a parameter, inside a `shard_map`. Dimensions of `splits` count from the end, so that a loop may
    go over the leading one."""

    part: jax.Array
    splits: Splits = dataclasses.field(metadata={"static": True})
    wire: str = dataclasses.field(default="stored", metadata={"static": True})


def make_mesh(sizes: Mapping[str, int], devices=None) -> jax.sharding.Mesh:
    """Builds the mesh of a config.

    Args:
        sizes: axis name -> size; axes left out have size 1; one size may be -1 (all remaining devices).
        devices: the devices to use, default all.

    Returns:
        A Mesh with all axes of `AXES`, all Explicit.

    Raises:
        InputError: unknown axis, sizes that do not multiply to the number of devices, or a shape that does not lie on the slice.
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
    try:
        return jax.make_mesh(tuple(shape), AXES, devices=devices)
    except NotImplementedError:  # what jax says where an axis is no product of the slice's sides
        return _cut(shape, devices)


def _cut(shape: list[int], devices) -> jax.sharding.Mesh:
    """A mesh of which some axes are cut out of a side of a TPU slice: neighbours stay neighbours, but the cut side is no ring."""
    try:
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError):
        axes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True) if size > 1)
        sides = ", ".join(str(len({device.coords[i] for device in devices})) for i in range(len(devices[0].coords)))
        raise InputError(f"config.mesh {axes} does not lie on these devices: each axis must be a product of some of the slice's sides "
                         f"{sides}, or a divisor of one") from None
    return jax.sharding.Mesh(laid, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def psum(x, axes: tuple[str, ...]):
    """Sum over mesh axes inside a shard_map; the identity when `axes` is empty."""
    return jax.lax.psum(x, axes) if axes else x


def batch_spec() -> P:
    """Leading dimension split over the batch axes."""
    return P(BATCH_AXES)


def rule_of(path: str) -> Rule:
    """The rule that a parameter's path falls under."""
    return next(rule for rule in RULES if fnmatch.fnmatchcase(path, rule.pattern))


def storage_spec(shape: tuple[int, ...], mesh: jax.sharding.Mesh, path: str = "") -> P:
    """Where a parameter lives, by `RULES`; small ones are the same everywhere.

    Raises:
        InputError: the experts do not divide by the mesh's `expert`.
    """
    rule, sizes = rule_of(path), {axis: mesh.shape[axis] for axis in SPLIT_AXES}
    entries: list[Any] = [None] * len(shape)
    free = [axis for axis in SPLIT_AXES if sizes[axis] > 1]
    if rule.expert and "expert" in free:
        if shape[rule.expert] % sizes["expert"]:
            raise InputError(f"{path}: {shape[rule.expert]} experts do not divide among {sizes['expert']} devices (mesh axis expert)")
        entries[rule.expert] = "expert"
        free.remove("expert")
    if free and math.prod(shape) >= MINIMUM:
        dims = [len(shape) + rule.only] if rule.only else sorted(range(rule.stacked, len(shape)), key=lambda d: -shape[d])
        for axes in dict.fromkeys((tuple(free), tuple(free[:1]))):
            fits = [d for d in dims if entries[d] is None and shape[d] % math.prod(sizes[axis] for axis in axes) == 0]
            if fits:
                entries[fits[0]] = axes if len(axes) > 1 else axes[0]
                break
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def check_spec(spec: P, shape: tuple[int, ...], mesh: jax.sharding.Mesh, path: str) -> None:
    """Raises InputError if a placement uses a mesh axis twice, or its axes do not divide the dimension."""
    used: set[str] = set()
    for size, entry in zip(shape, spec, strict=False):
        axes = axes_of(entry)
        if used & set(axes):
            raise InputError(f"{path}: mesh axis {sorted(used & set(axes))[0]} would split two dimensions of {shape}")
        used |= set(axes)
        if size % math.prod(mesh.shape[axis] for axis in axes):
            raise InputError(f"{path}: dimension {size} of {shape} does not divide by mesh axes {', '.join(axes)}")


def axes_of(entry) -> tuple[str, ...]:
    """Mesh axes of one entry of a placement."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def place(abstract: Any, mesh: jax.sharding.Mesh, fixed: Mapping[str, P] | None = None) -> Any:
    """Adds storage shardings to a train state of ShapeDtypeStructs.

    What the optimizer or an average keeps of a parameter lies where the parameter does, whether it has the parameter's shape
    or that without the last dimension. Everything else is stored by its shape.

    Args:
        abstract: has the parameters under 'params'.
        mesh: where it lives.
        fixed: path of a parameter -> its placement, for those that do not follow `RULES`.

    Raises:
        InputError: as `storage_spec` and `check_spec`.
    """
    name = lambda keys: "/".join(str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey))
    known = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract["params"]):
        path = name(keys)
        spec = (fixed or {}).get(path)
        known[path] = leaf.shape, storage_spec(leaf.shape, mesh, path) if spec is None else spec
        check_spec(known[path][1], leaf.shape, mesh, path)

    def one(keys, leaf):
        words = name(keys).split("/")
        shape, spec = next((known[p] for p in ("/".join(words[n:]) for n in range(len(words))) if p in known), (None, P()))
        if shape is not None and leaf.shape == shape[:-1]:
            spec = P(*spec[: len(leaf.shape)])
        elif leaf.shape != shape:
            spec = storage_spec(leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, abstract)


def table(abstract: Any) -> str:
    """A line for every leaf of a placed state: path, type, shape, placement, and what one device holds of it."""
    lines = []
    for keys, x in jax.tree_util.tree_leaves_with_path(abstract):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        entries = ["+".join(axes_of(entry)) or "-" for entry in x.sharding.spec]
        here = x.sharding.shard_shape(x.shape)
        lines.append(f"{path}  {x.dtype}{list(x.shape)}  {' '.join(entries) or 'everywhere'}  {list(here)}")
    return "\n".join(lines) + "\n"


def specs(tree: Any) -> Any:
    """The placement of every leaf of placed arrays."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def as_shard(x: jax.Array, spec: P, path: str = "") -> Any:
    """Inside a `shard_map`: the part that came in, with how it was cut; an array where it is whole on every device."""
    splits = tuple((dim - x.ndim, axes) for dim, entry in enumerate(spec) if (axes := _several(entry)))
    rule = rule_of(path)
    return Shard(x, splits, rule.wire if x.ndim - rule.stacked > 1 else "stored") if splits else x


def as_shards(flat: Mapping[str, jax.Array], placed: Mapping[str, P]) -> dict[str, Any]:
    """`as_shard` of parameters by path."""
    return {path: as_shard(x, placed[path], path) for path, x in flat.items()}


def _several(entry) -> tuple[str, ...]:
    return tuple(axis for axis in axes_of(entry) if jax.lax.axis_size(axis) > 1)


def is_shard(x: Any) -> bool:
    """Whether a leaf is a part."""
    return isinstance(x, Shard)


def split(tree: Any) -> bool:
    """Whether any leaf is a part."""
    return any(map(is_shard, jax.tree.leaves(tree, is_leaf=is_shard)))


@jax.named_scope("gather_parameters")
def whole(tree: Any, dtype=None, keep: int = 0) -> Any:
    """Gathers every part of a tree.

    Args:
        tree: of `Shard`s and arrays; arrays stay as they are.
        dtype: parts whose rule says so travel, and come back, in this type; so does their gradient.
        keep: a dimension from the end that stays split.
    """

    def one(x):
        if not is_shard(x):
            return x
        part = x.part.astype(dtype) if dtype is not None and x.wire == "compute" else x.part
        for dim, axes in x.splits:
            if dim != keep:
                part = jax.lax.all_gather(part, axes, axis=part.ndim + dim, tiled=True)
        left = tuple(each for each in x.splits if each[0] == keep)
        return Shard(part, left, x.wire) if left else part

    return jax.tree.map(one, tree, is_leaf=is_shard)


@jax.named_scope("read_columns")
def columns(fn: Callable[[jax.Array, jax.Array], jax.Array], table: Any, rows: jax.Array) -> jax.Array:
    """`fn(table, rows)` where every device has some columns of the table only, and rows of its own to read.

    Args:
        fn: (table [R, D], rows [*N, ...]) -> [*N, ..., D], each column for itself.
        table: an array, or a `Shard` of its last dimension.
        rows: numbers of rows, the same shape on every device.
    """
    if not is_shard(table):
        return fn(table, rows)
    ((_, axes),) = table.splits
    parts = fn(table.part, jax.lax.all_gather(rows, axes))
    return jax.lax.all_to_all(parts, axes, 0, parts.ndim - 1, tiled=True)[0]


def sum_left(flat: Mapping[str, jax.Array], placed: Mapping[str, P], axes: tuple[str, ...]) -> dict[str, jax.Array]:
    """Sums gradients over the batch axes that their parameters are not split along: over the others `whole` has."""
    left = lambda spec: tuple(axis for axis in axes if not any(axis in axes_of(entry) for entry in spec))
    return {path: psum(x, left(placed[path])) for path, x in flat.items()}


def put_batch(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Places a global batch (the same on every process) on the mesh, leading dimension over the batch axes."""
    sharding = jax.sharding.NamedSharding(mesh, batch_spec())
    return {name: jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index]) for name, x in batch.items()}
