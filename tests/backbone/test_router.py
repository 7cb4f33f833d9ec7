"""Routing: bias selects and never weighs, no renormalisation, padding is invisible."""

import jax
import jax.numpy as jnp
import numpy as np

from dina.backbone.config import ExpertsConfig
from dina.backbone.router import Router

CFG = ExpertsConfig(real=4, zero=2, top_k=2, scale=3.0)


def route(bias, valid):
    u = jnp.asarray(np.random.default_rng(0).normal(size=(9, 5)), jnp.float32)
    module = Router(CFG)
    params = module.init(jax.random.key(0), u, bias, valid)
    params = jax.tree.map(lambda x: x * 50, params)
    return params, u, module.apply(params, u, bias, valid)


def test_weights_are_scaled_probabilities_of_a_softmax_over_all_experts():
    params, u, out = route(jnp.zeros(6), jnp.ones(9, bool))
    p = jax.nn.softmax(u @ params["params"]["classifier"], -1)
    expected = np.sort(np.asarray(p), 1)[:, ::-1][:, :2] * 3.0
    np.testing.assert_allclose(out.weight_NK, expected, rtol=1e-5)
    np.testing.assert_allclose(out.z_sum, np.square(jax.nn.logsumexp(u @ params["params"]["classifier"], -1)).sum(), rtol=1e-5)


def test_bias_moves_the_choice_but_not_the_weight():
    _, _, plain = route(jnp.zeros(6), jnp.ones(9, bool))
    _, _, biased = route(jnp.zeros(6).at[5].set(10.0), jnp.ones(9, bool))
    assert np.all(np.asarray(biased.expert_NK[:, 0]) == 5) and not np.all(np.asarray(plain.expert_NK[:, 0]) == 5)
    np.testing.assert_allclose(biased.weight_NK[:, 0], 3.0 * plain.probability_NE[:, 5], rtol=1e-6)


def test_padding_has_no_weight_and_no_count():
    valid = jnp.arange(9) % 3 > 0
    _, _, out = route(jnp.zeros(6), valid)
    assert np.all(np.asarray(out.weight_NK)[::3] == 0)
    np.testing.assert_array_equal(out.count_GE[0], np.bincount(np.asarray(out.expert_NK)[np.asarray(valid)].ravel(), minlength=6))


def test_groups_are_counted_apart_and_change_nothing_else():
    group = jnp.array([0, 1, 2, 3, 1, 2, 3, 0, 3])
    params, u, plain = route(jnp.zeros(6), (group > 0).astype(jnp.int32))
    out = Router(CFG, groups=3).apply(params, u, jnp.zeros(6), group)
    for number in (1, 2, 3):
        chosen = np.asarray(out.expert_NK)[np.asarray(group) == number]
        np.testing.assert_array_equal(out.count_GE[number - 1], np.bincount(chosen.ravel(), minlength=6))
    np.testing.assert_array_equal(out.count_GE.sum(0), plain.count_GE[0])
    np.testing.assert_array_equal(out.weight_NK, plain.weight_NK)
