"""The depth head (case 06): teacher-forced rows and logits, greedy codes of both kinds, guided codes."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from dina.backbone.config import DepthConfig
from dina.backbone.linear import product
from dina.convert import language
from dina.decode import guidance
from dina.heads import depth
from tools.parity import load
from tools.parity.case import MARGIN, Case

HEAD_SIZE = 128  # the reference has dims // 128 heads


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "teacher_codes" in case and "tf_logits_level0" in case


class Head:
    """The head and the embedding tables of a case, which hold a row for the end class too."""

    def __init__(self, case: Case):
        c = case.config
        self.cfg = DepthConfig(width=c["dims"], layers=c["layers"], heads=c["dims"] // HEAD_SIZE, ffn_scale=c["ffn_scale"])
        self.sizes = tuple(c["codebook_sizes"])
        self.module = depth.DepthHead(self.cfg, self.sizes)
        inner = next(weight for weight in case.weight_names if re.search(r"\.hidden_(in_)?proj\.weight$", weight))
        name, projection = inner.split(".")[:2]
        table = (language.depth_head(name, projection), *language.depth_sizes(self.cfg, c["hidden_size"], self.sizes))
        self.params = load.variables(case, table)["params"][name]
        self.tables = [case.weight(f"embedding_layers.{i}.weight") for i in range(len(self.sizes))]
        self._step = jax.jit(functools.partial(depth.step, self.module))  # the level is traced: one program for all

    def walk(self, hidden, ends: bool, pairs: guidance.Pairs | None = None, golden=None, close=None):
        """Greedy codes level after level through the cache, and the logits that they were chosen by.

        Where a choice was a toss-up (`close`) the golden code is fed, so that later levels can still be compared.

        Args:
            hidden: trunk states.
            ends: whether the end class may be chosen.
            pairs: guided rows.
            golden, close: codes of the case, and where they may differ.
        """
        cache, row, codes, scores = depth.init_cache(self.module, len(hidden)), hidden, [], []
        for level, size in enumerate(self.sizes):
            logits, cache = self._step(self.params, level, row, cache)
            logits = np.asarray(logits)[:, : size + 1]
            logits = logits if pairs is None else np.asarray(guidance.combine(jnp.asarray(logits), pairs))
            scores.append(logits)
            codes.append(np.argmax(logits if ends else logits[:, :size], -1))
            fed = codes[-1] if golden is None else np.where(close[:, level], golden[:, level], codes[-1])
            embedded = self.tables[level][fed]
            row = embedded if level == 0 else row + embedded
        return np.stack(codes, 1), scores


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    head = Head(case)
    hidden = case.input("hidden")
    error = _teacher_forced(case, head, hidden)
    for kind, ends in (("image", False), ("audio", True)):
        if f"greedy_{kind}_codes" in case:
            _greedy(case, head, hidden, kind, ends, error)
    for name in case.arrays:
        if match := re.fullmatch(r"cfg([\dp.]+)_codes", name):
            _guided(case, head, hidden, match[1], error)


def _greedy(case: Case, head: Head, hidden, kind: str, ends: bool, error: float) -> None:
    margin, golden = case.input(f"greedy_{kind}_margin"), case.golden(f"greedy_{kind}_codes")
    codes, scores = head.walk(hidden, ends, None, golden, margin <= MARGIN * error)
    case.compare_ids(f"greedy_{kind}_codes", codes, margin, error)
    for level, size in enumerate(head.sizes):
        case.compare(f"greedy_{kind}_logits_level{level}", scores[level] if ends else scores[level][:, :size])


def _teacher_forced(case: Case, head: Head, hidden) -> float:
    codes = case.input("teacher_codes")
    embedded = np.stack([table[codes[:, i]] for i, table in enumerate(head.tables)], 1)
    rows = jax.jit(depth.input_rows)(hidden, embedded)
    apply = functools.partial(head.module.apply, capture_intermediates=True)
    (out, _, _), state = jax.jit(apply)({"params": head.params}, rows)
    seen = state["intermediates"]
    mine = lambda x_LMW: np.swapaxes(x_LMW, 0, 1)
    case.compare("proj_in", mine(product(seen["hidden_norm"]["__call__"][0], head.params["hidden_proj"])))
    for i in range(head.cfg.layers):
        layer = seen[f"layer_{i}"]
        case.compare(f"layer{i}_out", mine(layer["__call__"][0][0]))
        if f"layer{i}_attn_out" in case:
            case.compare(f"layer{i}_attn_out", mine(layer["attention"][0]))
    case.compare("headnorm_out", mine(out))
    logits = jax.jit(functools.partial(depth.teacher_forced, head.module))(head.params, rows)
    return max(case.compare(f"tf_logits_level{i}", x) for i, x in enumerate(logits))


def _guided(case: Case, head: Head, hidden, number: str, error: float) -> None:
    golden = case.golden(f"cfg{number}_codes")
    rows, scale = np.arange(len(golden)), float(number.replace("p", "."))
    pairs = guidance.Pairs(jnp.asarray(rows // 2 * 2), jnp.asarray(rows // 2 * 2 + 1), jnp.full(len(rows), scale))
    margin = case.input(f"cfg{number}_margin")
    codes, scores = head.walk(hidden[: len(golden)], False, pairs, golden, margin <= MARGIN * scale * error)
    case.compare_ids(f"cfg{number}_codes", codes, margin, scale * error)
    for level in range(len(head.sizes)):
        case.compare(f"cfg{number}_guided_logits_level{level}", scores[level][::2])
