"""Hidden frames to the vocoder's mel (case 08d): the prenet, every call of the estimator, the solver, a call of several blocks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dina.audio import flow
from dina.audio.encoder import length_mask
from dina.convert import audio as tables
from tools.parity import load
from tools.parity.case import Case

FIRST = "audio_flow_matching_decoder.prenet.in_mlp.0.weight"


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "prenet_out" in case and "estimator_v" in case


def module(c) -> flow.Flow:
    """Prenet and estimator of a case's config."""
    prenet = flow.Prenet(
        c["prenet_d_model"], c["prenet_nlayers"], c["prenet_attention_heads"], c["prenet_ffn_dim"], c["prenet_out_dim"],
        c["prenet_target_mel_length_scale_ratio"], c["prenet_activation_function"], parent=None,
    )  # fmt: skip
    sizes = tuple(c["channels"]), c["num_mid_blocks"], c["n_blocks"], c["num_heads"], c["attention_head_dim"]
    return flow.Flow(prenet, flow.Estimator(*sizes, flow.RELEASED_CHUNK, c["act_fn"], parent=None))


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    c, model, hidden_BTD, length_B = case.config["flow"], module(case.config["flow"]), case.input("hidden"), case.input("lengths")
    prefix = next(name for name in case.weight_names if name.endswith(FIRST)).removesuffix(FIRST)
    table = f"{prefix}audio_flow_matching_decoder.prenet.positional_embedding"
    if table in case.weight_names:
        case.drop_weight(table, "stored in the release, never added by its model")
    params = load.variables(case, (tables.flow(model, prefix), *tables.flow_sizes(model, hidden_BTD.shape[-1])))["params"]["flow"]
    mu_BTM = jax.jit(functools.partial(model.apply, method="mean"))({"params": params}, hidden_BTD[:, : length_B.max()], length_B)
    case.compare("prenet_out", mu_BTM)
    frames_B = flow.flow_length(length_B, c["prenet_target_mel_length_scale_ratio"])
    for name in ("out_lengths", "flow_matching_mel_lengths"):
        case.compare_ids(name, frames_B)
    velocity = functools.partial(jax.jit(functools.partial(model.apply, method="velocity")), {"params": params})
    _solve(case, c, velocity, mu_BTM, length_mask(frames_B, mu_BTM.shape[1]))
    x, mu = (case.input(f"long_{name}_f16").astype(np.float32).swapaxes(1, 2) for name in ("x", "mu"))
    v_BTM = velocity(x, mu, case.input("long_t").reshape(1), case.input("long_mask")[:, 0] > 0)
    case.compare("long_v", v_BTM.swapaxes(1, 2))


def _solve(case: Case, c, velocity, mu_BTM, valid_BT) -> None:
    """Each Euler step by its calls, from our own state, and the solver at once."""
    guidance = c["cfm"]["inference_cfg_rate"]
    grid_S = flow.time_grid(c["diffusion_steps"], spacing="cosine" if c["cfm"]["t_scheduler"] == "cosine" else "linear")
    case.compare("t_span", grid_S)
    noise_BTM = case.input("noise").swapaxes(1, 2)
    conditions = [mu_BTM, jnp.zeros_like(mu_BTM)] if guidance > 0 else [mu_BTM]
    case.compare("estimator_t", np.repeat(np.asarray(grid_S)[:-1], len(conditions)))
    # The case's own times from here on: the last bit of one is an angle of 6e-5 in the time's sinusoids.
    grid_S = jnp.asarray(case.golden("t_span"))
    x, points, velocities = noise_BTM, [], []
    for t, following in zip(grid_S[:-1], grid_S[1:], strict=True):
        points.append(x)
        called = [velocity(x, condition, jnp.full(len(x), t), valid_BT) for condition in conditions]
        velocities += called
        v = (1 + guidance) * called[0] - guidance * called[1] if guidance > 0 else called[0]
        x = x + (following - t) * v
    case.compare("estimator_x", np.stack(points).swapaxes(2, 3))
    case.compare("estimator_v", np.stack(velocities).swapaxes(2, 3))
    solved = flow.solve(velocity, mu_BTM, noise_BTM, valid_BT, grid_S, max(guidance, 0.0))
    # Beyond a clip's end the reference leaves the noise, ours is zero there.
    case.compare("flow_matching_mel", x, np.where(valid_BT[..., None], solved, noise_BTM))
