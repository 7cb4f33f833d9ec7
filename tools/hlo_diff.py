"""What changed between two compiled train steps: `python -m tools.hlo_diff OLD NEW`, two folders that `tools.aot --keep` made.

With `--config` and `--topology`, OLD and NEW are git revisions (or '.', the working tree), and both are compiled first. Prints
FLOPs by part, bytes by collective, kernels, operations and memory that differ. Exit 0 the same, 1 different, 2 bad input.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

from dina import config as configs
from dina.config import InputError
from tools.aot import count
from tools.aot.hlo import Program

ROOT = pathlib.Path(__file__).parents[1]
SAME = 1e-3  # relative difference below which a number is the same


def facts(folder: pathlib.Path) -> dict[str, float]:
    """Numbers of one compile, by name.

    Raises:
        InputError: no program in the folder.
    """
    for name in ("program.txt", "record.json", "plan.json"):
        if not (folder / name).exists():
            raise InputError(f"{folder} has no {name}; python -m tools.aot --keep={folder} makes it")
    plan, record = (json.loads((folder / name).read_text()) for name in ("plan.json", "record.json"))
    program = Program((folder / "program.txt").read_text())
    found = count.count(program, plan["mesh"], plan["slice_size"])
    out = {f"FLOPs {name}": value for name, value in found.flops.items()} | {"FLOPs remat": found.remat}
    for one in found.collectives:
        for what, value in (("bytes", one.sent * one.times), ("runs", one.times)):
            key = f"{what} {one.kind} over {one.axes}"
            out[key] = out.get(key, 0) + value
    out |= {f"kernel {name}": runs for name, runs in found.custom_calls.items()}
    operations = collections.Counter(op.opcode for table in program.computations.values() for op in table.values())
    out |= {f"operations {name}": number for name, number in operations.items()}
    return out | {f"memory {name}": record[name] for name in ("argument", "temp", "generated_code", "peak") if name in record}


def differences(old: dict[str, float], new: dict[str, float]) -> list[tuple[str, float, float]]:
    """(name, old, new) of what differs by more than `SAME`, the largest relative change first within each kind of number."""
    rows = [(name, old.get(name, 0), new.get(name, 0)) for name in {**old, **new}]
    apart = lambda a, b: abs(a - b) / max(abs(a), abs(b), 1e-30)
    changed = [row for row in rows if apart(*row[1:]) > SAME]
    return sorted(changed, key=lambda row: (row[0].split()[0], -apart(*row[1:]), row[0]))


def compile_revision(revision: str, config: str, topology: str, mesh: str, folder: pathlib.Path) -> None:
    """Runs tools.aot of a revision; '.' is the working tree.

    Raises:
        InputError: no such revision, or it cannot compile this.
    """
    with tempfile.TemporaryDirectory() as made:
        root = ROOT
        if revision != ".":
            root = pathlib.Path(made)
            done = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True)
            if done.returncode:
                raise InputError(f"{revision!r} is no revision of {ROOT}: {done.stderr.decode().strip().splitlines()[0]}")
            tarfile.open(fileobj=io.BytesIO(done.stdout)).extractall(root, filter="data")
        command = [sys.executable, "-m", "tools.aot", f"--config={config}", f"--topology={topology}", f"--mesh={mesh}", f"--keep={folder}"]
        search = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise InputError(f"{revision}: tools.aot ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.hlo_diff", description=__doc__)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--config", default="", help="with --topology: OLD and NEW are revisions")
    parser.add_argument("--topology", default="")
    parser.add_argument("--mesh", default="")
    args = parser.parse_args(argv)
    if bool(args.config) != bool(args.topology):
        raise InputError("--config and --topology go together: they say what both revisions compile")
    with tempfile.TemporaryDirectory() as made:
        folders = [pathlib.Path(args.old), pathlib.Path(args.new)]
        if args.config:
            folders = [pathlib.Path(made) / name for name in ("old", "new")]
            for revision, folder in zip((args.old, args.new), folders, strict=True):
                compile_revision(revision, args.config, args.topology, args.mesh, folder)
        changed = differences(*map(facts, folders))
    for name, old, new in changed:
        print(f"{name:48s} {old:16,.0f} -> {new:16,.0f}  ({'new' if not old else f'{new / old:.3f}x'})")
    print(f"{len(changed)} numbers differ" if changed else "no difference")
    return 1 if changed else configs.EXIT_DONE


if __name__ == "__main__":
    configs.run_main(main)
