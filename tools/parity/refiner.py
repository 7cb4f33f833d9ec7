"""The refiner's transformer on given latents (case 07b): every part, the three passes of guidance, schedules, an unguided run."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from dina.convert import visual
from dina.vision import refine, refiner
from tools.parity import load
from tools.parity.case import Case


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "joint_before_norm_out" in case


def module(case: Case, c, cond_dim: int) -> refiner.Refiner:
    """The transformer of a case's config `c`; `cond_dim`: 0 where code vectors come projected."""
    multiple, hidden = c["multiple_of"], int((c["ffn_dim_multiplier"] or 1) * 4 * c["hidden_size"])
    return refiner.Refiner(
        width=c["hidden_size"], depth=c["num_layers"], refiner_layers=c["num_refiner_layers"], heads=c["num_attention_heads"],
        kv_heads=c["num_kv_heads"], ff=multiple * math.ceil(hidden / multiple), cond_dim=cond_dim,
        references=len(case.weight("image_refiner.base_transformer.image_index_embedding")), token_dim=c["patch_size"] ** 2 * c["in_channels"],
        eps=c["norm_eps"], time_scale=c["timestep_scale"], axes=tuple(c["axes_dim_rope"]), parent=None,
    )  # fmt: skip


def channels_last(z_BLHW) -> np.ndarray:
    """The reference's latents or pixels in our order."""
    return np.moveaxis(np.asarray(z_BLHW), -3, -1)


def channels_first(z_BHWL) -> np.ndarray:
    """Ours in the reference's order."""
    return np.moveaxis(np.asarray(z_BHWL), -1, -3)


class Flow:
    """Our transformer with the weights and inputs of a case."""

    def __init__(self, case: Case):
        c = case.config["transformer_config"]
        self.patch, self.model = c["patch_size"], module(case, c, 0)
        self.latents, ref = (channels_last(case.input(name)) for name in ("latents", "ref_latents"))
        self.cond, self.t = case.input("text_feats"), case.input("timestep")[:, None]
        (b, *self.size), ref_size = self.latents.shape[:3], ref.shape[1:3]
        self.ref = refine.to_tokens(ref, self.patch)
        self.pack = refine.cell_pack(b, self.cond.shape[1])
        self.layout, self.ref_layout = (refine.token_layout(b, *size, self.patch) for size in (self.size, ref_size))
        table = (visual.refiner(self.model), *visual.refiner_sizes(self.model, self.cond.shape[-1]))
        self.params = load.variables(case, table)["params"]["refiner"]["dit"]
        self._apply = jax.jit(lambda params, x, t, keep: self.model.apply(
            {"params": params}, x, t, self.cond, self.ref, self.pack, self.layout, keep, self.ref_layout, capture_intermediates=True))  # fmt: skip

    def velocity(self, x_BTC, t, cond: float = 1.0, ref: float = 1.0):
        """(velocity, intermediates) with or without each condition."""
        v_BTC, state = self._apply(self.params, x_BTC, t, {"cond": jnp.full(self.t.shape, cond), "ref": jnp.full(self.t.shape, ref)})
        return v_BTC, state["intermediates"]

    def images(self, x_BTC) -> np.ndarray:
        """Tokens as latents [B, L, H, W]."""
        return channels_first(refine.from_tokens(x_BTC, *self.size, self.patch))


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    flow = Flow(case)
    x_BTC = refine.to_tokens(flow.latents, flow.patch)
    _parts(case, flow, flow.velocity(x_BTC, flow.t)[1])
    passes = [flow.velocity(x_BTC, flow.t, *kept)[0] for kept in refiner.Guidance().passes]
    for name, v_BTC in zip(("velocity", "velocity_ref_textzero", "velocity_noref"), passes, strict=True):
        case.compare(name, flow.images(v_BTC))
    tokens = math.prod(flow.size)
    for name in case.arrays:
        if match := re.fullmatch(r"velocity_cfg([\dp]+)_([\dp]+)", name):
            guidance = refiner.Guidance(*(float(number.replace("p", ".")) for number in match.groups()))
            case.compare(name, flow.images(guidance.combine(passes)))
        if match := re.fullmatch(r"sched_timesteps_(\d+)_(nodyn|dyn)(?:_(\d+)tok)?", name):
            case.compare(name, refiner.times(int(match[1]), 0 if match[2] == "nodyn" else int(match[3] or tokens)))
        if match := re.fullmatch(r"sample_(\d+)steps", name):
            case.compare(name, flow.images(_walk(flow, x_BTC, refiner.times(int(match[1]), tokens))))


def _parts(case: Case, flow: Flow, seen) -> None:
    """Embeddings, positions and stacks."""
    case.compare("temb", seen["time2"]["__call__"][0][:, 0])
    case.compare("caption_embed", seen["caption_embedder"]["__call__"][0])
    last = lambda name: seen[name]["__call__"][0][0][-1]
    for ours, golden in (("noise_refiner", "noise_refiner_out"), ("ref_refiner", "ref_refiner_out"),
                         ("context_refiner", "context_refiner_out"), ("layers", "joint_before_norm_out")):
        case.compare(golden, last(ours))
    positions = refiner.token_positions(flow.pack, flow.layout, jnp.ones(flow.t.shape), flow.ref_layout)
    cos, sin = refiner.rotary_tables(jnp.concatenate(positions, axis=1), flow.model.rotary_axes)
    case.compare("rope_real", cos[:, :, 0, ::2])
    case.compare("rope_imag", sin[:, :, 0, ::2])


def _walk(flow: Flow, x_BTC, times):
    """Euler's method from the case's latents under both conditions."""
    for now, then in zip(times, times[1:]):
        x_BTC = x_BTC + (then - now) * flow.velocity(x_BTC, jnp.full(flow.t.shape, now))[0]
    return x_BTC
