"""Flow matching: the block mask, padding, the training pair and the solver on a known flow (golden cases: tests/tools/test_parity.py)."""

import jax.numpy as jnp
import numpy as np
import pytest

from dina.audio import flow
from dina.config import InputError
from dina.convert import audio as tables
from tests.audio import toy
from tests.golden_io import read_case


@pytest.fixture(scope="module")
def golden():
    config, weights, data = read_case("08d_flow_matching")
    c = config["flow"]
    prenet = flow.Prenet(
        c["prenet_d_model"], c["prenet_nlayers"], c["prenet_attention_heads"], c["prenet_ffn_dim"], c["in_channels"], parent=None
    )
    estimator = flow.Estimator(
        tuple(c["channels"]), c["num_mid_blocks"], c["n_blocks"], c["num_heads"], c["attention_head_dim"], 100, parent=None
    )
    module = flow.Flow(prenet, estimator)
    found = toy.from_released(weights, tables.flow(module, ""), *tables.flow_sizes(module, c["prenet_in_dim"]))
    return module, {"params": found["params"]["flow"]}, data


def test_block_causal_mask():
    mask = np.asarray(flow.block_causal_mask(np.array([[True] * 5 + [False]]), 2))[0]
    assert mask[0].tolist() == [True, True, False, False, False, False]
    assert mask[3].tolist() == [True, True, True, True, False, False]
    assert mask[5].tolist() == [True, True, True, True, True, False]


def test_padding_changes_nothing(golden):
    module, variables, data = golden
    lengths = np.array([9, 13], np.int32)
    x = np.random.default_rng(0).normal(size=(2, 13, 80)).astype(np.float32)
    t = np.array([0.3, 0.3], np.float32)
    mu, v = module.apply(variables, data["hidden"], lengths, x, t)
    mu_short, v_short = module.apply(variables, data["hidden"][:1, :9], lengths[:1], x[:1, :9], t[:1])
    assert np.allclose(mu[0, :9], mu_short[0], atol=1e-5) and np.allclose(v[0, :9], v_short[0], atol=1e-5)
    assert not np.any(mu[0, 9:]) and not np.any(v[0, 9:])


def test_training_pair_is_the_flow_it_describes():
    rng = np.random.default_rng(0)
    x1, noise = (rng.normal(size=(2, 4, 3)).astype(np.float32) for _ in range(2))
    t, start, velocity = flow.noisy_pair(x1, noise, jnp.zeros(2), 1e-6)
    assert np.allclose(t, 0) and np.allclose(start, noise, atol=1e-5)
    t, middle, _ = flow.noisy_pair(x1, noise, jnp.full(2, 0.5), 1e-6)
    assert np.allclose(t, 1 - np.cos(np.pi / 4), atol=1e-6)
    assert np.allclose(middle, start + t[:, None, None] * velocity, atol=1e-5)


def test_solver_follows_a_straight_flow_and_guidance_extrapolates():
    rng = np.random.default_rng(0)
    mu, noise = (rng.normal(size=(2, 4, 3)).astype(np.float32) for _ in range(2))
    valid = np.array([[True] * 4, [True, True, False, False]])
    straight = lambda x, m, t, valid: m - jnp.concatenate([noise] * (len(m) // 2))
    out = flow.solve(straight, mu, noise, valid, flow.time_grid(3), 0.0)
    assert np.allclose(out, np.where(valid[..., None], mu, 0), atol=1e-5)
    guided = flow.solve(straight, mu, noise, valid, flow.time_grid(3), 0.5)
    assert np.allclose(guided, np.where(valid[..., None], 1.5 * mu, 0), atol=1e-5)


def test_lengths_are_the_references_in_float32():
    assert flow.flow_length(13, 1.0) == 13 and flow.flow_length(10, 1.6) == 16
    frames = np.arange(200)
    exact = [int(np.float32(n) * np.float32(0.7)) for n in frames]
    assert flow.flow_length(frames, 0.7).tolist() == exact == [flow.flow_length(int(n), 0.7) for n in frames]
    assert exact != [int(n * 0.7) for n in frames.tolist()]  # in float64 some are a frame longer or shorter


def test_time_grid_rounding():
    assert np.allclose(flow.time_grid(4, spacing="linear"), [0, 0.25, 0.5, 0.75, 1])
    with pytest.raises(InputError, match="audio.flow.spacing 'sine' does not exist"):
        flow.time_grid(4, spacing="sine")
    exact, rounded = flow.time_grid(10), flow.time_grid(10, "bfloat16")
    assert exact[0] == 0 and abs(exact[-1] - 1) < 1e-6
    assert 0 < np.abs(exact - rounded).max() < 4e-3
