"""What cells say about each other: differences in pairs, and whether what theory says of the table holds.

A difference is taken seed by seed and picture by picture before it is averaged (summary.py). Letters: S seeds, R pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from tools.sweep.summary import FIDELITY, Draws, Group, Point

NESTING = "levels trained"  # the axis of two trainings of which one is a read-off of the other


@dataclasses.dataclass(frozen=True)
class Difference:
    """`second` minus `first` in one score at one depth, and its interval over pairs of seed and picture.

    Attributes:
        axis: the config path in which alone they differ, or NESTING.
    """

    axis: str
    first: Group
    second: Group
    depth: int
    score: str
    interval: dict[str, float]

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval["low"] > 0 or self.interval["high"] < 0


def differences(found: Sequence[Group], drawn: Draws, depths: Sequence[int], scores: Sequence[str]) -> list[Difference]:
    """All pairs that `pairs` gives, at those of `depths` that both have; NESTING at the depth of the shorter one.

    Seeds that only one of the two has are left out.
    """
    out = []
    for axis, first, second in pairs(found):
        a, b = _same_seeds(first, second)
        wanted = [second.levels] if axis == NESTING else depths
        for depth in (d for d in wanted if a.cells and d in a.depths and d in b.depths):
            for score in scores:
                first_SR, second_SR = a.values(score, depth), b.values(score, depth)
                if first_SR is not None and second_SR is not None:
                    out.append(Difference(axis, first, second, depth, score, drawn.interval(second_SR - first_SR)))
    return out


def pairs(found: Sequence[Group]) -> Iterator[tuple[str, Group, Group]]:
    """(axis, first, second) of configurations that differ in one axis alone: neighbours in the order in which the sweep names
    an axis' values, and, as NESTING, a training of few levels after the one of more levels that begin with the same sizes."""
    for i, first in enumerate(found):
        done = set()
        for second in (*found[i + 1 :], *found[:i]):
            axes = [path for path in first.axes if first.axes[path] != second.axes.get(path)]
            if len(axes) != 1 or first.axes.keys() != second.axes.keys():
                continue
            if first.levels > second.levels > 0 and first.cells[0]["sizes"][: second.levels] == second.cells[0]["sizes"]:
                yield NESTING, first, second
            elif first.levels == second.levels and axes[0] not in done and second in found[i + 1 :]:
                done.add(axes[0])
                yield axes[0], first, second


def _same_seeds(a: Group, b: Group) -> tuple[Group, Group]:
    both = {cell["seed"] for cell in a.cells} & {cell["seed"] for cell in b.cells}
    cut = lambda g: dataclasses.replace(g, cells=tuple(cell for cell in g.cells if cell["seed"] in both))
    return cut(a), cut(b)


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that theory says of the table: how often it holds, and where it does not."""

    claim: str
    holds: int
    total: int
    exceptions: tuple[str, ...]


def checks(found: Sequence[Point], drawn: Draws) -> list[Check]:
    """Monotone where theory says so; an exception is a step the wrong way whose interval leaves zero out, or '(unclear)'."""
    by_group: dict[str, list[Point]] = {}
    for point in found:
        by_group.setdefault(point.group.name, []).append(point)
    out = []
    for score in FIDELITY:
        wrong, total = [], 0
        for name, row in by_group.items():
            for before, after in zip(row, row[1:], strict=False):
                total += 1
                step_SR = after.group.values(score, after.depth) - before.group.values(score, before.depth)
                if step_SR.mean() < 0:
                    unclear = "" if drawn.interval(step_SR)["high"] < 0 else " (unclear)"
                    wrong.append(f"{name}: depth {before.depth} to {after.depth}: {step_SR.mean():+.3g}{unclear}")
        out.append(Check(f"{score} does not fall with depth", total - len(wrong), total, tuple(wrong)))
    out.append(_monotone(by_group, "energy left falls with depth", lambda p: -p.numbers["energy"] if "energy" in p.numbers else None))
    out.append(_monotone(by_group, "bits under the language model grow with depth", lambda p: p.scores.get("language", {}).get("value")))
    paid = [p for p in found if "language" in p.scores and p.depth]
    dear = tuple(f"{p.group.name}, depth {p.depth}" for p in paid if p.scores["language"]["value"] > p.bits_image)
    out.append(Check("the language model needs fewer bits than the codes have", len(paid) - len(dear), len(paid), dear))
    return [check for check in out if check.total]


def _monotone(by_group: Mapping[str, Sequence[Point]], claim: str, value: Callable[[Point], float | None]) -> Check:
    wrong, total = [], 0
    for name, row in by_group.items():
        for before, after in zip(row, row[1:], strict=False):
            a, b = value(before), value(after)
            if a is None or b is None:
                continue
            total += 1
            wrong += [f"{name}: depth {before.depth} to {after.depth}"] if b < a else []
    return Check(claim, total - len(wrong), total, tuple(wrong))
