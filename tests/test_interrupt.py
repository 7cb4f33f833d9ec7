"""A signal is obeyed whatever the main thread does, within a bounded time, with exit code 75."""

import signal
import subprocess
import sys
import time

import pytest

from dina import interrupt

HEAD = """
import hashlib, sys, time
from dina import config, interrupt
def main(argv):
    stopper = interrupt.Stopper(grace=0.3)
    interrupt.ABANDON_SECONDS = 0.3
    with interrupt.last_act(lambda: print('gave back', flush=True)):
        print('ready', flush=True)
        BODY
    return 0
config.run_main(main)
"""
BODIES = {
    "abandonable": ("with interrupt.abandonable('compiling'): time.sleep(60)", 75, "leaving compiling", False),
    "abandonable, in a library": ("with interrupt.abandonable('compiling'): hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)", 75, "", True),
    "a loop that saves in time": ("while not stopper.asked: time.sleep(0.01)\n        raise interrupt.Interrupted", 75, "saving", False),
    "a save that takes too long": ("hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)", 75, "not saved within 0.3 s", True),
    "entering a phase when asked": (
        "while not stopper.asked: time.sleep(0.01)\n        with interrupt.abandonable('x'): time.sleep(60)", 75, "", False),
    "done in time": ("while not stopper.asked: time.sleep(0.01)", 0, "saving", False),
}  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("body", BODIES)
def test_every_phase_ends_in_time(body, number):
    text, code, said, left = BODIES[body]
    command = [sys.executable, "-c", HEAD.replace("BODY", text)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)  # to be inside the phase
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == code and said in out, out
    assert ("gave back" in out) == left  # a process that unwinds does this by itself


def test_a_second_signal_ends_at_once_and_closing_gives_handlers_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stopper = interrupt.Stopper(grace=1e6)
    try:
        signal.raise_signal(signal.SIGTERM)
        assert stopper.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(interrupt.Interrupted), interrupt.abandonable("x"):
            raise AssertionError("the phase began")
    finally:
        stopper.close()
        interrupt._asked = False
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
