"""The whole system from raw data to a report: `python -m tools.demo --workdir=runs/demo`.

Phases: raw data; the vision and the audio tokenizer side by side, one process and half of the cores each; offline
tokenisation and the language stages, and on what they leave of the cores the picture detokenizers; evaluation; report. Every phase is the ordinary entry point, started again
after an interruption it goes on where it was. Their output goes to `<workdir>/<phase>.log`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from dina.config import EXIT_RESTART, run_main

# phase -> the processes that run side by side: (name, module, config variant). The first phase with two divides the
# cores; where the second process only fills gaps (its name is in FILLS), both have all cores and it gives way.
FILLS = ("pixels",)
PHASES = (
    ("data", (("data", "dina.train", "data"),)),
    ("tokenizers", (("vision", "dina.train", "vision"), ("audio", "dina.train", "audio"))),
    ("language", (("language", "dina.train", "language"), ("pixels", "dina.train", "pixels"))),
    ("evaluate", (("evaluate", "dina.evaluate", ""),)),
    ("report", (("report", "tools.report", ""),)),
)
STATUS_SECONDS = 15


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


def start(name: str, module: str, config: str, workdir: pathlib.Path, cores: set[int]) -> subprocess.Popen:
    """Starts one process on some cores, its output in `<workdir>/<name>.log`."""
    log = (workdir / f"{name}.log").open("ab")
    command = [sys.executable, "-m", module, f"--config={config}", f"--workdir={workdir}"]

    def place():
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        if name in FILLS:
            os.nice(10)

    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=place)


def shares(count: int) -> list[set[int]]:
    """Divides this process's cores among `count` processes; each gets at least one."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return [set(cores[i::count]) or {cores[i % len(cores)]} for i in range(count)]


def status(workdir: pathlib.Path) -> str:
    """The newest metrics line of the stages that are at work."""
    texts = []
    for path in sorted(workdir.glob("*/metrics.jsonl"), key=lambda p: p.stat().st_mtime):
        if (path.parent / "stage.json").exists():
            continue
        lines = path.read_text().splitlines()
        if lines:
            line = json.loads(lines[-1])
            texts.append(f"{path.parent.name} step {line['step']} loss {line.get('loss', float('nan')):.3f}")
    return ", ".join(texts)


def run_phase(phase: str, processes, config: str, workdir: pathlib.Path, clock: Clock) -> int:
    """Runs one phase to its end; returns 0, or the exit code of the first process that failed."""
    fills = sum(name in FILLS for name, _, _ in processes)
    parts = shares(len(processes) - fills) * (1 + fills)
    running = {
        name: start(name, module, f"{config}:{variant}" if variant else config, workdir, cores)
        for (name, module, variant), cores in zip(processes, parts, strict=True)
    }
    said = time.time()
    try:
        while any(p.poll() is None for p in running.values()) and not any(p.poll() for p in running.values()):
            time.sleep(0.3)
            if time.time() - said >= STATUS_SECONDS:
                said = time.time()
                clock.tick(phase)
                print(f"[{clock.total():5.0f} s] {phase}: {status(workdir) or 'at work'}", flush=True)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()
        codes = {name: process.wait() for name, process in running.items()}
        clock.tick(phase)
    for name, code in codes.items():
        if code not in (0, EXIT_RESTART):
            tail = (workdir / f"{name}.log").read_text(errors="replace").splitlines()[-12:]
            print("\n".join([f"{name} failed with exit code {code}; the end of {workdir / name}.log:", *tail]), flush=True)
            return code if code > 0 else 1
    return max(codes.values())


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--config", default="experiments/digits.py")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    args = parser.parse_args(argv)
    args.workdir.mkdir(parents=True, exist_ok=True)
    clock = Clock(args.workdir / "demo.json")
    for phase, processes in PHASES:
        code = run_phase(phase, processes, args.config, args.workdir, clock)
        print(f"[{clock.total():5.0f} s] {phase}: {'done' if code == 0 else f'exit code {code}'}", flush=True)
        if code:
            return code
    print(f"{clock.total() / 60:.1f} minutes; the page is {args.workdir / 'report.html'}")
    return 0


if __name__ == "__main__":
    run_main(main)
