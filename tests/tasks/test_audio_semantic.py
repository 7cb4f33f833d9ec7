"""Distilling the first level: the feature, its invariances, and what its loss reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.config import InputError
from dina.tasks import audio_semantic
from dina.tasks.audio_batches import AudioBatches, make_table
from dina.tasks.audio_tokens import AudioTokens
from tests.audio import toy

KEY = jax.random.key(0)


def test_the_feature_is_of_shape_not_of_level_and_of_valid_codes_only():
    rng = np.random.default_rng(0)
    mel, valid = rng.standard_normal((2, 32, 20)).astype(np.float32), np.arange(4) < np.array([[4], [3]])
    feature = np.asarray(audio_semantic.cepstra(mel, valid))
    assert feature.shape == (2, 4, audio_semantic.width("cepstra")) and not feature[1, 3].any()
    np.testing.assert_allclose(feature.sum(1), 0, atol=1e-4)
    np.testing.assert_allclose(audio_semantic.cepstra(mel + 3.0, valid), feature, atol=1e-3)  # loudness
    tilt = np.linspace(-1, 1, 20, dtype=np.float32)
    np.testing.assert_allclose(audio_semantic.cepstra(mel + tilt, valid), feature, atol=1e-3)  # a channel
    noise = mel.copy()
    noise[1, 24:] = 7.0
    np.testing.assert_allclose(audio_semantic.cepstra(noise, valid), feature, atol=1e-5)


def test_the_distance_is_zero_for_the_same_and_two_for_the_opposite():
    x, valid = np.random.default_rng(1).standard_normal((2, 3, 5)).astype(np.float32), np.arange(3) < np.array([[3], [1]])
    for sign, each in ((4.0, 0.0), (-0.5, 2.0)):
        total, count = audio_semantic.distance(jnp.asarray(sign * x), jnp.asarray(x), jnp.asarray(valid))
        assert count == 4 and np.isclose(total, 4 * each, atol=1e-4)


def test_the_loss_reaches_the_encoder_through_the_first_level_alone_and_is_off_by_default():
    config = toy.experiment()
    task = AudioTokens(config, toy.stage("audio_tokens", distill="cepstra"))
    batch = AudioBatches(config, task.stage, make_table(toy.columns(), 10240), ("clean16",)).batch(0)
    variables, plain = jax.jit(task.init)(KEY), jax.eval_shape(AudioTokens(config, toy.stage("audio_tokens")).init, KEY)
    assert set(variables["params"]) - set(plain["params"]) == {audio_semantic.PART}

    @jax.jit
    def run(params, stats):
        def total(params):
            terms = task.loss(params, stats, batch, KEY, ()).terms
            return terms["semantic"][0], terms["semantic"][1]

        return jax.value_and_grad(total, has_aux=True)(params)

    (value, count), grads = run(variables["params"], variables["stats"])
    assert 0 < value < 2 * count and count > 4
    norm = {part: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)) for part, tree in grads.items()}
    assert norm["audio_encoder"] > 0 and norm[audio_semantic.PART] > 0
    assert norm["audio_decoder"] == norm["audio_quantizer"] == norm["audio_reader"] == 0
    books = variables["stats"]["audio_quantizer"]["codebook"]
    later = {name: book if name == task.quantizer.book(0) else book + 1.0 for name, book in books.items()}
    moved = {"audio_quantizer": variables["stats"]["audio_quantizer"] | {"codebook": later}}
    assert run(variables["params"], moved)[0][0] == value
    with pytest.raises(InputError, match="options.distill 'words' does not exist"):
        AudioTokens(config, toy.stage("audio_tokens", distill="words"))
