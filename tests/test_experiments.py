"""Experiment files: any change of a default shows as a diff of tests/golden/configs; what a stage freezes is whole."""

import importlib.util
import pathlib

import jax
import pytest

from dina import config as configs
from dina import optim, sharding, stages
from dina.config import InputError

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "configs"
NAMED = {"digits": "experiments/digits.py", "digits_smoke": "experiments/digits.py:smoke", "stamps": "experiments/stamps.py",
         "stamps_smoke": "experiments/stamps.py:smoke", "stamps_refiner": "experiments/stamps.py:refiner", "speech": "experiments/speech.py",
         "speech_smoke": "experiments/speech.py:smoke", "speech_language": "experiments/speech.py:language", "sweep_rvq": "experiments/sweeps/rvq.py",
         "sweep_recovery": "experiments/sweeps/recovery.py", "longcat_next": "experiments/longcat_next.py",
         "longcat_next_0.3b_v5p_64": "experiments/longcat_next.py:0.3b,v5p_64,pretrain"}
STAGES = {"digits": ("V0", "V1", "V2", "V4", "A1", "A2", "prealign", "pretrain"), "stamps": ("V0", "V1", "V2", "V2w"), "speech": ("A1", "A2")}


@pytest.mark.parametrize("name", NAMED)
def test_the_config_is_the_one_on_record(name):
    path = GOLDEN / f"{name}.json"
    text = configs.dump(configs.load(str(ROOT / NAMED[name]))) + "\n"
    assert path.read_text() == text, f"defaults changed; if meant: python -m tests.test_experiments rewrites {path.name}"


@pytest.mark.parametrize("experiment,name", [(experiment, name) for experiment, names in STAGES.items() for name in names])
def test_stages_are_complete(experiment, name):
    config = configs.load(str(ROOT / f"experiments/{experiment}.py:smoke"))
    stage = config.stages[name]
    variables = jax.eval_shape(stages.make_task(config, name).init, jax.random.key(0))
    trainable, frozen = optim.split(variables["params"], stage.train)
    inherited = set(stage.init_from)
    assert trainable and inherited <= set(variables["params"])
    frozen_parts = {path.split("/")[0] for path in frozen}
    # A part with statistics that is not trained must have them frozen too, and what is frozen was trained before,
    # except the trunk that pre-alignment builds on.
    assert {part for part in frozen_parts if part in variables["stats"]} <= set(stage.freeze_stats)
    assert frozen_parts - inherited <= {"backbone"}
    for source in (*stage.init_from.values(), *stage.after):
        assert list(config.order).index(source) < list(config.order).index(name)


def test_the_identity_follows_what_a_stage_depends_on():
    config = configs.load(str(ROOT / "experiments/digits.py"))
    other = configs.load(str(ROOT / "experiments/digits.py:stages.A1.steps=7"))
    same = {name for name in config.order if stages.stage_identity(config, name) == stages.stage_identity(other, name)}
    assert same == {"V0", "V1", "V2", "V4"}


@pytest.mark.parametrize("change,names", [
    ("model.remat=full,model.unroll=1,model.losses.text_chunk=7,model.losses.code_chunk=7,model.losses.remat=none", ()),
    ("vision.encoder.remat=none,vision.pixel_decoder.remat=block,vision.refiner.remat=block", ()),
    ("stages.A1.accumulate=2,stages.V0.accumulate=4,stages.sft.accumulate=2", ()),
    ("tokenize.speech_views=['clean']", ("prealign", "pretrain", "midtrain", "sft")),
    ("model.layers=3", ("prealign", "pretrain", "midtrain", "sft")),
])
def test_the_identity_ignores_speed_and_follows_the_codes(change, names):
    config, other = (configs.load(str(ROOT / f"experiments/digits.py:{arg}")) for arg in ("", change))
    changed = {name for name in config.order if stages.stage_identity(config, name) != stages.stage_identity(other, name)}
    assert changed == set(names)


@pytest.mark.parametrize("arg,words", [
    ("smok", "variant 'smok'.*did you mean 'smoke'"),
    ("jobs=['V7']", "jobs: job 'V7'"),
    ("jobs=['pretrian']", "did you mean 'pretrain'"),
    ("stages.V0.batch=7,mesh.data=2", "stages.V0.batch=7.*2 devices"),
    ("stages.sft.accumulate=5", "stages.sft.batch.*accumulate=5"),
])
def test_what_cannot_run_is_named_before_anything_runs(arg, words):
    with pytest.raises(InputError, match=words):
        config = configs.load(str(ROOT / f"experiments/digits.py:{arg}"))
        sizes = config.mesh.to_dict()
        stages.check(config, sharding.make_mesh(sizes, jax.devices()[: sizes["data"]]))


def test_a_misspelt_stage_field_or_option_is_named():
    spec = importlib.util.spec_from_file_location("digits", ROOT / "experiments/digits.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    with pytest.raises(InputError, match="stage field 'init_form'.*init_from"):
        module.stage("align", 1, 1, 0.1, (), {}, init_form={})
    config = configs.load(str(ROOT / "experiments/digits.py"))
    with config.unlocked():
        config.stages.V2.options.canvas_pwer = 1.0
    with pytest.raises(InputError, match="canvas_pwer.*canvas_power"):
        stages.make_task(config, "V2")


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, spec in NAMED.items():
        (GOLDEN / f"{name}.json").write_text(configs.dump(configs.load(str(ROOT / spec))) + "\n")
