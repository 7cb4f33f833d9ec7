"""Flow matching: golden case 08d, the block mask, padding, the training pair and the solver on a known flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.audio import flow
from tests.audio import golden_weights
from tests.golden_io import read_case, relative_error


@pytest.fixture(scope="module")
def golden():
    config, weights, data = read_case("08d_flow_matching")
    c = config["flow"]
    prefix = "audio_flow_matching_decoder"
    params = {
        "prenet": golden_weights.prenet(weights, f"{prefix}.prenet", c["prenet_nlayers"]),
        "estimator": golden_weights.estimator(weights, f"{prefix}.conditional_decoder", c["num_mid_blocks"], c["n_blocks"]),
    }
    prenet = flow.Prenet(
        c["prenet_d_model"], c["prenet_nlayers"], c["prenet_attention_heads"], c["prenet_ffn_dim"], c["in_channels"], parent=None
    )
    estimator = flow.Estimator(
        c["channels"][0], c["num_mid_blocks"], c["n_blocks"], c["num_heads"], c["attention_head_dim"], 100, parent=None
    )
    return flow.Flow(prenet, estimator), {"params": params}, data, c


def test_prenet_matches_golden(golden):
    module, variables, data, _ = golden
    mu = module.apply(variables, data["hidden"], data["lengths"].astype(np.int32), method="mean")
    for row, n in enumerate(data["out_lengths"]):
        assert relative_error(mu[row, :n], data["prenet_out"][row, :n]) < 1e-4


def test_solver_matches_golden(golden):
    module, variables, data, c = golden
    lengths = data["lengths"].astype(np.int32)
    mu = module.apply(variables, data["hidden"], lengths, method="mean")
    valid = jnp.arange(mu.shape[1]) < lengths[:, None]
    grid = flow.time_grid(c["diffusion_steps"])
    assert relative_error(grid, data["t_span"]) < 1e-6
    velocity = jax.jit(lambda *inputs: module.apply(variables, *inputs, method="velocity"))
    x = data["estimator_x"][1].swapaxes(1, 2)
    t = jnp.full((2,), data["estimator_t"][2])
    assert relative_error(velocity(x, mu, t, valid).swapaxes(1, 2), data["estimator_v"][2]) < 1e-4
    mel = flow.solve(velocity, mu, data["noise"].swapaxes(1, 2), valid, grid, c["cfm"]["inference_cfg_rate"])
    for row, n in enumerate(data["flow_matching_mel_lengths"]):
        assert relative_error(mel[row, :n], data["flow_matching_mel"][row, :n]) < 1e-4


def test_long_call_with_two_blocks_matches_golden(golden):
    module, variables, data, _ = golden
    x, mu = (data[f"long_{name}_f16"].astype(np.float32).swapaxes(1, 2) for name in ("x", "mu"))
    v = module.apply(variables, x, mu, data["long_t"].reshape(1), data["long_mask"][0] > 0, method="velocity")
    assert relative_error(v.swapaxes(1, 2), data["long_v"]) < 1e-4


def test_block_causal_mask():
    mask = np.asarray(flow.block_causal_mask(np.array([[True] * 5 + [False]]), 2))[0]
    assert mask[0].tolist() == [True, True, False, False, False, False]
    assert mask[3].tolist() == [True, True, True, True, False, False]
    assert mask[5].tolist() == [True, True, True, True, True, False]


def test_padding_changes_nothing(golden):
    module, variables, data, _ = golden
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


def test_time_grid_rounding():
    exact, rounded = flow.time_grid(10), flow.time_grid(10, "bfloat16")
    assert exact[0] == 0 and abs(exact[-1] - 1) < 1e-6
    assert 0 < np.abs(exact - rounded).max() < 4e-3
