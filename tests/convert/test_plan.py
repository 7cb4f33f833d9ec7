"""The whole released checkpoint by name and shape, listed by hand from reference/backbone.md §1.5 and §4; nothing is allocated."""

import collections

import numpy as np
import pytest

from dina.config import InputError
from dina.convert import plan
from dina.convert.released import Tensor

CONFIG = {
    "num_layers": 14, "hidden_size": 3072, "vocab_size": 282624, "text_vocab_size": 131072, "text_vocab_plus_multimodal_special_token_size": 131125,
    "num_attention_heads": 32, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "ffn_hidden_size": 6144, "n_routed_experts": 256, "zero_expert_num": 128, "moe_topk": 12, "expert_ffn_hidden_size": 1024,
    "routed_scaling_factor": 6.0, "rope_theta": 1e7, "rms_norm_eps": 1e-5, "ngram_vocab_size_ratio": 78, "emb_neighbor_num": 4,
    "emb_split_num": 4, "visual_embedding_layer_intermediate_size": 8192, "eos_token_id": 2, "rope_scaling": None, "hidden_act": "silu",
}  # fmt: skip


def trunk():
    yield "model.embed_tokens.weight", (282624, 3072)
    yield "lm_head.weight", (131125, 3072)
    yield "model.norm.weight", (3072,)
    for layer in range(14):
        at = f"model.layers.{layer}"
        for i in (0, 1):
            yield f"{at}.input_layernorm.{i}.weight", (3072,)
            yield f"{at}.post_attention_layernorm.{i}.weight", (3072,)
            yield f"{at}.self_attn.{i}.q_a_proj.weight", (1536, 3072)
            yield f"{at}.self_attn.{i}.q_a_layernorm.weight", (1536,)
            yield f"{at}.self_attn.{i}.q_b_proj.weight", (6144, 1536)
            yield f"{at}.self_attn.{i}.kv_a_proj_with_mqa.weight", (576, 3072)
            yield f"{at}.self_attn.{i}.kv_a_layernorm.weight", (512,)
            yield f"{at}.self_attn.{i}.kv_b_proj.weight", (8192, 512)
            yield f"{at}.self_attn.{i}.o_proj.weight", (3072, 4096)
            for part, shape in (("gate", (6144, 3072)), ("up", (6144, 3072)), ("down", (3072, 6144))):
                yield f"{at}.mlps.{i}.{part}_proj.weight", shape
        yield f"{at}.mlp.router.classifier.weight", (384, 3072)
        yield f"{at}.mlp.router.e_score_correction_bias", (384,)
        for expert in range(256):
            for part, shape in (("gate", (1024, 3072)), ("up", (1024, 3072)), ("down", (3072, 1024))):
                yield f"{at}.mlp.experts.{expert}.{part}_proj.weight", shape
    for i in range(12):
        yield f"model.ngram_embeddings.embedders.{i}.weight", (10223616 + 2 * i + 1, 256)
        yield f"model.ngram_embeddings.post_projs.{i}.weight", (3072, 256)


def heads():
    for name, width, sizes in (("visual_head", 2048, (16384,) * 8), ("audio_head", 3072, (8192, 4096, 2048, *(1024,) * 5))):
        yield f"{name}.hidden_norm.weight", (3072,)
        yield f"{name}.hidden_proj.weight", (width, 3072)
        yield f"{name}.headnorm.weight", (width,)
        for block in range(4):
            at = f"{name}.transformer_layers.{block}"
            for part in ("q_proj", "v_proj", "out_proj"):
                yield f"{at}.self_attention.{part}.weight", (width, width)
                yield f"{at}.self_attention.{part}.bias", (width,)
            yield f"{at}.self_attention.k_proj.weight", (width, width)
            yield f"{at}.layernorm1.weight", (width,)
            yield f"{at}.layernorm2.weight", (width,)
            yield f"{at}.linear1.weight", (16 * width, width)
            yield f"{at}.linear1.bias", (16 * width,)
            yield f"{at}.linear2.weight", (width, 16 * width)
            yield f"{at}.linear2.bias", (width,)
        for level, size in enumerate(sizes):
            yield f"{name}.heads.{level}.weight", (size + 1, width)
            yield f"{name}.heads.{level}.bias", (size + 1,)


def tokenizers():
    block = "model.visual_tokenizer.visual_embedding_layer.pre_buffer"
    yield f"{block}.pre_layernorm.weight", (3072,)
    yield f"{block}.pre_layernorm.bias", (3072,)
    for part, shape in (("gate", (8192, 3072)), ("up", (8192, 3072)), ("down", (3072, 8192))):
        yield f"{block}.mlp.{part}_proj.weight", shape
    for family, count in (("visual_tokenizer.visual_model", 385), ("visual_tokenizer.visual_bridge_model.bridge", 5),
                          ("visual_tokenizer.visual_bridge_model.quantizer", 30), ("audio_tokenizer", 1740)):  # fmt: skip
        for i in range(count):
            yield f"model.{family}.t{i}", (4,)


class Listed:
    """A checkpoint of which only names, shapes and types exist."""

    folder, shards = "listed", ("s",)

    def __init__(self, drop=lambda name: False):
        exact = ("mlp.router.classifier.weight", "e_score_correction_bias")
        self.tensors = {name: Tensor(name, "s", shape, "F32" if name.endswith(exact) else "BF16")
                        for source in (trunk, heads, tokenizers) for name, shape in source() if not drop(name)}  # fmt: skip

    def config(self):
        return CONFIG


def test_all_13450_tensors_have_their_place():
    listed = Listed()
    assert len(listed.tensors) == 13450
    made = plan.make(listed)
    names = [piece.name for leaf in made.leaves.values() for piece in leaf.pieces]
    assert sorted(names) == sorted(listed.tensors)
    counts = collections.Counter(path.split("/")[1] for path, leaf in made.leaves.items() for _ in leaf.pieces)
    assert counts["backbone"] + counts["lm_head"] + counts["embed"] - 5 == 11143
    assert (counts["visual_head"], counts["audio_head"], counts["audio_tokenizer"]) == (71, 71, 1740)
    assert counts["visual_tokenizer"] + 5 == 425
    assert made.vocabulary.padded_rows == 282624 and made.vocabulary.img_pad == 131108
    assert made.leaves["params/backbone/layers/experts/up"].shape == (14, 256, 3072, 1024)
    weights = sum(np.prod(leaf.shape) for path, leaf in made.leaves.items() if not path.startswith("carried/"))
    assert 70e9 < weights < 80e9


@pytest.mark.parametrize("lost, message", [
    ("visual_head.transformer_layers.3.", "58 tensors of visual_head., the release has 71"),
    ("model.audio_tokenizer.t1", "tensors of model.audio_tokenizer., the release has 1740"),
    ("model.layers.13.mlp.experts.255.", "missing model.layers.13.mlp.experts.255.down_proj.weight"),
])  # fmt: skip
def test_a_family_that_lost_tensors_is_refused(lost, message):
    with pytest.raises(InputError, match=message):
        plan.make(Listed(lambda name: name.startswith(lost)))
