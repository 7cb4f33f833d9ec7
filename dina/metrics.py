"""Where a run's numbers go: one JSON line per logged step, TensorBoard, and the terminal's progress bar.

Numbers go to `metrics.jsonl`, arrays, which are large, to `arrays.jsonl` every so often.
"""

from __future__ import annotations

import json
import math
import pathlib
import resource
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm


class Log:
    """Metrics of one stage.

    Args:
        folder: the stage's folder; gets `metrics.jsonl` and `arrays.jsonl` (appended, so that a resumed run continues
            them) and TensorBoard files.
        name: shown on the progress bar.
        steps: the stage's total steps.
        first: the step that this process starts from; lines of later steps, written before an interruption, are cut.
        arrays_every: arrays are written where a logged step is a multiple of it, and at the last step.
    """

    def __init__(self, folder: pathlib.Path, name: str, steps: int, first: int, arrays_every: int = 100):
        self.path, self.steps, self.arrays_every = folder / "metrics.jsonl", steps, arrays_every
        self.file, self.arrays = (_continued(path, first) for path in (self.path, folder / "arrays.jsonl"))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1 if first else None)
        self.bar = tqdm(total=steps, initial=first, desc=name, unit="step", mininterval=1.0, dynamic_ncols=True)
        self.begun = time.time()
        self.last: tuple[int, float] | None = None  # step and time of the last line that this process wrote

    def advance(self, n: int = 1) -> None:
        """Moves the progress bar."""
        self.bar.update(n)

    def write(self, step: int, values: Mapping[str, Any], rows: int = 0) -> None:
        """Writes one line and the same scalars to TensorBoard; non-finite values are written as text.

        With `rows` of a step, `rows_per_second` since the line before is added, which leaves compilation out; the first
        line of a process has none.
        """
        now = time.time()
        arrays = {key: np.asarray(value) for key, value in values.items() if np.ndim(value)}
        values = {key: value for key, value in values.items() if key not in arrays}
        if arrays and (step % self.arrays_every == 0 or step == self.steps):
            lists = {key: _rounded(value) for key, value in arrays.items()}
            self.arrays.write(json.dumps({"step": step} | lists) + "\n")
            self.arrays.flush()
        if rows and self.last is not None:
            values = {**values, "rows_per_second": (step - self.last[0]) * rows / max(1e-9, now - self.last[1])}
        self.last = step, now
        line = {"step": step, "time": round(time.time() - self.begun, 3), "wall": round(time.time(), 3)}
        for key, value in values.items():
            value = float(value)
            line[key] = round(value, 6) if math.isfinite(value) else str(value)
            self.board.add_scalar(key, value, step)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.bar.set_postfix(loss=f"{values['loss']:.3f}" if "loss" in values else "", refresh=False)

    def close(self) -> None:
        """Flushes and closes everything."""
        self.bar.close()
        self.file.close()
        self.arrays.close()
        self.board.close()


def _continued(path: pathlib.Path, first: int):
    """`path`, opened to append, without lines of steps after `first`."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step(line) <= first]
        path.write_text("".join(line + "\n" for line in kept))
    return path.open("a")


def _rounded(array: np.ndarray) -> Any:
    """Nested lists of five significant digits; what is not finite as text, since JSON has no word for it."""
    if array.ndim:
        return [_rounded(part) for part in array]
    return float(f"{array:.5g}") if np.isfinite(array) else str(array)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


def peak_memory_mib() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
