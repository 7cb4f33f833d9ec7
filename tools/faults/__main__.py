"""Runs an experiment under faults: `python -m tools.faults --config=experiments/digits.py:smoke [--json F]`.

First every job of the experiment runs once undisturbed. Then each fault meets one job, which finds the undisturbed
results of the jobs before it, in a folder of its own; it is run again until it is done, as a scheduler would, and what
it leaves (a hash of the final state, every logged number of every step, the bytes of code shards) must equal what
the undisturbed run left. A fault that did not strike fails. Prints one line per fault, then a table by kind.

JSON: `faults`, a list of name, kind, phase, fired, resumed_from, survived, detail; `summary`; `seconds`; `machine`.
Exit codes: 0 all survived, 1 some did not, 2 bad input.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import traceback

from tools.faults import shim

if __name__ == "__main__":
    shim.preload()

from dina import config as configs
from dina.config import EXIT_BUG, EXIT_DONE, InputError
from tools.faults import acts, plan
from tools.faults.process import Job, Process, Storage, differences, own_folder, read_end

RUNS = 6  # of a job until it must be done


def prepare_config(spec: str, root: pathlib.Path, **checkpoint):
    """The experiment with a checkpoint after each step; none of this changes a result."""
    config = configs.load(spec)
    with config.unlocked():
        config.checkpoint.update({"every": 1, "keep": 2, "compile_cache": str(root / "xla"), **checkpoint})
        config.log.every = 1
        if "tokenize" in config:
            config.tokenize.shard_records = 200  # several shards of few records
        config.run.data_dir = str(root / "base" / "data")
    return config


def undisturbed(spec: str, root: pathlib.Path) -> list[plan.Undisturbed]:
    """Runs every job once, in `<root>/base`, and makes `<root>/mid`: each stage as a process left it that died before its end."""
    config, found = prepare_config(spec, root), []
    for name in config.jobs:
        began = time.monotonic()
        process = Process(Job(prepare_config(spec, root), name, root / "base"), Storage("count"))
        if process.wait(3600) != 0:
            raise InputError(f"the undisturbed run of {name} ended with {process.code}; the end of {process.log}:\n{process.said()[-1500:]}")
        seconds, stage, mid = time.monotonic() - began, name in config.stages, []
        shutil.move(root / "base" / "end.json", root / f"end.{name}.json")
        if stage:
            job = Job(prepare_config(spec, root), name, root / "mid" / name)
            link(config, root, job)
            began = time.monotonic()  # what it costs once everything is compiled
            if Process(job, Storage("kill", 1, below="result")).wait() >= 0:
                raise InputError(f"{name} could not be stopped before its result")
            seconds = time.monotonic() - began
            mid = files_of(job.folder)
        operations = [tuple(line.split(" ", 1)) for line in process.report.read_text().splitlines()]
        print(f"undisturbed {name}: {seconds:.0f} s, {len(operations)} operations on files", flush=True)
        done = files_of(own_folder(config, name, root / "base"))
        found.append(plan.Undisturbed(name, stage, seconds, operations, mid, done))
    return found


def files_of(folder: pathlib.Path) -> list[str]:
    """All files below a folder, by relative path."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def link(config, root: pathlib.Path, job: Job) -> None:
    """Puts links to the undisturbed results of all other jobs into a job's folder."""
    job.workdir.mkdir(parents=True, exist_ok=True)
    for path in (root / "base").iterdir():
        if path.is_dir() and path.name != job.folder.name and not (job.workdir / path.name).exists():
            (job.workdir / path.name).symlink_to(path, target_is_directory=True)


def meet(fault: plan.Fault, spec: str, root: pathlib.Path) -> dict:
    """One fault: strikes, runs the job to its end, compares. Returns its record."""
    workdir = root / "work" / re.sub(r"[^A-Za-z0-9]+", "-", fault.name)
    shutil.rmtree(workdir, ignore_errors=True)
    job = Job(prepare_config(spec, root), fault.job, workdir)
    link(job.config, root, job)
    if fault.start != "fresh":
        source = root / "mid" / fault.job if fault.start == "mid" else root / "base"
        shutil.copytree(source / job.folder.name, job.folder, symlinks=True)
        shutil.rmtree(job.folder / "lease", ignore_errors=True)
    record = {"name": fault.name, "kind": fault.kind, "phase": fault.phase, "job": fault.job, "fired": False, "resumed_from": None}
    began = time.monotonic()
    try:
        impatient = Job(prepare_config(spec, root, lease=acts.LEASE), fault.job, workdir)
        outcome = fault.act(acts.Case(job, impatient))
        wrong, resumed, runs = outcome.wrong, None, 0
        if fault.kind == "poison":
            job = Job(prepare_config(spec, root), fault.job, workdir)
        (workdir / "end.json").unlink(missing_ok=True)
        code = None
        while code != 0 and runs < RUNS:
            process = Process(job)
            code, runs = process.wait(), runs + 1
            steps = re.findall(r"resumed at step (\d+)", process.said())
            resumed = int(steps[0]) if steps and resumed is None else resumed
        if code != 0:
            wrong = wrong or f"exit code {code} after {runs} runs: {process.said()[-300:]}"
        unequal = differences(read_end(workdir), json.loads((root / f"end.{fault.job}.json").read_text()))
        wrong = wrong or (f"not equal: {', '.join(unequal)}" if unequal else "")
        record |= {"fired": outcome.fired, "resumed_from": resumed, "detail": wrong or outcome.detail}
        record["survived"] = not wrong and outcome.fired
    except Exception as error:  # one fault's mistake must not hide the others
        record |= {"survived": False, "detail": f"{type(error).__name__}: {error}"}
        traceback.print_exc()
    record["seconds"] = round(time.monotonic() - began, 1)
    if record["survived"]:
        shutil.rmtree(workdir, ignore_errors=True)
    return record


def meet_all(faults: list[plan.Fault], spec: str, root: pathlib.Path, workers: int) -> list[dict]:
    """Meets all faults, in `workers` processes that fork from this one before it has used a device."""
    files = [root / f"records{number}.jsonl" for number in range(workers)]
    pids = []
    for number, path in enumerate(files):
        path.unlink(missing_ok=True)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                for fault in faults[number::workers]:
                    record = meet(fault, spec, root)
                    with path.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    mark = "ok  " if record["survived"] else "FAIL"
                    print(f"{mark} {record['seconds']:5.1f} s  {record['name']}: {record['detail']}", flush=True)
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    records = [json.loads(line) for path in files if path.exists() for line in path.read_text().splitlines()]
    met = {record["name"]: record for record in records}
    gone = {"fired": False, "resumed_from": None, "survived": False, "detail": "it was never met: its worker ended", "seconds": 0.0}
    return [met.get(f.name, {"name": f.name, "kind": f.kind, "phase": f.phase, "job": f.job} | gone) for f in faults]


def table(records: list[dict]) -> str:
    """One line per kind."""
    kinds = collections.defaultdict(list)
    for record in records:
        kinds[record["kind"]].append(record)
    lines = [f"{'kind':16} {'faults':>6} {'fired':>6} {'survived':>8}  jobs"]
    for kind, group in sorted(kinds.items()):
        jobs = ", ".join(dict.fromkeys(record["job"] for record in group))
        lines.append(f"{kind:16} {len(group):6} {sum(r['fired'] for r in group):6} {sum(r['survived'] for r in group):8}  {jobs}")
    lines.append(f"{'all':16} {len(records):6} {sum(r['fired'] for r in records):6} {sum(r['survived'] for r in records):8}  {len(kinds)} kinds")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="experiments/digits.py:smoke")
    parser.add_argument("--json", type=pathlib.Path, help="write the result here")
    parser.add_argument("--workdir", type=pathlib.Path, help="keep everything here; the undisturbed run is used again; default a temporary folder")
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))), help="faults met at a time")
    parser.add_argument("--only", default="", help="comma list of kinds or jobs")
    parser.add_argument("--random-kills", type=int, default=6, help="of the last stage, at random moments")
    parser.add_argument("--list", action="store_true", help="print the list and end")
    args = parser.parse_args(argv)
    began = time.monotonic()
    root = (args.workdir or pathlib.Path(tempfile.mkdtemp(prefix="dina-faults-"))).absolute()
    root.mkdir(parents=True, exist_ok=True)
    base = root / "undisturbed.json"
    if not base.exists():
        base.write_text(json.dumps([run.__dict__ for run in undisturbed(args.config, root)]))
    faults = plan.make([plan.Undisturbed(**run) for run in json.loads(base.read_text())], args.random_kills)
    wanted = set(filter(None, args.only.split(",")))
    unknown = wanted - {fault.kind for fault in faults} - {fault.job for fault in faults}
    if unknown:
        raise InputError(f"--only: {sorted(unknown)[0]!r} is no kind and no job; kinds: {', '.join(sorted({f.kind for f in faults}))}")
    faults = [fault for fault in faults if not wanted or {fault.kind, fault.job} & wanted]
    if args.list:
        print("\n".join(f"{fault.kind:16} {fault.phase:12} {fault.name}" for fault in faults))
        return EXIT_DONE
    records = meet_all(faults, args.config, root, args.workers)
    print(table(records), flush=True)
    survived = sum(record["survived"] for record in records)
    summary = {"faults": len(records), "kinds": len({r["kind"] for r in records}), "survived": survived, "fired": sum(r["fired"] for r in records)}
    if args.json:
        machine = {"cores": len(os.sched_getaffinity(0)), "host": os.uname().release}
        found = {"faults": records, "summary": summary, "seconds": round(time.monotonic() - began), "machine": machine}
        args.json.write_text(json.dumps(found, indent=1))
    if args.workdir is None and survived == len(records):
        shutil.rmtree(root)
    return EXIT_DONE if survived == len(records) else EXIT_BUG


if __name__ == "__main__":
    configs.run_main(main)
