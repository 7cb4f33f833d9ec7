"""What a compiled program computes and sends, loops multiplied: FLOPs by group, and bytes of every collective.

FLOPs are two per multiply-add of matrix products; TPU programs hold them as convolutions, in which a batch dimension is a
window that fits in one place only, so window positions are counted and not assumed. Other operations are left out.

Bytes on the wire are what one device sends in a ring (or, for all-to-all, to the others): all-gather and reduce-scatter
(n-1)/n of the whole array, all-reduce twice that, all-to-all (n-1)/n of its own array, permute all of it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

import numpy as np

from tools.aot.hlo import Op, Program, Shape, shapes
from tools.aot.kernels import AGAIN

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute", "send")
REMAT = "rematted_computation"
# What part of the model an operation belongs to, by its name in the Python program; the first match counts.
GROUPS = (("experts", "/experts/"), ("attention", "/attention_"), ("dense", "/ffn_"), ("depth_heads", "DepthHead"), ("depth_heads", "depth_loss"), ("depth_heads", "_head_loss"),
          ("ngram", "/ngram/"), ("embed", "(Embed)"))
RARE = "/experts/"  # a conditional in the experts is the slow path of full buffers, any other one skips what is not there
# Losses form their gradients inside what remat repeats (dina/heads/linear_loss.py): of three products one is the repetition.
FUSED_LOSS = re.compile(REMAT + r"/dot_general")
_REFERENCED = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: one of KINDS.
        axes: mesh axes that its groups span, joined by '+'; 'none' for groups of one, 'dcn' for what leaves the slice.
        group: devices of a group.
        sent: bytes that one device sends each time.
        times: that it runs in a step.
        name: of the operation.
    """

    kind: str
    axes: str
    group: int
    sent: float
    times: int
    name: str


@dataclasses.dataclass
class Counts:
    """Of one device and step.

    Attributes:
        flops: by group; recomputed ones are in `remat` instead.
        remat: FLOPs of recomputation.
        collectives: every one that runs.
        custom_calls: kernel -> runs of those whose FLOPs the text does not show; `kernels.AGAIN` ends what remat runs.
        unknown_loops: number of loops whose length is data, counted once.
    """

    flops: dict[str, float]
    remat: float
    collectives: list[Collective]
    custom_calls: dict[str, int]
    unknown_loops: int


def cheapest_or_dearest(program: Program):
    """Chooses branches: in the experts the one without products, elsewhere the one with them."""
    sizes: dict[str, int] = {}

    def size(name: str) -> int:
        if name not in sizes:
            sizes[name] = 0  # a computation never calls itself
            ops = program.computations.get(name, {}).values()
            inner = [other for op in ops for other in (*op.called(), *_REFERENCED.findall(op.rest)) if other in program.computations]
            sizes[name] = sum(1 for op in ops if op.opcode in ("dot", "convolution", "custom-call")) + sum(size(other) for other in set(inner))
        return sizes[name]

    def choose(op: Op, branches: list[str]) -> str:
        return (min if RARE in op.op_name else max)(branches, key=size)

    return choose




def count(program: Program, mesh: dict[str, int], slice_size: int = 0, depth_classes: frozenset[int] = frozenset()) -> Counts:
    """Counts a program.

    Args:
        program: of one device of a mesh.
        mesh: axis -> size, in order.
        slice_size: devices of a slice where there are several, else 0.
        depth_classes: stored classes of depth heads, by which their classifiers differ from the text head.
    """
    flops: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    remat, seen = 0.0, {}
    for op, where, times in program.runs(cheapest_or_dearest(program)):
        if op.opcode in ("dot", "convolution"):
            work = times * product_flops(op, program.computations[where])
            again = work if REMAT in op.op_name else 0.0
            again = work / 3 if FUSED_LOSS.search(op.op_name) else again
            group = group_of(op.op_name)
            if group == "text_head" and depth_classes & _sides(op, program.computations[where]):
                group = "depth_heads"
            remat += again
            flops[group] += work - again
        elif op.opcode == "custom-call" and "tpu_custom_call" in (op.attribute("custom_call_target") or ""):
            calls[re.sub(r"[.\d]+$", "", op.name) + AGAIN * (REMAT in op.op_name)] += times
        elif kind := kind_of(op):
            found = _collective(program, op, where, kind, times, mesh, slice_size)
            # The parts of one asynchronous collective repeat its operation in every computation that overlaps with it.
            key = (kind, op.attribute("channel_id"), op.type.split("{")[0]) if "chain_id" in op.rest else op.name
            if key not in seen or seen[key].times < times:
                seen[key] = found
    return Counts(dict(flops), remat, list(seen.values()), dict(calls), len(program.unknown))


def group_of(op_name: str) -> str:
    """Part of the model; 'text_head' for what is in none, which is the head and the losses."""
    return next((group for group, mark in GROUPS if mark in op_name), "text_head")


def product_flops(op: Op, table: dict[str, Op]) -> float:
    """Of a dot or convolution; `table` has its operands."""
    left, right = (_shape(op, table, i) for i in (0, 1))
    if op.opcode == "dot":
        contracted = [int(n) for n in re.findall(r"\d+", op.attribute("lhs_contracting_dims") or "")]
        return 2.0 * op.shapes[0].size * math.prod(left.dims[i] for i in contracted)
    into, kernel, out = re.match(r"(\w+)_(\w+)->(\w+)", op.attribute("dim_labels")).groups()
    groups = int(op.attribute("feature_group_count") or 1), int(op.attribute("batch_group_count") or 1)
    pairs = 1
    window = _window(op.attribute("window") or "{}")
    for place, letter in enumerate(sorted(letter for letter in kernel if letter.isdigit())):
        sizes = (left.dims[into.index(letter)], right.dims[kernel.index(letter)], op.shapes[0].dims[out.index(letter)])
        pairs *= window_pairs(*sizes, {key: values[place] for key, values in window.items() if values})
    features = left.dims[into.index("f")] / groups[0]
    return 2.0 * features * op.shapes[0].dims[out.index("f")] * left.dims[into.index("b")] / groups[1] * pairs


def window_pairs(source: int, kernel: int, out: int, window: dict) -> int:
    """Pairs of output and kernel positions of one window dimension that read a value and no padding or hole."""
    stride, low = window.get("stride", 1), window.get("pad", (0, 0))[0]
    base, spread = window.get("lhs_dilate", 1), window.get("rhs_dilate", 1)
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * spread - low
    return int(np.sum((at >= 0) & (at <= (source - 1) * base) & (at % base == 0)))


def _window(text: str) -> dict[str, list]:
    found = dict(part.split("=") for part in text.strip("{}").split() if "=" in part)
    read = {"pad": lambda v: tuple(int(n) for n in v.split("_"))}
    return {key: [read.get(key, int)(v) for v in value.split("x")] for key, value in found.items() if key != "size"}


def _sides(op: Op, table: dict[str, Op]) -> set[int]:
    return {n for shape in (op.shapes[0], _shape(op, table, 0), _shape(op, table, 1)) for n in shape.dims}


def _shape(op: Op, table: dict[str, Op], number: int) -> Shape:
    written = shapes(op.operands)  # some printers write operands' types
    return written[number] if written else table[op.inputs[number]].shapes[0]


def kind_of(op: Op) -> str | None:
    """Which collective, if any; of asynchronous pairs the first half counts."""
    name = op.opcode.removesuffix("-start")
    if name == "all-reduce" and "all-reduce-scatter" in op.name:
        return "reduce-scatter"
    if name == "send" and "megascale" not in op.rest:
        return None
    return name if name in KINDS else None


def _collective(program: Program, op: Op, where: str, kind: str, times: int, mesh: dict[str, int], slice_size: int) -> Collective:
    if kind == "send":
        return Collective(kind, "dcn", 2, op.shapes[0].nbytes, times, op.name)
    group = groups_of(op, mesh)
    axes = axes_of(group, mesh, slice_size)
    n = max(1, len(group))
    inputs = [program.computations[where][name] for name in op.inputs if name in program.computations[where]]
    given = sum(shape.nbytes for source in inputs for shape in source.shapes)
    made = sum(shape.nbytes for shape in op.shapes)
    made = made - given if op.opcode.endswith("-start") and made > given else made  # a start's result repeats its operands
    whole = {"all-gather": made, "reduce-scatter": given, "all-reduce": 2 * given, "collective-permute": given * n / max(1, n - 1)}.get(kind, given)
    if kind == "reduce-scatter" and op.opcode.startswith("all-reduce"):
        whole = made
    return Collective(kind, axes, n, whole * (n - 1) / n, times, op.name)


def groups_of(op: Op, mesh: dict[str, int]) -> list[int]:
    """Devices of the first group, as numbers of the mesh's flat order."""
    total = math.prod(mesh.values())
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", op.rest)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'?(\w+)'?=(\d+)", named[1])}
        inside = re.findall(r"'(\w+)'", named[2])
        index = np.arange(total).reshape(tuple(sizes.values()))
        return index[tuple(slice(None) if axis in inside else 0 for axis in sizes)].ravel().tolist()
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.rest)
    if iota:
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        index = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            index = index.transpose([int(n) for n in iota[3].split(",")])
        return index.reshape(shape)[0].tolist()
    explicit = re.search(r"replica_groups=\{\{([\d,]*)\}", op.rest)
    if explicit:
        return [int(n) for n in explicit[1].split(",") if n]
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", op.rest)
    if pairs:
        return [int(pairs[1]), int(pairs[2])]
    return list(range(total))


def axes_of(group: list[int], mesh: dict[str, int], slice_size: int = 0) -> str:
    """Axes along which the group's devices differ, joined by '+'; 'dcn' where they are of several slices."""
    if slice_size and len({device // slice_size for device in group}) > 1:
        return "dcn"
    places = np.array(np.unravel_index(np.array(group or [0]), tuple(mesh.values())))
    differ = [axis for axis, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1]
    return "+".join(differ) or "none"
