"""Jobs of a sweep: shared stages once, finished cells never again, an interrupted or killed run ends with the same numbers."""

import importlib.util

import jax
import numpy as np
import pytest

from dina import checkpoint, train
from dina.config import InputError
from tests.tools.sweep import toy_sweep
from tools.sweep import __main__ as command
from tools.sweep import execute, plan


@pytest.fixture(autouse=True)
def _own_cache_setting():
    """A sweep sets the process's compile cache, as every training run does."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    assert command.main([f"--config={toy_sweep.FILE}", f"--workdir={folder}"]) == 0
    return folder


def test_every_cell_is_measured_and_all_stand_on_one_shared_stage(workdir):
    assert sorted(toy_sweep.calls(workdir)) == ["0.02-3", "0.02-4", "0.05-3", "0.05-4"]
    (shared,) = workdir.glob("shared/*/one")
    body = checkpoint.result(shared)["params"]["body"]["w"]
    for cell in workdir.glob("cells/*"):
        after = checkpoint.result(cell / "two")["params"]["body"]["w"]
        np.testing.assert_array_equal(after, body)
        assert not (cell / "two" / "checkpoints").exists()
    values = {record["psnr_db"]["1"][0] for record in toy_sweep.results(workdir).values()}
    assert len(values) == 4


def test_page_and_table_are_of_all_cells(workdir):
    lines = (workdir / "table.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 + 2  # a line a cell, a line a configuration
    text = (workdir / "page.html").read_text()
    assert "rate 0.05" in text and "rate 0.02" in text and "not finished" not in text


def test_finished_cells_are_never_run_again_and_a_doubled_task_changes_nothing(workdir):
    before = {path: path.read_bytes() for path in workdir.glob("cells/*/measured-*.json")}
    assert execute.run(toy_sweep.FILE, workdir)[1] == []
    made = plan.load(toy_sweep.FILE)
    for kind, key in (("cell", made.cells[0].key), ("shared", next(iter(made.shared)))):
        execute.run_job(toy_sweep.FILE, str(workdir), kind, key)
    assert len(toy_sweep.calls(workdir)) == 4
    assert before == {path: path.read_bytes() for path in workdir.glob("cells/*/measured-*.json")}


def test_another_measurement_trains_nothing(workdir):
    trained = {path: path.stat().st_mtime_ns for path in workdir.glob("*/*/*/stage.json") if path.parent.name == "two"}
    execute.run(f"{toy_sweep.FILE}:measure.kill=nobody", workdir)
    assert trained == {path: path.stat().st_mtime_ns for path in workdir.glob("*/*/*/stage.json") if path.parent.name == "two"}
    assert len(list(workdir.glob("cells/*/measured-*.json"))) == 8


class _StopAt:
    """Asks to stop when it was looked at so often."""

    def __init__(self, looks):
        self.looks = looks

    @property
    def asked(self):
        self.looks -= 1
        return self.looks <= 0


def test_an_interrupted_sweep_ends_with_the_same_numbers(workdir, tmp_path):
    with pytest.raises(train.Interrupted):
        execute.run(toy_sweep.FILE, tmp_path, _StopAt(24))
    done = toy_sweep.calls(tmp_path)
    assert 0 < len(done) < 4
    execute.run(toy_sweep.FILE, tmp_path)
    assert toy_sweep.calls(tmp_path)[: len(done)] == done and len(toy_sweep.calls(tmp_path)) == 4
    assert toy_sweep.results(tmp_path) == toy_sweep.results(workdir)


def test_a_failed_cell_costs_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_sweep, "BROKEN", ["0.05-3"])
    _, (failed,) = execute.run(toy_sweep.FILE, tmp_path)
    assert isinstance(failed.error, RuntimeError) and len(toy_sweep.results(tmp_path)) == 3
    monkeypatch.setattr(toy_sweep, "BROKEN", [])
    assert execute.run(toy_sweep.FILE, tmp_path)[1] == [] and len(toy_sweep.calls(tmp_path)) == 4


def test_stages_of_a_finished_run_are_taken_over(workdir, tmp_path):
    (shared,) = workdir.glob("shared/*")
    spec = f"{toy_sweep.FILE}:trained={shared}"
    execute.run_job(spec, str(tmp_path), "shared", shared.name)
    same, other = (checkpoint.result(folder)["params"] for folder in (shared / "one", tmp_path / "shared" / shared.name / "one"))
    jax.tree.map(np.testing.assert_array_equal, same, other)
    assert not (tmp_path / "shared" / shared.name / "one" / "metrics.jsonl").exists()


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "measured-x.json"
    path.write_text("{")
    with pytest.raises(InputError, match="measured-x.json is damaged.*delete it"):
        execute.load_result(path)
    assert execute.load_result(tmp_path / "none.json") is None


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the package ray (extra `ray`) is not installed")
def test_a_killed_ray_worker_loses_one_cell_at_most(workdir, tmp_path):
    spec = f"{toy_sweep.FILE}:executor.name=ray,executor.cpus=1.0,measure.kill=0.05-4"
    _, failed = execute.run(spec, tmp_path)
    assert not failed and (tmp_path / "killed").exists()
    assert sorted(toy_sweep.calls(tmp_path)) == ["0.02-3", "0.02-4", "0.05-3", "0.05-4", "0.05-4"]
    bare = lambda found: {key: {k: v for k, v in record.items() if k != "measure"} for key, record in found.items()}
    assert bare(toy_sweep.results(tmp_path, spec)) == bare(toy_sweep.results(workdir))


def test_the_workdir_needs_a_cell_for_a_page(tmp_path):
    with pytest.raises(InputError, match="no finished cell"):
        command.main([f"--config={toy_sweep.FILE}", f"--workdir={tmp_path}", "--page-only"])
