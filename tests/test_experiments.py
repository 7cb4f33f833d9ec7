"""Experiment files: any change of a default shows as a diff of tests/golden/configs; what a stage freezes is whole."""

import pathlib

import jax
import pytest

from dina import config as configs
from dina import optim, stages

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "configs"
NAMED = {"digits": "experiments/digits.py", "digits_smoke": "experiments/digits.py:smoke"}


@pytest.mark.parametrize("name", NAMED)
def test_the_config_is_the_one_on_record(name):
    path = GOLDEN / f"{name}.json"
    text = configs.dump(configs.load(str(ROOT / NAMED[name]))) + "\n"
    assert path.read_text() == text, f"defaults changed; if meant: python -m tests.test_experiments rewrites {path.name}"


@pytest.mark.parametrize("name", ["V0", "V1", "V2", "V4", "A1", "A2", "prealign", "pretrain"])
def test_stages_are_complete(name):
    config = configs.load(str(ROOT / "experiments/digits.py:smoke"))
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


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, spec in NAMED.items():
        (GOLDEN / f"{name}.json").write_text(configs.dump(configs.load(str(ROOT / spec))) + "\n")
