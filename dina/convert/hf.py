"""The released `config.json` as our settings (names of backbone.md §1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dina.backbone.config import AttentionConfig, BackboneConfig, ExpertsConfig, NgramConfig
from dina.config import InputError

# Keys that change what is computed, and the values that our modules compute (backbone.md §1.1 to §1.4); absent is fine.
REQUIRED: dict[str, tuple] = {
    "rope_scaling": (None,), "norm_topk_prob": (False,), "mla_scale_q_lora": (True,), "mla_scale_kv_lora": (True,),
    "zero_expert_type": ("identity",), "hidden_act": ("silu",), "attention_bias": (False,), "router_bias": (False,),
    "tie_word_embeddings": (False,), "visual_embedding_layer_hidden_act": ("silu",),
}  # fmt: skip
# target_topk 8 of moe_topk 12 in the official fine-tuning code (backbone.md §7.3): two thirds of what a token chooses.
REAL_SHARE = 2 / 3
ROW_MULTIPLE = 8192  # stored n-gram rows are cut among as many devices; 0.08 % more than released


def backbone(c: Mapping[str, Any], **settings: Any) -> BackboneConfig:
    """The trunk of a `config.json`. Raises InputError naming a missing key.

    Args:
        c: the file's content.
        settings: further fields of `BackboneConfig`.
    """
    for name, allowed in REQUIRED.items():
        if name in c and c[name] not in allowed:
            raise InputError(f"released config: {name} is {c[name]!r}; this code computes {' or '.join(map(repr, allowed))}")
    attention = AttentionConfig(
        heads=_get(c, "num_attention_heads"), q_rank=_get(c, "q_lora_rank"), kv_rank=_get(c, "kv_lora_rank"),
        nope=_get(c, "qk_nope_head_dim"), rope=_get(c, "qk_rope_head_dim"), v=_get(c, "v_head_dim"), theta=float(_get(c, "rope_theta")),
    )  # fmt: skip
    top_k = _get(c, "moe_topk")
    experts = ExpertsConfig(
        real=_get(c, "n_routed_experts"), zero=_get(c, "zero_expert_num"), top_k=top_k, hidden=_get(c, "expert_ffn_hidden_size"),
        scale=float(_get(c, "routed_scaling_factor")), target_top_k=REAL_SHARE * top_k, dispatch=settings.pop("dispatch", "gather"),
    )  # fmt: skip
    return BackboneConfig(
        width=_get(c, "hidden_size"), layers=_get(c, "num_layers"), ffn=_get(c, "ffn_hidden_size"), norm_eps=_get(c, "rms_norm_eps"),
        attention=attention, experts=experts, unroll=settings.pop("unroll", 1), **settings,
    )  # fmt: skip


def ngram(c: Mapping[str, Any]) -> NgramConfig:
    """The n-gram tables of a `config.json`, with the quirks that the released weights were trained under.

    No defaults: orders and splits of 4 and 4 make as many tables as 5 and 3, so that shapes would not tell them apart.
    """
    return NgramConfig(order=_get(c, "emb_neighbor_num"), splits=_get(c, "emb_split_num"), ratio=_get(c, "ngram_vocab_size_ratio"),
                       variant="hf", blank="row0", eos=_get(c, "eos_token_id"), row_multiple=ROW_MULTIPLE)


def _get(c: Mapping[str, Any], name: str) -> int | float:
    if name not in c:
        raise InputError(f"released config: key {name!r} is missing")
    if isinstance(c[name], bool) or not isinstance(c[name], int | float):
        raise InputError(f"released config: key {name!r} is {c[name]!r}, not a number")
    return c[name]


def section(c: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """A section of a config. Raises InputError without it; `where` names the config."""
    if not isinstance(c.get(name), dict):
        raise InputError(f"released config: {where} has no section {name!r}")
    return c[name]


def number(c: Mapping[str, Any], name: str, where: str, default: Any = None) -> Any:
    """A number of the section `where`. Raises InputError if it is missing and there is no default, or if it is none."""
    value = c.get(name, default)
    if value is None:
        raise InputError(f"released config: key {where}.{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"released config: key {where}.{name} is {value!r}, not a number")
    return value


def refuse(c: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises InputError naming the first key that has another value than the wanted one, which our modules compute."""
    for name, value in wanted.items():
        if name in c and c[name] != value:
            raise InputError(f"{where}.{name} is {c[name]!r}; this code computes {value!r}")
