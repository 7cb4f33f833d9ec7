"""The loop: stages in order, hand-over, resume after an interruption, refusal of another config's folder."""

import collections
import json
import os
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest

from dina import checkpoint, guard, lease, process, sharding, stages, step as steps, train
from dina.config import InputError
from tests import toy


class _StopAt(train.Stopper):
    """Asks to stop when it was looked at `looks` times."""

    def __init__(self, looks):
        self.looks = looks

    @property
    def asked(self):
        self.looks -= 1
        return self.looks <= 0


def _run(config, workdir, stopper=None):
    mesh = sharding.make_mesh({"data": 2}, jax.devices()[:2])
    for name in config.jobs:
        train.train_stage(config, name, workdir, mesh, stopper or _StopAt(10**9))


def test_stages_hand_over_and_freeze(tmp_path):
    config = toy.config()
    _run(config, tmp_path)
    one, two = checkpoint.result(tmp_path / "one"), checkpoint.result(tmp_path / "two")
    assert np.array_equal(one["params"]["body"]["w"], two["params"]["body"]["w"])
    assert np.array_equal(one["stats"]["body"]["count"], two["stats"]["body"]["count"])
    record = json.loads((tmp_path / "two" / "stage.json").read_text())
    assert record["trained_parameters"] == 8 and record["parameters"] == {"body": 48, "head": 8}
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11)) and lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("looks", [2, 9, 13])
def test_an_interrupted_run_ends_in_the_same_state(tmp_path, looks):
    config = toy.config(ema_decay=0.9)
    _run(config, tmp_path / "whole")
    with pytest.raises(train.Interrupted):
        _run(config, tmp_path / "cut", _StopAt(looks))
    _run(config, tmp_path / "cut")
    for name in config.jobs:
        a, b = checkpoint.result(tmp_path / "whole" / name), checkpoint.result(tmp_path / "cut" / name)
        assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
        steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))


def test_another_config_is_refused_by_name(tmp_path):
    _run(toy.config(), tmp_path)
    with pytest.raises(InputError, match="another config"):
        _run(toy.config(batch=32), tmp_path)


def test_a_folder_where_another_process_trains_is_refused(tmp_path):
    config = toy.config()
    holder = "import sys; from dina import lease; lease.acquire(sys.argv[1], 1.0); print(flush=True); input()"
    command = [sys.executable, "-c", holder, str(tmp_path / "one" / "lease")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is training in .*one.*: wait"):
            _run(config, tmp_path)
        other.kill()
    _run(config, tmp_path)  # a killed process holds nothing
    assert checkpoint.finished(tmp_path / "two")


def test_a_run_that_lost_its_folder_writes_no_more(tmp_path, monkeypatch):
    config, acquire, held = toy.config(), lease.acquire, []
    monkeypatch.setattr(lease, "acquire", lambda *args: held.append(acquire(*args)) or held[-1])
    look = train.Loop.look

    def overtaken(self, n, values, examples):
        if n == 5:
            held[0].store.create(f"{held[0].token + 1:08d}", b"{}")
            held[0]._beaten = -1e9  # it slept
        return look(self, n, values, examples)

    monkeypatch.setattr(train.Loop, "look", overtaken)
    with pytest.raises(lease.Fenced):
        _run(config, tmp_path)
    lines = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5] and not checkpoint.finished(tmp_path / "one")


# -------------------------------------------------------------------------------------------------- damage and poison
def _equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, *(checkpoint.result(folder / "two") for folder in (a, b)))
    for name in ("one", "two"):
        logs = [[json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()] for folder in (a, b)]
        assert [(line["step"], line["loss"]) for line in logs[0]] == [(line["step"], line["loss"]) for line in logs[1]]


def test_damaged_checkpoints_and_results_are_made_again(tmp_path, capsys):
    _run(toy.config(), tmp_path / "whole")
    with pytest.raises(train.Interrupted):
        _run(toy.config(), tmp_path / "cut", _StopAt(9))
    path = max((tmp_path / "cut" / "one" / "checkpoints").glob("*/manifest.ocdbt"))
    path.write_bytes(b"")
    _run(toy.config(), tmp_path / "cut")
    assert "is damaged: manifest.ocdbt has 0 of" in capsys.readouterr().out
    _equal(tmp_path / "whole", tmp_path / "cut")
    for damage in ("result/_METADATA", "stage.json"):
        path = tmp_path / "cut" / "two" / damage
        path.write_bytes(path.read_bytes()[:-2])
        _run(toy.config(), tmp_path / "cut")
        assert "two: the finished result is damaged" in capsys.readouterr().out
        _equal(tmp_path / "whole", tmp_path / "cut")


def test_a_rewind_leaves_the_batch_out_and_survives_an_interruption(tmp_path):
    """Equal to a run that never had the batch: the poisoned one is the only difference of the two data sets."""
    def config(poison):
        c = toy.config(options={"poison_step": poison})
        c.guard = ml_collections.ConfigDict({"nonfinite": "rewind"})
        return c

    ends = {}
    for name, looks in (("whole", 10**9), ("cut", 9)):
        if name == "cut":
            with pytest.raises(train.Interrupted):
                _run(config(5), tmp_path / name, _StopAt(looks))
        _run(config(5), tmp_path / name)
        ends[name] = checkpoint.finished(tmp_path / name / "one")
        assert ends[name]["skipped_batches"] == [5]
        examples = [json.loads(line) for line in (tmp_path / name / "one" / "events.jsonl").read_text().splitlines()]
        assert examples[0]["examples"] == [80, 95] and examples[0]["policy"] == "rewind"
    _equal(tmp_path / "whole", tmp_path / "cut")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11)) and not any(line["refused"] for line in lines)


def test_poison_is_skipped_or_stops_the_run_with_its_batch(tmp_path):
    c = toy.config(options={"poison_step": 5})
    _run(c, tmp_path / "skip")
    lines = [json.loads(line) for line in (tmp_path / "skip" / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["refused"]] == [6]
    c.guard = ml_collections.ConfigDict({"nonfinite": "stop"})
    with pytest.raises(guard.Stopped, match="step 5, batch 5, examples 80..95"):
        _run(c, tmp_path / "stop")


def test_a_full_disk_costs_checkpoints_and_no_step(tmp_path, monkeypatch, capsys):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    _run(toy.config(), tmp_path / "whole")
    monkeypatch.setattr(checkpoint.manifest, "seal", full)
    _run(toy.config(), tmp_path / "full")
    assert "save failed: step 8, error" in capsys.readouterr().out
    _equal(tmp_path / "whole", tmp_path / "full")


def test_time_is_accounted_for(tmp_path):
    with pytest.raises(train.Interrupted):
        _run(toy.config(), tmp_path, _StopAt(6))
    (tmp_path / "one" / "metrics.jsonl").open("a").write(json.dumps({"step": 7, "wall": 1e12}) + "\n")
    _run(toy.config(), tmp_path)
    spent = checkpoint.finished(tmp_path / "one")["goodput"]
    assert all(spent[kind] > 0 for kind in ("compiling", "restoring", "waiting", "training", "saving")) and spent["lost"] > 1e11


def test_a_misspelt_part_is_named(tmp_path):
    with pytest.raises(InputError, match="bodi"):
        _run(toy.config(train=("bodi",)), tmp_path)


# ------------------------------------------------------------------------------------------------- one compiled step
def _step(config, name, mesh=None):
    mesh = mesh or sharding.make_mesh({"data": 1}, jax.devices()[:1])
    return train.compiled_step(config, name, stages.make_task(config, name), mesh)


def _alike(**changes):
    """An experiment whose two stages differ in `changes` (of 'two') only."""
    config = toy.config()
    config.stages.two.update({"train": ("body", "head"), "freeze_stats": ()})
    config.stages.two.update(changes)
    return config


def test_stages_that_differ_in_schedule_only_share_a_step():
    config = _alike(steps=7, after=("one",), init_from={"body": "one"})
    schedule = {"learning_rate": 1e-4, "warmup_steps": 1, "final_fraction": 0.5, "schedule": "linear"}
    config.stages.two.optimizer.update(schedule)
    assert _step(config, "one") is _step(config, "two")


@pytest.mark.parametrize("change", [
    {"train": ("head",)}, {"freeze_stats": ("body",)}, {"loss_weights": {"fit": 2.0}}, {"accumulate": 2},
    {"ema_decay": 0.9}, {"optimizer": {"beta2": 0.9}}, {"optimizer": {"multipliers": (("head", 2.0),)}},
    {"options": {"poison_step": 3}},
])  # fmt: skip
def test_stages_that_compute_something_else_do_not(change):
    config = _alike(**change)
    assert _step(config, "one") is not _step(config, "two")


def test_another_seed_or_mesh_is_another_step():
    config = _alike()
    one = _step(config, "one")
    assert _step(config, "one", sharding.make_mesh({"data": 2}, jax.devices()[:2])) is not one
    one, config.seed = _step(config, "one"), 4
    assert _step(config, "one") is not one


def test_a_shared_step_trains_as_one_of_its_own(tmp_path, monkeypatch):
    config = _alike(steps=6, init_from={"body": "one", "head": "one"})
    config.stages.two.optimizer.learning_rate = 0.01
    _run(config, tmp_path / "shared")
    shared = train.compiled_step
    monkeypatch.setattr(train, "compiled_step", lambda *args: train._STEPS.clear() or shared(*args))
    _run(config, tmp_path / "own")
    a, b = (checkpoint.result(tmp_path / name / "two") for name in ("shared", "own"))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_stage_that_takes_everything_over_is_not_initialised(tmp_path, monkeypatch):
    config = _alike(init_from={"body": "one", "head": "one"})
    _run(config, tmp_path)
    init, ran = toy.Toy.init, []

    def watched(self, key):
        jax.debug.callback(lambda: ran.append(True))  # when it computes, and not only gives shapes
        return init(self, key)

    monkeypatch.setattr(toy.Toy, "init", watched)
    for name, computes in (("two", False), ("one", True)):
        task, mesh = stages.make_task(config, name), sharding.make_mesh({"data": 1}, jax.devices()[:1])
        like = steps.abstract_state(task, config.stages[name], mesh)
        found = stages.initial_variables(config, name, task, tmp_path, like)
        jax.effects_barrier()
        assert bool(ran) == computes and found["params"]["body"]["w"].shape == (6, 8)
        if not computes:
            taken = checkpoint.result(tmp_path / "one")["params"]["body"]["w"]
            assert np.array_equal(found["params"]["body"]["w"], taken)


def test_programs_for_another_number_of_cores_are_kept_apart(tmp_path, compile_cache, monkeypatch):
    config, found = toy.config(), []
    config.mesh.data, config.checkpoint.compile_cache = -1, str(tmp_path / "xla")
    monkeypatch.setattr(process, "keep_memory", lambda: None)
    for cores in ({1}, {0, 1}):
        monkeypatch.setattr(train.os, "sched_getaffinity", lambda _, cores=cores: cores)
        assert train.setup(config).shape["data"] == len(jax.devices())
        found.append(jax.config.jax_compilation_cache_dir)
    assert found == [str(tmp_path / "xla" / "1-cores"), str(tmp_path / "xla" / "2-cores")]


def test_a_stage_compiled_ahead_is_read_from_the_cache(tmp_path, compile_cache):
    config, mesh = toy.config(), sharding.make_mesh({"data": 2}, jax.devices()[:2])
    train.compile_stage(config, "one", tmp_path, mesh)
    assert compile_cache["/jax/compilation_cache/cache_hits"] == 0
    files = {path.name for path in compile_cache.folder.iterdir()}
    assert any(name.startswith("jit_step-") for name in files) and any(name.startswith("jit_init-") for name in files)
    train._STEPS.clear()
    jax.clear_caches()
    train.train_stage(config, "one", tmp_path, mesh, _StopAt(10**9))
    new = {path.name for path in compile_cache.folder.iterdir()} - files
    assert compile_cache["/jax/compilation_cache/cache_hits"] >= 2
    assert not any(name.startswith(("jit_step-", "jit_init-")) for name in new)
    compile_cache.clear()
    train.compile_stage(config, "one", tmp_path, mesh)  # a finished stage needs nothing
    assert not compile_cache


@pytest.fixture
def compile_cache(tmp_path):
    """Counts events of the compile cache, which is an empty folder of its own."""
    from jax.experimental.compilation_cache import compilation_cache

    class Events(collections.Counter):
        folder = tmp_path / "cache"

    events, before = Events(), jax.config.jax_compilation_cache_dir
    listener = lambda event, **_: events.update([event])
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(Events.folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    jax.clear_caches()
    train._STEPS.clear()
    jax.monitoring.register_event_listener(listener)
    yield events
    jax.monitoring.unregister_event_listener(listener)
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    compilation_cache.reset_cache()


def test_the_compilers_effort_is_set_unless_the_user_says_it(monkeypatch):
    flag = "--xla_backend_optimization_level"
    for given, expected in (("", f"{flag}=1"), ("--a=b", f"--a=b {flag}=1"), (f"{flag}=3", f"{flag}=3")):
        monkeypatch.setenv("XLA_FLAGS", given)
        process.set_cpu_effort(1)
        assert os.environ["XLA_FLAGS"] == expected
