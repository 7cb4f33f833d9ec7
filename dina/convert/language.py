"""Names and layouts of the released language side: trunk, embeddings, text head, depth heads (backbone.md §1.5, §4).

Dimensions: d width, q query rank, c key-value rank, r rotated, h heads, k per-head query, y per-head key and value,
v per-head value, f dense hidden, e experts (identity ones included), g expert hidden, R rows of the joint table,
V text classes, n rows of an n-gram table, w their width, b pre-buffer hidden; of a depth head: W width, H heads,
X per-head size, l levels, t hidden values per level, K classes of a level.
"""

from __future__ import annotations

from dina.backbone.config import BackboneConfig, DepthConfig, NgramConfig
from dina.backbone.ngram import table_sizes
from dina.convert.rules import Rule

TRUNK = "params/backbone"


def trunk(prefix: str = "model") -> list[Rule]:
    """The logical layers and the final norm."""
    layer, ours = f"{prefix}.layers.{{layer}}", f"{TRUNK}/layers"
    attention, mine = f"{layer}.self_attn.{{i}}", f"{ours}/attention_{{i}}"
    rules = [
        Rule(f"{mine}/q_a", f"{attention}.q_a_proj.weight", "q d -> d q"),
        Rule(f"{mine}/q_norm/scale", f"{attention}.q_a_layernorm.weight", "q -> q"),
        Rule(f"{mine}/q_b", f"{attention}.q_b_proj.weight", "(h k) q -> q h k"),
        Rule(f"{mine}/kv_a", f"{attention}.kv_a_proj_with_mqa.weight", "cr d -> d cr"),
        Rule(f"{mine}/kv_norm/scale", f"{attention}.kv_a_layernorm.weight", "c -> c"),
        Rule(f"{mine}/kv_b", f"{attention}.kv_b_proj.weight", "(h y) c -> c h y"),
        Rule(f"{mine}/o", f"{attention}.o_proj.weight", "d (h v) -> h v d"),
        Rule(f"{ours}/input_norm_{{i}}/scale", f"{layer}.input_layernorm.{{i}}.weight", "d -> d"),
        Rule(f"{ours}/post_norm_{{i}}/scale", f"{layer}.post_attention_layernorm.{{i}}.weight", "d -> d"),
        Rule(f"{ours}/experts/router/classifier", f"{layer}.mlp.router.classifier.weight", "e d -> d e", exact=True),
        Rule("stats/backbone/router_bias", f"{layer}.mlp.router.e_score_correction_bias", "e -> e", exact=True),
        Rule(f"{TRUNK}/final_norm/scale", f"{prefix}.norm.weight", "d -> d"),
    ]
    for mine, theirs, hidden in ((f"{ours}/ffn_{{i}}", f"{layer}.mlps.{{i}}", "f"),
                                 (f"{ours}/experts", f"{layer}.mlp.experts.{{expert}}", "g")):
        rules += [Rule(f"{mine}/{part}", f"{theirs}.{part}_proj.weight", f"{hidden} d -> d {hidden}") for part in ("gate", "up")]
        rules.append(Rule(f"{mine}/down", f"{theirs}.down_proj.weight", f"d {hidden} -> {hidden} d"))
    return rules


def text_head(name: str = "lm_head.weight") -> list[Rule]:
    """The classifier over text pieces and specials."""
    return [Rule("params/lm_head/kernel", name, "V d -> d V")]


def joint_table(name: str = "model.embed_tokens.weight") -> list[Rule]:
    """Rows of text, specials and all codes; spare rows lie in our padding."""
    return [Rule("params/embed/table", name, "R d -> R d")]


def ngram(tables: str = "model.ngram_embeddings.embedders.{table}", projections: str = "model.ngram_embeddings.post_projs.{table}") -> list[Rule]:
    """The hashed tables and their projections."""
    return [Rule("params/embed/ngram/table", f"{tables}.weight", "n w -> n w", by="table"),
            Rule("params/embed/ngram/proj", f"{projections}.weight", "d w -> w d")]


def pre_buffer(prefix: str = "model.visual_tokenizer.visual_embedding_layer.pre_buffer") -> list[Rule]:
    """The residual block behind the sum of an image cell's rows."""
    ours = "params/embed/pre_buffer"
    return [
        Rule(f"{ours}/norm/scale", f"{prefix}.pre_layernorm.weight", "d -> d"),
        Rule(f"{ours}/norm/bias", f"{prefix}.pre_layernorm.bias", "d -> d"),
        Rule(f"{ours}/gate", f"{prefix}.mlp.gate_proj.weight", "b d -> d b"),
        Rule(f"{ours}/up", f"{prefix}.mlp.up_proj.weight", "b d -> d b"),
        Rule(f"{ours}/down", f"{prefix}.mlp.down_proj.weight", "d b -> b d"),
    ]


def depth_head(name: str, projection: str = "hidden_proj") -> list[Rule]:
    """A depth head; its feed-forward biases are stored but never used, and are carried along.

    `projection`: some copies call the audio head's `hidden_in_proj` (backbone.md §1.5).
    """
    ours, theirs = f"params/{name}", f"{name}.transformer_layers.{{block}}"
    mine, attention = f"{ours}/layer_{{block}}", f"{theirs}.self_attention"
    rules = [
        Rule(f"{ours}/hidden_norm/scale", f"{name}.hidden_norm.weight", "d -> d"),
        Rule(f"{ours}/hidden_proj", f"{name}.{projection}.weight", "W d -> d W"),
        Rule(f"{ours}/head_norm/scale", f"{name}.headnorm.weight", "W -> W"),
        Rule(f"{mine}/norm_1/scale", f"{theirs}.layernorm1.weight", "W -> W"),
        Rule(f"{mine}/norm_2/scale", f"{theirs}.layernorm2.weight", "W -> W"),
        Rule(f"{mine}/out", f"{attention}.out_proj.weight", "W (H X) -> H X W"),
        Rule(f"{mine}/out_bias", f"{attention}.out_proj.bias", "W -> W"),
        # Level l owns rows l, l + L, ... of the first matrix but consecutive columns of the second (backbone.md §4).
        Rule(f"{mine}/ffn_in", f"{theirs}.linear1.weight", "(t l) W -> l W t"),
        Rule(f"{mine}/ffn_out", f"{theirs}.linear2.weight", "W (l t) -> l t W"),
        Rule(f"carried/{name}/layer_{{block}}/ffn_in_bias", f"{theirs}.linear1.bias", "T -> T"),
        Rule(f"carried/{name}/layer_{{block}}/ffn_out_bias", f"{theirs}.linear2.bias", "W -> W"),
        Rule(f"{ours}/head_{{level}}", f"{name}.heads.{{level}}.weight", "K W -> W K", by="level"),
        Rule(f"{ours}/head_{{level}}_bias", f"{name}.heads.{{level}}.bias", "K -> K", by="level"),
    ]
    for part in "qkv":
        rules.append(Rule(f"{mine}/{part}", f"{attention}.{part}_proj.weight", "(H X) W -> W H X"))
    rules += [Rule(f"{mine}/{part}_bias", f"{attention}.{part}_proj.bias", "(H X) -> H X") for part in "qv"]
    return rules


def trunk_sizes(cfg: BackboneConfig) -> tuple[dict, dict]:
    """(counts, sizes) of `trunk`."""
    a, e = cfg.attention, cfg.experts
    counts = {"layer": cfg.layers, "i": 2, "expert": e.real}
    sizes = {"d": cfg.width, "q": a.q_rank, "c": a.kv_rank, "cr": a.kv_rank + a.rope, "h": a.heads, "k": a.nope + a.rope,
             "y": a.nope + a.v, "v": a.v, "f": cfg.ffn, "e": e.total, "g": e.hidden}
    return counts, sizes


def ngram_sizes(cfg: NgramConfig, vocab: int, width: int, row_multiple: int = 1) -> tuple[dict, dict]:
    """(counts, sizes) of `ngram`; released tables are padded to a multiple of `row_multiple` rows."""
    stored = tuple(-(-n // row_multiple) * row_multiple for n in table_sizes(cfg, vocab))
    return {"table": cfg.tables}, {"d": width, "n": stored, "w": width // cfg.tables}


def depth_sizes(cfg: DepthConfig, width: int, codes: tuple[int, ...]) -> tuple[dict, dict]:
    """(counts, sizes) of `depth_head` with `codes` per level behind a trunk of `width`."""
    hidden = cfg.ffn_scale * cfg.width
    sizes = {"d": width, "W": cfg.width, "H": cfg.heads, "X": cfg.width // cfg.heads, "l": len(codes),
             "t": hidden // len(codes), "T": hidden, "K": tuple(n + 1 for n in codes)}
    return {"block": cfg.layers, "level": len(codes)}, sizes
