"""What a fault does to a job: each act disturbs it once and says what came of that; running on to the end is the caller's."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shutil
import signal
import time
from collections.abc import Callable

from dina.config import EXIT_INPUT, EXIT_RESTART
from tools.faults.process import Hook, Job, Process, Storage

LEASE = 2.0  # seconds, where a holder is to die of standing still
PREEMPTIONS, PREEMPT_SECONDS = 3, 4.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A job in a folder of its own, in which what it starts from lies ready; `impatient` has a lease of LEASE seconds."""

    job: Job
    impatient: Job


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether the fault struck, what is wrong already ('' = nothing), and what is worth telling."""

    fired: bool
    wrong: str = ""
    detail: str = ""


Act = Callable[[Case], Outcome]


def storage(action: str, number: int, classes: str = "wc", millis: int = 0) -> Act:
    """An operation on files goes wrong."""

    def act(case: Case) -> Outcome:
        process = Process(case.job, Storage(action, number, classes, millis=millis))
        code = process.wait()
        killed = action in ("kill", "tear")
        # A full or failing disk may cost a checkpoint or the process, but is no success that was none.
        wrong = "" if not killed or code == -signal.SIGKILL or not process.fired() else f"exit code {code} of a killed process"
        where = process.report.read_text().strip().removeprefix("FIRED ") if process.fired() else ""
        return Outcome(process.fired(), wrong, f"{action} at {_short(where, case.job.folder)}, exit code {code}")

    return act


def hooked(target: str, call: int, action: str, delay: float = 0.0) -> Act:
    """A signal at a place in the program, a clock that jumps, or a number that is none."""

    def act(case: Case) -> Outcome:
        with case.job.config.unlocked():
            if action == "nan":
                case.job.config.guard = {"nonfinite": "stop"}
        process = Process(case.job, hook=Hook(target, call, action, delay))
        code = process.wait()
        wanted = {"SIGTERM": EXIT_RESTART, "SIGINT": EXIT_RESTART, "clock": 0, "nan": 1}.get(action)
        wanted = -getattr(signal, action) if wanted is None else wanted
        wrong = "" if code == wanted else f"exit code {code}, not {wanted}"
        if action == "nan" and not re.search(r"nonfinite loss .*examples \d+\.\.\d+", process.said()):
            wrong = "the batch was not named"
        return Outcome(process.fired(), wrong, f"{action} at {target}, exit code {code}")

    return act


def killed_after(seconds: float) -> Act:
    """SIGKILL at a moment; where the machine is so quick that the job has ended, at half of that, and so on."""

    def act(case: Case) -> Outcome:
        left, code = seconds, 0
        while code == 0 and left > 0.5:
            process = Process(case.job)
            while process.poll() is None and time.monotonic() - process.began < left:
                time.sleep(0.01)
            if process.code is None:
                process.signal(signal.SIGKILL)
            code, left = process.wait(), left / 2
            if code == 0:
                shutil.rmtree(case.job.folder)
        return Outcome(code == -signal.SIGKILL, "" if code in (0, -signal.SIGKILL) else f"exit code {code}", f"after {left * 2:.1f} s")

    return act


def damaged(name: str, how: str) -> Act:
    """A file is cut, changed by one bit, or removed."""

    def act(case: Case) -> Outcome:
        path = case.job.folder / name
        data = path.read_bytes()
        if how == "remove":
            path.unlink()
        elif how == "cut":
            path.write_bytes(data[: len(data) * 2 // 3])
        else:
            at = len(data) // 2
            path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        return Outcome(not path.exists() or path.read_bytes() != data, detail=f"{how} {name}")

    return act


def leftovers(case: Case) -> Outcome:
    """Half a checkpoint of another process, and files that are none of ours, lie about."""
    root = case.job.folder / "checkpoints"
    for path in (root / "00000099.1.0" / "d" / "half", root / "00000099.1.1.orbax-checkpoint-tmp" / "x", root / "README"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * 100)
    return Outcome(True, detail="a step without manifest, a temporary folder, a stray file")


def torn(case: Case) -> Outcome:
    """Half of the line that was being written when the machine lost its power."""
    path = case.job.folder / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines()[-1][:40])
    return Outcome(True, detail="half a line more in metrics.jsonl")


def two_jobs(case: Case) -> Outcome:
    """A second process on the folder refuses while the first lives; the first goes on."""
    one = Process(case.impatient, Storage("slow", millis=2))
    while not list((case.job.folder / "lease").glob("*.beat")) and one.poll() is None:
        time.sleep(0.05)
    two = Process(case.impatient)
    refused = two.wait()
    code = one.wait()
    said = "another process is training in" in two.said()
    wrong = "" if refused == EXIT_INPUT and said and code == 0 else f"exit codes {code} and {refused}"
    return Outcome(said, wrong, f"first exit code {code}, second {refused}")


def paused_holder(case: Case) -> Outcome:
    """The holder stops; another takes over within the stated time and ends; the first wakes and may write no more."""
    one = Process(case.impatient, hook=Hook("dina.train:Loop.look", 3, "SIGSTOP"))
    while not one.report.exists() and one.poll() is None:
        time.sleep(0.05)
    begun = time.monotonic()
    two = Process(case.impatient)
    code = two.wait()
    took = time.monotonic() - begun
    before = _contents(case.job.folder)
    one.signal(signal.SIGCONT)
    late = one.wait()
    wrong = "" if code == 0 and late == EXIT_INPUT and "took this folder over" in one.said() else f"exit codes {late} and {code}"
    changed = sorted(name for name, data in _contents(case.job.folder).items() if before.get(name) != data)
    if changed:
        wrong = wrong or f"the process that woke wrote {changed[0]}"
    return Outcome(one.fired(), wrong, f"taken over and ended after {took:.1f} s; the first woke and ended with {late}")


def preempted(case: Case) -> Outcome:
    """SIGTERM every few seconds."""
    codes = []
    for _ in range(PREEMPTIONS):
        process = Process(case.job)
        while process.poll() is None and time.monotonic() - process.began < PREEMPT_SECONDS:
            time.sleep(0.05)
        if process.code is None:
            process.signal(signal.SIGTERM)
        codes.append(process.wait())
        if codes[-1] == 0:
            break
    wrong = "" if set(codes) <= {0, EXIT_RESTART} else f"exit codes {codes}"
    return Outcome(EXIT_RESTART in codes, wrong, f"exit codes {codes}")


def kind_of_file(name: str) -> str:
    """What a file of a checkpoint is, without what is particular to it: data files of all sorts are one kind."""
    parts = [part for part in name.split("/") if not re.fullmatch(r"\d{8}\.\d+\.\d+", part)]
    parts = [re.sub(r"^\d{8}\.\d+\.\d+\.json$", "manifest", re.sub(r"^[0-9a-f]{16,}$", "DATA", part)) for part in parts]
    return "/".join(parts)


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Everything that counts: not what a process prints, where it is alive, or arrays of steps, which nothing but a manifest commits."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    out = re.compile(r"events\..*|tensorboard/.*|lease/.*|checkpoints/[^/]+/.*|checkpoints/\..*")
    return {name: path.read_bytes() for name, path in found.items() if not out.fullmatch(name)}


def _short(path: str, folder: pathlib.Path) -> str:
    return path.replace(f"{folder}/", "")
