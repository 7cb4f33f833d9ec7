"""Loss-free balancing: direction, target, rate schedule, and that it balances a skewed router."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dina.backbone import balance
from dina.backbone.config import BackboneConfig, ExpertsConfig

CFG = ExpertsConfig(real=256, zero=128, top_k=12, target_top_k=8)


def test_rule_in_released_numbers():
    counts = jnp.zeros((1, 384), jnp.int32).at[0, 0].set(750).at[0, 300].set(250)
    new = balance.update_bias(jnp.zeros((1, 384)), counts, CFG, 0)
    q = (8 / 12) / 256
    np.testing.assert_allclose(new[0, 0], 0.1 * (q - 0.75), rtol=1e-5)
    np.testing.assert_allclose(new[0, 1:256], 0.1 * q, rtol=1e-5)
    assert np.all(np.asarray(new[0, 256:]) == 0)


@pytest.mark.parametrize("step,rate", [(0, 0.1), (999, 0.1), (1000, 0.05), (3999, 0.0125), (4000, 0.01), (10**6, 0.01)])
def test_rate_halves_and_has_a_floor(step, rate):
    np.testing.assert_allclose(balance.rate(CFG, step), rate, rtol=1e-6)


def test_without_target_every_expert_moves_towards_the_same_share():
    cfg = dataclasses.replace(CFG, target_top_k=0, balance="sign")
    new = balance.update_bias(jnp.zeros((1, 384)), jnp.ones((1, 384), jnp.int32).at[0, 300].set(5), cfg, 0)
    assert new[0, 300] == -new[0, 299] == np.float32(-0.1)


def test_a_layer_without_tokens_keeps_its_bias():
    bias = balance.init_router_bias(BackboneConfig()) + 0.5
    np.testing.assert_array_equal(balance.update_bias(bias, jnp.zeros(bias.shape, jnp.int32), BackboneConfig().experts, 3), bias)


def test_repeated_updates_balance_a_skewed_router():
    cfg = ExpertsConfig(real=4, zero=2, top_k=3, target_top_k=2)
    random = np.random.default_rng(0)
    logits = random.normal(size=(512, 6)) + np.array([2, 0, 0, -1, 0, 0])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    bias = jnp.zeros((1, 6))
    for step in range(400):
        chosen = np.argsort(-(p + np.asarray(bias)), 1)[:, :3]
        counts = np.bincount(chosen.ravel(), minlength=6)[None]
        first = counts if step == 0 else first
        bias = balance.update_bias(bias, jnp.asarray(counts), cfg, step)
    np.testing.assert_allclose(counts[0, :4] / counts.sum(), 2 / 3 / 4, atol=0.01)
    assert np.ptp(first[0, :4]) > 200
