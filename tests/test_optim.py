"""Groups of parameters: patterns, decay, multipliers, schedules, averages."""

import jax.numpy as jnp
import numpy as np
import jax
import pytest

from dina import optim
from dina.config import InputError

TREE = {"a": {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, "b": {"norm": {"scale": jnp.ones((2, 2))}}}


def test_split_covers_everything_once():
    train, frozen = optim.split(TREE, ("a/*/kernel", "b"))
    assert set(train) == {"a/dense/kernel", "b/norm/scale"} and set(frozen) == {"a/dense/bias"}
    with pytest.raises(InputError, match="'c'"):
        optim.split(TREE, ("c",))


def test_decay_spares_biases_norms_and_tables():
    flat = optim.flatten(TREE) | {"e/embed_table": jnp.ones((3, 3))}
    assert [path for path, x in flat.items() if optim.decays(path, x)] == ["a/dense/kernel"]


def test_multipliers_scale_the_step_of_their_group():
    config = optim.default_config()
    config.multipliers = (("a/*", 3.0),)
    flat, _ = optim.split(TREE, ("a", "b"))
    tx = optim.make(config)
    updates, _ = tx.update({p: jnp.ones_like(x) for p, x in flat.items()}, tx.init(flat), flat)
    np.testing.assert_allclose(updates["a/dense/bias"][0] / updates["b/norm/scale"][0, 0], 3.0, rtol=1e-5)


@pytest.mark.parametrize("name,end", [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_schedules_warm_up_and_end(name, end):
    config = optim.default_config()
    config.schedule, config.warmup_steps, config.learning_rate, config.final_fraction = name, 5, 1.0, 0.1
    rate = optim.schedule(config, 50)
    assert float(rate(0)) < 0.5 and float(rate(5)) == pytest.approx(1.0) and float(rate(50)) == pytest.approx(end)
    config.schedule = "nope"
    with pytest.raises(InputError, match="nope"):
        optim.schedule(config, 5)


def test_average_starts_fast_and_ends_slow():
    mean = optim.average({"x": jnp.zeros(())}, {"x": jnp.ones(())}, 0.99, jnp.asarray(0))
    assert float(mean["x"]) == pytest.approx(0.9)
    mean = optim.average({"x": jnp.zeros(())}, {"x": jnp.ones(())}, 0.99, jnp.asarray(10**6))
    assert float(mean["x"]) == pytest.approx(0.01, rel=1e-3)


def test_muon_turns_stacked_matrices_and_leaves_the_rest_to_adam():
    config = optim.default_config()
    config.muon, config.muon_rate, config.clip_norm = ("enc/blocks/*/kernel",), 10.0, 1e9
    shapes = {"enc/blocks/q/kernel": (3, 8, 32), "enc/blocks/q/bias": (3, 32), "enc/in/kernel": (8, 8)}
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    grads = {path: jax.random.normal(jax.random.key(i), shape) for i, (path, shape) in enumerate(shapes.items())}
    tx = optim.make(config)
    updates, _ = tx.update(grads, tx.init(params), params)
    for layer in range(3):  # every layer alone: singular values near 10 * sqrt(32 / 8), pointing downhill
        values = np.linalg.svd(np.asarray(updates["enc/blocks/q/kernel"][layer]), compute_uv=False)
        assert 0.6 * 20 < values.min() <= values.max() < 1.3 * 20
        assert float(jnp.sum(updates["enc/blocks/q/kernel"][layer] * grads["enc/blocks/q/kernel"][layer])) < 0
    for path in ("enc/blocks/q/bias", "enc/in/kernel"):
        np.testing.assert_allclose(jnp.abs(updates[path]), 1.0, rtol=1e-3)  # Adam's first step


def test_muon_takes_several_axes_as_one_side_of_a_matrix():
    config = optim.default_config()
    config.muon, config.muon_rate, config.clip_norm = (("a/*/q", 1, 2), ("a/*/out", 2, 1), "a"), 10.0, 1e9
    shapes = {"a/0/q": (2, 8, 4, 8), "a/0/out": (2, 4, 8, 8), "a/1": (8, 32)}
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    grads = {path: jax.random.normal(jax.random.key(i), shape) for i, (path, shape) in enumerate(shapes.items())}
    tx = optim.make(config)
    updates, _ = tx.update(grads, tx.init(params), params)
    for path, shape, size in (("a/0/q", (8, 32), 20), ("a/0/out", (32, 8), 10), ("a/1", (8, 32), 20)):
        for matrix in np.asarray(updates[path]).reshape(-1, *shape):
            values = np.linalg.svd(matrix, compute_uv=False)
            assert 0.6 * size < values.min() <= values.max() < 1.3 * size
    config.muon = (("a/1", 1, 2),)
    with pytest.raises(InputError, match="optimizer.muon: a/1 has shape"):
        tx = optim.make(config)
        tx.update(grads, tx.init(params), params)


def test_rowwise_scales_rows_by_their_own_gradients_and_leaves_the_others_alone():
    random, tx = np.random.default_rng(0), optim.rowwise(0.9, 1e-8)
    params = {"t": jnp.asarray(random.normal(size=(2, 6, 3)), jnp.float32)}
    state, second = tx.init(params), np.zeros((2, 6))
    for n in range(4):
        grad = random.normal(size=(2, 6, 3)) * (random.random((2, 6, 1)) < 0.5) * 10.0**n
        square = np.mean(grad**2, -1)
        second = np.where(square > 0, np.where(second > 0, 0.9 * second + 0.1 * square, square), second)
        updates, state = tx.update({"t": jnp.asarray(grad, jnp.float32)}, state, params)
        np.testing.assert_allclose(state["t"], second, rtol=1e-5)
        np.testing.assert_allclose(updates["t"], grad / (np.sqrt(second) + 1e-8)[..., None], rtol=1e-5)
        assert n > 0 or np.all(np.isclose(np.sqrt(np.mean(np.square(updates["t"]), -1)), square > 0))


@pytest.mark.parametrize("settings", [{}, {"rowwise": ("a/table*",), "muon": ("b/*",), "multipliers": (("a/table2", 2.0),)}], ids=str)
def test_moving_together_is_moving_one_by_one(settings):
    config = optim.default_config()
    config.update({"weight_decay": 0.1, "clip_norm": 0.5} | settings)
    shapes = {"a/table1": (6, 4), "a/table2": (6, 4), "b/l0/w": (4, 4), "b/l1/w": (4, 4), "c/l0/w": (4, 4), "c/l1/w": (4, 4), "c/bias": (4,), "c/bias_2": (4,),
              "c/gain": (4,), "c/gain2": (4,)}
    draw = lambda seed: {path: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape) for i, (path, shape) in enumerate(shapes.items())}
    params, tx = draw(0), optim.make(config)
    groups = optim.alike(config, params, lambda path: path == "c/l1/w")
    assert sorted(map(len, groups.values())) == ([1, 1, 1, 1, 1, 1, 2, 2] if settings else [1, 1, 1, 2, 2, 3])
    assert optim.multiplier(config, "a/table2") == (2.0 if settings else 1.0)

    def run(together, params):
        state = tx.init(params)
        for seed in (1, 2):
            changes, packed = tx.update(optim.pack(together, draw(seed)), optim.pack(together, state), optim.pack(together, params))
            changes, state = optim.unpack(together, (changes, packed))
            params = {path: x + 0.1 * changes[path] for path, x in params.items()}
        return params, state

    alone = {path: (path,) for path in params}
    (found, state), (want, kept) = (jax.jit(lambda p, t=t: run(t, p))(params) for t in (groups, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), (found, state), (want, kept))
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
