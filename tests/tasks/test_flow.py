"""Stage A2: only the flow gets gradient, padding and order do not matter, a few steps learn."""

import jax
import numpy as np
import optax
import pytest

from dina.tasks.audio_batches import AudioBatches, make_table
from dina.tasks.flow import FlowTask
from tests.audio import toy


@pytest.fixture(scope="module")
def setup():
    config = toy.experiment()
    task = FlowTask(config, toy.stage("flow"))
    batches = AudioBatches(config, task.stage, make_table(toy.columns(), 10240), ("clean24",), "none")
    return task, batches, toy.variables(config)


def test_only_the_flow_gets_gradient(setup):
    task, batches, variables = setup
    batch = batches.batch(0)

    def total(params):
        return sum(total for total, _ in task.loss(params, variables["stats"], batch, jax.random.key(0), ()).terms.values())

    grads = jax.jit(jax.grad(total))(variables["params"])
    norms = {part: float(optax.global_norm(tree)) for part, tree in grads.items()}
    assert norms.pop("flow") > 0 and not any(norms.values()), norms


def test_terms_do_not_depend_on_order_or_padding(setup):
    task, batches, variables = setup
    loss = jax.jit(lambda batch: task.loss(variables["params"], variables["stats"], batch, jax.random.key(0), ()).terms)
    batch = batches.batch(0)
    whole = loss(batch)
    turned = loss({k: v[::-1] for k, v in batch.items()})
    more = {"wave16": 1280, "clean24": 1920}
    padded = loss({k: np.pad(v, ((0, 0), (0, more[k]))) if k in more else v for k, v in batch.items()})
    assert np.isclose(turned["flow"][0], whole["flow"][0], rtol=1e-5)
    for name in whole:
        assert padded[name][1] == turned[name][1] == whole[name][1]
    assert np.isclose(padded["prenet"][0], whole["prenet"][0], rtol=1e-5)
    expected = sum(4 * -(-n // 1280) - 1 for n in batch["samples"]) * 80
    assert whole["flow"][1] == expected


def test_a_few_steps_learn(setup):
    task, batches, variables = setup
    tx = optax.adam(5e-3)

    @jax.jit
    def step(flow, opt, batch, key):
        def total(f):
            terms = task.loss(variables["params"] | {"flow": f}, variables["stats"], batch, key, ()).terms
            means = {name: total / weight for name, (total, weight) in terms.items()}
            return sum(means.values()), means

        (_, means), grads = jax.value_and_grad(total, has_aux=True)(flow)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(flow, updates), opt, means

    flow, history = variables["params"]["flow"], []
    opt = tx.init(flow)
    for index in range(40):
        flow, opt, means = step(flow, opt, batches.batch(index), jax.random.key(index))
        history.append(means)
    for name in ("flow", "prenet"):
        first, last = (np.mean([float(h[name]) for h in part]) for part in (history[:5], history[-5:]))
        assert last < 0.8 * first, (name, first, last)
