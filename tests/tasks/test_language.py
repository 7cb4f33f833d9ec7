"""The language task: terms and their weights, metrics, balance, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dina import model as model_lib, sharding, stages, step as steps
from dina.audio import config as audio_config
from dina.audio.tokenizer import quantizer_config
from dina.config import InputError
from dina.data.phrases import KINDS
from dina.embed import rows_from_codebooks
from dina.quantize import rvq
from dina.tasks.language import Language, hidden_z
from dina.vision import config as vision_config
from dina.vision.tokenizer import make_tokenizer
from tests import tiny_language as tiny


def _batch():
    return tiny.pack([tiny.documents(seed)[:3] for seed in (0, 1)] + [tiny.documents(seed)[3:] for seed in (0, 1)])


@functools.cache
def _loss(normalise):
    config, stage = tiny.experiment()
    config.model.losses.normalise = normalise
    task = Language(config, stage)
    return jax.jit(lambda v, b: task.loss(v["params"], v["stats"], b, jax.random.key(0), ()))


@functools.cache
def _out(normalise="joint", rows=slice(None)):
    return _loss(normalise)(tiny.variables(), {name: array[rows] for name, array in _batch().items()})


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
    out, batch, v = _out(), _batch(), tiny.VOCABULARY
    for name in ("text/nll", "text/accuracy"):
        parts = [out.metrics[f"{name}/{kind}"] for kind in KINDS]
        np.testing.assert_allclose(sum(float(x) for x, _ in parts), out.metrics[name][0], rtol=1e-5)
        assert sum(float(w) for _, w in parts) == batch["text_weight"].sum()
    layers, chosen = 2, 2
    routed = (batch["segment"] > 0).sum() * layers * chosen
    assert float(out.updates["router_counts"].sum()) == routed == float(out.metrics["experts/zero_rate"][1])
    share, of = out.metrics["experts/share"]
    batch_kinds = [(batch["segment"] > 0) & (batch["tokens"] != v.img_pad) & (batch["tokens"] != v.audio_pad), batch["tokens"] == v.img_pad, batch["tokens"] == v.audio_pad]
    np.testing.assert_array_equal(np.sum(share, (0, 2)), [kind.sum() * layers * chosen for kind in batch_kinds])
    assert float(of) == routed and float(sum(out.metrics[f"experts/zero_rate/{k}"][0] for k in model_lib.INPUT_KINDS)) == float(out.metrics["experts/zero_rate"][0])
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


def test_prealignment_leaves_the_trunk_and_its_routers_as_they_are():
    config, stage = tiny.experiment()
    stage.train = tuple(part for part in model_lib.PARTS if part != "backbone")
    stage.freeze_stats, stage.optimizer.weight_decay = ("backbone",), 0.1
    task, mesh = Language(config, stage), sharding.make_mesh({"data": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = steps.init_state(task, stage, tiny.variables())
        before = jax.device_get(state)
        step = jax.jit(steps.make_train_step(task, stage, 0, mesh))
        for _ in range(2):
            state, values = step(state, sharding.put_batch(_batch(), mesh), np.float32(0.1))
    after = jax.device_get(state)
    assert not values["refused"]
    for kind in ("params", "stats"):
        jax.tree.map(np.testing.assert_array_equal, after[kind]["backbone"], before[kind]["backbone"])
    assert np.any(before["stats"]["backbone"]["router_bias"])
    assert not any("backbone" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(after["opt"]))
    for part in stage.train:
        assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (after["params"][part], before["params"][part])))), part


def test_code_rows_start_from_the_codebooks_and_no_others_do(monkeypatch):
    config, stage = tiny.experiment()
    config.vision, config.audio = vision_config.default_config(), audio_config.default_config()
    config.vision.quantizer.sizes, config.audio.quantizer.sizes = tiny.VOCABULARY.visual, tiny.VOCABULARY.audio
    config.run, config.model.code_start = {"workdir": "unused"}, "codebooks"
    quantizers = {"vision_quantizer": make_tokenizer(config.vision).rvq, "audio_quantizer": quantizer_config(config.audio)}
    trained = {part: rvq.init_stats(q, jax.random.key(n)) for n, (part, q) in enumerate(quantizers.items())}
    monkeypatch.setattr(stages, "load_parts", lambda config, workdir, parts: ({}, {part: trained[part] for part in parts}))
    task, key = Language(config, stage), jax.random.key(5)
    table = lambda variables: np.asarray(variables["params"]["embed"]["table"])
    old, new = table(tiny.variables()), table(task.start(tiny.variables(), None, key))
    others = np.ones(len(old), bool)
    for number, (part, base) in enumerate(zip(quantizers, (task.vocabulary.visual_base[0], task.vocabulary.audio_base[0]))):
        q = quantizers[part]
        books, counts = ([trained[part][name][q.book(level)] for level in range(q.levels)] for name in ("codebook", "count"))
        rows = rows_from_codebooks(jax.random.fold_in(key, number), books, counts, old.shape[1])
        np.testing.assert_allclose(new[base : base + len(rows)], rows, rtol=1e-6)
        others[base : base + len(rows)] = False
    np.testing.assert_array_equal(new[others], old[others])
    assert others.any() and np.all(np.any(new[~others] != old[~others], axis=1))
    stage.init_from.embed = "prealign"
    np.testing.assert_array_equal(table(Language(config, stage).start(tiny.variables(), None, key)), old)
    stage.init_from, config.model.code_start = {}, "random"
    np.testing.assert_array_equal(table(Language(config, stage).start(tiny.variables(), None, key)), old)
