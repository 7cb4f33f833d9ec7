"""Looks after a run's checkpoints: `python -m tools.checkpoint COMMAND FOLDER …`, FOLDER a stage's (<workdir>/<stage>).

  list FOLDER                            every step: committed or not, size, libraries, metrics
  verify FOLDER                          reads every file; exit 1 if anything is damaged or incomplete
  diff FOLDER:STEP FOLDER:STEP           arrays that differ; without :STEP, a finished stage's result
  prune FOLDER --keep N [--every K] [--best min:METRIC]     removes steps that this does not keep
  export FOLDER[:STEP] --out DIR         released names, through tools.convert; the import must lie beside the stage
Nothing here may run while the stage trains, but `list`, `verify` and `diff`.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from typing import Any

import numpy as np

from dina import checkpoint, lease, optim, promote, retention
from dina.config import EXIT_BUG, EXIT_DONE, InputError, run_main


def _open(folder: pathlib.Path) -> checkpoint.Checkpoints:
    if not (folder / "checkpoints").is_dir():
        raise InputError(f"{folder} has no checkpoints; name a stage's folder, <workdir>/<stage>")
    return checkpoint.Checkpoints(folder, "")


def list_steps(folder: pathlib.Path) -> list[str]:
    """One line per attempt to save a step, and one for a finished result."""
    saves, lines = _open(folder), []
    for name in saves.committed():
        try:
            body = saves.manifest_of(name)
        except checkpoint.Damaged as error:
            lines.append(f"step {name.step:8}  {name}  DAMAGED: {error}")
            continue
        size = sum(entry[0] for entry in body["files"].values())
        metrics = " ".join(f"{key}={value:.4g}" for key, value in sorted(body["metrics"].items()))
        told = f"{size / 2**20:9.1f} MiB  {body['examples']} examples  jax {body['versions']['jax']}  {metrics}"
        lines.append(f"step {name.step:8}  {name}  {told}".rstrip())
    lines += [f"step {name.step:8}  {name}  NOT USED: {why}" for name, why in saves.problems()]
    if (folder / "stage.json").exists():
        record = checkpoint.finished(folder)
        lines.append(f"result of {record['steps']} steps, identity {record['identity']}")
    return lines


def verify(folder: pathlib.Path) -> tuple[list[str], bool]:
    """(one line per step and result, whether all is well); reads every file."""
    saves, lines, good = _open(folder), [], True
    for name in saves.committed():
        try:
            count = len(saves.verify(name)["files"])
            lines.append(f"step {name.step:8}  {name}  {count} files are what was written")
        except checkpoint.Damaged as error:
            good = False
            lines.append(f"step {name.step:8}  {name}  DAMAGED: {error}")
    for name, why in saves.problems():
        good = False
        lines.append(f"step {name.step:8}  {name}  NOT USED: {why}")
    if (folder / "stage.json").exists():
        try:
            checkpoint.check_result(folder, checkpoint.finished(folder))
            lines.append("result: its files are what was written")
        except (checkpoint.Damaged, checkpoint.DamagedRecord) as error:
            good = False
            lines.append(f"result: DAMAGED: {error}")
    return lines, good


def load(place: str) -> dict[str, Any]:
    """Path -> array of FOLDER:STEP, or of a finished stage's FOLDER."""
    folder, name = _step(place)
    tree = checkpoint.result(folder) if name is None else promote.load(folder, name)[0]
    return optim.flatten(tree)


def diff(one: str, two: str) -> list[str]:
    """One line per array that is not the same in both."""
    a, b = load(one), load(two)
    lines = [f"only in {one if path in a else two}: {path}" for path in sorted(a.keys() ^ b.keys())]
    for path in sorted(a.keys() & b.keys()):
        x, y = np.asarray(a[path]), np.asarray(b[path])
        if x.shape != y.shape:
            lines.append(f"{path}: shape {x.shape}, {y.shape}")
        elif not np.array_equal(x, y, equal_nan=True):
            apart = np.abs(x.astype(np.float64) - y.astype(np.float64))
            lines.append(f"{path}: {np.mean(x != y):.1%} of {x.size} numbers differ, by {np.nanmax(apart):.3g} at most")
    return lines


def prune(folder: pathlib.Path, keep: int, every: int, best: str) -> list[str]:
    """Removes what a policy does not keep, holding the stage's lease; returns what is gone."""
    _open(folder)
    if best:
        retention.parse_best(best)
    with lease.alone(folder):
        saves = checkpoint.Checkpoints(folder, "", keep, every, best)
        return [f"removed step {name.step} ({name})" for name in saves.prune()]


def export(place: str, out: pathlib.Path) -> int:
    """Writes a step, or a finished stage, under released names."""
    from tools import convert

    folder, name = _step(place)
    if name is None:
        return convert.main(["export", f"--workdir={folder.parent}", f"--stage={folder.name}", f"--out={out}"])
    with tempfile.TemporaryDirectory() as work:
        promote.promote(folder.parent, folder.name, name, pathlib.Path(work))
        return convert.main(["export", f"--workdir={work}", f"--stage={folder.name}", f"--out={out}"])


def _step(place: str) -> tuple[pathlib.Path, checkpoint.Name | None]:
    """Of 'FOLDER:STEP' the newest committed attempt; None without a step."""
    text, _, step = place.rpartition(":")
    if not text or not step.isdigit():
        return pathlib.Path(place), None
    folder = pathlib.Path(text)
    names = [name for name in _open(folder).committed() if name.step == int(step)]
    if not names:
        there = ", ".join(str(name.step) for name in _open(folder).committed())
        raise InputError(f"{folder} has no committed step {step}; it has {there or 'none'}")
    return folder, names[-1]


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("list", "verify", "prune"):
        one = commands.add_parser(command)
        one.add_argument("folder", type=pathlib.Path)
        if command == "prune":
            one.add_argument("--keep", type=int, required=True)
            one.add_argument("--every", type=int, default=0)
            one.add_argument("--best", default="")
    one = commands.add_parser("diff")
    one.add_argument("one")
    one.add_argument("two")
    one = commands.add_parser("export")
    one.add_argument("place")
    one.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args(argv)
    if args.command == "export":
        return export(args.place, args.out)
    good = True
    if args.command == "list":
        lines = list_steps(args.folder)
    elif args.command == "verify":
        lines, good = verify(args.folder)
    elif args.command == "diff":
        lines = diff(args.one, args.two)
        good = not lines
    else:
        lines = prune(args.folder, args.keep, args.every, args.best)
    print("\n".join(lines or ["nothing"]))
    return EXIT_DONE if good else EXIT_BUG


if __name__ == "__main__":
    run_main(main)
