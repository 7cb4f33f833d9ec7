"""How much memory a piece of work needs: resident bytes at its peak over those before it. Linux; imports nothing else, for the
peer's interpreter loads it too."""

import ctypes
import pathlib
from collections.abc import Callable
from typing import Any

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def above(run: Callable[[], Any]) -> tuple[Any, int | None]:
    """The work's result and its peak in bytes over the memory held before; None where the system does not count it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed is not held
        CLEAR.write_text("5")  # the peak starts from now
        start = _field("VmRSS")
    except (OSError, AttributeError):
        return run(), None
    return run(), _field("VmHWM") - start


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
