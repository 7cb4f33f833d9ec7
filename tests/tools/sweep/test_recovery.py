"""Sources of the recovery study: what has no skips forgets, what is shuffled is a permutation, what is read is centred."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.config import InputError
from dina.vision import bridge, tokenizer
from tests.vision import packs
from tools.sweep import recovery

ROWS = [[(1, 2), (2, 2)], [(2, 3)], [(1, 1), (2, 1)]]


@pytest.fixture(scope="module")
def config():
    made = packs.tiny_config()
    made.vision.quantizer.sizes = (4, 4)
    return made


@pytest.fixture(scope="module")
def batch(config):
    return packs.batch(config.vision, ROWS)


def _stage(**options):
    return packs.stage(recovery.TASK, sample=15, **options)


def test_without_skips_nothing_gets_around_the_last_layer(config, batch):
    encoder = bridge.make_encoder(config.vision)
    params = jax.jit(lambda k: bridge.init_encoder(config.vision, k), compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(0))
    inputs = {name: batch[name] for name in tokenizer.ENCODER_INPUTS}
    bare = jax.jit(lambda p: recovery.without_skips(encoder, p, inputs))
    last = params["vit"]["blocks"]["down"]
    silent = {"kernel": last["kernel"].at[-1].set(0), "bias": last["bias"].at[-1].set(0)}
    blocks = params["vit"]["blocks"] | {"down": silent}
    cut = params | {"vit": params["vit"] | {"blocks": blocks}}
    real_BN = batch["cell_segment"] > 0
    whole_MZ = np.asarray(jax.jit(lambda p: encoder.apply({"params": p}, inputs))(cut))[real_BN]
    bare_MZ, some_MZ = (np.asarray(bare(p))[real_BN] for p in (cut, params))
    assert np.ptp(bare_MZ, axis=0).max() < 1e-6 < 1e-3 < min(np.ptp(whole_MZ, axis=0).max(), np.ptp(some_MZ, axis=0).max())


def test_shuffling_permutes_real_cells_only():
    mask_BN = np.array([[1, 1, 1, 0], [1, 0, 1, 0]], bool)
    x_BNZ = np.arange(16.0).reshape(2, 4, 2)
    found = np.asarray(recovery.shuffled(jax.random.key(3), jnp.asarray(x_BNZ), jnp.asarray(mask_BN)))
    np.testing.assert_array_equal(found[~mask_BN], x_BNZ[~mask_BN])
    assert not np.array_equal(found[mask_BN], x_BNZ[mask_BN])
    np.testing.assert_array_equal(np.sort(found[mask_BN], 0), np.sort(x_BNZ[mask_BN], 0))


def test_components_are_the_best_linear_map():
    rng = np.random.default_rng(0)
    low_NV = rng.standard_normal((18, 3)) @ rng.standard_normal((3, 4704))
    batch = {"cell_segment": np.ones((3, 6), np.int32), "patches": low_NV.reshape(3, 24, 1176).astype(np.float32)}
    map_VZ = np.asarray(recovery.components([batch], 5))
    centred = low_NV - low_NV.mean(0)
    np.testing.assert_allclose(centred @ map_VZ @ map_VZ.T, centred, atol=1e-3)
    assert map_VZ.shape == (4704, 5)
    assert np.asarray(recovery.components([batch], 40)).shape == (4704, 40)


@pytest.mark.slow
def test_read_features_are_centred_and_books_lower_what_is_left(config, batch):
    task = recovery.Recovery(config, _stage(source="linear", read="codes", truncate=0.0))
    variables = jax.jit(task.init, compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(0))
    variables = task.start(variables, iter([batch, batch]), jax.random.key(1))
    reader = variables["stats"][recovery.READER]
    x_MZ = np.asarray(task.reader.features(variables["params"], reader, batch))[batch["cell_segment"] > 0]
    np.testing.assert_allclose([x_MZ.mean(), (x_MZ**2).mean()], [0, 1], atol=1e-4)
    assert reader["codebook"]["0"].shape == (4, config.vision.bridge.out_dim)
    out = jax.jit(lambda p: task.loss(p, variables["stats"], batch, jax.random.key(2), ()))(variables["params"])
    assert set(out.terms) == {"l1", "l2"} and float(out.terms["l2"][1]) == 4 * (batch["cell_segment"] > 0).sum()
    assert np.isfinite(float(out.terms["l2"][0]))


@pytest.mark.parametrize("options,words", [({"source": "randm"}, "option source: 'randm'"), ({"read": "code"}, "did you mean 'codes'")])
def test_mistakes_are_named(config, options, words):
    with pytest.raises(InputError, match=words):
        recovery.Recovery(config, _stage(**options))
