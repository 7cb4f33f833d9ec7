"""The train step: mesh invariance, micro-batches, freezing, refusal of poison, averages."""

import functools
import re

import jax
import numpy as np
import pytest

from dina import optim, sharding, stages, step as steps
from dina.tasks.language import Language
from tests import tiny_language, toy


def _train(config, mesh_sizes, steps_run=5, name="one"):
    mesh = sharding.make_mesh(mesh_sizes, jax.devices()[: int(np.prod(list(mesh_sizes.values())))])
    stage = config.stages[name]
    task = stages.make_task(config, name)
    with jax.set_mesh(mesh):
        abstract = steps.abstract_state(task, stage, mesh)
        state = steps.init_state(task, stage, task.init(jax.random.key(0)))
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)
        start = jax.device_get(state)
        step = jax.jit(steps.make_train_step(task, stage, config.seed, mesh))
        losses = []
        for n in range(steps_run):
            state, values = step(state, sharding.put_batch(task.batches().batch(n), mesh), np.float32(0.05))
            losses.append(float(values["loss"]))
        return np.array(losses), start, jax.device_get(state), values


@pytest.mark.parametrize("mesh", [{"data": 4}, {"replica": 2, "data": 2, "expert": 2}])
def test_any_mesh_gives_the_same_run(mesh):
    losses, _, state, _ = _train(toy.config(), {"data": 1})
    other_losses, _, other, _ = _train(toy.config(), mesh)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    assert state["stats"]["body"]["count"] == pytest.approx(other["stats"]["body"]["count"])
    np.testing.assert_allclose(other["params"]["body"]["w"], state["params"]["body"]["w"], rtol=1e-4, atol=1e-6)


def test_micro_batches_change_nothing():
    losses, _, state, _ = _train(toy.config(), {"data": 1})
    split_losses, _, split, _ = _train(toy.config(accumulate=4), {"data": 2})
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
    assert split["stats"]["head"]["count"] == pytest.approx(state["stats"]["head"]["count"])


def test_frozen_parts_stay_bit_identical_and_have_no_optimizer_state():
    _, start, state, _ = _train(toy.config(ema_decay=0.9), {"data": 2}, name="two")
    assert np.array_equal(start["params"]["body"]["w"], state["params"]["body"]["w"])
    assert start["stats"]["body"]["count"] == state["stats"]["body"]["count"]
    assert not np.array_equal(start["params"]["head"]["w"], state["params"]["head"]["w"])
    assert start["stats"]["head"]["count"] != state["stats"]["head"]["count"]
    assert set(state["opt"][1].mu) == {"head/w"} and set(state["ema"]) == {"head/w"}


def test_a_non_finite_step_leaves_everything_as_it_was():
    config = toy.config(ema_decay=0.5)
    config.stages.one.options.poison_step = 4
    _, _, before, _ = _train(config, {"data": 2}, steps_run=4)
    _, _, after, values = _train(config, {"data": 2}, steps_run=5)
    assert values["refused"] == 1.0
    for name in ("params", "stats", "opt", "ema"):
        for a, b in zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True):
            assert np.array_equal(a, b)
    assert after["step"] == 5


def test_the_average_is_what_a_stage_hands_over():
    _, _, state, _ = _train(toy.config(ema_decay=0.99), {"data": 1})
    handed = steps.result(state)["params"]["head"]["w"]
    assert np.array_equal(handed, state["ema"]["head/w"]) and not np.array_equal(handed, state["params"]["head"]["w"])


def _language(sizes, accumulate=1, steps_run=2, **settings):
    """Losses, norms and parameters of a tiny language model of which everything is split that divides."""
    config, stage = tiny_language.experiment()
    config.model.update_from_flattened_dict(settings)
    stage.accumulate, stage.optimizer.clip_norm = accumulate, 0.5
    task = Language(config, stage)
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    documents = tiny_language.documents()
    batch = tiny_language.pack([[documents[(i + j) % 6] for j in range(i % 3)] for i in range(16)])  # none, one or two documents a row
    batch["text_weight"] *= np.arange(16)[:, None] ** 2 % 5 + np.float32(0.1)
    start = tiny_language.variables()  # kept for other tests, so made outside of the mesh
    losses = []
    with jax.set_mesh(mesh):
        abstract = steps.abstract_state(task, stage, mesh)
        place = lambda x, like: jax.device_put(np.array(x), like.sharding)
        variables = {kind: jax.tree.map(place, start[kind], abstract[kind]) for kind in start}
        state = jax.tree.map(place, steps.init_state(task, stage, variables), abstract)
        step = jax.jit(steps.make_train_step(task, stage, 0, mesh))
        for _ in range(steps_run):
            state, values = step(state, sharding.put_batch(batch, mesh), np.float32(0.003))
            losses.append([float(values[name]) for name in ("loss", "grad_norm", "experts/zero_rate")])
    return np.array(losses), optim.flatten(jax.device_get(state["params"])), state


@functools.cache
def _truth():
    return _language({"data": 1})


@pytest.mark.parametrize("sizes, accumulate, settings", [
    ({"data": 2, "expert": 4}, 1, {"experts.dispatch": "all_to_all", "remat": "attention"}),
    pytest.param({"replica": 2, "data": 2, "expert": 2}, 2, {"ngram.lookup": "exchange", "remat": "full"}, marks=pytest.mark.slow),
    pytest.param({"data": 8}, 1, {}, marks=pytest.mark.slow),
    pytest.param({"data": 4, "expert": 2}, 1, {"experts.dispatch": "ragged_all_to_all", "remat": "attention+experts"}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_a_language_model_in_parts_takes_the_same_steps(sizes, accumulate, settings, monkeypatch):
    want, truth, _ = _truth()
    monkeypatch.setattr(sharding, "MINIMUM", 1)
    losses, params, state = _language(sizes, accumulate, **settings)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    for path, x in truth.items():
        # Adam divides by the root of its second moment: where that is rounding noise, so is the step.
        assert (np.abs(params[path] - x) > 1e-4).mean() < 2e-3, path
    devices = np.prod(list(sizes.values())) // sizes.get("replica", 1)
    for path, x in optim.flatten(state["params"]).items():
        assert state["opt"][1].mu[path].sharding == x.sharding, path
        if path.startswith("backbone/layers/ffn") or "/experts/" in path:
            assert x.addressable_shards[0].data.size * devices == x.size, path


@pytest.mark.slow
def test_no_large_gradient_is_all_reduced_and_parameters_travel_in_the_compute_type(monkeypatch):
    monkeypatch.setattr(sharding, "MINIMUM", 1)
    config, stage = tiny_language.experiment()
    config.model.update_from_flattened_dict({"experts.dispatch": "all_to_all", "remat": "full", "dtype": "bfloat16"})
    task, mesh = Language(config, stage), sharding.make_mesh({"data": 2, "expert": 4})
    with jax.set_mesh(mesh):
        state = steps.abstract_state(task, stage, mesh)
        batch = sharding.put_batch(tiny_language.pack([[] for _ in range(8)]), mesh)
        program = jax.jit(steps.make_train_step(task, stage, 0, mesh)).lower(state, batch, np.float32(0)).as_text()
    types = lambda op: re.findall(rf"stablehlo\.{op}\"?\(.*?\) -> \(?tensor<([^>]*)>", program, re.DOTALL)
    values = [np.prod([int(n) for n in kind.split("x")[:-1]]) for kind in types("all_reduce")]
    # q_b's 12 rows divide by `data` alone: its part, 2 x 6 x 2 x 12, is summed over `expert`. Whole matrices have up to 3,072 values.
    assert max(values) <= 288 and len(values) > 10
    experts = {"1x24x16xbf16", "1x16x24xbf16"}  # one expert a device, gathered over `data`
    assert experts <= set(types("all_gather")) and {"1x12x16xbf16", "1x16x12xbf16"} <= set(types("reduce_scatter"))
