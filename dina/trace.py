"""A window of training steps, traced with JAX's profiler: `--profile=FIRST:LAST` (xprof and TensorBoard read it)."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from dina.config import InputError


class Window(NamedTuple):
    """Steps first..last-1, counted from 0; none where they are the same."""

    first: int = 0
    last: int = 0


def parse(text: str) -> Window:
    """'10:15' as a Window, '' as an empty one. Raises InputError."""
    if not text:
        return Window()
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise InputError(f"--profile={text!r} is not FIRST:LAST, two steps counted from 0, the first one before the last")
    return Window(int(first), int(last))


class Tracer:
    """Traces a stage's steps of a window into a folder.

    Args:
        window: what to trace; steps that this process does not make are left out.
        folder: gets the trace; None = another host's process traces.
    """

    def __init__(self, window: Window, folder: pathlib.Path | None):
        self.window, self.folder, self.running = window, folder, False

    @contextlib.contextmanager
    def step(self, number: int, result: list[Any]) -> Iterator[None]:
        """Around step `number`, whose arrays the block adds to `result`."""
        inside = self.folder is not None and self.window.first <= number < self.window.last
        if inside and not self.running:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number) if inside else contextlib.nullcontext():
            yield
        if self.running and number + 1 >= self.window.last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running, so that it is written."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            print(f"dina: trace of steps {self.window.first} to {self.window.last - 1} in {self.folder}", flush=True)
