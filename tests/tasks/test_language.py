"""The language task: terms and their weights, metrics, balance, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dina.config import InputError
from dina.data.phrases import KINDS
from dina.tasks.language import Language, hidden_z
from tests import tiny_language as tiny


def _batch():
    return tiny.pack([tiny.documents(seed)[:3] for seed in (0, 1)] + [tiny.documents(seed)[3:] for seed in (0, 1)])


@functools.cache
def _out(normalise="joint", rows=slice(None)):
    config, stage = tiny.experiment()
    config.model.losses.normalise = normalise
    task, variables = Language(config, stage), tiny.variables()
    batch = {name: array[rows] for name, array in _batch().items()}
    return jax.jit(lambda v, b: task.loss(v["params"], v["stats"], b, jax.random.key(0), ()))(variables, batch)


def test_joint_terms_share_the_weight_of_all_positions():
    batch, joint, own = _batch(), _out(), _out("own")
    speech = batch["code_weight"][batch["tokens"] != tiny.VOCABULARY.img_pad].sum()
    image = batch["code_weight"].sum() - speech
    total = batch["text_weight"].sum() + image + speech
    for name, weight in (("text", batch["text_weight"].sum()), ("visual", image), ("audio", speech)):
        assert float(joint.terms[name][1]) == total and float(own.terms[name][1]) == weight > 0
        np.testing.assert_allclose(joint.terms[name][0], own.terms[name][0], rtol=1e-6)


def test_a_level_weighs_a_quarter_of_a_word():
    out = _out()
    levels = [float(out.metrics[f"visual/nll/{level}"][0]) for level in range(3)]
    np.testing.assert_allclose(out.terms["visual"][0], 0.25 * sum(levels), rtol=1e-5)


def test_metrics_per_kind_add_up_and_padding_counts_nowhere():
    out, batch = _out(), _batch()
    for name in ("text/nll", "text/accuracy"):
        parts = [out.metrics[f"{name}/{kind}"] for kind in KINDS]
        np.testing.assert_allclose(sum(float(x) for x, _ in parts), out.metrics[name][0], rtol=1e-5)
        assert sum(float(w) for _, w in parts) == batch["text_weight"].sum()
    layers, chosen = 2, 2
    routed = (batch["segment"] > 0).sum() * layers * chosen
    assert float(out.updates["router_counts"].sum()) == routed == float(out.metrics["experts/zero_rate"][1])
    assert float(out.metrics["experts/load_max"][0]) >= 1 >= float(out.metrics["experts/load_min"][0])


def test_sums_of_halves_are_the_sum_of_the_whole():
    whole, halves = _out(), [_out(rows=slice(0, 2)), _out(rows=slice(2, 4))]
    for name, (total, weight) in whole.terms.items():
        np.testing.assert_allclose(total, sum(h.terms[name][0] for h in halves), rtol=1e-5)
        np.testing.assert_allclose(weight, sum(h.terms[name][1] for h in halves), rtol=1e-6)
    np.testing.assert_array_equal(whole.updates["router_counts"], sum(h.updates["router_counts"] for h in halves))


def test_balance_lifts_idle_experts_and_leaves_identity_experts_alone():
    config, stage = tiny.experiment()
    task, stats = Language(config, stage), tiny.variables()["stats"]
    counts = jnp.tile(jnp.array([[9, 1, 1, 1, 4, 4]]), (2, 1))
    before = stats["backbone"]["router_bias"]
    moved = task.update_stats(stats, {"router_counts": counts}, jax.random.key(0), 0)["backbone"]["router_bias"] - before
    assert (moved[:, 0] < 0).all() and (moved[:, 1:4] > 0).all() and not np.asarray(moved[:, 4:]).any()


def test_only_named_terms_are_computed():
    config, stage = tiny.experiment(text=1.0, hidden_z=1e-7)
    task, variables = Language(config, stage), tiny.variables()
    shapes = jax.eval_shape(lambda b: task.loss(variables["params"], variables["stats"], b, jax.random.key(0), ()), _batch())
    assert set(shapes.terms) == {"text", "hidden_z"} and not any(name.startswith("visual") for name in shapes.metrics)
    with pytest.raises(InputError, match="video"):
        Language(*tiny.experiment(video=1.0))


def test_hidden_z_leaves_padding_out():
    stream = np.ones((1, 3, 4), np.float32)
    stream[0, 2] = 100
    total, count = hidden_z(stream, np.array([[1, 1, 0]]))
    np.testing.assert_allclose(total, 2 * (1 + np.log(4)) ** 2, rtol=1e-6)
    assert float(count) == 2


def test_a_repeated_batch_is_learnt():
    config, stage = tiny.experiment()
    task, variables, batch = Language(config, stage), tiny.variables(), jax.tree.map(jnp.asarray, _batch())
    weights, tx = dict(stage.loss_weights), optax.adam(1e-2)

    def loss(params):
        out = task.loss(params, variables["stats"], batch, jax.random.key(0), ())
        terms = {name: total / weight for name, (total, weight) in out.terms.items()}
        return sum(weights[name] * value for name, value in terms.items()), terms

    @jax.jit
    def step(params, opt):
        (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt, terms, jax.tree.map(jnp.linalg.norm, grads)

    params, opt, history = variables["params"], tx.init(variables["params"]), []
    for _ in range(12):
        params, opt, terms, norms = step(params, opt)
        history.append({name: float(value) for name, value in terms.items()})
    for name in ("text", "visual", "audio"):
        assert history[-1][name] < 0.85 * history[0][name], history
    silent = [jax.tree_util.keystr(path) for path, norm in jax.tree_util.tree_leaves_with_path(norms) if not norm > 0]
    assert not silent, f"no gradient reaches {silent}"
