"""Every real stage, a few steps each: what is frozen stays, the same seed gives the same bits, a killed run catches up."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dina import checkpoint, config as configs, optim

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
CONFIG = configs.load(str(ROOT / "experiments/digits.py:smoke"))
KILLED = ("V0", "V1", "V2", "A1", "A2", "prealign", "pretrain")  # while they train, once each


def _start(folder):
    shared = folder.parent
    spec = f"experiments/digits.py:smoke,run.data_dir={shared / 'data'},checkpoint.compile_cache={shared / 'xla'}"
    command = [sys.executable, "-m", "dina.train", f"--config={spec}", f"--workdir={folder}"]
    with (shared / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def _results(folder):
    return {name: checkpoint.result(folder / name) for name in CONFIG.stages}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "whole"
    process = _start(folder)
    assert process.wait() == 0, (folder.parent / "whole.log").read_text()[-2000:]
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return _results(folder)


@pytest.mark.parametrize("name", list(CONFIG.order))
def test_what_a_stage_does_not_train_is_bit_for_bit_what_it_took_over(results, name):
    stage, after = CONFIG.stages[name], results[name]
    params = optim.flatten(after["params"])
    for part, source in stage.init_from.items():
        before = optim.flatten(results[source]["params"][part])
        for path, x in before.items():
            if not optim.matches(f"{part}/{path}", stage.train):
                np.testing.assert_array_equal(params[f"{part}/{path}"], x, err_msg=f"{name}: {part}/{path}")
        if part in after["stats"] and optim.matches(part, stage.freeze_stats):
            jax.tree.map(np.testing.assert_array_equal, after["stats"][part], results[source]["stats"][part])
    trained = [path for path in params if optim.matches(path, stage.train)]
    taken = {path: x for part, source in stage.init_from.items() for path, x in optim.flatten({part: results[source]["params"][part]}).items()}
    assert trained and all(np.any(params[path] != taken[path]) for path in trained if path in taken and np.any(params[path]))


def test_a_run_killed_in_every_phase_ends_with_the_same_bits(folder, results):
    again = folder.parent / "killed"
    for name in KILLED:
        process, metrics = _start(again), again / name / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _start(again).wait() == 0, (folder.parent / "killed.log").read_text()[-2000:]
    for name, found in _results(again).items():
        jax.tree.map(np.testing.assert_array_equal, found, results[name])
