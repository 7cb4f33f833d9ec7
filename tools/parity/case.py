"""One golden case: its arrays and weights, and the ledger of what was read, compared, and left out for what reason.

The format is a folder with `config.json`, `data.npz` and `weights.safetensors` (released names). The tolerance is the
cases' own: max abs error <= 1e-4 of the tensor's max abs. An id may differ only where the case's margin between best
and runner-up is within ten times our error on the scores that it was chosen by.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from dina.config import InputError

TOLERANCE = 1e-4
MARGIN = 10.0


@dataclasses.dataclass(frozen=True)
class Line:
    """One compared tensor. `relative` is the max abs error over the golden tensor's max abs; for ids, the share that differs."""

    case: str
    tensor: str
    max_abs_error: float
    relative_error: float
    tolerance: float
    passed: bool
    note: str = ""


class Case:
    """A case folder. Raises InputError naming the file if one is missing or damaged."""

    def __init__(self, folder: pathlib.Path):
        self.name = folder.name
        self.config: dict[str, Any] = _read(folder / "config.json", lambda path: json.loads(path.read_text()))
        self._data = _read(folder / "data.npz", lambda path: dict(np.load(path)))
        weights = folder / "weights.safetensors"
        # A case without weights (sampling) has no such file.
        self._weights = _read(weights, _tensors) if weights.exists() or self.config.get("_weights") else {}
        self.lines: list[Line] = []
        self.not_compared: dict[str, str] = {}
        self.unused: dict[str, str] = {}
        self._seen: set[str] = set()
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._data

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays."""
        return tuple(self._data)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Released names of all weights."""
        return tuple(self._weights)

    def input(self, name: str) -> np.ndarray:
        """An array that is given, not recomputed; ids as int32."""
        self._seen.add(name)
        array = self._data[name]
        return array.astype(np.int32) if array.dtype.kind in "iu" else array

    def golden(self, name: str) -> np.ndarray:
        """An array to look at without counting it as compared."""
        return self._data[name]

    def weight(self, name: str) -> np.ndarray:
        """A weight as float32. Raises InputError for a name that the case does not hold."""
        if name not in self._weights:
            raise InputError(f"case {self.name}: weights.safetensors has no tensor {name}")
        self._used.add(name)
        return self._weights[name].astype(np.float32)

    def require_equal(self, name: str, other: str) -> None:
        """Two weights that are one of ours. Raises InputError if they differ."""
        if not np.array_equal(self.weight(name), self.weight(other)):
            raise InputError(f"case {self.name}: weights {name} and {other} must be equal")

    def leave_out(self, name: str, reason: str) -> None:
        """An array that is not compared."""
        self.not_compared[name] = reason

    def drop_weight(self, name: str, reason: str) -> None:
        """A weight that the model does not use."""
        self.unused[name] = reason

    def compare(self, name: str, *ours: Any, tolerance: float = TOLERANCE, scale: float = 0.0, lost: Any = None) -> float:
        """Compares values; of several results of ours (forms of one computation) the worst counts.

        Args:
            name: golden array; one that this case does not hold is not compared.
            ours: our results.
            tolerance: of the max abs error over `scale`.
            scale: default: the golden tensor's own max abs.
            lost: mask of the leading axes; there a choice between ties went the other way, and nothing is compared.

        Returns:
            The max abs error.
        """
        if name not in self:
            return 0.0
        golden = self._golden(name)
        scale = scale or (float(np.max(np.abs(golden))) if golden.size else 0.0)
        worst, note = 0.0, ""
        for result in ours:
            result = np.asarray(result, np.float64)
            if result.shape != golden.shape:
                worst, note = np.inf, f"our shape is {list(result.shape)}, golden {list(golden.shape)}"
                break
            if lost is not None and np.any(lost):
                note = f"{int(np.sum(lost))} of {np.size(lost)} positions are behind a choice between ties"
                if np.all(lost):
                    worst = np.inf
                    break
                lost = np.reshape(lost, (*np.shape(lost), *[1] * (golden.ndim - np.ndim(lost))))
                result = np.where(lost & np.isfinite(result), golden, result)
            error = float(np.max(np.abs(result - golden))) if golden.size else 0.0
            worst = max(worst, error) if np.isfinite(error) else np.inf
        relative = worst / scale if scale else worst
        self._add(name, worst, relative, tolerance, relative <= tolerance, note)
        return worst

    def compare_ids(
        self, name: str, ours: Any, margin: Any = None, error: float = 0.0, *, along: int | None = None, lost: Any = False
    ) -> np.ndarray:
        """Compares ids, booleans or other whole numbers.

        Args:
            name: golden array.
            ours: our ids.
            margin: golden gap between best and runner-up for each id (broadcast); None: every id must agree.
            error: our max abs error on the scores.
            along: axis of a sequence in which an excused mismatch changes what follows, which is then excused too.
            lost: mask (broadcast) of ids that follow from such a mismatch elsewhere.

        Returns:
            Mask of the excused mismatches.
        """
        if name not in self:
            return np.zeros(np.shape(ours), bool)
        golden = self._golden(name)
        ours = np.asarray(ours)
        if ours.shape != golden.shape:
            self._add(name, np.inf, np.inf, 0.0, False, f"our shape is {list(ours.shape)}, golden {list(golden.shape)}")
            return np.zeros(ours.shape, bool)
        differs = ours.astype(np.int64) != golden.astype(np.int64)
        excused = differs & np.broadcast_to(lost, golden.shape)
        if margin is not None:
            excused = excused | (differs & np.broadcast_to(np.asarray(margin) <= MARGIN * error, golden.shape))
        if along is not None:
            excused = differs & np.maximum.accumulate(excused, axis=along)
        counted = differs & ~excused
        note = f"{int(excused.sum())} within the margin" if excused.any() else ""
        distance = float(np.max(np.abs(ours.astype(np.float64) - golden))) if counted.any() else 0.0
        self._add(name, distance, float(counted.mean()) if golden.size else 0.0, 0.0, not counted.any(), note)
        return excused

    def crash(self, error: Exception) -> None:
        """A case that our code could not run to its end fails."""
        self.lines.append(Line(self.name, "(the whole case)", np.inf, np.inf, 0.0, False, f"{type(error).__name__}: {error}"))

    def finish(self) -> list[Line]:
        """All lines; what is neither input, compared nor left out fails, and so does a weight that nobody read."""
        for name in self._data:
            if name not in self._seen and name not in self.not_compared:
                self.lines.append(Line(self.name, name, np.inf, np.inf, 0.0, False, "not compared"))
        for name in self._weights:
            if name not in self._used and name not in self.unused:
                self.lines.append(Line(self.name, name, np.inf, np.inf, 0.0, False, "weight not used"))
        return self.lines

    def _golden(self, name: str) -> np.ndarray:
        self._seen.add(name)
        array = self._data[name]
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    def _add(self, name, max_abs, relative, tolerance, passed, note) -> None:
        self.lines.append(Line(self.name, name, max_abs, relative, tolerance, bool(passed), note))


def _read(path: pathlib.Path, read):
    if not path.exists():
        raise InputError(f"golden case: {path} does not exist")
    try:
        return read(path)
    except Exception as error:  # whatever the format's reader raises
        raise InputError(f"golden case: {path} cannot be read ({type(error).__name__}: {error})") from None


def _tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(path)
