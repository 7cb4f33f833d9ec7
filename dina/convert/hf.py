"""The released `config.json` as our settings (names of backbone.md §1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dina.backbone.config import AttentionConfig, BackboneConfig, ExpertsConfig, NgramConfig
from dina.config import InputError

# The serving stack's n-gram configuration keys where they are absent (backbone.md §1.1).
NGRAM_DEFAULTS = {"ngram_vocab_size_ratio": 78, "emb_neighbor_num": 4, "emb_split_num": 4}
# target_topk 8 of moe_topk 12 in the official fine-tuning code (backbone.md §7.3): two thirds of what a token chooses.
REAL_SHARE = 2 / 3


def backbone(c: Mapping[str, Any], **settings: Any) -> BackboneConfig:
    """The trunk of a `config.json`. Raises InputError naming a missing key.

    Args:
        c: the file's content.
        settings: further fields of `BackboneConfig`.
    """
    attention = AttentionConfig(
        heads=_get(c, "num_attention_heads"), q_rank=_get(c, "q_lora_rank"), kv_rank=_get(c, "kv_lora_rank"),
        nope=_get(c, "qk_nope_head_dim"), rope=_get(c, "qk_rope_head_dim"), v=_get(c, "v_head_dim"), theta=float(_get(c, "rope_theta")),
    )  # fmt: skip
    top_k = _get(c, "moe_topk")
    experts = ExpertsConfig(
        real=_get(c, "n_routed_experts"), zero=c.get("zero_expert_num") or 0, top_k=top_k, hidden=_get(c, "expert_ffn_hidden_size"),
        scale=float(_get(c, "routed_scaling_factor")), target_top_k=REAL_SHARE * top_k, dispatch=settings.pop("dispatch", "gather"),
    )  # fmt: skip
    return BackboneConfig(
        width=_get(c, "hidden_size"), layers=_get(c, "num_layers"), ffn=_get(c, "ffn_hidden_size"), norm_eps=_get(c, "rms_norm_eps"),
        attention=attention, experts=experts, unroll=settings.pop("unroll", 1), **settings,
    )  # fmt: skip


def ngram(c: Mapping[str, Any]) -> NgramConfig:
    """The n-gram tables of a `config.json`, with the quirks that the released weights were trained under."""
    get = lambda name: c.get(name, NGRAM_DEFAULTS[name])
    return NgramConfig(order=get("emb_neighbor_num"), splits=get("emb_split_num"), ratio=get("ngram_vocab_size_ratio"),
                       variant="hf", blank="row0", eos=c.get("eos_token_id") or 2)


def _get(c: Mapping[str, Any], name: str) -> Any:
    if name not in c:
        raise InputError(f"released config: key {name!r} is missing")
    return c[name]
