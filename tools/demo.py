"""The whole system from raw data to a report: `python -m tools.demo --workdir=runs/demo`.

Phases: raw data; the vision and the audio tokenizer side by side, one process and half of the cores each, and behind
them the compiler for what comes next; the language stages, and on what they leave of the cores the picture
detokenizers; evaluation; report. Every phase is the ordinary entry point: started again after an interruption, it goes
on where it was. Their output goes to `<workdir>/<name>.log`, their compiled programs to `<workdir>/xla`.

SIGTERM and Ctrl-C stop the processes, which save what they have, and then this one with exit code 75; a second one does
not wait for that.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from dina.config import EXIT_RESTART, InputError, run_main
from tools.report import readme

# phase -> the processes that run side by side: (name, module, config variant). They divide the cores, except those of
# FILLS (by name), which may use all cores and give way to the others.
FILLS = ("ahead", "pixels")
PHASES = (
    ("data", (("data", "dina.train", "data"),)),
    ("tokenizers", tuple((name, "dina.train", name) for name in ("vision", "audio", "ahead"))),
    ("language", (("language", "dina.train", "language"), ("pixels", "dina.train", "pixels"))),
    ("evaluate", (("evaluate", "dina.evaluate", ""),)),
    ("report", (("report", "tools.report", ""),)),
)
# Compiling ahead costs the tokenizers nothing: it takes what one of them has left when the other ends before it.
IDLE = ("ahead",)
STATUS_SECONDS = 15
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Clock:
    """Seconds of work per phase, kept on disk so that an interrupted demo adds up."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        self.last = time.time()

    def tick(self, phase: str) -> None:
        """Adds the time since the last tick to `phase`."""
        now = time.time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.seconds, indent=1))
        part.replace(self.path)

    def total(self) -> float:
        """Seconds of work so far."""
        return sum(self.seconds.values())


class Stop:
    """Turns SIGTERM and SIGINT into `asked`; a further one is passed on to `running`, which then ends at once."""

    def __init__(self):
        self.asked = False
        self.running: list[subprocess.Popen] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number, _):
        if self.asked:
            self.terminate()
        self.asked = True

    def terminate(self) -> None:
        """Asks all processes to save and end; one that was asked before ends without."""
        for process in self.running:
            if process.poll() is None:
                process.terminate()


def all_cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def shares(count: int) -> list[set[int]]:
    """Divides this process's cores among `count` processes; each gets at least one."""
    cores = sorted(all_cores())
    return [set(cores[i::count]) or {cores[i % len(cores)]} for i in range(count)]


def start(name: str, module: str, config: str, workdir: pathlib.Path, cores: set[int]) -> subprocess.Popen:
    """Starts one process on some cores, its output in `<workdir>/<name>.log`; it is asked to end if this one dies."""
    command = [sys.executable, "-m", module, f"--config={config}", f"--workdir={workdir}"]
    # Loaded here, because between fork and exec only system calls are safe.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def place():
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        if name in IDLE and hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        elif name in FILLS:
            os.nice(10)

    with (workdir / f"{name}.log").open("ab") as log:
        # In a process group of its own, Ctrl-C reaches this process alone, which asks each of them once. It is no session
        # of its own: with autogroups (Linux' default) niceness and SCHED_IDLE count among the processes of a session only.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                preexec_fn=place, process_group=0)


def status(workdir: pathlib.Path) -> str:
    """The newest metrics line of the stages that are at work."""
    texts = []
    for path in sorted(workdir.glob("*/metrics.jsonl"), key=lambda p: p.stat().st_mtime):
        line = last_line(path)
        if line and not (path.parent / "stage.json").exists():
            # float(): a loss that is not finite is written as text.
            texts.append(f"{path.parent.name} step {line['step']} loss {float(line.get('loss', 'nan')):.3f}")
    return ", ".join(texts)


def last_line(path: pathlib.Path) -> dict:
    """The newest whole line of a metrics file, {} if there is none; a line may be read while it is written."""
    for text in reversed(path.read_text(errors="replace").splitlines()):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            return line
    return {}


def run_phase(phase: str, processes, config: str, workdir: pathlib.Path, clock: Clock, stop: Stop) -> int:
    """Runs one phase to its end; returns 0, 75 if it was interrupted, or the exit code of the first that failed."""
    parts = iter(shares(sum(name not in FILLS for name, _, _ in processes)))
    running: dict[str, subprocess.Popen] = {}
    said = time.time()
    try:
        for name, module, variant in processes:
            own = f"{variant},checkpoint.compile_cache={(workdir / 'xla').absolute()}"
            spec = f"{config},{own}" if ":" in config else f"{config}:{own}"
            cores = all_cores() if name in FILLS else next(parts)
            running[name] = start(name, module, spec, workdir, cores)
            stop.running = list(running.values())
        while not stop.asked and None in (codes := [p.poll() for p in running.values()]) and not any(codes):
            time.sleep(0.3)
            clock.tick(phase)  # this often, because the report reads how long its own phase took
            if time.time() - said >= STATUS_SECONDS:
                said = time.time()
                print(f"[{clock.total():5.0f} s] {phase}: {status(workdir) or 'at work'}", flush=True)
        failed = next((name for name, p in running.items() if p.poll() not in (None, 0, EXIT_RESTART)), None)
    finally:
        stop.terminate()
        codes = {name: process.wait() for name, process in running.items()}
        clock.tick(phase)
    if failed and not stop.asked:
        tail = (workdir / f"{failed}.log").read_text(errors="replace").splitlines()[-12:]
        head = f"{failed} failed with exit code {codes[failed]}; the end of {workdir / failed}.log:"
        print("\n".join([head, *tail]), flush=True)
        return codes[failed] if codes[failed] > 0 else 1
    return EXIT_RESTART if stop.asked or any(codes.values()) else 0


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--config", default="experiments/digits.py")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    args = parser.parse_args(argv)
    if "," in str(args.workdir.absolute()):
        raise InputError(f"--workdir={args.workdir}: a comma separates config overrides, so the path must have none")
    args.workdir.mkdir(parents=True, exist_ok=True)
    clock, stop = Clock(args.workdir / "demo.json"), Stop()
    for phase, processes in PHASES:
        code = run_phase(phase, processes, args.config, args.workdir, clock, stop)
        print(f"[{clock.total():5.0f} s] {phase}: {'done' if code == 0 else f'exit code {code}'}", flush=True)
        if code:
            return code
    print(readme.markdown(json.loads((args.workdir / "report.json").read_text())))
    print(f"{clock.total() / 60:.1f} minutes; the page is {args.workdir / 'report.html'}")
    return 0


if __name__ == "__main__":
    run_main(main)
