"""Runs jobs of an experiment in a process of their own, forked from one that has imported everything, and ends them badly.

The parent must not have used a device: a fork of one that has is not whole.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from dina import checkpoint, config as configs, tokenize, train  # noqa: F401  all that a child needs, imported once
from tools.faults import shim

# Threads of libraries that have been imported and not used hold no locks.
warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
LIMIT_SECONDS = 300.0
LOGGED_ONLY = ("time", "wall", "rows_per_second")  # of a metrics line, not of the result


@dataclasses.dataclass(frozen=True)
class Storage:
    """Makes an operation on files go wrong; see shim.arm. `below` is relative to the job's own folder."""

    action: str
    number: int = 1
    classes: str = "wc"
    below: str = ""
    millis: int = 0


@dataclasses.dataclass(frozen=True)
class Hook:
    """Does something to the process before the `call`-th call of a function: a signal's name, 'clock' or 'nan'.

    Attributes:
        target: 'module:attribute.path'.
        delay: seconds after the call began, for what must happen inside of it.
    """

    target: str
    call: int
    action: str
    delay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What is run, and where: one job of an experiment's list in a work folder of its own."""

    config: ml_collections.ConfigDict
    name: str
    workdir: pathlib.Path

    @property
    def folder(self) -> pathlib.Path:
        """The only place that the job writes to."""
        return own_folder(self.config, self.name, self.workdir)


def own_folder(config, name: str, workdir: pathlib.Path) -> pathlib.Path:
    """Where a job writes."""
    return workdir / {"data": "data"}.get(name, "codes" if name.startswith("codes") else name)


class Process:
    """One run of a job, with at most one thing that goes wrong.

    Attributes:
        code: how it ended, once `wait` returned: an exit code, or the negative number of a signal.
    """

    _numbers = iter(range(10**9))

    def __init__(self, job: Job, storage: Storage | None = None, hook: Hook | None = None):
        self.job, number = job, next(self._numbers)
        job.workdir.mkdir(parents=True, exist_ok=True)
        self.log = job.workdir / f"run{number}.log"
        self.report = job.workdir / f"fired{number}"
        self.began, self.code = time.monotonic(), None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(job, self.log, self.report, storage, hook)

    def signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = LIMIT_SECONDS) -> int:
        """Waits for the end; kills a process that takes longer."""
        while self.poll() is None:
            if time.monotonic() - self.began > seconds:
                self.signal(signal.SIGKILL)
            time.sleep(0.02)
        return self.code

    def fired(self) -> bool:
        """Whether what was to go wrong did."""
        return self.report.exists() and "FIRED" in self.report.read_text()

    def said(self) -> str:
        """All that it printed."""
        return self.log.read_text(errors="replace")


def _child(job: Job, log: pathlib.Path, report: pathlib.Path, storage, hook) -> None:
    """Never returns."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["dina.train"]
        with job.config.unlocked():
            job.config.jobs = (job.name,)
            if job.name == "data":
                job.config.run.data_dir = str(job.folder)
        settle = train.settle

        def settle_all(config):
            settle(config)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # hundreds of processes compile the same

        train.settle = settle_all
        if hook is not None:
            _install(hook, report)
        if storage is not None:
            shim.arm(job.folder / storage.below, storage.classes, storage.action, storage.number, report, storage.millis)
        configs.run_main(lambda _: train.run(job.config, job.workdir), [])
    except SystemExit as end:
        code = int(end.code or 0)
        if code == 0:
            try:
                write_end(job)
            except Exception:  # the parent finds no end
                traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _install(hook: Hook, report: pathlib.Path) -> None:
    """Puts a hook into this process."""
    module, _, path = hook.target.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        if next(calls) == hook.call:
            report.write_text(f"FIRED {hook.action}\n")
            if hook.action == "clock":
                now = time.time
                time.time = lambda: now() + 86400.0 * 365
            elif hook.action == "nan":
                args = (_poisoned(args[0]), *args[1:])
            elif hook.delay:
                threading.Timer(hook.delay, os.kill, (os.getpid(), getattr(signal, hook.action))).start()
            else:
                os.kill(os.getpid(), getattr(signal, hook.action))
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _poisoned(batch: dict) -> dict:
    """A batch with one number of it not a number."""
    name = next(name for name, array in sorted(batch.items()) if np.issubdtype(array.dtype, np.floating))
    array = batch[name].copy()
    array.flat[int(np.flatnonzero(array)[0]) if array.any() else 0] = np.nan
    return batch | {name: array}


# ------------------------------------------------------------------------------------------------------- how it ended
def write_end(job: Job) -> None:
    """Writes what the job left, as hashes, to `end.json` of its work folder."""
    (job.workdir / "end.json").write_text(json.dumps(end_of(job)))


def end_of(job: Job) -> dict:
    """What the job left: of a stage the hash of its result and every logged number of each step, else hashes of files."""
    if job.name not in job.config.stages:
        paths = sorted(path for path in job.folder.rglob("*") if path.is_file() and "array_record" in path.name)
        return {"files": {path.relative_to(job.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}}
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(checkpoint.result(job.folder)):
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    lines = [json.loads(text) for text in (job.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [{key: value for key, value in line.items() if key not in LOGGED_ONLY} for line in lines]
    return {"state": found.hexdigest(), "steps": steps}


def read_end(workdir: pathlib.Path) -> dict | None:
    """What `write_end` wrote, None if the job never came so far."""
    path = workdir / "end.json"
    return json.loads(path.read_text()) if path.exists() else None


def differences(found: dict | None, wanted: dict) -> Sequence[str]:
    """What is not equal."""
    if found is None:
        return ["it did not end"]
    return [key for key in wanted if found.get(key) != wanted[key]]
