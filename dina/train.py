"""Trains any stage of any experiment: `python -m dina.train --config=experiments/X.py[:arg] --workdir=DIR`.

Runs the jobs of `config.jobs` in order: 'data' (raw records), stages, 'codes' (offline tokenisation; 'codes:images' and
'codes:speech' are one kind of it, as soon as its tokenizer is trained), and 'compile:STAGE' (fills the compile cache
while others still make what the stage needs). Run the same command again and it resumes: finished jobs are skipped, an
interrupted stage goes on from its last checkpoint with the batches it would have seen.

Exit codes: 0 done, 75 interrupted and saved (run it again), 2 bad input, 1 bug.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pathlib
import signal
import time
from collections.abc import Callable

import grain
import jax
import numpy as np

from dina import checkpoint, config as configs, metrics, optim, process, sharding, stages, step as steps
from dina.config import EXIT_RESTART, InputError
from dina.data import packing

REFUSED_IN_A_ROW = 8  # this many non-finite steps one after another stop the run
_STEPS: dict[tuple, Callable] = {}  # see compiled_step


class Interrupted(Exception):
    """The process was asked to stop, and its state is saved."""


class Stopper:
    """Turns SIGTERM and SIGINT into a flag that loops look at between steps; a second signal ends at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number, _):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(f"dina: signal {number}: saving, then exiting with {EXIT_RESTART}", flush=True)


def settle(config) -> None:
    """Applies process-wide settings: memory, compiler, compile cache."""
    if jax.config.jax_platforms == "cpu":  # neither is for other backends: they hold little memory here, and read the flag too
        process.keep_memory()
        process.set_cpu_effort(config.checkpoint.cpu_effort)
    cache = pathlib.Path(config.checkpoint.compile_cache).expanduser()
    if jax.default_backend() == "cpu" and hasattr(os, "sched_getaffinity"):
        # XLA cuts loops into as many pieces as the process has cores, and leaves that number out of the cache's key.
        cache /= f"{len(os.sched_getaffinity(0))}-cores"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def setup(config) -> jax.sharding.Mesh:
    """`settle`, and the mesh, of fake devices where it asks for more than a CPU is."""
    wanted = int(np.prod([size for size in config.mesh.values()] or [1]))
    if jax.config.jax_platforms == "cpu" and wanted > 1:
        jax.config.update("jax_num_cpu_devices", wanted)
    settle(config)
    return sharding.make_mesh(config.mesh.to_dict())


def prefetched(batches, first: int, last: int):
    """Batches of steps first..last-1, made by a background thread (grain)."""
    dataset = grain.MapDataset.range(first, last).map(batches.batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=3)))


@contextlib.contextmanager
def alone(folder: pathlib.Path):
    """Holds `folder` against a second run of the same command; it is free again however this process ends.

    The processes of one run share a folder, so the first of them holds it; a file system without locks goes without.

    Raises:
        InputError: another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            if jax.process_index() == 0:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is training in {folder}: wait until it ends, stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            print(f"dina: {folder} cannot be locked ({error}); see to it that one run at a time uses it", flush=True)
        yield


def train_stage(config, name: str, workdir: pathlib.Path, mesh, stopper: Stopper, profile=(-1, -1)) -> None:
    """Trains one stage to its end, or to an interruption; returns at once where it is finished.

    Args:
        config: the experiment.
        name: a key of config.stages.
        workdir: the experiment's folder.
        mesh: where to run.
        stopper: tells when to stop.
        profile: (first, last) step of a profiler trace.

    Raises:
        Interrupted: stopped, state saved.
        InputError: the folder holds another config's run, or another process is at work in it.
    """
    folder, identity = workdir / name, stages.stage_identity(config, name)
    if not checkpoint.finished(folder, identity):
        with alone(folder):
            if not checkpoint.finished(folder, identity):  # it may have ended since
                return _train(config, name, folder, identity, mesh, stopper, profile)
    print(f"dina: {name}: finished before", flush=True)


def _train(config, name, folder, identity, mesh, stopper, profile) -> None:
    stage, workdir, begun = config.stages[name], folder.parent, time.time()
    task = stages.make_task(config, name)
    saves = checkpoint.Checkpoints(folder, identity, config.checkpoint.keep)
    with jax.set_mesh(mesh):
        first, seconds, state, batches = _open(config, name, workdir, task, saves, mesh)
        step = compiled_step(config, name, task, mesh)
        log = metrics.Log(folder, name, stage.steps, first, config.log.arrays_every)
        state = _loop(config, stage, state, step, batches, first, mesh, log, saves, stopper, profile, begun - seconds)
        record = {
            "stage": name, "task": stage.task, "identity": identity, "steps": stage.steps,
            "examples": stage.steps * stage.batch, "seconds": round(time.time() - begun + seconds, 2),
            "peak_memory_mib": round(metrics.peak_memory_mib()), "jax": jax.__version__,
            "parameters": {part: _count(tree) for part, tree in state["params"].items()},
            "trained_parameters": _count(optim.split(state["params"], stage.train)[0]),
        }
        saves.close()
        checkpoint.finish(folder, steps.result(state), record)
    log.close()


def compiled_step(config, name: str, task, mesh):
    """The jitted train step of stage `name`; stages in a row that compute the same share one, traced and compiled once.

    They do if they differ only in their data, their length and their learning rate (which is an argument of the step).
    Only the newest step is kept: its program takes memory.
    """
    stage = config.stages[name].to_dict()
    for field in ("steps", "init_from", "after"):
        stage.pop(field)
    for field in ("learning_rate", "schedule", "warmup_steps", "final_fraction"):
        stage["optimizer"].pop(field)
    if config.stages[name].task == "language":  # all its options are about data; of what they do to shapes, jit knows
        stage.pop("options")
    sections = {section: config[section].to_dict() for section in ("text", *stages.TASKS[stage["task"]][1])}
    key = repr((config.seed, stage, sections)), mesh
    if key not in _STEPS:
        _STEPS.clear()
        step = steps.make_train_step(task, config.stages[name], config.seed, mesh)
        _STEPS[key] = jax.jit(step, donate_argnums=0)
    return _STEPS[key]


def compile_stage(config, name: str, workdir: pathlib.Path, mesh) -> None:
    """Compiles what stage `name` will run into the compile cache, from shapes alone: a language stage needs no codes.

    The program is cut for this process's cores, as `settle` says: compile with as many as the stage will have.
    """
    stage, begun = config.stages[name], time.time()
    if checkpoint.finished(workdir / name, stages.stage_identity(config, name)):
        return
    task = stages.make_task(config, name)
    with jax.set_mesh(mesh):
        abstract = steps.abstract_state(task, stage, mesh)
        blank = packing.blank_batch(config, stage) if stage.task == "language" else task.batches().batch(0)
        batch, rate = sharding.put_batch(blank, mesh), np.float32(0)
        compiled_step(config, name, task, mesh).lower(abstract, batch, rate).compile()
        if stages.starts_fresh(config, name, abstract):
            init, key = stages.initialiser(config, task, abstract)
            init.lower(key).compile()
    print(f"dina: {name}: compiled in {time.time() - begun:.0f} s", flush=True)


def _count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _open(config, name, workdir, task, saves, mesh):
    """Restores the stage's newest state, or initialises it; returns (first step, seconds spent, state, batches)."""
    stage = config.stages[name]
    batches = task.batches()
    abstract = steps.abstract_state(task, stage, mesh)
    latest = saves.latest()
    if latest is not None:
        state, meta = saves.restore(latest, abstract)
        print(f"dina: {name}: resumed at step {latest}", flush=True)
        return latest, meta.get("seconds", 0.0), state, batches
    variables = stages.initial_variables(config, name, task, workdir, abstract)
    stream = (batches.batch(i) for i in range(stage.steps))
    variables = task.start(variables, stream, jax.random.fold_in(jax.random.key(config.seed), 2**31 - 2))
    state = steps.init_state(task, stage, variables)
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)
    return 0, 0.0, state, batches


def _loop(config, stage, state, step, batches, first, mesh, log, saves, stopper, profile, began):
    """Steps first..stage.steps-1; dispatches step n, then logs step n-1, so the device never waits for the host."""
    stream = prefetched(batches, first, stage.steps)
    pending, refused = None, 0
    rates = np.asarray(optim.schedule(stage.optimizer, stage.steps)(np.arange(stage.steps)), np.float32)
    for n in range(first, stage.steps):
        if n == profile[0]:
            jax.profiler.start_trace(str(log.path.parent / "profile"))
        host = next(stream)
        state, values = step(state, sharding.put_batch(host, mesh), rates[n])
        if pending is not None:
            refused = _write(config, stage, log, *pending, refused)
        pending = (n, values, host["example"])
        log.advance()
        if n + 1 == profile[1]:
            jax.block_until_ready(state["step"])
            jax.profiler.stop_trace()
        done = n + 1
        if stopper.asked or (done % config.checkpoint.every == 0 and done < stage.steps):
            saves.save(done, state, done * stage.batch, time.time() - began)
        if stopper.asked:
            saves.close()
            log.close()
            raise Interrupted
    if pending is not None:
        _write(config, stage, log, *pending, refused)
    return state


def _write(config, stage, log, n, values, examples, refused) -> int:
    """Logs step n where due; returns how many steps in a row were refused, and stops the run at too many."""
    if (n + 1) % config.log.every and n + 1 != stage.steps and n:
        return refused
    values = jax.device_get(values)
    refused = refused + 1 if values["refused"] else 0
    log.write(n + 1, values, stage.batch)
    if refused >= REFUSED_IN_A_ROW:
        raise RuntimeError(
            f"{refused} logged steps in a row had a non-finite loss or gradient; the last one is step {n}, examples "
            f"{examples.min()}..{examples.max()}; the state is as it was before them"
        )
    return refused


def run(config, workdir: pathlib.Path, profile=(-1, -1)) -> int:
    """Runs all jobs of `config.jobs`; returns the exit code."""
    from dina import tokenize  # imports the tokenizers' modules, which plain stages do not need

    workdir.mkdir(parents=True, exist_ok=True)
    with config.unlocked():
        config.run.workdir = str(workdir)
    mesh = setup(config)
    stages.check(config, mesh)
    stopper = Stopper()
    try:
        for job in config.jobs:
            if job == "data":
                tokenize.prepare_data(config)
            elif job == "codes":
                tokenize.tokenize(config, workdir)
            elif job.startswith("codes:"):
                tokenize.tokenize(config, workdir, [job.removeprefix("codes:")])
            elif job.startswith("compile:"):
                compile_stage(config, job.removeprefix("compile:"), workdir, mesh)
            else:
                train_stage(config, job, workdir, mesh, stopper, profile)
            if stopper.asked:
                raise Interrupted
    except Interrupted:
        return EXIT_RESTART
    return 0


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dina.train", description=__doc__)
    parser.add_argument("--config", required=True, help="experiments/X.py[:variant,key=value,...]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--profile", default="-1:-1", help="first:last step of an xprof trace")
    args = parser.parse_args(argv)
    try:
        first, last = (int(n) for n in args.profile.split(":"))
    except ValueError:
        raise InputError(f"--profile={args.profile!r} is not FIRST:LAST, two step numbers") from None
    return run(configs.load(args.config), args.workdir, (first, last))


if __name__ == "__main__":
    configs.run_main(main)
