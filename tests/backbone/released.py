"""Golden case 01 in our layout (tests only): kernels transposed, heads split, experts and layers stacked."""

import functools

import numpy as np

from dina.backbone.config import AttentionConfig, BackboneConfig, ExpertsConfig
from tests.golden_io import read_case


def config(c, **settings):
    """BackboneConfig of a case's config.json."""
    attention = AttentionConfig(c["num_attention_heads"], c["q_lora_rank"], c["kv_lora_rank"], c["qk_nope_head_dim"],
                                c["qk_rope_head_dim"], c["v_head_dim"], c["rope_theta"], block=0)  # fmt: skip
    experts = ExpertsConfig(c["n_routed_experts"], c["zero_expert_num"], c["moe_topk"], c["expert_ffn_hidden_size"],
                            c["routed_scaling_factor"], dispatch="dense")  # fmt: skip
    return BackboneConfig(c["hidden_size"], c["num_layers"], c["ffn_hidden_size"], c["rms_norm_eps"], unroll=1,
                          attention=attention, experts=experts, **settings)  # fmt: skip


def attention(w, prefix, a):
    get = lambda name: w[f"{prefix}.{name}.weight"]
    return {
        "q_a": get("q_a_proj").T,
        "q_norm": {"scale": get("q_a_layernorm")},
        "q_b": get("q_b_proj").T.reshape(a.q_rank, a.heads, a.nope + a.rope),
        "kv_a": get("kv_a_proj_with_mqa").T,
        "kv_norm": {"scale": get("kv_a_layernorm")},
        "kv_b": get("kv_b_proj").T.reshape(a.kv_rank, a.heads, a.nope + a.v),
        "o": get("o_proj").T.reshape(a.heads, a.v, -1),
    }


def layer(w, i, cfg):
    prefix = f"model.layers.{i}"
    swiglu = lambda name: {part: w[f"{prefix}.{name}.{part}_proj.weight"].T for part in ("gate", "up", "down")}
    real = [swiglu(f"mlp.experts.{e}") for e in range(cfg.experts.real)]
    params = {"experts": {part: np.stack([e[part] for e in real]) for part in ("gate", "up", "down")}}
    params["experts"]["router"] = {"classifier": w[f"{prefix}.mlp.router.classifier.weight"].T}
    for j in (0, 1):
        params[f"attention_{j}"] = attention(w, f"{prefix}.self_attn.{j}", cfg.attention)
        params[f"ffn_{j}"] = swiglu(f"mlps.{j}")
        params[f"input_norm_{j}"] = {"scale": w[f"{prefix}.input_layernorm.{j}.weight"]}
        params[f"post_norm_{j}"] = {"scale": w[f"{prefix}.post_attention_layernorm.{j}.weight"]}
    return params


def stack(trees):
    """Stacks equal nested dicts leaf by leaf."""
    return {k: stack([t[k] for t in trees]) if isinstance(v, dict) else np.stack([t[k] for t in trees]) for k, v in trees[0].items()}


@functools.cache
def load(name="01_longcat_flash_lm"):
    """(config, params, router biases [L, E], embedding table, text classifier [D, V], data)."""
    case, w, data = read_case(name)
    cfg = config(case)
    params = {"layers": stack([layer(w, i, cfg) for i in range(cfg.layers)]), "final_norm": {"scale": w["model.norm.weight"]}}
    bias = np.stack([w[f"model.layers.{i}.mlp.router.e_score_correction_bias"] for i in range(cfg.layers)])
    return cfg, {"params": params}, bias, w["model.embed_tokens.weight"], w["lm_head.weight"].T, (case, data)
