"""Reads a compiled program's text: computations, operations, and how often each runs.

A loop's body runs as often as its condition says: the counter starts at a constant (0 where the text does not show it),
goes up by one and is compared with a constant; both may come in through the loop's tuple. A loop whose bound is data runs
once here and is named in `Program.unknown`. Of a conditional one branch runs: the caller says which.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CONTINUED = re.compile(r"\n(?=\"|\}\})")  # kernels' attributes may have several lines
_OPCODE = re.compile(r"([\w\-]+)\(")
_LEAF = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_REFERENCE = re.compile(r"%?([A-Za-z_][\w.\-]*)")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
         "s64": 8, "u64": 8, "f64": 8, "c64": 8, "token": 0}
_THROUGH = ("copy", "bitcast", "convert", "reshape", "opt-barrier")  # ops that keep a scalar's value


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's element type and sides."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return functools.reduce(lambda a, b: a * b, self.dims, 1)

    @property
    def nbytes(self) -> float:
        """Bytes."""
        return self.size * BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 4)


@dataclasses.dataclass
class Op:
    """One line: `name = type opcode(operands), rest`."""

    name: str
    type: str
    opcode: str
    operands: str
    rest: str

    @functools.cached_property
    def shapes(self) -> list[Shape]:
        """Of the result, a tuple's one after another."""
        return shapes(self.type)

    @functools.cached_property
    def inputs(self) -> list[str]:
        """Names of the operands."""
        return [_REFERENCE.findall(part)[-1] for part in _split(self.operands) if _REFERENCE.search(part)]

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the Python program it came from."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """The value of `name=` up to its end, braces included."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.rest)
        if not found:
            return None
        text = self.rest[found.end() :]
        if text.startswith("{"):
            return text[: _closing(text, "{", "}") + 1]
        return re.split(r",? ", text, maxsplit=1)[0].rstrip(",")

    def called(self) -> list[str]:
        """Computations that run when it runs, loops and conditionals apart."""
        names = [self.attribute(key) for key in ("calls", "to_apply", "called_computations")]
        return [name for text in names if text for name in _REFERENCE.findall(text)]


def shapes(text: str) -> list[Shape]:
    """Array types in a text, layouts left out."""
    plain = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", text)
    return [Shape(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _LEAF.findall(plain)]


class Program:
    """A parsed program.

    Args:
        text: of `compiled.as_text()`, of any backend.

    Attributes:
        computations: name -> {operation's name: Op}, in order.
        entry: name of the one that runs.
        unknown: loops whose number of runs is data.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Op]] = {}
        self.entry, self.roots, self.unknown = "", {}, set()
        current = None
        for line in _CONTINUED.sub(" ", text).splitlines():
            if current is None:
                if head := _HEAD.match(line):
                    current = head[2]
                    self.computations[current] = {}
                    self.entry = current if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif op := _parse(line):
                self.computations[current][op.name] = op
                if line.lstrip().startswith("ROOT "):
                    self.roots[current] = op
        if not self.entry:
            raise ValueError("no ENTRY computation: this is not the text of a compiled program")

    def runs(self, branch: Callable[[Op, list[str]], str]) -> Iterator[tuple[Op, str, int]]:
        """(operation, its computation, how often it runs in one call of the program), each operation once.

        Args:
            branch: which of the branch computations of a conditional runs.
        """
        counts: collections.Counter[str] = collections.Counter()
        for name in self._order(branch):
            counts[name] += 1 if name == self.entry else 0
            for op in self.computations[name].values():
                for other, times in self._calls(name, op, branch):
                    counts[other] += counts[name] * times
        for name, times in counts.items():
            if times:
                yield from ((op, name, times) for op in self.computations[name].values())

    def _calls(self, name: str, op: Op, branch) -> list[tuple[str, int]]:
        if op.opcode == "while":
            return [(op.attribute("body").lstrip("%"), self.trips(name, op))]
        if op.opcode == "conditional":
            return [(branch(op, self.branches(op)), 1)]
        return [(other, 1) for other in op.called() if other in self.computations]

    def branches(self, op: Op) -> list[str]:
        """Of a conditional."""
        text = op.attribute("branch_computations") or f"{op.attribute('false_computation')} {op.attribute('true_computation')}"
        return _REFERENCE.findall(text)

    def _order(self, branch) -> list[str]:
        """Computations so that callers come before what they call."""
        done: list[str] = []
        seen: set[str] = set()
        stack: list[tuple[str, bool]] = [(self.entry, False)]
        while stack:
            name, left = stack.pop()
            if left:
                done.append(name)
            elif name not in seen:
                seen.add(name)
                stack.append((name, True))
                stack += [(other, False) for op in self.computations[name].values() for other, _ in self._calls(name, op, branch)]
        return done[::-1]

    def trips(self, where: str, op: Op) -> int:
        """How often a while loop's body runs."""
        known = re.search(r'known_trip_count[^\d]*(\d+)', op.rest)
        if known:
            return int(known[1])
        condition = op.attribute("condition").lstrip("%")
        bound = self._bound(condition, self.roots[condition], where, op)
        if bound is None:
            self.unknown.add(op.name)
            return 1
        return max(0, bound)

    def _bound(self, condition: str, root: Op, where: str, loop: Op) -> int | None:
        """Limit minus start of `counter < limit`, or of a fusion that is that."""
        at = condition
        resolve = lambda name: self._initial(at, name, where, loop)
        if root.opcode == "fusion":
            inner = root.called()[0]
            outer = dict(zip(self._parameters(inner), root.inputs, strict=False))
            root = self.roots[inner]
            at_inner = inner
            resolve = lambda name: self._initial(condition, outer[name], where, loop) if name in outer else self._constant(at_inner, name)
        direction = root.attribute("direction")
        if root.opcode != "compare" or direction not in ("LT", "LE", "GT", "GE", "NE"):
            return None
        left, right = (resolve(name) for name in root.inputs)
        if direction in ("GT", "GE"):
            left, right = right, left
        if right is None:
            return None
        # A counter whose start cannot be read is taken to start at 0, as jax's loops over stacked arrays do.
        return right - (left or 0) + (direction in ("LE", "GE"))

    def _parameters(self, name: str) -> list[str]:
        ops = [op for op in self.computations[name].values() if op.opcode == "parameter"]
        return [op.name for op in sorted(ops, key=lambda op: int(op.operands))]

    def _initial(self, condition: str, name: str, where: str, loop: Op) -> int | None:
        """A scalar's value when the loop begins: a constant of the condition, or of the tuple that goes in."""
        op = self._source(condition, name)
        if op is None or op.opcode != "get-tuple-element":
            return self._constant(condition, name)
        state = self.computations[where].get(loop.inputs[0])
        while state is not None and state.opcode in _THROUGH:
            state = self.computations[where].get(state.inputs[0])
        if state is None or state.opcode != "tuple":
            return None
        return self._constant(where, state.inputs[int(op.attribute("index"))])

    def _source(self, where: str, name: str) -> Op | None:
        op = self.computations[where].get(name)
        while op is not None and op.opcode in _THROUGH:
            op = self.computations[where].get(op.inputs[0])
        return op

    def _constant(self, where: str, name: str) -> int | None:
        op = self._source(where, name)
        if op is None or op.opcode != "constant" or not re.fullmatch(r"-?\d+", op.operands.strip()):
            return None
        return int(op.operands)


def _parse(line: str) -> Op | None:
    name, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(rest, "(", ")") + 1 if rest.startswith("(") else rest.index(" ")
    found = _OPCODE.match(rest[end:].lstrip())
    if not found:
        return None
    tail = rest[end:].lstrip()[found.end() - 1 :]
    close = _closing(tail, "(", ")")
    return Op(name.lstrip("%"), rest[:end], found[1], tail[1:close], tail[close + 1 :].lstrip(", "))


def _closing(text: str, opening: str, closing: str) -> int:
    """Index of the bracket that closes the first one."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == opening) - (letter == closing)
        if depth == 0 and letter == closing:
            return index
    return len(text)


def _split(text: str) -> list[str]:
    """Parts between the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part for part in (*parts, text[start:]) if part.strip()]
