"""The log file: lines, non-finite values, cutting what an interruption left behind."""

import json
import types

import numpy as np

from dina import metrics


def test_lines_after_the_resume_point_are_cut(tmp_path):
    log = metrics.Log(tmp_path, "x", 10, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 0.5 if step < 3 else float("nan")})
    log.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "lo')
    log = metrics.Log(tmp_path, "x", 10, 2)
    log.write(3, {"loss": 1.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.5), (3, 1.0)]


def test_rates_are_those_between_lines(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(time=lambda: now[0]))
    log = metrics.Log(tmp_path, "x", 10, 0)
    for step, now[0] in ((1, 100.0), (5, 102.0)):
        log.write(step, {"loss": 1.0}, rows=8)
    log.close()
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert "rows_per_second" not in lines[0] and lines[1]["rows_per_second"] == 16.0


def test_tensorboard_hides_the_steps_that_a_resumed_run_repeats(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(metrics, "SummaryWriter", lambda folder, purge_step: made.append(purge_step))
    for first in (0, 4):
        metrics.Log(tmp_path, "x", 10, first)
    assert made == [None, 5]


def test_non_finite_values_are_text(tmp_path):
    log = metrics.Log(tmp_path, "x", 1, 0)
    log.write(1, {"loss": float("inf")})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == "inf"


def test_arrays_have_lines_of_their_own_every_so_often(tmp_path):
    log = metrics.Log(tmp_path, "x", 5, 0, arrays_every=2)
    for step in range(1, 6):
        log.write(step, {"loss": 1.0, "share": np.array([[0.25, step], [np.nan, 1 / 3]])})
    log.close()
    metrics.Log(tmp_path, "x", 5, 4, arrays_every=2).close()
    lines = [json.loads(line) for line in (tmp_path / "arrays.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "share": [[0.25, step], ["nan", 0.33333]]} for step in (2, 4)]
    assert "share" not in (tmp_path / "metrics.jsonl").read_text()
