"""Several processes on this machine train as one: the same losses, one committer, one end, and any number of them goes on.

Equality is DESIGN §5's: losses within 1e-5 after a change of the process count, the same bits for the same one.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dina import checkpoint, config as configs, hosts, interrupt, sharding, tokenize, train
from dina.config import InputError
from tests import toy

ROOT = pathlib.Path(__file__).parent.parent
STEPS, DEVICES = 24, 4
# Slow enough to be met in the middle; DELAY is of a step, in seconds.
CHILD = """
import pathlib, sys, time
from tests import toy
from dina import config as configs, hosts, train
def main(argv):
    folder, address, processes, process, delay, steps = argv
    config, look = toy.config(steps=int(steps)), train.Loop.look
    config.mesh.data = 4
    def slow(*args):
        time.sleep(float(delay))
        return look(*args)
    train.Loop.look = slow
    hosts.join(address, int(processes), int(process), wait=30)
    return train.run(config, pathlib.Path(folder), coordinator=address, processes=int(processes))
configs.run_main(main)
"""


class Run:
    """One start of the same command by `count` processes; their output is in `folder`.N.log."""

    def __init__(self, folder, count, command):
        with socket.create_server(("localhost", 0)) as server:
            address = f"localhost:{server.getsockname()[1]}"
        self.logs = [folder.parent / f"{folder.name}.{number}.log" for number in range(count)]
        self.processes = []
        for number, log in enumerate(self.logs):
            with log.open("wb") as file:
                env = os.environ | {"JAX_PLATFORMS": "cpu"}
                self.processes.append(subprocess.Popen(command(address, number), cwd=ROOT, stdout=file, stderr=file, env=env))

    def wait(self, seconds=120.0):
        """(exit codes, seconds that it took)"""
        begun = time.monotonic()
        codes = [process.wait(max(0.1, begun + seconds - time.monotonic())) for process in self.processes]
        return codes, time.monotonic() - begun

    def texts(self):
        return [log.read_text() for log in self.logs]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


def _toy(folder, count, delay=0.0, steps=STEPS):
    command = lambda address, number: [sys.executable, "-c", CHILD, str(folder), address, str(count), str(number), str(delay), str(steps)]
    return Run(folder, count, command)


def _lines(folder, stage):
    path = folder / stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _until(run, folder, stage, step):
    """Waits for a logged step."""
    while not any(line["step"] >= step for line in _lines(folder, stage)):
        assert all(process.poll() is None for process in run.processes), run.texts()
        time.sleep(0.02)


def _committed(folder, stage):
    return [name.step for name in checkpoint.Checkpoints(folder / stage, "").committed()]


def _same(found, wanted, names):
    """A log has six decimals, so each of two losses is off by up to half of the last one."""
    for name in names:
        ours, theirs = ([(line["step"], line["loss"]) for line in _lines(folder, name)] for folder in (found, wanted))
        assert ours and [step for step, _ in ours] == [step for step, _ in theirs]
        np.testing.assert_allclose([loss for _, loss in ours], [loss for _, loss in theirs], rtol=1e-5, atol=1.01e-6)
        for a, b in zip(*(jax.tree.leaves(checkpoint.result(folder / name)) for folder in (found, wanted)), strict=True):
            assert np.abs(a - b).max() <= 1e-4 * max(1.0, np.abs(b).max())


def _train(config, folder, devices):
    """All jobs, by this process, on so many of its devices."""
    mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
    with config.unlocked():
        config.run.workdir = str(folder)
    with contextlib.closing(train.Stopper()) as stopper:
        for name in config.jobs:
            if name in config.stages:
                train.train_stage(config, name, folder, mesh, stopper)
            else:
                tokenize.prepare_data(config) if name == "data" else tokenize.tokenize(config, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The toy experiment by one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    _train(toy.config(steps=STEPS), folder, DEVICES)
    return folder


def test_stopped_killed_and_gone_on_with_fewer_it_ends_as_one_process_does(alone, tmp_path):
    folder = tmp_path / "run"
    with _toy(folder, 2, delay=0.05) as run:
        _until(run, folder, "one", 7)
        run.processes[1].send_signal(signal.SIGTERM)
        codes, took = run.wait()
        assert codes == [75, 75] and took < 20, run.texts()
    last = _lines(folder, "one")[-1]["step"]
    assert 7 <= last < STEPS and _committed(folder, "one")[-1] == last and not (folder / "one" / "stage.json").exists()
    with _toy(folder, 2, delay=0.05) as run:
        _until(run, folder, "two", 10)
        run.processes[0].kill()
        codes, took = run.wait()
        assert codes == [-signal.SIGKILL, 75] and took < 20, run.texts()
        assert all(f"one: resumed at step {last}" in text for text in run.texts())
        assert "process 0 of 2 was killed" in run.texts()[1]
    spent = (folder / "one" / "hosts" / "1" / "goodput.jsonl").read_text().splitlines()
    assert json.loads(spent[-1])["step"] == STEPS
    with _toy(folder, 1) as run:
        assert run.wait()[0] == [0], run.texts()
        assert "one: finished before" in run.texts()[0] and "two: resumed at step" in run.texts()[0]
    _same(folder, alone, ("one", "two"))


# ---------------------------------------------------------------------------------------------------- real experiments
SMALL = """
from experiments import digits
def get_config(arg=""):
    c = digits.get_config("smoke")
    c.jobs = ("data", "V0")
    c.run.data_dir = DATA
    c.checkpoint.compile_cache = DATA + "/xla"
    c.data.mnist.update({"train": 40, "valid": 10, "test": 10})
    for split in ("train", "valid", "test", "judge"):
        part = c.data.speech[split]
        part.update({"voices": part.voices[:1], "variants": part.variants[:1], "digits": 1, "others": 1})
    c.vision.encoder.update({"depth": 1, "full_layers": (0,)})
    c.stages.V0.optimizer.muon = ()
    c.mesh.data = 2
    return c
"""


@pytest.mark.slow
def test_two_processes_train_digits_from_pixels_with_the_losses_of_one(tmp_path):
    spec = tmp_path / "small.py"
    spec.write_text(SMALL.replace("DATA", repr(str(tmp_path / "data"))))
    config = configs.load(str(spec))
    _train(config, tmp_path / "one", 2)
    with _cli(tmp_path / "two", 2, str(spec)) as run:
        assert run.wait()[0] == [0, 0], run.texts()
    _same(tmp_path / "two", tmp_path / "one", ("V0",))


def _cli(folder, count, spec):
    return Run(folder, count, lambda address, number: [
        sys.executable, "-m", "dina.train", f"--config={spec}", f"--workdir={folder}", f"--coordinator={address}",
        f"--processes={count}", f"--process={number}"])  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- parts
@pytest.mark.parametrize("args,match", [
    (("host", 2, 0), "neither HOST:PORT"), (("host:99999", 2, 0), "neither HOST:PORT"), (("host:1", 2, None), "give both"),
    (("host:1", 2, 2), "give both"), (("auto", 2, None), "leave them out"), (("", 2, 1), "neither HOST:PORT"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(args, match):
    with pytest.raises(InputError, match=match):
        hosts.join(*args)


def test_a_hosts_rows_are_placed_as_the_whole_batch_is():
    mesh = sharding.make_mesh({"data": 4}, jax.devices()[:4])
    batch = {"x": np.arange(24, dtype=np.float32).reshape(8, 3), "example": np.arange(8)}
    rows = hosts.own_rows(mesh, 8)
    assert rows.tolist() == list(range(8))
    placed, wanted = hosts.put_rows(rows, 8, batch, mesh), sharding.put_batch(batch, mesh)
    for name in batch:
        assert placed[name].sharding == wanted[name].sharding
        np.testing.assert_array_equal(placed[name], wanted[name])


def test_a_part_of_a_batch_is_those_rows():
    batches, rows = toy.ToyBatches(toy.config().stages.one), np.array([3, 4, 9])
    for name, x in batches.batch(2).items():
        np.testing.assert_array_equal(batches.part(2, rows)[name], x[rows])


def test_the_channel_passes_on_what_was_decided_and_who_ended_with_which_code(monkeypatch):
    left = []
    monkeypatch.setattr(interrupt, "leave", lambda why, code=75: left.append((why, code)))
    ends = [socket.socketpair() for _ in range(2)]
    middle = hosts.Channel({number + 1: pair[0] for number, pair in enumerate(ends)})
    one, two = (hosts.Channel({0: pair[1]}) for pair in ends)
    middle.tell({"said": [1, "a"]})
    assert one.said.get(timeout=5) == two.said.get(timeout=5) == [1, "a"]
    one.end(2, "ended: bad input", of=1)
    for _ in range(100):  # process 0 hears it, and process 2 from process 0
        if sum("process 1" in why and "bad input" in why and code == 2 for why, code in left) >= 2:
            break
        time.sleep(0.05)
    assert [code for why, code in left if "bad input" in why] == [2, 2]
    for channel in (middle, one, two):
        channel.close()
