"""The whole released checkpoint by name and shape, listed by hand from reference/backbone.md §1.5 and §4; nothing is allocated."""

import collections
import pathlib

import numpy as np
import pytest

from dina.config import InputError
from dina.convert import hf_audio, hf_visual, plan, rules
from dina.convert.released import APART, Tensor

VISUAL_CONFIG = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu", "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
    "vq_config": {"depth": 8, "codebook_sizes": [16384] * 8, "codebook_dim": 3584, "shared_codebook": True, "quant_conv": True, "quantizer_type": "rq"},
    "visual_decoder_config": {
        "image_decoder_config": {"hidden_size": 1024, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 2730,
                                 "layer_norm_eps": 1e-6},
        "transformer_config": {"patch_size": 2, "in_channels": 16, "hidden_size": 2520, "num_layers": 32, "num_refiner_layers": 2,
                               "num_attention_heads": 21, "num_kv_heads": 7, "norm_eps": 1e-5, "axes_dim_rope": [40, 40, 40], "text_feat_dim": 2048,
                               "timestep_scale": 1000.0},
        "vae_config": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32,
                       "scaling_factor": 0.3611, "shift_factor": 0.1159},
    },
}  # fmt: skip
AUDIO_CONFIG = {
    "num_mel_bins": 128, "n_fft": 400, "hop_length": 160, "sampling_rate": 16000, "max_audio_seconds": 30, "kernel_size": 3, "stride_size": 2,
    "avg_pooler": 4, "d_model": 1280, "activation_function": "gelu", "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
    "decoder_layers": 8, "decoder_attention_heads": 20, "decoder_ffn_dim": 5120, "decoder_kernel_size": 3, "decoder_stride_size": 2,
    "vq_config": {"codebook_sizes": [8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024]},
    "vocoder_config": {"num_mel_bins": 80, "sampling_rate": 16000, "hop_length": 256, "channels": [256] * 5},
    "flow_matching_config": {
        "in_channels": 80, "diffusion_steps": 10, "prenet_in_dim": 1280, "prenet_d_model": 512, "prenet_attention_heads": 8, "prenet_ffn_dim": 2048,
        "prenet_nlayers": 12, "prenet_max_source_positions": 5000, "prenet_target_mel_length_scale_ratio": 1.0, "channels": [256],
        "attention_head_dim": 64, "n_blocks": 4, "num_mid_blocks": 12, "num_heads": 8, "act_fn": "gelu",
        "cfm_params": {"t_scheduler": "cosine", "inference_cfg_rate": 0.7},
    },
}  # fmt: skip
CONFIG = {
    "num_layers": 14, "hidden_size": 3072, "vocab_size": 282624, "text_vocab_size": 131072, "text_vocab_plus_multimodal_special_token_size": 131125,
    "num_attention_heads": 32, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "ffn_hidden_size": 6144, "n_routed_experts": 256, "zero_expert_num": 128, "moe_topk": 12, "expert_ffn_hidden_size": 1024,
    "routed_scaling_factor": 6.0, "rope_theta": 1e7, "rms_norm_eps": 1e-5, "ngram_vocab_size_ratio": 78, "emb_neighbor_num": 4,
    "emb_split_num": 4, "visual_embedding_layer_intermediate_size": 8192, "eos_token_id": 2, "rope_scaling": None, "hidden_act": "silu",
    "visual_config": VISUAL_CONFIG, "audio_config": AUDIO_CONFIG,
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
    yield from transformer("model.visual_tokenizer.visual_model")
    bridge = "model.visual_tokenizer.visual_bridge_model"
    yield f"{bridge}.bridge.ln_q.weight", (1280,)
    yield from dense(f"{bridge}.bridge.mlp.0", 5120, 5120)
    yield from dense(f"{bridge}.bridge.mlp.2", 3584, 5120)
    yield f"{bridge}.quantizer.quant_conv.0.weight", (3584,)
    yield f"{bridge}.quantizer.quant_conv.0.bias", (3584,)
    yield from dense(f"{bridge}.quantizer.quant_conv.1", 3584, 3584)
    yield from dense(f"{bridge}.quantizer.quant_conv.3", 3584, 3584)
    for level in range(8):
        at = f"{bridge}.quantizer.quantize.codebooks.{level}"
        yield f"{at}.embed", (16385, 3584)
        yield f"{at}.embed_ema", (16384, 3584)
        yield f"{at}.cluster_size_ema", (16384,)


def audio_tokenizer():
    """Encoder, bridge with codebooks, mel decoder, prenet and estimator: 487 + 31 + 149 + 163 + 910."""
    at = "model.audio_tokenizer.audio_model"
    yield f"{at}.positional_embedding", (1500, 1280)
    yield from dense(f"{at}.conv1", 1280, 128, 3)
    yield from dense(f"{at}.conv2", 1280, 1280, 3)
    yield from layers(f"{at}.layers", 32, 1280, 5120)
    yield from dense(f"{at}.layer_norm", 1280)
    at = "model.audio_tokenizer.audio_bridge_model"
    yield f"{at}.gate_proj.weight", (5120, 1280, 4)
    yield f"{at}.up_proj.weight", (5120, 1280, 4)
    yield f"{at}.down_proj.weight", (5120, 5120)
    yield from dense(f"{at}.layer_norm", 5120)
    yield from dense(f"{at}.proj_decoder", 1280, 5120)
    for level, codes in enumerate((8192, 4096, 2048, 1024, 1024, 1024, 1024, 1024)):
        for name, shape in (("embed", (codes, 5120)), ("embed_avg", (codes, 5120)), ("cluster_size", (codes,))):
            yield f"{at}.vq_list.{level}.codebook.{name}", shape
    at = "model.audio_tokenizer.audio_decoder"
    yield f"{at}.positional_embedding", (3000, 1280)
    for name, channels in (("dconv1", 1280), ("dconv2", 80)):
        yield f"{at}.{name}.conv.weight", (1280, channels, 3)
        yield f"{at}.{name}.conv.bias", (channels,)
        yield from dense(f"{at}.{name}.norm", channels)
    yield from layers(f"{at}.layers", 8, 1280, 5120)
    yield from dense(f"{at}.layer_norm", 1280)
    for i in range(4):
        yield from dense(f"{at}.post_net.layers.{3 * i}", 256, 256 if i else 80, 5)
        yield from dense(f"{at}.post_net.layers.{3 * i + 1}", 256)
    yield from dense(f"{at}.post_net.layers.12", 80, 256, 1)
    at = "model.audio_tokenizer.audio_flow_matching_decoder.prenet"
    yield f"{at}.positional_embedding", (5000, 512)
    yield from dense(f"{at}.in_mlp.0", 2048, 1280)
    yield from dense(f"{at}.in_mlp.2", 512, 2048)
    yield from layers(f"{at}.transformer_layers", 12, 512, 2048, norms=("weight",))
    yield f"{at}.final_norm.weight", (512,)
    yield f"{at}.out_proj.weight", (80, 512)
    yield from estimator("model.audio_tokenizer.audio_flow_matching_decoder.conditional_decoder")


def estimator(at):
    yield from dense(f"{at}.time_mlp.linear_1", 1024, 160)
    yield from dense(f"{at}.time_mlp.linear_2", 1024, 1024)
    for block, width in (("down_blocks.0", 160), ("up_blocks.0", 512), *((f"mid_blocks.{i}", 256) for i in range(12))):
        res = f"{at}.{block}.0"
        yield from dense(f"{res}.mlp.1", 256, 1024)
        for name, before in (("block1", width), ("block2", 256)):
            yield from dense(f"{res}.{name}.block.0", 256, before, 3)
            yield from dense(f"{res}.{name}.block.2", 256)
        yield from dense(f"{res}.res_conv", 256, width, 1)
        for i in range(4):
            attention = f"{at}.{block}.1.{i}"
            yield from dense(f"{attention}.norm1", 256)
            yield from dense(f"{attention}.norm3", 256)
            for part in "qkv":
                yield f"{attention}.attn1.to_{part}.weight", (512, 256)
            yield from dense(f"{attention}.attn1.to_out.0", 256, 512)
            yield from dense(f"{attention}.ff.net.0.proj", 1024, 256)
            yield from dense(f"{attention}.ff.net.2", 256, 1024)
        if not block.startswith("mid"):
            yield from dense(f"{at}.{block}.2", 256, 256, 3)
    yield from dense(f"{at}.final_block.block.0", 256, 256, 3)
    yield from dense(f"{at}.final_block.block.2", 256)
    yield from dense(f"{at}.final_proj", 80, 256, 1)


def layers(name, count, width, hidden, norms=("weight", "bias")):
    for at in (f"{name}.{layer}" for layer in range(count)):
        yield f"{at}.self_attn.k_proj.weight", (width, width)
        for part in ("q", "v", "out"):
            yield from dense(f"{at}.self_attn.{part}_proj", width, width)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            yield from ((f"{at}.{norm}.{kind}", (width,)) for kind in norms)
        yield from dense(f"{at}.fc1", hidden, width)
        yield from dense(f"{at}.fc2", width, hidden)


def dense(name, wide, *narrow):
    yield f"{name}.weight", (wide, *narrow)
    yield f"{name}.bias", (wide,)


def transformer(name):
    yield f"{name}.patch_embed.proj.weight", (1280, 3, 2, 14, 14)
    for layer in range(32):
        at = f"{name}.blocks.{layer}"
        yield f"{at}.norm1.weight", (1280,)
        yield f"{at}.norm2.weight", (1280,)
        for part, shape in (("attn.qkv", (3840, 1280)), ("attn.proj", (1280, 1280)), ("mlp.gate_proj", (3420, 1280)), ("mlp.up_proj", (3420, 1280)),
                            ("mlp.down_proj", (1280, 3420))):  # fmt: skip
            yield from dense(f"{at}.{part}", *shape)


def detokenizers():
    """The file beside the index; those of the refiner are counted in test_visual.py."""
    yield from transformer("visual_model")
    at = "image_decoder"
    for name in ("post_quant_norm", "patch_unmerger.ln_q", "norm_in", "norm_out"):
        yield f"{at}.{name}.weight", (1024,)
    for name, shape in (("post_quant_conv", (1024, 3584)), ("patch_unmerger.mlp.0", (4096, 1024)), ("patch_unmerger.mlp.2", (4096, 4096)),
                        ("decoder_head.0", (2730, 1024)), ("decoder_head.2", (1176, 2730))):  # fmt: skip
        yield from dense(f"{at}.{name}", *shape)
    for layer in range(32):
        at = f"image_decoder.encoder.layers.{layer}"
        for name, width in (("layer_norm1", 1024), ("layer_norm2", 1024), ("self_attn.inner_attn_ln", 1024), ("mlp.ffn_ln", 2730)):
            yield f"{at}.{name}.weight", (width,)
        for part in "qv":
            yield from dense(f"{at}.self_attn.{part}_proj", 1024, 1024)
        yield f"{at}.self_attn.k_proj.weight", (1024, 1024)
        yield from dense(f"{at}.self_attn.out_proj", 1024, 1024)
        for part, shape in (("w1", (2730, 1024)), ("w2", (2730, 1024)), ("w3", (1024, 2730))):
            yield from dense(f"{at}.mlp.{part}", *shape)
    told = {"image_refiner.base_transformer.layers.0.feed_forward.linear_1.weight": (10240, 2520), hf_visual.INDEX: (5, 2520), hf_visual.COND: (2048, 3584)}
    found = hf_visual.of_config(VISUAL_CONFIG, {name: Tensor(name, "", shape, "BF16") for name, shape in told.items()}, ["refiner"])
    for table in hf_visual.tables(found):
        yield from ((piece.name, piece.shape) for piece in rules.pieces(*table))


class Listed:
    """A checkpoint of which only names, shapes and types exist."""

    folder, shards = pathlib.Path("listed"), ("s",)

    def __init__(self, drop=lambda name: False, more=()):
        exact = ("mlp.router.classifier.weight", "e_score_correction_bias", ".embed", "_ema", ".embed_avg", ".cluster_size")
        self.tensors = {name: Tensor(name, "s", shape, "F32" if name.endswith(exact) else "BF16")
                        for source in (trunk, heads, tokenizers, audio_tokenizer, *more) for name, shape in source() if not drop(name)}  # fmt: skip

    def config(self):
        return CONFIG


def families(made):
    """Released tensors of each part."""
    names = rules.by_name(leaf.pieces for leaf in made.leaves.values())
    return names, collections.Counter(parts[0].path.split("/")[1] for parts in names.values())


def test_all_13450_tensors_have_their_place():
    listed = Listed()
    assert len(listed.tensors) == 13450
    made = plan.make(listed)
    names, counts = families(made)
    assert names.keys() == listed.tensors.keys()
    assert counts["backbone"] + counts["lm_head"] + counts["embed"] - 5 == 11143
    assert (counts["visual_head"], counts["audio_head"]) == (71, 71)
    # Encoder with bridge, codebooks with projection, mel decoder, prenet with estimator.
    assert [counts[part] for part in hf_audio.PARTS] == [487 + 5, 24 + 2, 149, 163 + 910]
    assert (counts["vision_encoder"], counts["vision_quantizer"]) == (385 + 5, 30)
    assert made.vocabulary.padded_rows == 282624 and made.vocabulary.img_pad == 131108
    shapes = {path: leaf.shape for path, leaf in made.leaves.items()}
    assert shapes["params/backbone/layers/experts/up"] == (14, 256, 3072, 1024)
    assert shapes["stats/vision_quantizer/codebook/0"] == (16384, 3584) and shapes["carried/vision_quantizer/padding/0"] == (1, 3584)
    weights = sum(np.prod(shape) for path, shape in shapes.items() if not path.startswith("carried/"))
    assert 70e9 < weights < 80e9


def test_the_detokenizers_1771_tensors_have_their_place():
    listed = Listed(more=[detokenizers])
    own = {name for name in listed.tensors if name.startswith(tuple(APART.values())[0])}
    assert len(own) == 1771
    names, counts = families(plan.make(listed, plan.BESIDE))
    assert names.keys() == own
    assert (counts["pixel_decoder"], counts["refiner"], counts["vision_copy"]) == (558, 828, 385)


@pytest.mark.parametrize("lost, message", [
    ("visual_head.transformer_layers.3.", "58 tensors of visual_head., the release has 71"),
    ("model.audio_tokenizer.audio_decoder.post_net.", "post_net.layers.0.bias(.|\n)*1722 tensors of model.audio_tokenizer., the release has 1740"),
    ("model.layers.13.mlp.experts.255.", "missing model.layers.13.mlp.experts.255.down_proj.weight"),
    ("image_decoder.norm_out.", "missing image_decoder.norm_out.weight(.|\n)*557 tensors of image_decoder., the release has 558"),
])  # fmt: skip
def test_a_family_that_lost_tensors_is_refused(lost, message):
    with pytest.raises(InputError, match=message):
        plan.make(Listed(lambda name: name.startswith(lost), [detokenizers]))
