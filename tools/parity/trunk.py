"""The trunk with text head (case 01): every sub-layer, routing, cached steps, greedy choice, left padding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dina.backbone import block
from dina.backbone.config import BackboneConfig
from dina.convert import hf, language
from tools.parity import load
from tools.parity.case import Case

DECODE = ("absorbed", "expanded")


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "layer0_router_scores" in case and "logits" in case


def settings(c, decode: str = "absorbed") -> BackboneConfig:
    """The trunk of a case's config; 'dense' dispatch is the truth that the others are tested against."""
    cfg = hf.backbone(c, dispatch="dense")
    return dataclasses.replace(cfg, attention=dataclasses.replace(cfg.attention, decode=decode))


def read(case: Case, c, prefix: str = ""):
    """(variables, text classifier included, and the embedding table)."""
    cfg = settings(c)
    v = load.variables(
        case, (language.trunk(f"{prefix}model"), *language.trunk_sizes(cfg)),
        (language.text_head(f"{prefix}lm_head.weight"), {}, {"V": c["vocab_size"], "d": cfg.width}),
    )  # fmt: skip
    return v, jnp.asarray(case.weight(f"{prefix}model.embed_tokens.weight"))


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    weights, table = read(case, case.config)
    ids = case.input("input_ids")
    case.compare("inputs_embeds", table[ids])
    logits_error, lost_BS = _whole(case, weights, table, ids)
    cached = [_Cached(case, weights, table, decode) for decode in DECODE]
    if "incremental_logits" in case:
        case.compare("incremental_logits", *(c.incremental(ids) for c in cached), lost=lost_BS)
    if "greedy_ids" in case:
        case.compare_ids("greedy_ids", cached[0].greedy(ids), _greedy_margin(case), logits_error, along=1, lost=lost_BS.any(1)[:, None])
    if "padded_attention_mask" in case:
        _padded(case, weights, table, ids)


def logits(weights, h_BSD) -> np.ndarray:
    """Text logits of hidden states."""
    return np.asarray(h_BSD @ weights["params"]["lm_head"]["kernel"])


def apply(cfg, weights, x, position, segment, **kwargs) -> block.BackboneOut:
    """The trunk on input embeddings."""
    return _apply(cfg, False, weights, x, position, segment, kwargs)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(cfg, capture: bool, weights, x, position, segment, kwargs):
    """(output, intermediates), compiled once for each shape."""
    p, bias = {"params": weights["params"]["backbone"]}, weights["stats"]["backbone"]["router_bias"]
    out, state = block.Backbone(cfg).apply(p, x, position, segment, bias, **kwargs, capture_intermediates=capture, mutable=["intermediates"])
    return out, state.get("intermediates", {})


def _whole(case: Case, weights, table, ids) -> tuple[float, np.ndarray]:
    """Error of the logits, and the positions [B, S] that an expert chosen between ties has changed (in this form; others are
    taken to choose alike)."""
    cfg = settings(case.config)
    position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    out, seen = _apply(cfg, True, weights, table[ids], position, np.ones_like(ids), {})
    seen = seen["layers"]
    lost_BS = np.zeros(ids.shape, bool)
    for i in range(cfg.layers):
        lost_BS = _layer(case, seen, i, lost_BS)
    case.compare("final_norm", out.h_BSD, lost=lost_BS)
    return case.compare("logits", logits(weights, out.h_BSD), lost=lost_BS), lost_BS


def _layer(case: Case, seen, i: int, lost_BS: np.ndarray) -> np.ndarray:
    """Compares a layer; returns the positions from which on nothing can be compared any more."""
    name = f"layer{i}"
    for ours, golden in (("attention_0", "attn0_out"), ("attention_1", "attn1_out")):
        case.compare(f"{name}_{golden}", seen[ours]["__call__"][0][0][i], lost=lost_BS)
    for ours, golden in (("ffn_0", "mlp0_out"), ("ffn_1", "mlp1_out"), ("post_norm_0", "router_in")):
        case.compare(f"{name}_{golden}", seen[ours]["__call__"][0][i], lost=lost_BS)
    routing, lost_N = seen["experts"]["router"]["__call__"][0], lost_BS.reshape(-1)
    error = case.compare(f"{name}_router_scores", routing.probability_NE[i], lost=lost_N)
    margin = case.input(f"{name}_router_margin")
    ids, theirs = np.asarray(routing.expert_NK[i]), case.golden(f"{name}_router_topk_ids")
    # The reference does not sort what it selects: sets are compared, and weights where theirs stand.
    order = np.argsort(np.argsort(theirs, -1), -1)
    sorted_ids = np.take_along_axis(np.sort(ids, -1), order, -1)
    other_NK = case.compare_ids(f"{name}_router_topk_ids", sorted_ids, margin[:, None], error, lost=lost_N[:, None])
    dense = np.zeros(routing.probability_NE[i].shape, np.float32)
    np.put_along_axis(dense, ids, np.asarray(routing.weight_NK[i]), -1)
    tie_N = lost_N | np.any(other_NK, -1)
    case.compare(f"{name}_router_dense_weights", dense, lost=tie_N)
    case.compare(f"{name}_router_topk_weights", np.take_along_axis(dense, theirs, -1), lost=tie_N)
    tie_BS = tie_N.reshape(lost_BS.shape)
    case.compare(f"{name}_moe_out", seen["experts"]["__call__"][0][0][i], lost=tie_BS)
    lost_BS = np.maximum.accumulate(tie_BS, 1)  # attention carries the difference on
    case.compare(f"{name}_out", seen["__call__"][0][0][i], lost=tie_BS)
    return lost_BS


@dataclasses.dataclass
class _Cached:
    case: Case
    weights: dict
    table: jax.Array
    decode: str

    def _feed(self, cache, ids, start):
        cfg = settings(self.case.config, self.decode)
        position = np.broadcast_to(np.arange(start, start + ids.shape[1]), ids.shape)
        out = apply(cfg, self.weights, self.table[ids], position, np.ones_like(ids), cache=cache, slot=jnp.int32(start))
        return out.cache, logits(self.weights, out.h_BSD)

    def _start(self, ids):
        # One length of cache, hence one compiled step, for both walks.
        length = max(ids.shape[1] + 2, self.case.golden("greedy_ids").shape[1] if "greedy_ids" in self.case else 0)
        cache = block.init_cache(settings(self.case.config), len(ids), length)
        return self._feed(cache, ids[:, : self.case.config["split"]], 0)

    def incremental(self, ids):
        cache, first = self._start(ids)
        parts = [first]
        for t in range(self.case.config["split"], ids.shape[1]):
            cache, now = self._feed(cache, ids[:, t : t + 1], t)
            parts.append(now)
        return np.concatenate(parts, 1)

    def greedy(self, ids):
        split, length = self.case.config["split"], self.case.golden("greedy_ids").shape[1]
        cache, scores = self._start(ids)
        out = ids[:, :split]
        while out.shape[1] < length:
            out = np.concatenate([out, np.argmax(scores[:, -1:], -1).astype(np.int32)], 1)
            if out.shape[1] < length:
                cache, scores = self._feed(cache, out[:, -1:], out.shape[1] - 1)
        return out


def _greedy_margin(case: Case) -> np.ndarray:
    margin = case.input("greedy_margin")
    given = case.golden("greedy_ids").shape[1] - margin.shape[1]
    return np.pad(margin, ((0, 0), (given, 0)), constant_values=np.inf)


def _padded(case: Case, weights, table, ids) -> None:
    mask, position = case.input("padded_attention_mask"), case.input("padded_position_ids")
    cfg, tail = settings(case.config), case.golden("padded_logits_valid_last_row").shape[0]
    # What stands at padding must not matter: any id will do.
    x = table[np.where(mask > 0, ids, 0)]
    cached = {"cache": block.init_cache(cfg, *ids.shape), "slot": jnp.int32(0)}
    results = [logits(weights, apply(cfg, weights, x, position, mask, **kwargs).h_BSD)[-1, -tail:] for kwargs in ({}, cached)]
    case.compare("padded_logits_valid_last_row", *results)
