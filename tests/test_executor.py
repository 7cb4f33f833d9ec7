"""One function over many items: in this process, and on a local Ray whose worker is killed."""

import functools
import importlib.util
import os
import pathlib
import signal

import pytest

from dina import executor
from dina.config import InputError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the package ray (extra `ray`) is not installed")


def _options(**changes):
    options = executor.default_config()
    options.update(changes)
    return options


def square(item):
    """Fails at 3."""
    if item == 3:
        raise ValueError("no three")
    return item * item


def square_unless_first(item, folder):
    """Dies as a preempted machine does, the first time that it is given 2."""
    marker = pathlib.Path(folder) / str(item)
    if item == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(item), os.getcwd(), os.getpid()


def test_an_error_ends_its_item_only():
    found = list(executor.run(_options(), square, [2, 3, 4]))
    assert [(o.item, o.value) for o in found] == [(2, 4), (3, None), (4, 16)]
    assert isinstance(found[1].error, ValueError) and found[0].error is found[2].error is None


def test_fatal_errors_end_everything():
    run = executor.run(_options(), square, [2, 3, 4], (ValueError,))
    assert next(run).value == 4
    with pytest.raises(ValueError, match="no three"):
        next(run)


def test_an_unknown_executor_is_named():
    with pytest.raises(InputError, match="'rya'.*did you mean 'ray'"):
        executor.run(_options(name="rya"), square, [1])


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_error_says_how_to_get_it():
    with pytest.raises(InputError, match="uv pip install ray"):
        list(executor.run(_options(name="ray"), square, [1]))


@needs_ray
def test_ray_runs_a_killed_task_again_and_reports_what_fails(tmp_path):
    options = _options(name="ray", cpus=1.0, retries=2)
    found = {o.item: o for o in executor.run(options, functools.partial(square_unless_first, folder=str(tmp_path)), [1, 2, 3])}
    assert (tmp_path / "2").exists()
    assert found[1].value[0] == 1 and found[2].value[0] == 4
    assert {found[i].value[1] for i in (1, 2)} == {os.getcwd()} and os.getpid() not in {found[i].value[2] for i in (1, 2)}
    assert isinstance(found[3].error, ValueError)


@needs_ray
def test_ray_gives_up_after_its_retries(tmp_path):
    options = _options(name="ray", cpus=1.0, retries=0)
    (outcome,) = executor.run(options, functools.partial(square_unless_first, folder=str(tmp_path)), [2])
    assert outcome.value is None and outcome.error is not None
