"""Being asked to stop: SIGTERM and SIGINT, obeyed in every phase within a bounded time.

Loops look at `Stopper.asked` between steps and save. Where there is nothing to save, because all that is worth keeping
is committed already (compiling, preparing data, tokenising, evaluating, sampling), `abandonable` makes the signal raise
Interrupted right there. Python runs signal handlers between two of its own instructions only, so a thread that the C
handler wakes sees to it that a long call into a library ends too: it leaves the process, whose commits are all atomic.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from dina.config import EXIT_RESTART

ABANDON_SECONDS = 5.0  # for a phase without a save to unwind by itself
GRACE_SECONDS = 30.0
_phases: list[str] = []  # abandonable ones that the main thread is in
_last_acts: list[Callable[[], None]] = []  # of a process that leaves at once, such as giving a lease back
_asked = False


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop, and what can be saved is saved. Exit code 75."""


class Stopper:
    """Turns SIGTERM and SIGINT into a flag; a second signal ends at once.

    Args:
        grace: seconds after which a process that still saves is left for its last committed step.
    """

    def __init__(self, grace: float = GRACE_SECONDS):
        global _asked
        _asked, self.asked, self.grace = False, False, grace
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._closed = threading.Event()
        threading.Thread(target=self._guard, name="stopper", daemon=True).start()

    def close(self) -> None:
        """Gives signals back to who had them."""
        if not self._closed.is_set():
            self._closed.set()
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            os.write(self._write, b"\0")

    def _ask(self, number, _):
        global _asked
        if self.asked:
            raise KeyboardInterrupt
        _asked = self.asked = True
        doing = f"leaving {_phases[-1]}" if _phases else "saving"
        print(f"dina: signal {number}: {doing}, then exiting with {EXIT_RESTART}", flush=True)
        if _phases:
            raise Interrupted

    def _guard(self) -> None:
        """Waits for a signal, in C if need be, and then for the main thread to end, for a bounded time."""
        while (byte := os.read(self._read, 1)) not in (bytes([signal.SIGTERM]), bytes([signal.SIGINT])):
            if self._closed.is_set() or not byte:
                return
        begun, limit = time.monotonic(), ABANDON_SECONDS if _phases else self.grace
        while time.monotonic() - begun < limit:
            if self._closed.wait(0.05):
                return
        what = f"{_phases[-1]} did not end" if _phases else "the state was not saved"
        leave(f"{what} within {limit:g} s of the signal; abandoned, what was last committed stands")


def leave(why: str, code: int = EXIT_RESTART) -> None:
    """Ends this process at once, with exit code 75 if no other is given, giving back what it holds."""
    print(f"dina: {why}", flush=True)
    for act in list(_last_acts):
        with contextlib.suppress(Exception):  # one that fails must not keep the process
            act()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def abandonable(phase: str) -> Iterator[None]:
    """While inside, a signal raises Interrupted at once; nothing in this phase may need a save."""
    _phases.append(phase)
    try:
        if _asked:
            raise Interrupted
        yield
    finally:
        _phases.pop()


@contextlib.contextmanager
def last_act(act: Callable[[], None]) -> Iterator[None]:
    """While inside, `act` is done should the process be left at once."""
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)
