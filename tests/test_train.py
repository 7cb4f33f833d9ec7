"""The loop: stages in order, hand-over, resume after an interruption, refusal of another config's folder."""

import json
import signal

import jax
import numpy as np
import pytest

from dina import checkpoint, sharding, train
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


def test_a_misspelt_part_is_named(tmp_path):
    with pytest.raises(InputError, match="bodi"):
        _run(toy.config(train=("bodi",)), tmp_path)


def test_sigterm_sets_the_flag():
    old = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopper = train.Stopper()
    try:
        signal.raise_signal(signal.SIGTERM)
        assert stopper.asked
    finally:
        signal.signal(signal.SIGTERM, old[0])
        signal.signal(signal.SIGINT, old[1])
