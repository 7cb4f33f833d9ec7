"""The n-gram embedding (case 02): hashes, rows and sums of the research class ('oe') and of the serving path ('serving')."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np

from dina.backbone import ngram
from dina.backbone.config import NgramConfig
from dina.convert import language
from tools.parity import load
from tools.parity.case import Case


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "ngram_row_ids" in case


def settings(order: int, splits: int, ratio: float, multiple: int, variant: str) -> NgramConfig:
    """The tables of a case, stored with room for the rows that `multiple` adds to the released ones."""
    return NgramConfig(order=order, splits=splits, ratio=ratio, variant=variant, row_multiple=128 * multiple)


def read_tables(case: Case, cfg: NgramConfig, vocab: int, width: int, multiple: int, tables: str, projections: str) -> dict:
    """The module's parameters from released names; `multiple`: what released tables' rows are padded to."""
    counts, sizes = language.ngram_sizes(cfg, vocab, width, multiple)
    shape = (cfg.tables, ngram.stored_rows(cfg, vocab), width // cfg.tables)
    table = (language.ngram(tables, projections), counts, sizes)
    return load.variables(case, table, shapes={"params/embed/ngram/table": shape})["params"]["embed"]["ngram"]


class Tables:
    """The module in one variant, with the case's weights."""

    def __init__(self, case: Case, variant: str):
        c = case.config
        self.cfg = settings(c["oe_neighbor_num"], c["oe_split_num"], c["oe_vocab_size_ratio"], c["embP"], variant)
        self.vocab = c["vocab_size_text"]
        self.specials = tuple(c["multimodal_special_token_list"] + (c.get("text_special_tokens_list") or []))
        params = read_tables(case, self.cfg, self.vocab, c["hidden_size"], c["embP"], "oe_embedders.{table}", "oe_projs.{table}")
        self.params = {"params": params}
        self.word = np.asarray(case.weight("word_embeddings.weight"))

        self._embed = jax.jit(ngram.NgramEmbedding(self.cfg, self.vocab, self.specials).apply)
        self._rows = jax.jit(functools.partial(ngram.rows, self.cfg, self.vocab, self.specials))

    def embed(self, ids):
        return np.asarray(self._embed(self.params, ids, np.ones_like(ids), self.word[ids]))

    def rows(self, ids):
        return [np.asarray(x) for x in self._rows(ids, np.ones_like(ids))]


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    oe, serving = Tables(case, "oe"), Tables(case, "serving")
    ids = case.input("input_ids")
    case.compare("embeds_word_only", oe.word[ids])
    for name in case.arrays:
        if match := re.fullmatch(r"short(\d+)_ids", name):
            case.compare(f"short{match[1]}_embeds", oe.embed(case.input(name)))
    research, production = oe.embed(ids), serving.embed(ids)
    case.compare("embeds", research)
    case.compare("serving_embeds", production)
    # Where both variants agree the golden array is rounding noise, so its own max is no scale.
    case.compare("serving_vs_torch_rowpos_absmax", np.abs(production - research).max(-1), scale=float(np.abs(case.golden("embeds")).max()))
    contexts = jax.jit(functools.partial(ngram.contexts, oe.cfg, oe.specials))
    context, special = (np.asarray(x) for x in contexts(ids, np.ones_like(ids)))
    case.compare_ids("ids_special_zeroed", np.where(special, 0, ids))
    for d in range(1, oe.cfg.order):
        case.compare_ids(f"shift_{d}", context[..., d])
    row, live, _ = oe.rows(ids)
    case.compare_ids("ngram_row_ids", row)
    case.compare_ids("ngram_mask", live)
    case.compare_ids("table_mods", ngram.table_sizes(oe.cfg, oe.vocab))
    case.compare_ids("serving_ngram_row_ids_plain", serving.rows(ids[:1])[0][0])
    # The decode state; the case keeps the newest id's row of one more column than decoding needs.
    if "pv_input_ids_after" not in case:
        return
    width = case.golden("pv_input_ids_after").shape[1]
    history = np.asarray(jax.jit(ngram.next_history)(np.full((len(ids), width), ngram.ABSENT), ids, np.ones_like(ids)))
    case.compare_ids("pv_input_ids_after", np.where(np.isin(history, oe.specials) | (history < 0), 0, history))
