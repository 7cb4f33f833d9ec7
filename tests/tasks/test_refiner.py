"""Stage V4: keyed by example, only the transformer gets gradient, conditions dropped and codes disturbed as asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.tasks import refiner as task_module
from dina.vision import refiner
from tests.vision import packs

ROWS = [[(1, 2), (2, 2)], [(2, 3)]]


@pytest.fixture(scope="module")
def setup():
    config = packs.tiny_config()
    task = task_module.RefinerTask(config, packs.stage("refiner", drop_both=0.2, drop_ref=0.2, drop_cond=0.2))
    return task, jax.jit(task.init)(jax.random.key(0)), packs.batch(config.vision, ROWS)


def test_rows_are_keyed_by_example_and_only_the_refiner_learns(setup):
    task, variables, batch = setup

    @jax.jit
    def run(batch):
        total = lambda p: task.loss(p, variables["stats"], batch, jax.random.key(1), ()).terms["velocity"]
        return jax.value_and_grad(total, has_aux=True)(variables["params"])

    (value, weight), grads = run(batch)
    (swapped, _), _ = run({name: x[::-1] for name, x in batch.items()})
    np.testing.assert_allclose(value, swapped, rtol=1e-4)
    (other, _), _ = run(batch | {"example": batch["example"] + 5})
    assert abs(float(other - value)) > 1e-3 * float(value)
    assert float(weight) == 4 * 12
    largest = {part: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)) for part, tree in grads.items()}
    assert {part for part, value in largest.items() if value > 0} == {refiner.PART}


def test_dropped_conditions_do_not_blow_up_the_gradient(setup):
    task, variables, batch = setup
    layout = task.autoencoder.layout(batch)
    data = task.autoencoder.encode({}, batch["patches"], batch)
    keep = {"cond": jnp.zeros((2, 3)), "ref": jnp.zeros((2, 3))}

    def total(params):
        args = (data, jnp.full((2, 3), 0.5), jnp.zeros((2, 6, 6)), data, batch, layout, keep)
        return jnp.mean(task.refiner.apply({"params": params}, *args) ** 2)

    grads = jax.jit(jax.grad(total))(variables["params"][refiner.PART]["dit"])
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 100


def test_draws_follow_the_options(setup):
    task, _, _ = setup
    draw = jax.vmap(lambda k: task._draw(k, 3, 6))(jax.random.split(jax.random.key(2), 400))
    cond, ref = np.asarray(draw["keep"]["cond"]), np.asarray(draw["keep"]["ref"])
    shares = [((cond == a) & (ref == b)).mean() for a, b in ((0, 0), (0, 1), (1, 0))]
    np.testing.assert_allclose(shares, 0.2, atol=0.05)
    assert 0 < float(draw["t"].min()) and float(draw["t"].max()) < 1 and abs(float(draw["t"].mean()) - 0.5) < 0.03
    assert float(draw["rate"].max()) <= 0.1 and int(draw["other"].max()) == 7 and int(draw["other"].min()) == 0


def test_disturb_keeps_absent_codes_absent():
    codes, other = jnp.array([[1, -1], [2, 3]]), jnp.array([[7, 7], [7, 7]])
    hit = jnp.array([[True, True], [False, True]])
    np.testing.assert_array_equal(task_module.disturb(codes, hit, other), [[7, -1], [2, 7]])
