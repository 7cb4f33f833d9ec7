"""The DiNA model: embed, trunk, text head and two depth heads over one stream of positions, and its losses.

The parts are plain modules whose parameters live in one dict by part name (`embed`, `backbone`, `lm_head`,
`visual_head`, `audio_head`), the unit of freezing and hand-over. Everything here is a pure function of them.

The model predicts position t from the hidden state at t - 1 of the same document. What a position's target is:
its text (the outer token, or the transcript entry inside guided speech) where `text_weight` is above 0, and its codes
where `code_weight` is. Each loss runs only there, in chunks (reference/backbone.md §7.2, DESIGN §4.8, §4.13).

Shapes: B rows, S positions, L levels, D width, M places of a modality's buffer, N = B * S or B * M, V text classes,
E experts, G logical layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn
from jaxtyping import Array, Float, Int

from dina import losses, sharding
from dina.backbone import balance, block, ngram
from dina.backbone import config as trunk_config
from dina.backbone.block import Backbone, BackboneOut
from dina.backbone.linear import product, rearranges, turn_all, weight
from dina.backbone.norm import fan_in
from dina.config import InputError
from dina.embed import Embed, code_rows, holds_codes, level_rows, text_ids
from dina.grammar import Vocabulary, text_label
from dina.heads import depth, layerwise
from dina.heads.linear_loss import PADDED_LOGIT

INPUT_KINDS = ("text", "image", "audio")  # what a position holds, as experts are counted by it
PARTS = ("embed", "backbone", "lm_head", "visual_head", "audio_head")


def default_config() -> ml_collections.ConfigDict:
    """`config.model`: the trunk's fields and sections, the pre-buffer, and how losses are weighed and computed."""
    config = trunk_config.default_config()
    # Code rows of the joint table at the start: 'random' (paper §1.7), or 'codebooks' (embed.rows_from_codebooks).
    config.code_start = "random"
    config.pre_buffer = ml_collections.ConfigDict({"hidden": 256})
    config.losses = ml_collections.ConfigDict({
        "visual_level": 0.25,  # weight of one level's cross-entropy beside 1 for a text token (backbone.md §7.2)
        "audio_level": 0.25,
        "normalise": "joint",  # 'joint': all terms over all weighted positions; 'own': each over its own
        "text_chunk": 1024,  # positions whose logits exist at once
        "code_chunk": 256,
        "remat": "full",  # of the chunks of both: 'full' or 'none'
    })
    return config


class TextHead(nn.Module):
    """The untied classifier over text pieces and specials; `stored` columns, those from `classes` on never chosen."""

    classes: int
    stored: int

    @nn.compact
    def __call__(self, h_ND: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Logits in float32, a large negative number on the padding classes."""
        kernel_DV = weight(self, "kernel", _zero_padded(self.classes), (h_ND.shape[-1], self.stored))
        logits_NV = product(h_ND, kernel_DV, h_ND.dtype, jnp.float32)
        return jnp.where(jnp.arange(self.stored) < self.classes, logits_NV, PADDED_LOGIT)


def _zero_padded(classes: int):
    def init(key, shape, dtype=jnp.float32):
        return jnp.where(jnp.arange(shape[1]) < classes, fan_in()(key, shape, dtype), 0.0)

    return init


@dataclasses.dataclass(frozen=True)
class Model:
    """The modules of one configuration; holds no arrays."""

    vocabulary: Vocabulary
    trunk: trunk_config.BackboneConfig
    ngram: trunk_config.NgramConfig
    embed: Embed
    backbone: Backbone
    lm_head: TextHead
    visual_head: depth.DepthHead
    audio_head: depth.DepthHead
    losses: dict[str, Any] = dataclasses.field(hash=False, compare=False)


def build(config: ml_collections.ConfigDict, vocabulary: Vocabulary, axes: tuple[str, ...] = ()) -> Model:
    """Builds the modules.

    Args:
        config: `config.model`, see `default_config`.
        vocabulary: row layout of the joint table.
        axes: mesh axes that must agree on the experts' slow path.
    """
    trunk = trunk_config.parse(trunk_config.BackboneConfig, config)
    tables = trunk_config.parse(trunk_config.NgramConfig, config.ngram)
    if tables.lookup == "exchange" and tables.variant == "oe":
        raise InputError("config key model.ngram: variant 'oe' reads its tables twice a position, which lookup 'exchange' does not do")
    head = lambda name, sizes: depth.DepthHead(trunk_config.parse(trunk_config.DepthConfig, config[name]), tuple(sizes))
    if config.losses.normalise not in ("joint", "own"):
        raise InputError(f"config key model.losses.normalise is {config.losses.normalise!r}; known: joint, own")
    if config.code_start not in ("random", "codebooks"):
        raise InputError(f"config key model.code_start is {config.code_start!r}; known: random, codebooks")
    return Model(
        vocabulary=vocabulary,
        trunk=trunk,
        ngram=tables,
        embed=Embed(vocabulary, trunk.width, tables, config.pre_buffer.hidden),
        backbone=Backbone(trunk, axes, len(INPUT_KINDS)),
        lm_head=TextHead(vocabulary.classes, vocabulary.padded_classes),
        visual_head=head("visual_head", vocabulary.visual),
        audio_head=head("audio_head", vocabulary.audio),
        losses=config.losses.to_dict(),
    )


def init(model: Model, key: Array) -> dict[str, dict[str, Any]]:
    """Fresh variables: {'params': {part: tree}, 'stats': {'backbone': {'router_bias': [G, E]}}}; traceable."""
    keys = dict(zip(PARTS, jax.random.split(key, len(PARTS)), strict=True))
    voc, width = model.vocabulary, model.trunk.width
    one = jnp.ones((1, 2), jnp.int32)
    x_BSD = jnp.zeros((1, 2, width))
    bias_GE = balance.init_router_bias(model.trunk)
    params = {
        "embed": model.embed.init(keys["embed"], one, one, jnp.zeros((1, 2, voc.levels), jnp.int32), one),
        "backbone": model.backbone.init(keys["backbone"], x_BSD, one, one, bias_GE),
        "lm_head": model.lm_head.init(keys["lm_head"], x_BSD),
        "visual_head": model.visual_head.init(keys["visual_head"], jnp.zeros((len(voc.visual), 1, width))),
        "audio_head": model.audio_head.init(keys["audio_head"], jnp.zeros((len(voc.audio), 1, width))),
    }
    return {
        "params": {part: variables["params"] for part, variables in params.items()},
        "stats": {"backbone": {"router_bias": bias_GE}},
    }


def serve(model: Model, params: dict[str, Any], rows: int) -> dict[str, Any]:
    """{part: tree} as decoding `rows` rows together wants it; computes the same."""
    if not rearranges():
        return params
    served = {"backbone": block.serve(model.trunk, params["backbone"], rows)}
    served |= {name: depth.serve(params[name], rows) for name in ("visual_head", "audio_head")}
    return params | served | {"lm_head": turn_all(params["lm_head"], rows)}


def run(model: Model, params: Any, stats: Any, batch: dict[str, Array]) -> BackboneOut:
    """Hidden states of a packed batch.

    Args:
        model: the modules.
        params: {part: tree} with at least embed and backbone.
        stats: {'backbone': {'router_bias'}}.
        batch: tokens, transcript, segment, position [B, S], codes [B, S, L], cell_index [B, M].
    """
    names = ("tokens", "transcript", "codes", "segment")
    inputs = [batch[name] for name in names]
    embed = {name: tree if name == "table" else sharding.whole(tree) for name, tree in params["embed"].items()}
    x_BSD = model.embed.apply({"params": embed}, *inputs, cell_index_BM=batch["cell_index"])
    x_BSD = x_BSD.astype(jnp.dtype(model.trunk.dtype))
    bias_GE = stats["backbone"]["router_bias"]
    image_BS, audio_BS = holds_codes(model.vocabulary, batch["tokens"], batch["segment"])
    kind_BS = jnp.where(batch["segment"] > 0, 1 + image_BS + 2 * audio_BS, 0)
    backbone = {name: tree if name == "layers" else sharding.whole(tree) for name, tree in params["backbone"].items()}
    return model.backbone.apply({"params": backbone}, x_BSD, batch["position"], batch["segment"], bias_GE, kind_BS)


def ngram_rows(model: Model, batch: dict[str, Array]) -> Int[Array, "B S T"]:
    """The row that every position reads of each n-gram table, -1 = none."""
    voc, cfg = model.vocabulary, model.ngram
    ids_BS = text_ids(voc, batch["tokens"], batch["transcript"], batch["segment"], cfg.blank)
    row_BST, live_BST, _ = ngram.rows(cfg, voc.text, voc.special_ids, ids_BS, batch["segment"])
    return jnp.where(live_BST, row_BST, -1)


@jax.named_scope("text_loss")
def text_sums(
    model: Model, params: Any, h_BSD: Float[Array, "B S D"], batch: dict[str, Array], kinds: int
) -> dict[str, Array]:
    """Text cross-entropy over positions with `text_weight` > 0.

    Args:
        model: the modules.
        params: needs `lm_head`.
        h_BSD: hidden states.
        batch: tokens, transcript, segment, text_weight and kind, all [B, S].
        kinds: number of task kinds; a position of kind k counts in entry k.

    Returns:
        nll, correct and weight, each [kinds]; sums over positions.
    """
    target_BS = text_label(batch["tokens"], batch["transcript"])[:, 1:]
    same_BS = batch["segment"][:, 1:] == batch["segment"][:, :-1]
    weight_N = jnp.where(same_BS, batch["text_weight"][:, 1:], 0.0).reshape(-1)
    order_N = losses.front(weight_N > 0)
    arrays = {
        "h": h_BSD[:, :-1].reshape(-1, h_BSD.shape[-1])[order_N],
        "target": target_BS.reshape(-1)[order_N],
        "weight": weight_N[order_N],
        "kind": batch["kind"][:, 1:].reshape(-1)[order_N],
    }

    def sums(params, piece):
        nll_C, correct_C = losses.nll(model.lm_head.apply({"params": params}, piece["h"]), piece["target"])
        by_kind = lambda x_C: jax.ops.segment_sum(x_C * piece["weight"], piece["kind"], kinds)
        return {"nll": by_kind(nll_C), "correct": by_kind(correct_C)}

    how, head = model.losses, sharding.whole(params["lm_head"], model.trunk.dtype)  # once for all chunks
    out = losses.chunked_sums(sums, head, arrays, jnp.sum(weight_N > 0), how["text_chunk"], how["remat"])
    # Beside the chunks, so that whoever asks for the weights alone runs no model (step._accumulate).
    return out | {"weight": jax.ops.segment_sum(arrays["weight"], arrays["kind"], kinds)}


def code_sums(
    model: Model,
    params: Any,
    name: str,
    h_BSD: Float[Array, "B S D"],
    index_BM: Int[Array, "B M"],
    batch: dict[str, Array],
) -> depth.LevelLoss:
    """Teacher-forced cross-entropy of one depth head, run on gathered positions only.

    Args:
        model: the modules.
        params: needs `embed` (raw joint rows feed the head) and the head's part.
        name: 'visual_head' or 'audio_head'.
        h_BSD: hidden states.
        index_BM: positions of hidden states whose next position has a code loss in this modality, -1 = unused.
        batch: tokens, segment, code_weight [B, S], codes [B, S, L].

    Returns:
        Sums per level of the head.
    """
    head = {"visual_head": model.visual_head, "audio_head": model.audio_head}[name]
    levels, width = len(head.sizes), h_BSD.shape[-1]
    here_BM = jnp.maximum(index_BM, 0)
    used_N = (index_BM >= 0).reshape(-1)
    order_N = losses.front(used_N)
    # Flat positions of the hidden state and of the codes it predicts, used ones first.
    at_N = (here_BM + jnp.arange(len(index_BM))[:, None] * h_BSD.shape[1]).reshape(-1)[order_N]
    holders = holds_codes(model.vocabulary, batch["tokens"], batch["segment"])
    code_BSL = code_rows(model.vocabulary, batch["codes"], *holders)
    next_N = at_N + used_N[order_N]
    flat = lambda x: x.reshape(-1, *x.shape[2:])[next_N]
    table_RD = params["embed"]["table"]
    arrays = {
        "h": h_BSD.reshape(-1, width)[at_N],
        "embedded": level_rows(table_RD, flat(code_BSL)[:, :levels]).astype(h_BSD.dtype),
        "label": flat(batch["codes"])[:, :levels],
        "weight": jnp.where(used_N[order_N], flat(batch["code_weight"]), 0.0),
    }

    how, used = model.losses, jnp.sum(used_N)
    with jax.named_scope(f"{name}_loss"):
        if sharding.split(params[name]):
            out = layerwise.level_losses(head, params[name], losses.cut(arrays, how["code_chunk"]), used, how["remat"])
        else:
            out = losses.chunked_sums(functools.partial(_level_sums, head), params[name], arrays, used, how["code_chunk"], how["remat"])
    return out._replace(weight_L=jnp.sum(jnp.where(arrays["label"] >= 0, arrays["weight"][:, None], 0.0), 0))


def _level_sums(head: depth.DepthHead, params: Any, piece: dict[str, Array]) -> depth.LevelLoss:
    return depth.losses(head, params, depth.input_rows(piece["h"], piece["embedded"]), piece["label"], piece["weight"])
