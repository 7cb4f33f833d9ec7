"""The pods' experiment: parameters of the release, proportions of its siblings, and that every row of its hardware divides."""

import importlib.util
import math
import pathlib

import jax
import pytest

from dina import config as configs
from dina import sharding, stages
from dina.config import InputError
from tools.aot import families, topology

FILE = pathlib.Path(__file__).parent.parent / "experiments" / "longcat_next.py"
SPEC = importlib.util.spec_from_file_location("longcat_next", FILE)
SPEC.loader.exec_module(module := importlib.util.module_from_spec(SPEC))


def load(*names):
    return configs.load(f"{FILE}:{','.join(names)}")


def counted(config):
    return families.count(config, jax.eval_shape(stages.make_task(config, "pretrain").init, jax.random.key(0))["params"])


def test_parameters_are_those_of_the_release():
    found = counted(load())
    assert {name: round(size / 1e9, 2) for name, size in found.items()} == {
        "trunk": 69.03, "ngram": 31.42, "visual_head": 0.88, "audio_head": 1.43, "bridge": 0.08, "all": 71.41}


@pytest.mark.parametrize("size,total", [("0.3b", 0.39), ("3b", 3.51)])
def test_siblings_keep_the_proportions(size, total):
    found, release = counted(load(size)), module.SIZES["68b"]
    assert round(found["all"] / 1e9, 2) == total
    own, m = module.SIZES[size], load(size).model
    assert own.top_k / own.real == release.top_k / release.real
    assert (m.width / m.experts.hidden, m.width / m.attention.q_rank, m.width / m.attention.kv_rank, m.width / own.heads) == (3, 2, 6, 96)
    assert m.width % 12 == 0  # a row of each of the twelve n-gram tables
    # Word rows, which do not shrink with the trunk, are a third of the smallest.
    assert found["ngram"] / found["trunk"] == pytest.approx(0.45 if size == "3b" else 0.24, abs=0.06)


@pytest.mark.parametrize("name", module.HARDWARE)
@pytest.mark.parametrize("stage", module.ORDER)
def test_every_row_divides_every_stage(name, stage):
    config, row = load(name, stage), module.HARDWARE[name]
    pod = topology.parse(row.topology)
    assert (pod.chips, pod.devices, pod.slices) == (row.chips, row.devices, row.slices)
    sizes = config.mesh.to_dict()
    assert math.prod(sizes.values()) == row.devices
    stages.check(config, type("Mesh", (), {"shape": {axis: sizes.get(axis, 1) for axis in sharding.AXES}}))
    s = config.stages[stage]
    # A device has one sequence at a time, whole or shared.
    assert s.batch == s.accumulate * math.prod(sizes.get(axis, 1) for axis in sharding.BATCH_AXES)
    assert config.model.experts.real % row.expert == 0


@pytest.mark.parametrize("name", module.HARDWARE)
def test_expert_and_data_lie_on_sides_of_a_slice(name):
    row = module.HARDWARE[name]
    pod = topology.parse(row.topology)
    sides = [*map(int, pod.shape.split("x")), pod.generation.devices]
    subsets = [math.prod(side for i, side in enumerate(sides) if number >> i & 1) for number in range(2 ** len(sides))]
    # With several copies of the state in a slice, experts are cut out of a side, so that every copy has what a smaller pod has.
    assert row.expert in subsets or (row.copies > 1 and any(side % row.expert == 0 for side in sides))


def test_stages_are_the_papers():
    config = load()
    tokens = {name: (s.batch, s.options.pack.positions) for name, s in config.stages.items()}
    assert tokens == {"prealign": (8192, 8192), "pretrain": (8192, 8192), "midtrain": (1024, 32768), "sft": (128, 65536)}
    assert config.stages.prealign.options.mixture["plain_text"] == 0
    assert sum(module.AUDIO_SHARES.values()) == pytest.approx(sum(module.IMAGE_SHARES.values())) == pytest.approx(1)


def test_what_is_not_there_is_named():
    with pytest.raises(InputError, match="v5p_64"):
        load("v5p_63")
    assert module.get_config("stage=sft").jobs == module.get_config("sft").jobs == ("sft",)
