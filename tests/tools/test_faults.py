"""The list of faults, the library that makes storage fail, and (slow) a whole list met by a toy experiment."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from dina.config import InputError
from tools.faults import acts, plan, shim
from tools.faults.process import differences

ROOT = pathlib.Path(__file__).parent.parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="the library is C")


def _run(job, seconds, **fields):
    operations = [("open64", "x"), ("write", "x"), ("link", "x")] * 200
    mid = [f"checkpoints/{name}" for name in ("00000001.1.0.json", "00000002.1.1.json", "00000002.1.1/_METADATA",
                                              "00000002.1.1/d/0123456789abcdef0123", "00000002.1.1/manifest.ocdbt")]  # fmt: skip
    done = ["stage.json", "result/_METADATA", "result/d/0123456789abcdef0123", "images-00000", "images-00001"]
    return plan.Undisturbed(job, seconds=seconds, operations=operations, mid=mid, done=done, **fields)


RUNS = [_run("data", 1, stage=False), *(_run(f"S{n}", 10 - n, stage=True) for n in range(10)), _run("codes", 3, stage=False)]


def test_the_list_is_long_and_balanced_and_reaches_everything():
    faults = plan.make(RUNS)
    kinds = [fault.kind for fault in faults]
    assert len(faults) >= 200 and len(set(kinds)) >= 12 and max(map(kinds.count, kinds)) <= len(faults) / 3
    assert len({fault.name for fault in faults}) == len(faults)
    assert {fault.job for fault in faults} == {run.job for run in RUNS}
    assert {"restoring", "compiling", "training", "saving", "finishing", "data", "codes"} <= {f.phase for f in faults if f.kind == "sigterm"}
    assert set(kinds[: len(set(kinds))]) == set(kinds)  # one cut short has met every kind
    assert [fault.name for fault in plan.make(RUNS)] == [fault.name for fault in faults]
    soak = [fault for fault in plan.make(RUNS, random_kills=50) if fault.kind == "random_kill"]
    assert len(soak) == 50 and {fault.job for fault in soak} == {"S9"}


def test_damage_is_done_to_the_newest_step_and_to_every_kind_of_file():
    names = {fault.name for fault in plan.make(RUNS) if fault.kind == "bit_flip" and fault.job == "S9"}
    assert names == {f"S9: bit_flip checkpoints/{kind}" for kind in ("d/DATA", "_METADATA", "manifest", "manifest.ocdbt")}
    assert acts.kind_of_file("checkpoints/00000002.1.1/d/0123456789abcdef0123") == "checkpoints/d/DATA"
    assert acts.kind_of_file("checkpoints/00000002.1.1.json") == "checkpoints/manifest"


def test_what_differs_is_named():
    assert differences(None, {"state": 1}) == ["it did not end"]
    assert differences({"state": 1, "steps": [2]}, {"state": 1, "steps": [1]}) == ["steps"]


SCRIPT = """
import os, pathlib, sys
from tools.faults import shim
shim.preload()
from dina import files
folder, report, action, number = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
store = files.Folder(folder)
shim.arm(folder, sys.argv[5], action, number, report)
for name in ('a', 'b'):
    try:
        store.create(name, b'x' * 100)
    except OSError as error:
        print(name, os.strerror(error.errno))
(folder.parent / 'elsewhere').write_text('y')
"""


@needs_compiler
def test_storage_fails_where_it_is_told_to(tmp_path):
    def run(action, number=1, classes="wc"):
        folder, report = tmp_path / f"{action}{number}{classes}", tmp_path / f"{action}{number}{classes}.report"
        command = [sys.executable, "-c", SCRIPT, str(folder), str(report), action, str(number), classes]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        return done, folder, report.read_text().splitlines()

    done, folder, lines = run("count")
    names = [line.split()[0] for line in lines]
    assert done.returncode == 0 and names[:5] == ["open64", "write", "fsync", "link", "unlink"] and all(str(folder) in line for line in lines)
    assert len(lines) == 12 and sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    done, folder, lines = run("kill", 1, "c")  # before the first commit: only what is half-written is there
    assert done.returncode == -9 and [path.name[:3] for path in folder.iterdir()] == [".a."] and lines[0].startswith("FIRED")
    done, folder, _ = run("tear", 2)
    assert done.returncode == -9 and [path.stat().st_size for path in folder.iterdir()] == [50]
    done, folder, _ = run("full", 3, "w")
    assert done.stdout == "a No space left on device\nb No space left on device\n" and (tmp_path / "elsewhere").exists()
    done, folder, _ = run("fail", 4)
    assert done.stdout == "a Input/output error\n" and (folder / "b").exists() and not (folder / "a").exists()


def test_a_machine_without_compiler_is_told(monkeypatch):
    monkeypatch.setattr(shim.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="C compiler"):
        shim.build()


@needs_compiler
@pytest.mark.slow
def test_a_toy_experiment_survives_its_whole_list(tmp_path):
    (tmp_path / "toy_experiment.py").write_text("from tests import toy\n\n\ndef get_config(arg):\n    return toy.config()\n")
    command = [sys.executable, "-m", "tools.faults", f"--config={tmp_path}/toy_experiment.py", f"--json={tmp_path}/out.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
    found = json.loads((tmp_path / "out.json").read_text())
    bad = [fault for fault in found["faults"] if not fault["survived"]]
    assert done.returncode == 0 and not bad and len(found["faults"]) > 100, (bad, done.stdout[-2000:], done.stderr[-2000:])
