"""Pre-align, pre-train, mid-train and SFT: one next-token objective over text, images and speech.

The stages differ in what they train and read, not in what they compute. Loss terms (a stage's `loss_weights` name the
ones it wants): `text`, `visual`, `audio`, `router_z`, `hidden_z`, all of reference/backbone.md §7.2. With
`model.losses.normalise='joint'` the first three are divided by the number of all weighted positions together, so that
weights of 1 give the released loss; with 'own', each by its own positions.

The routers' selection biases are state without gradients: the loss counts selections, `update_stats` moves the biases.

Shapes: B rows, S positions, L levels, G logical layers, E experts, K kinds of input position.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from dina import grammar, sharding, stages
from dina import model as model_lib
from dina.audio.tokenizer import quantizer_config
from dina.backbone import balance
from dina.config import InputError
from dina.data import packing, phrases
from dina.embed import rows_from_codebooks
from dina.tasks.base import LossOut, Sums, Task, Variables
from dina.vision.tokenizer import make_tokenizer

TERMS = ("text", "visual", "audio", "router_z", "hidden_z")
NGRAM_TABLE = "embed/ngram/table"
CODE_HEADS = {"visual": ("visual_head", "visual_index"), "audio": ("audio_head", "audio_index")}


class Language(Task):
    """Trains (some of) `embed`, `backbone`, `lm_head`, `visual_head`, `audio_head`."""

    gather = "use"

    def __init__(self, config, stage):
        super().__init__(config, stage)
        unknown = sorted(set(stage.loss_weights) - set(TERMS))
        if unknown:
            raise InputError(f"loss_weights of a language stage: {unknown[0]!r} is not one of {', '.join(TERMS)}")
        # The ids are all that training needs of the vocabulary; size tags come in as text ids of the batches.
        self.vocabulary = grammar.from_config(config)
        self.model = model_lib.build(config.model, self.vocabulary)
        self.tables = (NGRAM_TABLE,) if self.model.ngram.lookup == "exchange" else ()

    def init(self, key: jax.Array) -> Variables:
        return model_lib.init(self.model, key)

    def batches(self) -> packing.PackedDocuments:
        return packing.open_batches(self.config, self.stage, self.config.run.workdir)

    def start(self, variables: Variables, batches, key: jax.Array) -> Variables:
        """Gives the code rows of a fresh table the geometry of the codebooks, where the config asks for it."""
        del batches
        if self.config.model.code_start == "random" or "embed" in self.stage.init_from:
            return variables
        quantizers = {"vision_quantizer": (make_tokenizer(self.config.vision).rvq, self.vocabulary.visual_base[0]),
                      "audio_quantizer": (quantizer_config(self.config.audio), self.vocabulary.audio_base[0])}
        _, trained = stages.load_parts(self.config, pathlib.Path(self.config.run.workdir), list(quantizers))
        table_RD = variables["params"]["embed"]["table"]
        for number, (part, (rvq, first)) in enumerate(quantizers.items()):
            books, counts = ([trained[part][kind][rvq.book(level)] for level in range(rvq.levels)]
                             for kind in ("codebook", "count"))
            rows_RD = rows_from_codebooks(jax.random.fold_in(key, number), books, counts, table_RD.shape[1])
            table_RD = table_RD.at[first : first + len(rows_RD)].set(rows_RD.astype(table_RD.dtype))
        embed = variables["params"]["embed"] | {"table": table_RD}
        return variables | {"params": variables["params"] | {"embed": embed}}

    def loss(self, params: Any, stats: Any, batch: Any, key: jax.Array, axes: tuple[str, ...]) -> LossOut:
        del key  # nothing here is random
        model = model_lib.build(self.config.model, self.vocabulary, axes)
        wanted = set(self.stage.loss_weights)
        out = model_lib.run(model, params, stats, batch)
        text = model_lib.text_sums(model, params, out.h_BSD, batch, len(phrases.KINDS))
        codes = {
            name: model_lib.code_sums(model, params, head, out.h_BSD, batch[index], batch)
            for name, (head, index) in CODE_HEADS.items() if name in wanted
        }  # fmt: skip
        terms = {name: term for name, term in self._terms(text, codes).items() if name in wanted}
        if "router_z" in wanted:
            terms["router_z"] = out.router_z
        if "hidden_z" in wanted:
            terms["hidden_z"] = hidden_z(out.stream_BSD, batch["segment"])
        counts_GE = sharding.psum(jnp.sum(out.counts_LGE, 1), axes)
        metrics = text_metrics(text) | expert_metrics(out.counts_LGE, counts_GE, self.model.trunk.experts.real)
        metrics["experts/overflow"] = out.overflow.astype(jnp.float32), jnp.sum(out.counts_LGE, dtype=jnp.float32)
        for name, sums in codes.items():
            metrics |= code_metrics(name, sums)
        return LossOut(terms, metrics, {"router_counts": counts_GE})

    def table_rows(self, batch: Any) -> dict[str, jax.Array]:
        return {path: model_lib.ngram_rows(self.model, batch) for path in self.tables}

    def _terms(self, text, codes) -> Sums:
        """The cross-entropies as (sum, weight)."""
        how = self.config.model.losses
        sums = {"text": (jnp.sum(text["nll"]), jnp.sum(text["weight"]))}
        for name, level in codes.items():
            weight_L = jnp.broadcast_to(jnp.asarray(how[f"{name}_level"], jnp.float32), level.loss_L.shape)
            # Every weighted position has a label at level 0: its weight counts positions.
            sums[name] = jnp.sum(weight_L * level.loss_L), level.weight_L[0]
        if how.normalise == "own":
            return sums
        total = sum(weight for _, weight in sums.values())
        return {name: (value, total) for name, (value, _) in sums.items()}

    def update_stats(self, stats: Any, updates: Any, key: jax.Array, step: jax.Array) -> Any:
        del key
        old_GE, experts = stats["backbone"]["router_bias"], self.model.trunk.experts
        bias_GE = balance.update_bias(old_GE, updates["router_counts"], experts, step)
        return stats | {"backbone": {"router_bias": bias_GE}}


def hidden_z(stream_BSD, segment_BS) -> tuple[jax.Array, jax.Array]:
    """(sum over positions of logsumexp(|y|)^2, positions) of the residual stream before the last norm."""
    valid_BS = segment_BS > 0
    z_BS = jnp.square(jax.nn.logsumexp(jnp.abs(stream_BSD.astype(jnp.float32)), axis=-1))
    return jnp.sum(jnp.where(valid_BS, z_BS, 0.0)), jnp.sum(valid_BS, dtype=jnp.float32)


def text_metrics(text: dict[str, jax.Array]) -> Sums:
    """Cross-entropy (nats) and accuracy of the text head, overall and per task kind."""
    out = {}
    for name, key in (("text/nll", "nll"), ("text/accuracy", "correct")):
        out[name] = jnp.sum(text[key]), jnp.sum(text["weight"])
        for number, kind in enumerate(phrases.KINDS):
            out[f"{name}/{kind}"] = text[key][number], text["weight"][number]
    return out


def code_metrics(name: str, sums) -> Sums:
    """Cross-entropy (nats) and accuracy per level of one depth head."""
    out = {}
    for level in range(len(sums.weight_L)):
        out[f"{name}/nll/{level}"] = sums.loss_L[level], sums.weight_L[level]
        out[f"{name}/accuracy/{level}"] = sums.correct_L[level], sums.weight_L[level]
    return out


def expert_metrics(local_GKE, total_GE, real: int) -> Sums:
    """Load of the busiest and idlest real expert over the mean one (1 is even), the share of identity experts, overall
    and by kind of input position (K: text, image, audio), and all shares, [G, K, E], which add up to 1."""
    local_GKE, load_GE = local_GKE.astype(jnp.float32), total_GE[:, :real].astype(jnp.float32)
    load_GE = load_GE / jnp.maximum(jnp.mean(load_GE, axis=1, keepdims=True), 1e-9)
    # Extremes of the global counts are no sums: every device reports the same value once, and the mean keeps it.
    one = jnp.ones(())
    by_kind = {f"experts/zero_rate/{kind}": (jnp.sum(local_GKE[:, k, real:]), jnp.sum(local_GKE[:, k]))
               for k, kind in enumerate(model_lib.INPUT_KINDS)}  # fmt: skip
    return by_kind | {
        "experts/share": (local_GKE, jnp.sum(local_GKE)),
        "experts/load_max": (jnp.mean(jnp.max(load_GE, axis=1)), one),
        "experts/load_min": (jnp.mean(jnp.min(load_GE, axis=1)), one),
        "experts/zero_rate": (jnp.sum(local_GKE[..., real:]), jnp.sum(local_GKE)),
    }
