"""Policies about bad steps, and which batch a step takes when some are left out."""

import json

import numpy as np
import pytest
from hypothesis import given, strategies as st

from dina import guard
from dina.config import InputError

EXAMPLES = np.arange(8, 16)


def _guard(folder, **options):
    made = guard.default_config()
    made.update(options)
    return guard.Guard(folder, made)


@given(st.sets(st.integers(0, 40), max_size=12))
def test_steps_take_all_batches_that_are_not_left_out_in_order(skipped):
    taken = [guard.batch_of(step, tuple(skipped)) for step in range(60)]
    assert taken == [number for number in range(60 + len(skipped)) if number not in skipped][:60]


def test_skipped_steps_are_noted_and_too_many_in_a_row_stop(tmp_path):
    watch = _guard(tmp_path, patience=3)
    for refused in (True, True, False, True, True):
        watch.look(1, float("nan") if refused else 1.0, refused, 2, EXAMPLES)
    with pytest.raises(guard.Stopped, match="3 steps in a row.*step 7, batch 9, examples 8..15"):
        watch.look(7, float("inf"), True, 9, EXAMPLES)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len(events) == 5 and events[-1]["event"] == "nonfinite" and events[-1]["batch"] == 9
    assert events[-1]["examples"] == [8, 15] and events[-1]["loss"] == "inf"


@pytest.mark.parametrize("kind", ["nonfinite", "spike"])
def test_stop_and_rewind_name_the_batch(tmp_path, kind):
    loss, refused = (float("nan"), True) if kind == "nonfinite" else (9.0, False)
    for policy, raised in (("stop", guard.Stopped), ("rewind", guard.Rewind)):
        watch = _guard(tmp_path, **{kind: policy}, window=4, factor=3.0, rewinds=1)
        for step in range(4):
            watch.look(step, 2.9, False, step, EXAMPLES)
        watch.look(4, 8.6, False, 4, EXAMPLES)  # 2.97 times the median
        with pytest.raises(raised) as error:
            watch.look(5, loss, refused, 6, EXAMPLES)
        assert "batch 6" in str(error.value) if policy == "stop" else error.value.batch == 6
    if kind == "nonfinite":
        with pytest.raises(guard.Stopped, match="after 1 rewinds"):
            watch.look(5, loss, refused, 7, EXAMPLES)


def test_a_spike_needs_a_full_window_and_can_be_ignored(tmp_path):
    for options in ({"spike": "stop", "window": 8}, {"spike": "ignore", "window": 2}):
        watch = _guard(tmp_path, **options)
        for loss in (1.0, 1.0, 1.0, 100.0):
            watch.look(0, loss, False, 0, EXAMPLES)


def test_a_policy_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match="guard.spike: 'skip' is none of ignore, stop, rewind"):
        _guard(tmp_path, spike="skip")


def test_stacks_of_a_run_that_hangs_are_printed(tmp_path):
    import subprocess
    import sys

    code = """
import pathlib, sys, time
from dina import guard
options = guard.default_config()
options.hang = 0.2
watch = guard.Guard(pathlib.Path(sys.argv[1]), options)
def stuck():
    time.sleep(1.0)
watch.alive()
stuck()
watch.rest()
time.sleep(0.5)
print('end', file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    before, _, after = done.stderr.partition("end")
    assert done.returncode == 0 and "in stuck" in before and "Timeout (0:00:00.2" in before, done.stderr
