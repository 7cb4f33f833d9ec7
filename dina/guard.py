"""What a run does about steps that went wrong: non-finite ones, spikes of the loss, and steps that never end.

A non-finite step has changed nothing (dina/step.py): it can be skipped as it is. A spike has: undoing it means going
back to a good checkpoint and leaving that batch out, so that the batch of step n is the n-th of those that are not left
out. Every event goes to the stage's `events.jsonl` with the identity of its batch.
"""

from __future__ import annotations

import collections
import faulthandler
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence

import ml_collections
import numpy as np

from dina.config import InputError

POLICIES = {"nonfinite": ("skip", "stop", "rewind"), "spike": ("ignore", "stop", "rewind")}


def default_config() -> ml_collections.ConfigDict:
    """`config.guard`; what a config leaves out is as here.

    nonfinite    'skip', 'stop' or 'rewind'
    patience     this many non-finite steps one after another stop a run that skips them
    spike        'ignore', 'stop' or 'rewind', where the loss is above `factor` times the median of `window` steps before
    rewinds      this many in one process, then it stops
    hang         seconds without a step after which all stacks are printed, 0 = never
    """
    return ml_collections.ConfigDict({
        "nonfinite": "skip", "patience": 8, "spike": "ignore", "factor": 3.0, "window": 32, "rewinds": 8, "hang": 900.0,
    })  # fmt: skip


class Rewind(Exception):
    """The run goes back to its last good checkpoint and leaves a batch out."""

    def __init__(self, batch: int):
        super().__init__(batch)
        self.batch = batch


class Stopped(RuntimeError):
    """The policy says that a person must look at this; the message names the batch."""


class Guard:
    """Watches one stage's steps.

    Args:
        folder: the stage's.
        options: of `default_config`.

    Raises:
        InputError: there is no such policy.
    """

    def __init__(self, folder: pathlib.Path, options: ml_collections.ConfigDict):
        for key, known in POLICIES.items():
            if options[key] not in known:
                raise InputError(f"config key guard.{key}: {options[key]!r} is none of {', '.join(known)}")
        self.options, self.path = options, folder / "events.jsonl"
        self.losses: collections.deque[float] = collections.deque(maxlen=options.window)
        self.refused, self.rewinds, self._armed = 0, 0, 0.0

    def look(self, step: int, loss: float, refused: bool, batch: int, examples: np.ndarray) -> None:
        """Judges a step by its loss.

        Raises:
            Rewind, Stopped: as the policies say.
        """
        if refused:
            self.refused += 1
            self._act("nonfinite", step, loss, batch, examples)
            return
        self.refused = 0
        usual = statistics.median(self.losses) if len(self.losses) == self.losses.maxlen else np.inf
        if self.options.spike != "ignore" and loss > self.options.factor * usual:
            self._act("spike", step, loss, batch, examples)
        self.losses.append(loss)

    def _act(self, kind: str, step: int, loss: float, batch: int, examples: np.ndarray) -> None:
        policy = self.options[kind]
        where = f"step {step}, batch {batch}, examples {examples.min()}..{examples.max()}"
        self.note(kind, policy=policy, step=step, loss=str(loss), batch=batch, examples=[int(examples.min()), int(examples.max())])
        if policy == "stop":
            raise Stopped(f"{kind} loss {loss} at {where}; stopped as guard.{kind} says; run again to go on from the last checkpoint")
        if policy == "rewind":
            if self.rewinds >= self.options.rewinds:
                raise Stopped(f"{kind} loss {loss} at {where}, after {self.rewinds} rewinds (guard.rewinds)")
            self.rewinds += 1
            self.refused = 0
            self.losses.clear()
            raise Rewind(batch)
        if self.refused >= self.options.patience:
            raise Stopped(f"{self.refused} steps in a row had a non-finite loss or gradient; the last one is {where}; "
                          "the state is as it was before them")

    def note(self, event: str, **fields) -> None:
        """Writes and prints an event."""
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "wall": round(time.time(), 3)} | fields) + "\n")
        print(f"dina: {self.path.parent.name}: {event}: {', '.join(f'{k} {v}' for k, v in fields.items())}", flush=True)

    def alive(self) -> None:
        """Says that a step was made: stacks are printed `hang` seconds after the last of these."""
        if self.options.hang and time.monotonic() - self._armed > min(1.0, self.options.hang / 10):
            self._armed = time.monotonic()
            faulthandler.dump_traceback_later(self.options.hang, repeat=True, file=sys.__stderr__)

    def rest(self) -> None:
        """No more steps are expected."""
        faulthandler.cancel_dump_traceback_later()


def batch_of(step: int, skipped: Sequence[int]) -> int:
    """The number of the batch that step `step` takes: the batches that are left out are nobody's."""
    for number in sorted(skipped):
        step += number <= step
    return step
