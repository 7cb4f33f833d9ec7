"""The demo's processes: how they share cores, fail, and stop in good order; and the line that says where they are."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from dina import config as configs
from dina.config import InputError
from tools import demo

ROOT = pathlib.Path(__file__).parent.parent.parent


def _demo(folder, *variants):
    command = [sys.executable, "-m", "tests.tools.fake_phase", "demo", str(folder), *variants]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _until(condition, what, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"{what} did not happen in {seconds} s"
        time.sleep(0.02)


def _gone(pid):
    """Whether a process has ended; without a parent that waits for it, it may stay a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_phase_ends_well(tmp_path):
    with _demo(tmp_path, "quick") as run:
        assert "play: done" in run.communicate()[0] and run.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_demo_lets_its_processes_save(tmp_path, number):
    with _demo(tmp_path, "wait", "quick") as run:
        _until((tmp_path / "wait.pid").exists, "the start")
        pid = int((tmp_path / "wait.pid").read_text())
        # Ctrl-C reaches the demo alone; but niceness counts within a session only.
        assert os.getpgid(pid) != os.getpgid(run.pid) and os.getsid(pid) == os.getsid(run.pid)
        run.send_signal(number)
        run.communicate()
    assert run.returncode == configs.EXIT_RESTART and (tmp_path / "wait.saved").exists()
    assert _gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is a signal on Linux only")
def test_a_killed_demo_leaves_no_orphans(tmp_path):
    with _demo(tmp_path, "wait") as run:
        _until((tmp_path / "wait.pid").exists, "the start")
        run.kill()
    _until((tmp_path / "wait.saved").exists, "saving")
    _until(lambda: _gone(int((tmp_path / "wait.pid").read_text())), "the end")


def test_a_failure_stops_the_others_and_is_shown(tmp_path):
    with _demo(tmp_path, "wait", "bad") as run:
        out = run.communicate()[0]
    assert run.returncode == 3 and "bad failed with exit code 3" in out and "it is broken" in out
    assert all(_gone(int(path.read_text())) for path in tmp_path.glob("*.pid"))


def test_cores_are_divided():
    cores = demo.all_cores()
    for count in (1, 2, 3):
        parts = demo.shares(count)
        assert len(parts) == count and set.union(*parts) <= cores and all(parts)
    assert demo.shares(1) == [cores]
    if len(cores) > 1:
        one, two = demo.shares(2)
        assert not one & two and one | two == cores


def test_the_status_survives_what_is_not_a_number_or_not_whole(tmp_path):
    whole, half = '{"step": 3, "loss": 1.25}\n', '{"step": 4, "lo'
    lines = {"V0": whole + half, "A1": '{"step": 7, "loss": "nan"}\n', "A2": "", "V1": half}
    for name, text in lines.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
        os.utime(tmp_path / name / "metrics.jsonl", (1, 1 + list(lines).index(name)))
    assert demo.status(tmp_path) == "V0 step 3 loss 1.250, A1 step 7 loss nan"
    (tmp_path / "A1" / "stage.json").touch()
    assert demo.status(tmp_path) == "V0 step 3 loss 1.250"


def test_every_process_is_a_variant_and_every_job_is_run():
    path = str(ROOT / "experiments/digits.py")
    jobs = []
    for _, processes in demo.PHASES:
        for _, module, variant in processes:
            if module == "dina.train":
                jobs += configs.load(f"{path}:{variant},checkpoint.compile_cache=/x/xla").jobs
    kinds = {"codes:images", "codes:speech"}
    assert len(jobs) == len(set(jobs)) and kinds <= set(jobs)
    trained = {job for job in jobs if not job.startswith("compile:")} - kinds
    assert trained == set(configs.load(path).jobs) - {"codes"}


@pytest.mark.parametrize("config, expected", [("x.py", "x.py:language,"), ("x.py:smoke", "x.py:smoke,language,")])
def test_a_phase_adds_its_variant_to_the_config_and_its_time_to_the_clock(tmp_path, monkeypatch, config, expected):
    specs = []
    monkeypatch.setattr(demo, "start", lambda name, module, spec, *_: specs.append(spec) or subprocess.Popen(["sleep", "0.5"]))
    clock, stop = demo.Clock(tmp_path / "demo.json"), types.SimpleNamespace(asked=False, terminate=lambda: None)
    assert demo.run_phase("language", (("language", "dina.train", "language"),), config, tmp_path, clock, stop) == 0
    assert specs[0].startswith(expected) and specs[0].endswith(f"checkpoint.compile_cache={tmp_path / 'xla'}")
    assert 0.5 <= demo.Clock(tmp_path / "demo.json").seconds["language"] < 30


def test_a_comma_in_the_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="comma"):
        demo.main([f"--workdir={tmp_path / 'a,b'}"])
    assert not (tmp_path / "a,b").exists()
