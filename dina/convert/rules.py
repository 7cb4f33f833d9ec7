"""How released tensors lie in ours, as data: a rule names one family of tensors on both sides and the axes between them.

A rule is read in both directions. `axes` is an einops pattern over named dimensions, from the released layout to ours
("(h k) q -> q h k"); the sizes of the dimensions come beside it, so both shapes follow. Placeholders in names stand for
numbers: one that is in both names gives separate tensors on both sides, one that only the released name has becomes a
leading axis of ours ({layer} and then {expert}, in the order in which they stand in the name).

Ours may be longer than the released tensor where it is padded (DESIGN §4.12): a piece fills its own region, what is
left is zero, and export cuts the region out again. A released tensor may also be longer than ours: `cut` names the parts
of its first axis, and each rule takes one of them. And several released tensors may be one of ours: `copies`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import einops
import numpy as np

from dina.config import InputError

Sizes = Mapping[str, int | tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One family of tensors.

    Attributes:
        ours: path of ours, the kind first: 'params/backbone/layers/attention_{i}/q_b'.
        theirs: released name.
        axes: einops pattern, released to ours, without the axes that placeholders add.
        by: placeholder that chooses among the sizes of a dimension that has several.
        start: first row of the region in the first axis of ours. With one per value of `by`, that placeholder adds no axis:
            its tensors lie one below the other.
        exact: fp32 in the released checkpoint, whatever the others are.
        cut: dimensions into which the released first axis is cut, in order; the first axis of `axes` is the part of this rule.
        copies: placeholder whose tensors are one and the same of ours: equal when they are read, all written on export.
    """

    ours: str
    theirs: str
    axes: str
    by: str = ""
    start: tuple[int, ...] = (0,)
    exact: bool = False
    cut: tuple[str, ...] = ()
    copies: str = ""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One released tensor, or a part of it, and where it lies in ours.

    Attributes:
        name: released name.
        shape: released shape.
        path: path of ours.
        index: position on the leading axes that placeholders add.
        start: first row of the region in the first axis after them.
        region: shape of the region.
        axes: einops pattern.
        sizes: sizes of the pattern's dimensions.
        exact: fp32 in the released checkpoint.
        part: first and last + 1 of the released rows that lie here; None: all.
        copy: whether another piece before it has filled the region, with the same values if the copies are what they should be.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[int, ...]
    start: int
    region: tuple[int, ...]
    axes: str
    sizes: dict[str, int]
    exact: bool
    part: tuple[int, int] | None = None
    copy: bool = False

    @property
    def slices(self) -> tuple:
        """Index of the region in ours."""
        if not self.region:
            return self.index
        first, *rest = self.region
        return (*self.index, slice(self.start, self.start + first), *(slice(0, n) for n in rest))

    def to_ours(self, released: np.ndarray) -> np.ndarray:
        """The region's content, a view where the layout allows it."""
        return self.arrange(released[slice(*self.part)] if self.part else released)

    def arrange(self, rows: np.ndarray) -> np.ndarray:
        """The same of the released rows that lie here."""
        return einops.rearrange(rows, self.axes, **self._factors()) if self.shape else rows

    def to_theirs(self, region: np.ndarray) -> np.ndarray:
        """The released tensor of a region, or its part."""
        if not self.shape:
            return region
        left, right = self.axes.split("->")
        return einops.rearrange(region, f"{right} -> {left}", **self._factors())

    def _factors(self) -> dict[str, int]:
        grouped = re.findall(r"\(([^)]*)\)", self.axes)
        return {name: self.sizes[name] for group in grouped for name in group.split()}


def pieces(rules: Iterable[Rule], counts: Mapping[str, int], sizes: Sizes) -> Iterator[Piece]:
    """Every released tensor that the rules name.

    Args:
        rules: the table.
        counts: how many values each placeholder takes.
        sizes: size of each dimension; a tuple holds one per value of the rule's `by`.
    """
    for rule in rules:
        names = list(dict.fromkeys(re.findall(r"{(\w+)}", rule.theirs)))
        in_rows = rule.by if len(rule.start) > 1 else ""
        stacked = [name for name in names if f"{{{name}}}" not in rule.ours and name not in (in_rows, rule.copies)]
        left, right = rule.axes.split("->")
        for values in itertools.product(*(range(counts[name]) for name in names)):
            at = dict(zip(names, values, strict=True))
            choice = at[rule.by] if rule.by else 0
            own = {d: _choose(sizes[d], choice) for d in (*re.findall(r"\w+", rule.axes), *rule.cut)}
            shape, part = _shape(left, own), None
            if rule.cut:
                at_cut = rule.cut.index(left.split()[0])
                start = sum(own[d] for d in rule.cut[:at_cut])
                part = (start, start + shape[0])
                shape = (sum(own[d] for d in rule.cut), *shape[1:])
            yield Piece(
                name=rule.theirs.format(**at),
                shape=shape,
                path=rule.ours.format(**at),
                index=tuple(at[name] for name in stacked),
                start=_choose(rule.start, choice),
                region=_shape(right, own),
                axes=rule.axes, sizes=own, exact=rule.exact, part=part, copy=bool(rule.copies) and at[rule.copies] > 0,
            )  # fmt: skip


def _shape(side: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one side of a pattern."""
    groups = re.findall(r"\([^)]*\)|\w+", side)
    return tuple(int(np.prod([sizes[d] for d in re.findall(r"\w+", group)])) for group in groups)


def _choose(value: int | tuple[int, ...], index: int) -> int:
    if isinstance(value, tuple):
        return value[index] if len(value) > 1 else value[0]
    return value


def by_name(groups: Iterable[Sequence[Piece]]) -> dict[str, list[Piece]]:
    """Pieces of each released tensor, several where it was cut."""
    found: dict[str, list[Piece]] = {}
    for piece in itertools.chain.from_iterable(groups):
        found.setdefault(piece.name, []).append(piece)
    return found


def sources(group: Sequence[Piece]) -> list[Piece]:
    """The pieces that fill one of our tensors: of several copies the last, whose values a loader is left with."""
    return list({(piece.index, piece.start): piece for piece in group}.values())


def by_path(pieces_: Iterable[Piece]) -> dict[str, list[Piece]]:
    """Pieces of each of our tensors. Raises InputError where two rules claim one released tensor."""
    found: dict[str, list[Piece]] = {}
    seen: set[tuple[str, int]] = set()
    for piece in pieces_:
        claim = (piece.name, piece.part[0] if piece.part else 0)
        if claim in seen:
            raise InputError(f"conversion table: {piece.name} is claimed twice")
        seen.add(claim)
        found.setdefault(piece.path, []).append(piece)
    return found


def least_shape(group: Sequence[Piece]) -> tuple[int, ...]:
    """The shape of ours that just holds its pieces; ours may be padded beyond it."""
    lead = tuple(max(p.index[axis] for p in group) + 1 for axis in range(len(group[0].index)))
    first = max(p.start + p.region[0] for p in group)
    return (*lead, first, *(max(p.region[axis] for p in group) for axis in range(1, len(group[0].region))))


def assemble(group: Sequence[Piece], read, shape: Sequence[int], dtype) -> np.ndarray:
    """One of our tensors from its pieces.

    Args:
        group: its pieces.
        read: released name -> array.
        shape: shape of ours.
        dtype: of the result.

    Raises:
        InputError: a released tensor has another shape than the table says, does not fit into ours, or is no copy of
            those that it should equal.
    """
    check_fit(group, shape)
    out = np.zeros(shape, dtype)
    for piece in group:
        content = piece.to_ours(check_shape(piece, read(piece.name)))
        if piece.copy and not np.array_equal(out[piece.slices], content.astype(dtype)):
            raise InputError(f"tensor {piece.name} differs from {group[0].name}; both are one tensor, {piece.path}")
        out[piece.slices] = content
    return out


def join(parts: Sequence[Piece], region) -> np.ndarray:
    """One released tensor from its pieces; `region`: piece -> its content in ours."""
    if parts[0].part is None:
        return parts[0].to_theirs(region(parts[0]))
    return np.concatenate([piece.to_theirs(region(piece)) for piece in sorted(parts, key=lambda piece: piece.part)])


def disassemble(groups: Mapping[str, Sequence[Piece]], ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Released tensors by name from ours by path."""
    return {name: join(parts, lambda piece: ours[piece.path][piece.slices]) for name, parts in by_name(groups.values()).items()}


def assemble_all(
    groups: Mapping[str, Sequence[Piece]], read, shapes: Mapping[str, Sequence[int]] | None = None, dtype=np.float32
) -> dict[str, np.ndarray]:
    """All of our tensors by path; `shapes` of those that are padded, others just hold their pieces."""
    shapes = shapes or {}
    return {path: assemble(group, read, shapes.get(path, least_shape(group)), dtype) for path, group in groups.items()}


def check_shape(piece: Piece, array: np.ndarray) -> np.ndarray:
    """`array` itself. Raises InputError if it has not the shape of the table."""
    if tuple(array.shape) != piece.shape:
        raise InputError(f"tensor {piece.name} has shape {list(array.shape)}, this config needs {list(piece.shape)}")
    return array


def check_fit(group: Sequence[Piece], shape: Sequence[int]) -> None:
    """Raises InputError if ours cannot hold its pieces."""
    least = least_shape(group)
    if len(least) != len(shape) or any(n > m for n, m in zip(least, shape, strict=True)):
        raise InputError(f"{group[0].path} has shape {list(shape)}, {group[0].name} and its like need {list(least)}")
