"""Runs one function over many items: in this process, or as Ray tasks on as many machines as there are (DESIGN §4.16).

What a task makes must be durable and keyed by content: then a task that is retried after its worker died, or that runs
twice, changes nothing, and no scheduler of our own is needed. Items and functions travel by pickle, so the function is
one of a module (or a `functools.partial` of one), and all machines see the same project and files under the same paths.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections

from dina.config import InputError, check_name

# Set in every worker as they are here; Ray passes on none of them to another machine.
ENVIRONMENT = ("JAX_PLATFORMS", "DINA_DATA", "TF_CPP_MIN_LOG_LEVEL")


class Outcome(NamedTuple):
    """What became of one item: its value, or the error that ended it."""

    item: Any
    value: Any
    error: Exception | None


def default_config() -> ml_collections.ConfigDict:
    """`config.executor`: name is 'local' or 'ray'; the rest is Ray's: what a task occupies of a machine, and how often it
    is started again when its worker dies."""
    return ml_collections.ConfigDict({"name": "local", "cpus": 2.0, "gpus": 0.0, "retries": 3})


def run(
    options: ml_collections.ConfigDict, function: Callable[[Any], Any], items: Sequence[Any], fatal: tuple[type[Exception], ...] = ()
) -> Iterator[Outcome]:
    """Calls `function` once for each item, and yields what came of it, in the order in which they end.

    Args:
        options: of `default_config`.
        function: of one item; see the top of this file.
        items: anything that pickles.
        fatal: exceptions that end everything; any other one ends its own item only. 'local' alone raises them.

    Raises:
        InputError: there is no such executor, or Ray is not installed.
    """
    check_name(options.name, EXECUTORS, "config key executor.name:")
    return EXECUTORS[options.name](options, function, items, fatal)


def _local(options, function, items, fatal) -> Iterator[Outcome]:
    del options
    for item in items:
        try:
            yield Outcome(item, function(item), None)
        except fatal:
            raise
        except Exception as error:  # the next item may be fine; the caller reports this one
            yield Outcome(item, None, error)


def _ray(options, function, items, fatal) -> Iterator[Outcome]:
    """Tasks of the cluster that RAY_ADDRESS names, or of this machine."""
    del fatal
    if not items:
        return
    if importlib.util.find_spec("ray") is None:
        raise InputError("executor 'ray' needs the package ray, which is not installed; install it with `uv pip install ray`")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    paths = os.pathsep.join(dict.fromkeys(os.path.abspath(path) for path in (os.getcwd(), *sys.path) if path))
    variables = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    ray.init(include_dashboard=False, log_to_driver=True, runtime_env={"env_vars": variables | {"PYTHONPATH": paths}})
    try:
        task = ray.remote(_call).options(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=options.retries, retry_exceptions=False)
        waiting = {task.remote(function, item, os.getcwd()): item for item in items}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            item = waiting.pop(done)
            try:
                yield Outcome(item, ray.get(done), None)
            except ray.exceptions.RayTaskError as error:
                yield Outcome(item, None, error.cause if isinstance(error.cause, Exception) else error)
            except ray.exceptions.RayError as error:  # its worker died more often than it may
                yield Outcome(item, None, error)
    finally:
        ray.shutdown()


def _call(function, item, folder: str):
    os.chdir(folder)  # relative paths of configs mean what they mean to who started this
    return function(item)


EXECUTORS = {"local": _local, "ray": _ray}
