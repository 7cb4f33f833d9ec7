"""The sparse block: identity experts carry the full scaled weight, padding is exactly zero, biases get no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.backbone.config import ExpertsConfig
from dina.backbone.experts import SparseFFN

CFG = ExpertsConfig(real=4, zero=2, top_k=2, hidden=6, scale=3.0, dispatch="dense", target_top_k=1.0)


@pytest.fixture(scope="module")
def setting():
    u = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 5)), jnp.float32)
    valid = jnp.arange(7)[None] < jnp.array([[7], [4]])
    params = jax.jit(SparseFFN(CFG).init)(jax.random.key(0), u, jnp.zeros(6), valid)
    return params, u, valid


def test_identity_experts_return_the_input_times_the_scaled_probability(setting):
    params, u, valid = setting
    bias = jnp.array([0, 0, 0, 0, 9.0, 9.0])  # both selections fall on identity experts
    y, stats = SparseFFN(CFG).apply(params, u, bias, valid)
    p = jax.nn.softmax(u @ params["params"]["router"]["classifier"], -1)
    np.testing.assert_allclose(y, jnp.where(valid[..., None], 3.0 * p[..., 4:].sum(-1, keepdims=True) * u, 0), rtol=1e-5)
    np.testing.assert_array_equal(stats.count_GR[0], [0, 0, 0, 0, 11, 11])


def test_padding_is_zero_and_the_bias_has_no_gradient(setting):
    params, u, valid = setting
    y, stats = SparseFFN(CFG).apply(params, u, jnp.zeros(6), valid)
    assert np.all(np.asarray(y)[~np.asarray(valid)] == 0) and int(stats.count_GR.sum()) == 22
    gradient = jax.grad(lambda b: jnp.sum(SparseFFN(CFG).apply(params, u, b, valid)[0] ** 2))(jnp.zeros(6))
    assert np.all(np.asarray(gradient) == 0)
