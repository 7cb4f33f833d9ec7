"""Where a stage's time went: seconds compiling, restoring, waiting for data, training, saving, and lost to interruptions.

`goodput.jsonl` of a stage has lines with the seconds of one process so far; the last line of each process counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator

KINDS = ("compiling", "restoring", "waiting", "training", "saving", "lost")


class Goodput:
    """Times one process's work on a stage.

    Args:
        folder: the stage's.
    """

    def __init__(self, folder: pathlib.Path):
        self.path, self.seconds = folder / "goodput.jsonl", dict.fromkeys(KINDS, 0.0)
        self.began, self.process = time.monotonic(), f"{os.uname().nodename}.{os.getpid()}.{time.time_ns()}"

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Adds the time inside to a kind."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[kind] += time.monotonic() - begun

    def lose(self, metrics: pathlib.Path, first: int) -> None:
        """Adds what was trained beyond step `first` and is done again, as a log of steps tells it."""
        times = dict(_walls(metrics)) if metrics.exists() else {}
        later = [wall for step, wall in times.items() if step > first]
        earlier = [wall for step, wall in times.items() if step <= first]
        if later:
            self.seconds["lost"] += max(later) - (max(earlier) if earlier else min(later))

    def write(self, step: int) -> None:
        """Writes the seconds so far; training is what no other kind took."""
        own = {kind: seconds for kind, seconds in self.seconds.items() if kind != "training"}
        here = time.monotonic() - self.began - sum(seconds for kind, seconds in own.items() if kind != "lost")
        line = {"process": self.process, "step": step} | {kind: round(own.get(kind, here), 3) for kind in KINDS}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def total(folder: pathlib.Path) -> dict[str, float]:
    """Seconds of all processes that worked on a stage, by kind."""
    last = {}
    path = folder / "goodput.jsonl"
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line is of a process that was killed
            line = json.loads(text)
            last[line["process"]] = {kind: float(line[kind]) for kind in KINDS}
    return {kind: round(sum(line[kind] for line in last.values()), 3) for kind in KINDS}


def _walls(path: pathlib.Path) -> Iterator[tuple[int, float]]:
    """(step, wall clock time) of every whole line of a metrics log."""
    for text in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            yield line["step"], line["wall"]
