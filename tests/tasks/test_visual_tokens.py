"""Stage V1: k-means start, gradient only where it belongs, one update per step, every kind of quantizer trains and is read
by the next stage, the digit gate's parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dina import sharding, step as steps
from dina.config import InputError
from dina.quantize import rvq
from dina.quantize.variables import published
from dina.tasks import pixels, visual_tokens
from dina.vision import tokenizer
from dina.vision.tokenizer import PART
from tests.vision import packs

ROWS = [[(1, 2), (2, 2)], [(2, 3)], [(1, 1), (2, 1)], [(1, 3)]]


@pytest.fixture(scope="module")
def setup():
    config = packs.tiny_config()
    task = visual_tokens.VisualTokens(config, packs.stage("visual_tokens", dropout=0.5, kmeans_vectors=40))
    variables = jax.jit(task.init)(jax.random.key(0))
    batches = [packs.batch(config.vision, ROWS, seed) for seed in range(3)]
    return task, task.start(variables, iter(batches), jax.random.key(1)), batches


@functools.cache
def _compiled(task):
    return jax.jit(task.loss, static_argnums=4)


def _loss(task, variables, batch, axes=()):
    return _compiled(task)(variables["params"], variables["stats"], batch, jax.random.key(2), axes)


def test_start_fits_the_books_to_real_features(setup):
    task, variables, batches = setup
    fresh = jax.jit(task.init)(jax.random.key(0))
    energy = lambda v: [float(a / b) for a, b in (_loss(task, v, batches[0]).metrics[f"energy/{i}"] for i in range(3))]
    starts = [variables, *(task.start(fresh, iter(batches), jax.random.key(seed)) for seed in (2, 3))]
    assert np.median([energy(start)[-1] for start in starts]) < 0.1 < energy(fresh)[-1]
    # counts are hits per update: 18 cells a batch
    np.testing.assert_allclose(variables["stats"][PART]["count"]["0"].sum(), 18.0, rtol=1e-5)


def test_quant_conv_starts_as_a_linear_map_that_weighs_pixels():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(400, 16))
    pixels = (z - z.mean(1, keepdims=True))[:, 12:14] @ rng.normal(size=(2, 30))  # two of sixteen directions
    conv = tokenizer.QuantConv(4)
    params = conv.init(jax.random.key(0), jnp.zeros((1, 16)))["params"]
    left = {}
    for share in (0.0, 1.0):
        started = visual_tokens.quant_conv_start(params, z, pixels, share)
        x = np.asarray(conv.apply({"params": started}, jnp.asarray(z, jnp.float32)))
        u = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
        for target, what in ((x, "linear"), (pixels, "pixels")):
            source = np.c_[u if what == "linear" else x, np.ones(len(u))]
            error = target - source @ np.linalg.lstsq(source, target, rcond=None)[0]
            left[what, share] = (error**2).sum() / ((target - target.mean(0)) ** 2).sum()
    assert max(left["linear", share] for share in (0.0, 1.0)) < 1e-8
    assert left["pixels", 1.0] < 0.2 < 0.5 < left["pixels", 0.0]
    with pytest.raises(InputError, match="at most half"):
        visual_tokens.quant_conv_start(tokenizer.QuantConv(9).init(jax.random.key(0), z)["params"], z, pixels, 0.5)


def test_terms_and_gradients(setup):
    task, variables, batches = setup
    out = _loss(task, variables, batches[0])
    assert set(out.terms) == {"commit", "cosine", "smooth_l1"}
    assert all(float(weight) == 18.0 for _, weight in out.terms.values())

    def total(params):
        return sum(s for s, _ in _loss(task, {"params": params, "stats": variables["stats"]}, batches[0]).terms.values())

    grads = jax.jit(jax.grad(total))(variables["params"])
    largest = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
    assert largest(grads["vision_encoder"]) == 0
    assert largest(grads[PART]["quant_conv"]) > 0 and largest(grads[PART]["feature_decoder"]) > 0


def test_update_moves_the_books_and_padding_does_not(setup):
    task, variables, batches = setup
    out = _loss(task, variables, batches[0])
    new = task.update_stats(variables["stats"], out.updates, jax.random.key(3), 0)
    assert float(jnp.abs(new[PART]["codebook"]["0"] - variables["stats"][PART]["codebook"]["0"]).max()) > 0
    dirty = dict(batches[0], patches=np.where(batches[0]["segment"][..., None] > 0, batches[0]["patches"], 99.0))
    again = _loss(task, variables, dirty)
    seen = lambda o: (o.terms, o.updates[PART]["count"], o.updates[PART]["sum"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), seen(out), seen(again))


def test_two_devices_give_the_sums_of_one(setup):
    task, variables, batches = setup
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])

    def local(variables, batch):
        out = _loss(task, variables, batch, ("data",))
        return jax.lax.psum((out.terms, out.metrics), "data"), out.updates

    put = lambda tree, spec: jax.tree.map(lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)), tree)
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False))
    (terms, metrics), updates = jax.device_get(run(put(variables, P()), put(batches[1], P("data"))))
    one = jax.device_get(_loss(task, variables, batches[1]))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, terms, one.terms)
    jax.tree.map(np.testing.assert_array_equal, updates[PART]["count"], one.updates[PART]["count"])
    jax.tree.map(close, updates[PART]["sum"], one.updates[PART]["sum"])
    drawn = lambda u: jax.tree.map(lambda c, w: c / np.maximum(w, 1)[:, None], u[PART]["candidate"], u[PART]["weight"])
    jax.tree.map(close, drawn(updates), drawn(one.updates))
    mean = lambda pair: pair[0] / pair[1]
    for name in one.metrics:
        np.testing.assert_allclose(mean(metrics[name]), mean(one.metrics[name]), rtol=1e-4, atol=1e-5)


QUANTIZERS = {
    "dac": {"update": "sgd", "metric": "cosine", "factor_dim": 4, "commitment": "residual", "gradient": "rotation",
            "restart_cap": 0.0},
    "simvq": {"kind": "simvq"},
    "fsq": {"kind": "fsq"},
}  # fmt: skip


def _stage(**options):
    stage = packs.stage("visual_tokens", **options)
    stage.train, stage.loss_weights = (PART,), {"commit": 0.25, "cosine": 1.0, "smooth_l1": 1.0}
    return stage


@pytest.mark.parametrize("name", ["fsq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("simvq", "dac"))])
def test_every_quantizer_trains_and_the_next_stage_reads_its_statistics(name):
    config, stage = packs.tiny_config(), _stage(kmeans_vectors=40, health_window=30)
    config.vision.quantizer.update(QUANTIZERS[name])
    task, batch = visual_tokens.VisualTokens(config, stage), packs.batch(config.vision, ROWS)
    variables = task.start(jax.jit(task.init)(jax.random.key(0)), iter([batch, batch, batch]), jax.random.key(1))
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        place = lambda tree: jax.device_put(tree, jax.sharding.NamedSharding(mesh, P()))
        state, before = place(steps.init_state(task, stage, variables)), jax.device_get(variables)
        step, losses = jax.jit(steps.make_train_step(task, stage, 0, mesh), donate_argnums=0), []
        for _ in range(8):
            seen = jax.device_get(task.tokenizer.view(state["params"], state["stats"]))
            state, values = step(state, sharding.put_batch(batch, mesh), np.float32(0.01))
            losses.append(float(values["loss"]))
        state, values = jax.device_get((state, values))
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) and not values["refused"]
    assert values["window/cells"] == 36.0 and 0 < values["window/usage/0"] <= 1  # two steps of 18 cells are a window of 30
    moved = lambda a, b: float(np.abs(a - b).max()) > 0
    assert all(jax.tree.leaves(jax.tree.map(moved, before["params"][PART]["quantizer"], state["params"][PART]["quantizer"])))
    stats = state["stats"][PART]
    for kept in published(task.tokenizer.rvq):  # as the last step's forward pass had it
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stats[kept], seen[kept])
    following = pixels.Pixels(config, packs.stage("pixels", align_stride=0))
    params = jax.eval_shape(following.init, jax.random.key(0))["params"] | jax.eval_shape(lambda: state["params"])
    out = jax.eval_shape(lambda p, s, b: following.loss(p, {PART: s}, b, jax.random.key(2), ()), params, stats, batch)
    assert set(out.terms) == {"l1", "l2"}
    codes = np.where(batch["cell_segment"][..., None] > 0, np.arange(3), -1)
    q, predicted = tokenizer.features(config.vision, state, codes)
    assert q.shape[-1] == 6 and np.isfinite(predicted).all() and (q[batch["cell_segment"] == 0] == 0).all()


def test_the_codebook_loss_has_a_weight_of_its_own_or_rides_with_commitment():
    sums = {name: (value, 2.0) for name, value in (("commit", 3.0), ("codebook", 5.0))}
    out = rvq.QuantizeOut(None, None, depth_N=None, energy_L=None, **sums)
    terms = lambda weights, **fields: visual_tokens.code_terms(rvq.RVQConfig(sizes=(4,), dim=2, **fields), out, weights)
    assert terms({"codebook": 1.0}) == {"commit": (3.0, 2.0)}  # moving averages need no such loss
    assert terms({"commit": 0.25, "codebook": 1.0}, update="sgd") == sums
    assert terms({"commit": 0.25}, update="sgd") == terms({"commit": 0.25}, kind="simvq") == {"commit": (23.0, 2.0)}


def test_unknown_option_is_an_error():
    with pytest.raises(InputError, match="dropuot"):
        visual_tokens.VisualTokens(packs.tiny_config(), packs.stage("visual_tokens", dropuot=0.5))


def test_pooling_and_probe():
    features = np.arange(12, dtype=np.float32).reshape(1, 6, 2)
    pooled = visual_tokens.pooled_features(features, np.array([[1, 1, 2, 2, 2, 0]]), 3)
    np.testing.assert_allclose(pooled[0], [[1, 2, 2, 3], [6, 7, 8, 9], [0, 0, 0, 0]])
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 400)
    x = np.eye(10)[y] + 0.1 * rng.normal(size=(400, 10))
    assert visual_tokens.probe_accuracy(x[:300], y[:300], x[300:], y[300:]) > 0.95
    assert visual_tokens.probe_accuracy(x[:300], y[:300], x[300:], rng.permutation(y[300:])) < 0.4


def test_gate_scores_both_kinds_of_features(setup):
    task, variables, batches = setup
    gate = visual_tokens.digit_gate(task.config, variables, batches[:2], batches[:1])
    assert gate["images"] == 6 and 0 <= gate["quantised"] <= 1 and gate["continuous"] > 0.5  # scored on what it saw
