"""The list of faults for an experiment: which there are, where each of them strikes, and how often each kind.

Everything is a pure function of what the undisturbed run did: its jobs, the files that it left, and the operations on
files that it made, of which kills and failures take some, spread evenly over all that there were.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tools.faults import acts
from tools.faults.acts import Case

LOOK, COMMIT = "dina.train:Loop.look", "dina.checkpoint:Checkpoints._commit"
# Phase of a stage -> where a signal meets it.
PHASES = {
    "restoring": ("dina.train:_open", 1, 0.3), "compiling": ("dina.train:compiled_step", 1, 0.5), "training": (LOOK, 3, 0.0),
    "saving": (COMMIT, 2, 0.0), "finishing": ("dina.checkpoint:finish", 1, 0.0),
}  # fmt: skip
PREPARING = {"data": ("dina.tokenize:prepare_data", 1, 1.0), "codes": ("dina.data.codes:write_shard", 2, 0.0)}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One entry of the list.

    Attributes:
        name: of its own.
        kind: what goes wrong.
        job: of the experiment, and the phase of it that is struck.
        act: does it; see acts.py.
        start: what the job finds: 'fresh' nothing, 'mid' checkpoints of an interrupted run, 'done' all that it made.
    """

    name: str
    kind: str
    job: str
    phase: str
    act: Callable[[Case], acts.Outcome]
    start: str = "fresh"


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What the undisturbed run of a job did: ('open64', path) of every operation, files it left half-way and at its end."""

    job: str
    stage: bool
    seconds: float
    operations: Sequence[tuple[str, str]]
    mid: Sequence[str] = ()
    done: Sequence[str] = ()


def make(runs: Sequence[Undisturbed], random_kills: int = 6) -> list[Fault]:
    """All faults for the jobs of an experiment. Kinds that strike many places strike the cheapest stage more often; the last
    stage, which in our experiments trains on text, images and speech together, is killed at so many random moments."""
    stages = sorted((run for run in runs if run.stage), key=lambda run: run.seconds)
    codes = [run for run in runs if run.job.startswith("codes")]
    faults: list[Fault] = []
    for rank, run in enumerate(stages):
        cheap = rank == 0
        faults += _storage(run, *((34, 26, 8) if cheap else (2, 1, 0)), "save")
        faults += _signals(run, "sigterm", "SIGTERM", PHASES if cheap else (tuple(PHASES)[rank % len(PHASES)],))
        faults += _damage(run, cheap)
        faults += _once(run, "crash", acts.hooked(LOOK, 2, "SIGSEGV" if rank % 2 else "SIGABRT"))
        if rank % 3 == 0:
            faults += _signals(run, "sigint", "SIGINT", ("training", "saving"))
            faults += _once(run, "poison", acts.hooked("dina.sharding:put_batch", 3, "nan"))
            faults += _once(run, "clock_jump", acts.hooked(LOOK, 2, "clock"))
    last = [run for run in runs if run.stage][-1:]
    moments = np.random.default_rng(0).uniform(0.3, 1.0, random_kills)  # before that it has only imported
    faults += [Fault(f"{run.job}: random_kill {number} at {moment:.3f}", "random_kill", run.job, "anywhere", acts.killed_after(moment * run.seconds))
               for run in last for number, moment in enumerate(moments)]  # fmt: skip
    for run in stages[:2]:  # what takes several processes at once, or long
        faults += _once(run, "two_jobs", acts.two_jobs) + _once(run, "paused_holder", acts.paused_holder)
        faults += _once(run, "preemption", acts.preempted)
        faults += _once(run, "slow_storage", acts.storage("slow", 1, millis=3))
    for run in codes:
        faults += _storage(run, 12, 8, 2, "tokenise")
        faults += _signals(run, "sigterm", "SIGTERM", ("codes",))
        for name in _spread(run.done, 6):
            for how in ("cut", "flip", "remove"):
                faults.append(Fault(f"{run.job}: {how} {name}", "damaged_codes", run.job, "codes", acts.damaged(name, how), "done"))
    faults += [fault for run in runs if run.job == "data" for fault in _signals(run, "sigterm", "SIGTERM", ("data",))]
    return _in_turn(faults)


def _in_turn(faults: list[Fault]) -> list[Fault]:
    """The first of each kind, then the second, and so on: a list that is cut short has met every kind."""
    seen: collections.Counter[str] = collections.Counter()
    keyed = []
    for place, fault in enumerate(faults):
        keyed.append((seen[fault.kind], place, fault))
        seen[fault.kind] += 1
    return [fault for _, _, fault in sorted(keyed, key=lambda key: key[:2])]


def _once(run: Undisturbed, kind: str, act) -> list[Fault]:
    return [Fault(f"{run.job}: {kind}", kind, run.job, "training", act)]


def _spread(items: Sequence, count: int) -> list:
    """`count` of the items, evenly, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def _storage(run: Undisturbed, kills: int, commits: int, others: int, phase: str) -> Iterator[Fault]:
    """Operations on files that kill, tear or fail. Of threads the order differs a little from run to run."""
    numbers = {"w": 0, "c": 0}
    for name, _ in run.operations:
        numbers["c" if name.startswith(("rename", "link", "unlink", "rmdir")) else "w"] += 1
    writes, ends = ([1 + i for i in range(int(0.97 * numbers[c]))] for c in "wc")
    own = "kill_write", "kill_commit"
    if phase == "tokenise":
        own = "kill_tokenise", "kill_tokenise"
    for kind, classes, places, count, action in (
        (own[0], "w", writes, kills, "kill"), (own[1], "c", ends, commits, "kill"), ("torn_write", "w", writes, others, "tear"),
        ("disk_full", "w", writes, others, "full"), ("io_error", "wc", writes, others, "fail"),
    ):  # fmt: skip
        for number in _spread(places, count):
            yield Fault(f"{run.job}: {kind} {classes}{number}", kind, run.job, phase, acts.storage(action, number, classes))


def _signals(run: Undisturbed, kind: str, action: str, phases) -> list[Fault]:
    where = PHASES | PREPARING
    return [Fault(f"{run.job}: {kind} {phase}", kind, run.job, phase, acts.hooked(where[phase][0], where[phase][1], action, where[phase][2]))
            for phase in phases]  # fmt: skip


def _damage(run: Undisturbed, cheap: bool) -> Iterator[Fault]:
    """Damage to what a killed run left, and to a finished result: every kind of file there is."""
    newest = max((name.split("/")[1].split(".json")[0] for name in run.mid if name.startswith("checkpoints/0")), default="")
    files = [name for name in run.mid if name.startswith(f"checkpoints/{newest}")]
    kinds = {acts.kind_of_file(name): name for name in files}
    for file_kind, name in sorted(kinds.items()) if cheap else _spread(sorted(kinds.items()), 2):
        for kind, how in (("truncation", "cut"), ("bit_flip", "flip"), ("missing_file", "remove")):
            if name.endswith(".json") and name.count("/") == 1 and how == "remove":
                kind = "missing_marker"
            if cheap or how == "flip":
                yield Fault(f"{run.job}: {kind} {file_kind}", kind, run.job, "checkpoint", acts.damaged(name, how), "mid")
    if cheap:
        results = {acts.kind_of_file(name): name for name in run.done if name.startswith("result/")} | {"stage.json": "stage.json"}
        for file_kind, name in sorted(results.items()):
            yield Fault(f"{run.job}: damaged result {file_kind}", "damaged_result", run.job, "result", acts.damaged(name, "flip"), "done")
        yield Fault(f"{run.job}: leftovers", "leftovers", run.job, "checkpoint", acts.leftovers, "mid")
    if cheap:
        yield Fault(f"{run.job}: torn log", "torn_log", run.job, "checkpoint", acts.torn, "mid")
