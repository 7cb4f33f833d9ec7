"""Sampling (case 09): repetition penalty, temperature, both orders of the filters, the draw, guidance."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

from dina.decode import guidance, sampling
from tools.parity.case import Case

HF_SETTING = {"rep": "repetition", "temp": "temperature", "topk": "top_k", "topp": "top_p"}


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "kept_probs_vocab_order" in case


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    logits = jnp.asarray(case.input("logits"))
    # Past ids are padded with 0 on the right in the reference, which so penalises class 0 in shorter rows; the case
    # does not say how long rows are, so 0 is taken as seen wherever it stands.
    past, rows = case.input("past_ids"), np.arange(len(logits))[:, None]
    seen = np.zeros(logits.shape, bool)
    seen[rows, np.maximum(past, 0)] = True
    seen[(past < 0).any(1)] = False  # the reference drops rows that hold a negative id
    column = lambda name: case.input(name)[:, 0]
    how = sampling.Sampling(jnp.asarray(column("temperature")), jnp.asarray(column("top_k")), jnp.asarray(column("top_p")),
                            jnp.asarray(column("repetition_penalty")))  # fmt: skip
    _serving(case, logits, jnp.asarray(seen), how)
    for name in case.arrays:
        if name.startswith("hf_"):
            _hf(case, name, logits, jnp.asarray(seen))
    _guided(case, logits)


def _serving(case: Case, logits, seen, how: sampling.Sampling) -> None:
    case.compare("penalized_logits", sampling.penalise(logits, seen, how.repetition_B))
    off = sampling.Sampling(how.temperature_B, jnp.zeros_like(how.top_k_B), jnp.ones_like(how.top_p_B), how.repetition_B)
    probs = np.asarray(jax.nn.softmax(sampling.filtered_logits(logits, off, seen), -1))
    error = case.compare("probs", probs)
    order = np.argsort(-probs, -1, kind="stable")
    ranked = np.take_along_axis(case.golden("probs"), order, -1)
    gap = np.minimum(-np.diff(ranked, prepend=np.inf), -np.diff(ranked, append=-np.inf))
    case.compare_ids("sorted_idx", order, gap, error)
    kept = np.asarray(sampling.keep(jnp.asarray(probs), how.top_k_B, how.top_p_B))
    case.compare("kept_sorted_probs_unnormalized", np.take_along_axis(np.where(kept, probs, 0), order, -1))
    final = np.asarray(jax.nn.softmax(sampling.filtered_logits(logits, how, seen), -1))
    case.compare("kept_probs_vocab_order", final)
    mass = np.asarray(sampling.keep(jnp.asarray(probs), off.top_k_B, how.top_p_B)) * probs
    case.compare("top_p_normalized_probs", mass / mass.sum(-1, keepdims=True))
    top = np.sort(case.golden("kept_probs_vocab_order"), -1)
    case.compare_ids("argmax_token", np.argmax(final, -1), top[:, -1] - top[:, -2], error)
    _draw(case, final, order)


def _draw(case: Case, final, order) -> None:
    """Our draw adds noise per class; the case draws by the inverse of the running sum, which is restated here on our distribution."""
    uniform = case.input("uniforms")
    running = np.cumsum(np.take_along_axis(final, order, -1), -1)
    place = (running < (uniform * running[:, -1])[:, None]).sum(-1)
    gap = np.abs(running - uniform[:, None]).min(-1)
    case.compare_ids("inverse_cdf_token", np.take_along_axis(order, place[:, None], -1)[:, 0], gap, 1e-6)


def _hf(case: Case, name: str, logits, seen) -> None:
    """Processors named in the array: hf_rep1p2 is the penalised scores, hf_probs_… the distribution after all of them."""
    found = {HF_SETTING[key]: float(value.replace("p", ".")) for key, value in re.findall(r"(rep|temp|topk|topp)(\d+(?:p\d+)?)", name)}
    row = sampling.settings([{k: int(v) if k == "top_k" else v for k, v in found.items()}] * len(logits))
    if name.startswith("hf_probs"):
        case.compare(name, jax.nn.softmax(sampling.filtered_logits(logits, row, seen, "hf"), -1))
    else:
        case.compare(name, sampling.penalise(logits, seen, row.repetition_B))


def _guided(case: Case, logits) -> None:
    if "cfg_scale" not in case:
        return
    scale = jnp.asarray(np.repeat(case.input("cfg_scale")[:, 0], 2))
    logits = logits[: len(scale)]
    rows = jnp.arange(len(logits))
    pairs = guidance.Pairs(rows // 2 * 2, rows // 2 * 2 + 1, scale)
    case.compare("cfg_guided_logits", guidance.combine(logits, pairs)[::2])
    half = guidance.combine(logits.astype(jnp.bfloat16), pairs)[::2]
    case.compare("cfg_guided_bf16", half.astype(jnp.float32))
