"""Trains any stage of any experiment: `python -m dina.train --config=experiments/X.py[:arg] --workdir=DIR`.

Runs the jobs of `config.jobs` in order: 'data' (raw records), stages, 'codes' (offline tokenisation; 'codes:images' and
'codes:speech' are one kind of it, as soon as its tokenizer is trained), and 'compile:STAGE' (fills the compile cache
while others still make what the stage needs). Run the same command again and it resumes: finished jobs are skipped, an
interrupted stage goes on from its last checkpoint with the batches it would have seen.

A signal is obeyed in every phase (dina/interrupt.py), a folder is held by a lease (dina/lease.py), damaged checkpoints
are reported and passed over (dina/checkpoint.py); docs/reliability.md says what may be relied on.

On several hosts the same command runs on each, with --coordinator=auto, or --coordinator=HOST:PORT --processes=N
--process=I (dina/hosts.py); all see the same workdir.

Exit codes: 0 done, 75 interrupted and saved (run it again), 2 bad input, 1 bug.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence

import grain
import jax
import ml_collections
import numpy as np

from dina import checkpoint, config as configs, files, goodput, guard, hosts, lease as leases, metrics, optim, process, sharding, stages, step as steps, trace
from dina.config import EXIT_DONE, EXIT_RESTART, InputError
from dina.data import packing
from dina.interrupt import Interrupted, Stopper, abandonable

_STEPS: dict[tuple, Callable] = {}  # see compiled_step


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


def setup(config, processes: int = 1) -> jax.sharding.Mesh:
    """`settle`, and the mesh, of fake devices where it asks for more than the CPUs of so many processes are.

    Raises:
        InputError: the mesh does not go with the processes or their devices.
    """
    wanted = int(np.prod([size for size in config.mesh.values()] or [1]))
    if jax.config.jax_platforms == "cpu" and wanted > 1:
        if wanted % processes:
            raise InputError(f"config.mesh {config.mesh.to_dict()}: {wanted} devices cannot be shared evenly by {processes} processes")
        jax.config.update("jax_num_cpu_devices", wanted // processes)
    settle(config)
    hosts.check()
    return sharding.make_mesh(config.mesh.to_dict())


def options(config, section: str, defaults: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A section of the config over its defaults, so that configs need not name what they leave as it is.

    Raises:
        InputError: the section has a key that there is not.
    """
    given = config.get(section, ml_collections.ConfigDict()).to_dict()
    for key in given:
        configs.check_name(key, defaults, "config key", f"{section}.{key}" if key not in defaults else "")
    return ml_collections.ConfigDict(defaults.to_dict() | given)


def prefetched(batches, first: int, last: int, skipped: Sequence[int] = (), threads: int = 1, rows: np.ndarray | None = None):
    """Batches of steps first..last-1, made by background threads (grain); those in `skipped` are left out.

    Of each, `rows` only, where they are given.
    """
    turn = threading.Lock()  # a plan of packs remembers what it has planned

    def make(step):
        with turn:
            number = guard.batch_of(int(step), skipped)
            return batches.batch(number) if rows is None else batches.part(number, rows)

    dataset = grain.MapDataset.range(first, last).map(make)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=3 if threads else 0)))


def train_stage(config, name: str, workdir: pathlib.Path, mesh, stopper: Stopper, profile: trace.Window = trace.Window()) -> None:
    """Trains one stage to its end, or to an interruption; returns at once where it is finished and its result is whole.

    Args:
        config: the experiment.
        name: a key of config.stages.
        workdir: the experiment's folder.
        mesh: where to run.
        stopper: tells when to stop.
        profile: steps to trace.

    Raises:
        Interrupted: stopped, state saved.
        InputError: the folder holds another config's run, or another process is at work in it.
    """
    folder, identity = workdir / name, stages.stage_identity(config, name)
    if not _finished(config, folder, identity):
        with leases.alone(folder, options(config, "checkpoint", checkpoint.default_config()).lease) as lease:
            if not _finished(config, folder, identity, redo=True):  # it may have ended since
                return _train(config, name, folder, identity, mesh, stopper, profile, lease)
    print(f"dina: {name}: finished before", flush=True)


def _finished(config, folder, identity, redo=False) -> bool:
    """Whether a stage's result is there and whole; with `redo`, a damaged one is made again from the last checkpoint."""
    return hosts.agreed(lambda: _whole(config, folder, identity, redo))


def _whole(config, folder, identity, redo) -> bool:
    try:
        record = checkpoint.finished(folder, identity, config)
        if record is not None:
            checkpoint.check_result(folder, record)
        return record is not None
    except (checkpoint.DamagedRecord, checkpoint.Damaged) as error:
        if redo:
            checkpoint.redo(folder, str(error))
        return False


def _train(config, name, folder, identity, mesh, stopper, profile, lease) -> None:
    stage, keep = config.stages[name], options(config, "checkpoint", checkpoint.default_config())
    own = hosts.own_folder(folder)
    task, times = stages.make_task(config, name), goodput.Goodput(own)
    tracer = trace.Tracer(profile, folder / "profile" if hosts.first() else None)
    saves = checkpoint.Checkpoints(folder, identity, keep.keep, keep.keep_every, keep.keep_best, lease)
    watch = guard.Guard(own, options(config, "guard", guard.default_config()))
    begun, skipped, state = time.monotonic(), set(), None
    with jax.set_mesh(mesh), contextlib.closing(saves):
        while state is None:
            with abandonable(f"restoring {name}"), times.spent("restoring"):
                first, meta, opened, batches = _open(config, name, folder.parent, task, saves, mesh)
                step = compiled_step(config, name, task, mesh)
            skipped |= set(meta.get("skipped", ()))
            times.lose(folder / "metrics.jsonl", first)
            log = None
            if hosts.first():
                checkpoint.write_config(folder, config)
                log = metrics.Log(folder, name, stage.steps, first, config.log.arrays_every)
            loop = Loop(config, stage, keep, lease, log, saves, times, watch, begun - meta.get("seconds", 0.0), tuple(sorted(skipped)))
            try:
                with contextlib.closing(log) if log else contextlib.nullcontext(), contextlib.closing(tracer):
                    state = loop.run(opened, step, batches, first, mesh, stopper, tracer)
            except guard.Rewind as event:
                skipped.add(event.batch)
                with contextlib.suppress(checkpoint.SaveFailed):
                    saves.wait()
            finally:
                watch.rest()
        with contextlib.suppress(checkpoint.SaveFailed):  # the result itself is what counts now
            saves.wait()
        times.write(stage.steps)
        record = {
            "stage": name, "task": stage.task, "identity": identity, "steps": stage.steps,
            "examples": stage.steps * stage.batch, "seconds": round(time.monotonic() - loop.began, 2),
            "peak_memory_mib": round(metrics.peak_memory_mib()), "jax": jax.__version__,
            "parameters": {part: _count(tree) for part, tree in state["params"].items()},
            "trained_parameters": _count(optim.split(state["params"], stage.train)[0]),
            "skipped_batches": sorted(skipped), "goodput": goodput.total(folder),
        }
        if lease is not None:
            lease.check()
        try:
            checkpoint.finish(folder, steps.result(state), record)
        except (OSError, ValueError) as error:  # what the file system or tensorstore says of it
            raise InputError(f"{folder}: the result could not be written ({error}); make room, and run the same again") from error


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
        _STEPS[key] = jax.jit(step, donate_argnums=0, compiler_options=steps.compiler_options(mesh))
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
    """Restores the stage's newest good state, or initialises it; returns (first step, manifest or {}, state, batches)."""
    stage = config.stages[name]
    batches = task.batches()
    abstract = steps.abstract_state(task, stage, mesh)
    latest = saves.latest()
    if latest is not None:
        state, meta = saves.restore(latest, abstract)
        print(f"dina: {name}: resumed at step {latest}", flush=True)
        return latest, meta, state, batches
    variables = stages.initial_variables(config, name, task, workdir, abstract)
    stream = (batches.batch(i) for i in range(stage.steps))
    variables = task.start(variables, stream, jax.random.fold_in(jax.random.key(config.seed), 2**31 - 2))
    state = steps.init_state(task, stage, variables)
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)
    return 0, {}, state, batches


@dataclasses.dataclass
class Loop:
    """The steps of one stage, from where it was opened to its end. `began` is when all of its work would have begun."""

    config: ml_collections.ConfigDict
    stage: ml_collections.ConfigDict
    keep: ml_collections.ConfigDict
    lease: leases.Lease | None
    log: metrics.Log | None
    saves: checkpoint.Checkpoints
    times: goodput.Goodput
    watch: guard.Guard
    began: float
    skipped: tuple[int, ...]

    def run(self, state, step, batches, first, mesh, stopper, tracer):
        """Dispatches step n, then looks at step n-1, so the device never waits for the host; returns the last state."""
        stage, pending = self.stage, None
        rows, vote = hosts.own_rows(mesh, stage.batch), hosts.Vote(mesh)
        whole = len(rows) == stage.batch
        put = sharding.put_batch if whole else functools.partial(hosts.put_rows, rows, stage.batch)
        stream = prefetched(batches, first, stage.steps, self.skipped, rows=None if whole else rows)
        rates = np.asarray(optim.schedule(stage.optimizer, stage.steps)(np.arange(stage.steps)), np.float32)
        for n in range(first, stage.steps):
            with self.times.spent("waiting"):
                host = next(stream)
            with tracer.step(n, made := []), self._compiling() if n == first else contextlib.nullcontext():
                state, values = step(state, put(host, mesh), rates[n])
                made.append(values)
            if pending is not None:
                self.look(*pending)
            pending = (n, values, host["example"])
            if self.log:
                self.log.advance()
            asked = vote.cast(stopper.asked)
            if asked or ((n + 1) % self.keep.every == 0 and n + 1 < stage.steps):
                self.save(state, self.look(*pending), n + 1, wait=asked)
                pending = None
            if asked:
                raise Interrupted
        if pending is not None:
            self.look(*pending)
        return state

    def look(self, n: int, values, examples) -> dict[str, float]:
        """Judges and logs step n; returns its loss. Raises as `guard.Guard.look`, or Fenced."""
        if self.lease is not None:
            self.lease.check()
        loss, refused = (float(x) for x in jax.device_get((values["loss"], values["refused"])))
        self.watch.alive()
        if self.log and ((n + 1) % self.config.log.every == 0 or n + 1 == self.stage.steps or n == 0):
            self.log.write(n + 1, jax.device_get(values), self.stage.batch)
        self.watch.look(n, loss, bool(refused), guard.batch_of(n, self.skipped), examples)
        return {key: float(value) for key, value in jax.device_get(values).items() if np.ndim(value) == 0} if self.keep.keep_best else {}

    def save(self, state, values: dict[str, float], done: int, wait: bool) -> None:
        """Starts a save, and waits for it if asked; one that failed is said, and the next is tried when it is due."""
        with self.times.spent("saving"):
            try:
                self.saves.save(done, state, done * self.stage.batch, time.monotonic() - self.began, values, self.skipped)
                if wait:
                    self.saves.wait()
                    hosts.agreed(lambda: None)  # process 0 has committed
            except checkpoint.SaveFailed as error:
                self.watch.note("save failed", step=done, error=str(error))
        self.times.write(done)

    @contextlib.contextmanager
    def _compiling(self):
        with abandonable("compiling"), self.times.spent("compiling"):
            yield


def run(config, workdir: pathlib.Path, profile: trace.Window = trace.Window(), coordinator: str = "", processes: int = 1) -> int:
    """Runs all jobs of `config.jobs`; returns the exit code. Several processes have joined before (`hosts.join`)."""
    from dina import tokenize  # imports the tokenizers' modules, which plain stages do not need

    workdir.mkdir(parents=True, exist_ok=True)
    with config.unlocked():
        config.run.workdir = str(workdir)
    stopper = Stopper(options(config, "checkpoint", checkpoint.default_config()).grace)
    with (contextlib.closing(stopper), contextlib.suppress(Interrupted), hosts.together(coordinator),
          files.storage_errors(str(workdir))):  # fmt: skip
        mesh = setup(config, processes)
        stages.check(config, mesh)
        hosts.connect(coordinator)
        for job in config.jobs:
            if job in config.stages:
                train_stage(config, job, workdir, mesh, stopper, profile)
            else:
                with abandonable(job):  # what these commit is whole, and the next run keeps it
                    if job == "data":
                        hosts.agreed(lambda: str(tokenize.prepare_data(config)))
                        if not hosts.first():  # finds it there, unless this host has a disk of its own
                            tokenize.prepare_data(config)
                    elif job.startswith("compile:"):
                        compile_stage(config, job.removeprefix("compile:"), workdir, mesh)
                    else:
                        tokenize.tokenize(config, workdir, [job.removeprefix("codes:")] if ":" in job else tokenize.KINDS)
            if stopper.asked:
                raise Interrupted
        return EXIT_DONE
    return EXIT_RESTART


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dina.train", description=__doc__)
    parser.add_argument("--config", required=True, help="experiments/X.py[:variant,key=value,...]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--profile", default="", metavar="FIRST:LAST", help="steps, counted from 0, of a profiler trace in STAGE/profile")
    parser.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0 of several; auto: JAX finds it (TPU slices, Slurm)")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    args = parser.parse_args(argv)
    config, profile = configs.load(args.config), trace.parse(args.profile)
    hosts.join(args.coordinator, args.processes, args.process)
    return run(config, args.workdir, profile, args.coordinator, args.processes or 1)


if __name__ == "__main__":
    configs.run_main(main)
