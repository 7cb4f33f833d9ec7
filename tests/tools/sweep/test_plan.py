"""Cells from a config: every combination once, one encoder for all, keys that follow what a cell trains."""

import pytest

from dina import stages
from dina.config import InputError
from tests.tools.sweep import toy_sweep
from tools.sweep import plan


def _sweep(**changes):
    sweep = toy_sweep.get_config()
    with sweep.ignore_type():
        for name, value in changes.items():
            sweep[name] = value
    return sweep


def test_every_combination_is_a_cell_once():
    twice = (((toy_sweep.RATE, (0.02,)), ("seed", (4, 5))), *toy_sweep.get_config().products)
    found = plan.make(_sweep(products=twice)).cells
    assert sorted((cell.axes[toy_sweep.RATE], cell.seed) for cell in found) == [(0.02, 3), (0.02, 4), (0.02, 5), (0.05, 3), (0.05, 4)]
    assert len({cell.key for cell in found}) == 5 and {cell.group for cell in found} == {"rate 0.05", "rate 0.02"}


def test_cells_share_a_stage_that_they_take_over_as_an_import():
    made = plan.make(_sweep())
    (shared,) = made.shared.values()
    base = plan.base(made.sweep.base)
    assert shared.identities == {"one": stages.stage_identity(base, "one")} and shared.config.seed == base.seed
    for cell in made.cells:
        assert cell.stages == ("two",) and "one" not in cell.config.stages and cell.config.imports.one == shared.identities["one"]
        assert cell.config.seed == cell.axes["seed"] == cell.seed


def test_paths_of_shared_stages_reach_them():
    made = plan.make(_sweep(shared_paths=("seed",)))
    assert len(made.shared) == 2 and {shared.config.seed for shared in made.shared.values()} == {3, 4}
    assert all(cell.shared.config.seed == cell.seed for cell in made.cells)


def test_fixed_values_are_of_cells_and_not_of_what_they_share():
    plain, fixed = plan.make(_sweep()), plan.make(_sweep(fixed=(("stages.two.steps", 9), ("stages.two.options", {"poison_step": -2}))))
    assert plain.shared.keys() == fixed.shared.keys() and not {c.key for c in plain.cells} & {c.key for c in fixed.cells}
    assert fixed.cells[0].config.stages.two.steps == 9 and fixed.cells[0].config.stages.two.options.poison_step == -2


def test_a_key_ignores_what_does_not_change_the_result():
    same = plan.make(_sweep(fixed=(("mesh.data", 4), ("log.every", 7), ("stages.two.accumulate", 2)), title="another"))
    assert [cell.key for cell in same.cells] == [cell.key for cell in plan.make(_sweep()).cells]


@pytest.mark.parametrize("changes,words", [
    ({"products": ()}, "products: it is empty"),
    ({"products": ((("seed", ()),),)}, "products: seed has no values"),
    ({"products": ((("stages.two.stepps", (1,)),),)}, "stages.two.stepps.*did you mean 'steps'"),
    ({"fixed": (("stages.tow.options", {"a": 1}),)}, "stages.tow.*did you mean 'two'"),
    ({"stages": ("one", "twoo")}, "twoo.*did you mean 'two'"),
])  # fmt: skip
def test_mistakes_are_named(changes, words):
    with pytest.raises(InputError, match=words):
        plan.make(_sweep(**changes))


def test_values_are_short():
    assert plan.describe((8, 8, 8)) == "3 x 8" and plan.describe([8]) == "1 x 8" and plan.describe((8, 4)) == "(8, 4)"
    assert plan.describe("shared") == "shared" and plan.short("stages.V0.steps") == "V0.steps" and plan.short("seed") == "seed"


def test_functions_are_found_by_name():
    assert plan.resolve("tools.sweep.plan:resolve", "x") is plan.resolve
    with pytest.raises(InputError, match="config key measure.function: 'tools.sweep.plan:no' cannot be loaded"):
        plan.resolve("tools.sweep.plan:no", "measure.function")
