"""One job of a sweep: shared stages, or a cell from training to its measurement; and all jobs through an executor.

    <workdir>/shared/<key>/<stage>/      trained once
    <workdir>/cells/<key>/<stage>/       a cell's own stages; of a shared one its record and a link to its result
    <workdir>/cells/<key>/measured-<id>.json   what was measured, with what; written whole, last, by one replace

A job is a function of (sweep file, workdir, key) and ends at once where its result is there. Killed, it goes on from the
stage's last checkpoint; run twice at a time, the second waits for the first and finds its result.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from dina import checkpoint, executor, stages, tokenize, train
from dina.config import InputError, dump
from tools.sweep import plan as plans
from tools.sweep.plan import Cell, Plan, Shared

FORMAT = 1  # of what is measured; raise it when the same options give other numbers


class Patient:
    """A stopper that nobody asks to stop: Ray's workers end when they are killed."""

    asked = False


def measure_id(sweep) -> str:
    """Hash of how cells are measured."""
    return hashlib.sha256(f"{FORMAT}/{dump(sweep.measure)}".encode()).hexdigest()[:12]


def result_path(sweep, workdir: pathlib.Path, key: str) -> pathlib.Path:
    """Where the measurement of a cell stands once it is there."""
    return workdir / "cells" / key / f"measured-{measure_id(sweep)}.json"


def load_result(path: pathlib.Path) -> dict[str, Any] | None:
    """A finished cell's record, or None. Raises InputError for a damaged file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run the sweep again") from None


def run(spec: str, workdir: pathlib.Path, stopper=None) -> tuple[Plan, list[executor.Outcome]]:
    """Runs what is missing of a sweep: shared stages first, then cells.

    Args:
        spec: FILE[:variants and overrides].
        workdir: of the sweep.
        stopper: tells jobs in this process when to stop.

    Returns:
        (the plan, outcomes that failed). Cells whose shared stages failed are not tried.

    Raises:
        train.Interrupted: stopped in between; what was at work is saved.
    """
    plan = plans.load(spec)
    stopper = stopper or Patient()
    failed: list[executor.Outcome] = []
    for kind, items in (("shared", list(plan.shared)), ("cell", [cell.key for cell in plan.cells])):
        missing = [key for key in items if not _is_finished(plan, workdir, kind, key)]
        print(f"dina: sweep: {len(items)} {kind} jobs, {len(items) - len(missing)} finished before", flush=True)
        job = functools.partial(run_job, spec, str(workdir.absolute()), kind)
        if plan.sweep.executor.name == "local":
            job = functools.partial(job, stopper=stopper)
        begun = time.time()
        for number, outcome in enumerate(executor.run(plan.sweep.executor, job, missing, (train.Interrupted,)), 1):
            said = f"failed: {type(outcome.error).__name__}: {outcome.error}" if outcome.error else f"{outcome.value} s"
            name = plan.cell(outcome.item).group if kind == "cell" else ", ".join(plan.shared[outcome.item].identities)
            print(f"dina: sweep: {number} of {len(missing)} {kind}: {name} [{outcome.item}]: {said}; {time.time() - begun:.0f} s in all", flush=True)
            if outcome.error:
                failed.append(outcome)
                if not isinstance(outcome.error, InputError):  # ours: keep the trace
                    traceback.print_exception(outcome.error)
        if failed:
            break
    return plan, failed


def _is_finished(plan: Plan, workdir: pathlib.Path, kind: str, key: str) -> bool:
    if kind == "cell":
        return result_path(plan.sweep, workdir, key).is_file()
    return all((workdir / "shared" / key / name / "stage.json").is_file() for name in plan.shared[key].identities)


def run_job(spec: str, workdir: str, kind: str, key: str, stopper=None) -> float:
    """One job in this process; returns the seconds that it took. Raises what went wrong."""
    plan, root, begun = plans.load(spec), pathlib.Path(workdir), time.time()
    stopper = stopper or Patient()
    with held(root / {"shared": "shared", "cell": "cells"}[kind] / key):
        if kind == "shared":
            train_shared(plan.shared[key], root, plan.sweep.trained, stopper)
        elif not result_path(plan.sweep, root, key).is_file():
            run_cell(plan, plan.cell(key), root, stopper)
    return round(time.time() - begun, 1)


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Waits until no other process has `folder`, and has it; a file system without locks goes without."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".held").open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare(config, workdir: pathlib.Path):
    """The mesh, and the data where the experiment makes its own."""
    config.run.workdir = str(workdir)
    mesh = train.setup(config)
    stages.check(config, mesh)
    if "data" in config.jobs:
        tokenize.prepare_data(config)
    return mesh


def train_shared(shared: Shared, root: pathlib.Path, trained: str, stopper) -> None:
    """Trains shared stages to their end, but for those that another run, of workdir `trained`, has finished."""
    folder, mesh = root / "shared" / shared.key, None
    for name, identity in shared.identities.items():
        source = pathlib.Path(trained) / name
        record = checkpoint.finished(source) if trained else None
        if record is not None and record["identity"] == identity:
            shutil.copytree(source / "result", folder / name / "result", dirs_exist_ok=True)
            checkpoint.write_record(folder / name, record)
            continue
        mesh = mesh or _prepare(shared.config, folder)
        train.train_stage(shared.config, name, folder, mesh, stopper)
        if stopper.asked:
            raise train.Interrupted


def run_cell(plan: Plan, cell: Cell, root: pathlib.Path, stopper) -> None:
    """Trains a cell's own stages, measures it, and writes the record that makes it finished."""
    folder = root / "cells" / cell.key
    if cell.shared:
        take_over(cell.shared, root, folder)
    mesh = _prepare(cell.config, folder)
    for name in cell.stages:
        train.train_stage(cell.config, name, folder, mesh, stopper)
        if stopper.asked:
            raise train.Interrupted
    begun = time.time()
    options = plan.sweep.measure
    measured = plans.resolve(options.function, "measure.function")(cell.config, options, folder)
    seconds = {name: json.loads((folder / name / "stage.json").read_text())["seconds"] for name in cell.stages}
    record = {
        "key": cell.key, "group": cell.group, "axes": cell.axes, "seed": cell.seed, "measure": measure_id(plan.sweep),
        "seconds": seconds | {"measure": round(time.time() - begun, 1)}, "jax": jax.__version__, **measured,
    }  # fmt: skip
    write_whole(result_path(plan.sweep, root, cell.key), json.dumps(record))
    for name in cell.stages:  # finished stages need none
        shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)


def take_over(shared: Shared, root: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts shared stages into a cell's folder as imports: their records, and links to their results."""
    for name, identity in shared.identities.items():
        source = root / "shared" / shared.key / name
        record = checkpoint.finished(source, identity)
        if record is None:
            raise InputError(f"{source} is not finished; run the sweep again, it trains shared stages first")
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        link = target / "result"
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(source / "result", target), target_is_directory=True)
        # As tools.convert writes it; what stands in `vision` must be so in the cell as well.
        vision = {name: shared.config.vision[name].to_dict() for name in ("encoder", "bridge")} if "vision" in shared.config else {}
        checkpoint.write_record(target, record | {"model": None, "vocabulary": None, "vision": vision})


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file that is there whole or not at all; who writes the same twice changes nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
