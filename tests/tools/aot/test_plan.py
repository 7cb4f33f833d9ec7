"""What is refused before a compile, and how a mesh is chosen."""

import pathlib

import pytest

from dina.config import InputError
from tools.aot import plan, sweep, topology

ROOT = pathlib.Path(__file__).parents[3]
POD = ROOT / "experiments" / "longcat_next.py"


def test_a_pod_of_the_table_brings_its_row():
    made = plan.make(f"{POD}:0.3b,stage=pretrain", "v6e-1024")
    assert made.mesh == {"replica": 4, "data": 16, "expert": 16, "seq": 1, "model": 1} and made.slice_size == 256
    assert made.spec.endswith(",v6e_1024") and made.stage == "pretrain"


def test_a_pod_that_is_not_there_is_all_data_and_accumulates_the_rest():
    made = plan.make(f"{POD}:0.3b,stage=midtrain", "v5e:2x4")
    assert made.mesh["data"] == 8 and made.spec.endswith("stages.midtrain.accumulate=128") and made.slice_size == 0


def test_a_named_mesh_counts():
    made = plan.make(f"{POD}:0.3b,stage=pretrain", "v5p-128", "data=16,expert=4", rows=2)
    assert (made.mesh["data"], made.mesh["expert"]) == (16, 4) and made.spec.endswith("accumulate=64")


@pytest.mark.parametrize("spec,pod,mesh,words", [
    (f"{POD}:stage=pretrain", "v5p-128", "data=48", "48 devices, v5p:4x4x4 has 64"),
    (f"{POD}:stage=pretrain", "v5p-128", "data=64,rows=1", "axis 'rows'.*model"),
    (f"{POD}:stage=pretrain", "v5p-128", "data", "write axis=size"),
    (f"{POD}:stage=sft", "v5e-256", "data=256", "batch=128 does not divide among 256 devices"),
    (str(POD), "v5p-128", "", "4 stages would run.*pretrain"),
    (f"{POD}:stage=pretrial", "v5p-128", "", "did you mean 'pretrain'"),
    (f"{POD}:stage=pretrain,stages.pretrain.task=align", "v5e:2x2", "", "no language stage"),
    (f"{POD}:stage=pretrain", "v5p-129", "", "v5p-128"),
])
def test_one_line_says_what_is_wrong(spec, pod, mesh, words):
    with pytest.raises(InputError, match=words) as error:
        plan.make(spec, pod, mesh)
    assert "\n" not in str(error.value)


def test_a_sweep_tries_expert_axes_that_divide():
    pod = topology.parse("v5e:2x4")
    assert sweep.candidates("auto", pod) == ["data=8,expert=1"]
    assert sweep.candidates("auto", topology.parse("v6e-1024")) == [f"replica=4,data={256 // e},expert={e}" for e in (1, 4, 8, 16)]
    assert sweep.candidates("data=8; data=2,expert=4", pod) == ["data=8", "data=2,expert=4"]
