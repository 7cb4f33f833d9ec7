"""Stage A1: losses ignore padding and order, every part learns, the word reader learns, codebooks follow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dina.tasks.audio_batches import AudioBatches, make_table
from dina.tasks.audio_tokens import AudioTokens, pooled_l1
from tests.audio import toy

WEIGHTS = {"coarse": 1.0, "refined": 1.0, "multiscale": 0.5, "commit": 0.25, "word": 0.5}


@pytest.fixture(scope="module")
def setup():
    config = toy.experiment()
    task = AudioTokens(config, toy.stage("audio_tokens"))
    batches = AudioBatches(config, task.stage, make_table(toy.columns(), 10240), ("clean16",))
    variables = toy.variables(config)
    before = variables["stats"]["audio_quantizer"]
    variables = task.start(variables, (batches.batch(i) for i in range(1000)), jax.random.key(1))
    loss = jax.jit(lambda params, stats, batch, key: task.loss(params, stats, batch, key, ()))
    return task, batches, variables | {"before": before}, loss


def means(out):
    return {name: float(total / weight) for name, (total, weight) in out.terms.items()}


def test_terms_do_not_depend_on_order_or_padding(setup):
    task, batches, variables, loss = setup
    params, stats, key = variables["params"], variables["stats"], jax.random.key(2)
    batch = batches.batch(0)
    whole = loss(params, stats, batch, key)
    assert set(whole.terms) == set(WEIGHTS)
    turned = loss(params, stats, {k: v[::-1] for k, v in batch.items()}, key)
    padded = loss(params, stats, {k: np.pad(v, ((0, 0), (0, 1280))) if v.ndim == 2 else v for k, v in batch.items()}, key)
    for name, (total, weight) in whole.terms.items():
        for other in (turned, padded):
            assert np.isclose(other.terms[name][0], total, rtol=1e-5), name
            assert other.terms[name][1] == weight, name
    for a, *others in zip(*(jax.tree.leaves(out.updates["audio_quantizer"]["count"]) for out in (whole, turned, padded))):
        assert all(np.array_equal(a, b) for b in others)


def test_unknown_words_have_no_word_loss(setup):
    task, batches, variables, loss = setup
    batch = batches.batch(0)
    silent = loss(variables["params"], variables["stats"], batch | {"word": np.full(4, -1, np.int32)}, jax.random.key(0))
    assert silent.terms["word"][1] == 0 and silent.terms["word"][0] == 0


def test_continuous_steps_bypass_the_codebooks_and_both_reach_the_encoder(setup):
    task, batches, variables, loss = setup
    params, stats = variables["params"], variables["stats"]
    batch = batches.batch(0)
    other = {"audio_quantizer": jax.tree.map(lambda x: x + 1.0, stats["audio_quantizer"])}
    key = jax.random.key(0)
    bypass = batch | {"quantized": np.zeros(4, np.float32)}
    assert means(loss(params, stats, bypass, key))["refined"] == means(loss(params, other, bypass, key))["refined"]
    assert means(loss(params, stats, batch, key))["refined"] != means(loss(params, other, batch, key))["refined"]

    @jax.jit
    def gradient(params, batch):
        def total(p):
            return task.loss(p, stats, batch, key, ()).terms["refined"][0]

        return jax.grad(total)(params)

    for inputs in (batch, bypass):
        norms = {part: float(optax.global_norm(tree)) for part, tree in gradient(params, inputs).items()}
        assert all(norms[part] > 0 for part in ("audio_encoder", "audio_quantizer", "audio_decoder"))


def test_a_few_steps_learn_words_and_mels(setup):
    task, batches, variables, _ = setup
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params, stats, opt, batch, key):
        def total(p):
            out = task.loss(p, stats, batch, key, ())
            return sum(WEIGHTS[name] * total / weight for name, (total, weight) in out.terms.items()), out

        (_, out), grads = jax.value_and_grad(total, has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), task.update_stats(stats, out.updates, key, jnp.int32(0)), opt, out

    params, stats, opt = variables["params"], variables["stats"], tx.init(variables["params"])
    history = []
    for index in range(40):
        params, stats, opt, out = step(params, stats, opt, batches.batch(index), jax.random.key(index))
        history.append(means(out))
    first, last = ({name: np.mean([h[name] for h in part]) for name in WEIGHTS} for part in (history[:5], history[-5:]))
    for name in ("coarse", "refined", "word", "multiscale"):
        assert last[name] < 0.8 * first[name], (name, first[name], last[name])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), stats, variables["stats"])
    assert all(change > 0 for change in moved["audio_quantizer"]["codebook"].values())


def test_start_puts_codes_on_the_data(setup):
    task, batches, variables, loss = setup
    energy = []
    for stats in (variables["stats"], {"audio_quantizer": variables["before"]}):
        out = loss(variables["params"], stats, batches.batch(0), jax.random.key(0))
        energy.append(float(out.metrics["energy_left/2"][0]))
    assert energy[0] < 0.2 * energy[1]


def test_pooled_l1_by_definition():
    error = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    expected = np.abs(error.reshape(2, 3, 2, 4).sum(2)).sum()
    assert np.isclose(pooled_l1(jnp.asarray(error), 2, 1), expected, rtol=1e-5)
    assert np.isclose(pooled_l1(jnp.asarray(error), 1, 1), np.abs(error).sum(), rtol=1e-5)
    last = np.abs(error[:, :4].sum(1)).sum() + np.abs(error[:, 4:].sum(1)).sum()
    assert np.isclose(pooled_l1(jnp.asarray(error), 4, 1), last, rtol=1e-5)
