"""A released checkpoint of any size with official names and random values, and its config.json (tests and benchmarks)."""

import json

import ml_dtypes
import numpy as np

from dina.backbone.config import DepthConfig
from dina.convert import hf, hf_audio, hf_visual, language, rules
from dina.convert.released import Tensor, Writer, apart

VISUAL_CONFIG = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 12, "num_heads": 2, "out_hidden_size": 20, "window_size": 56, "fullatt_block_indexes": [1],
    "hidden_act": "silu", "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
    "vq_config": {"depth": 2, "codebook_size": 32, "codebook_dim": 10, "in_channels": 20, "shared_codebook": True, "quant_conv": True,
                  "quantizer_type": "rq", "decay": 0.99},
    "visual_decoder_config": {
        "image_decoder_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "layer_norm_eps": 1e-6,
                                 "hidden_act": "gelu"},
        "transformer_config": {"patch_size": 2, "in_channels": 2, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
                               "num_attention_heads": 2, "num_kv_heads": 1, "norm_eps": 1e-5, "axes_dim_rope": [4, 4, 4], "text_feat_dim": 14,
                               "timestep_scale": 1000.0},
        "vae_config": {"block_out_channels": [4, 8], "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 2, "scaling_factor": 0.36,
                       "shift_factor": 0.115},
    },
}  # fmt: skip
AUDIO_CONFIG = {
    "num_mel_bins": 6, "n_fft": 400, "hop_length": 160, "sampling_rate": 16000, "max_audio_seconds": 1, "kernel_size": 3, "stride_size": 2,
    "avg_pooler": 2, "d_model": 8, "activation_function": "gelu", "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 12,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 10, "decoder_kernel_size": 3, "decoder_stride_size": 2,
    "vq_config": {"codebook_sizes": [16, 8, 8]},
    "vocoder_config": {"num_mel_bins": 5, "sampling_rate": 16000, "hop_length": 256, "channels": [4, 6, 7]},
    "flow_matching_config": {
        "in_channels": 5, "prenet_out_dim": 5, "spk_emb_dim": 0, "diffusion_steps": 3, "prenet_in_dim": 8, "prenet_d_model": 6,
        "prenet_attention_heads": 1, "prenet_ffn_dim": 9, "prenet_nlayers": 2, "prenet_activation_function": "gelu",
        "prenet_max_source_positions": 20, "prenet_target_mel_length_scale_ratio": 1.0, "channels": [8, 16], "attention_head_dim": 4, "n_blocks": 1, "num_mid_blocks": 2, "num_heads": 2,
        "act_fn": "gelu", "use_hidden_states_before_dconv2": True,
        "cfm_params": {"solver": "euler", "sigma_min": 1e-6, "t_scheduler": "cosine", "training_cfg_rate": 0.2, "inference_cfg_rate": 0.7},
    },
}  # fmt: skip
SMALL = {
    "num_layers": 2, "hidden_size": 64, "vocab_size": 512, "text_vocab_size": 200, "text_vocab_plus_multimodal_special_token_size": 253,
    "num_attention_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "ffn_hidden_size": 96, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 3, "expert_ffn_hidden_size": 24,
    "routed_scaling_factor": 6.0, "rope_theta": 1e7, "rms_norm_eps": 1e-5, "ngram_vocab_size_ratio": 3, "emb_neighbor_num": 3,
    "emb_split_num": 2, "visual_embedding_layer_intermediate_size": 40, "eos_token_id": 2, "visual_config": VISUAL_CONFIG,
    "audio_config": AUDIO_CONFIG,
}  # fmt: skip
AUDIO, VISUAL, HEAD = (16, 8, 8), (32, 32), DepthConfig(width=128, layers=1, heads=1, ffn_scale=6)
OTHERS = {"visual_model.patch_embed.proj.weight": (16, 3, 2, 14, 14)}
REFINER_FF, REFERENCES = 20, 5  # only tensors say them


def tensors(c=SMALL, audio=AUDIO, visual=VISUAL, head=HEAD, files="index", refiner_ff=REFINER_FF):
    """name -> (shape, dtype) of every tensor, in an order that cuts stacks across shards.

    `files`: 'index' (the shards that the index names) or 'all' (the detokenizers' file too).
    """
    cfg, ngram, width = hf.backbone(c), hf.ngram(c), c["hidden_size"]
    tables = [
        (language.trunk(), *language.trunk_sizes(cfg)), (language.text_head(), {}, {"V": c["text_vocab_plus_multimodal_special_token_size"], "d": width}),
        (language.joint_table(), {}, {"R": c["vocab_size"], "d": width}), (language.ngram(), *language.ngram_sizes(ngram, c["text_vocab_size"], width)),
        (language.pre_buffer(), {}, {"d": width, "b": c["visual_embedding_layer_intermediate_size"]}),
        *((language.depth_head(name), *language.depth_sizes(head, width, sizes)) for name, sizes in (("visual_head", visual), ("audio_head", audio))),
        *visual_tables(c["visual_config"], refiner_ff), *hf_audio.tables(hf_audio.of_config(c)),
    ]  # fmt: skip
    half, full = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    found = {p.name: (p.shape, full if p.exact else half) for table in tables for p in rules.pieces(*table)}
    found |= {name: (shape, half) for name, shape in OTHERS.items()}
    found = {name: what for name, what in found.items() if files == "all" or not apart(name)}
    return dict(sorted(found.items(), key=lambda item: (apart(item[0]), item[0])))


def visual_tables(c, refiner_ff=REFINER_FF):
    """Tables of a `visual_config`; what a checkpoint's shapes would tell stands in for them."""
    dim = c["vq_config"]["codebook_dim"]
    layer, base = "image_decoder.encoder.layers.0", "image_refiner.base_transformer"
    shapes = {f"{layer}.mlp.w2.weight": (), f"{layer}.mlp.ffn_ln.weight": (), f"{layer}.self_attn.q_proj.bias": (), f"{layer}.self_attn.v_proj.bias": (),
              f"{base}.layers.0.feed_forward.linear_1.weight": (refiner_ff,), hf_visual.INDEX: (REFERENCES,),
              hf_visual.COND: (0, dim), "image_decoder.post_quant_conv.weight": (0, dim)}  # fmt: skip
    return hf_visual.tables(hf_visual.of_config(c, {name: Tensor(name, "", shape, "BF16") for name, shape in shapes.items()}))


def write(folder, c=SMALL, shard_bytes=120_000, seed=0, **sizes):
    """Writes the checkpoint; the same seed gives the same bits."""
    return write_tensors(folder, tensors(c, **sizes), c, shard_bytes, seed)


def write_tensors(folder, listed, c=SMALL, shard_bytes=120_000, seed=0):
    """The same for any tensors: name -> (shape, dtype). Copies of a shared codebook are equal."""
    writer, shared = Writer(folder, listed, shard_bytes), c.get("visual_config", {}).get("vq_config", {}).get("shared_codebook")
    for number, (name, (shape, dtype)) in enumerate(listed.items()):
        book = shared and ".quantize.codebooks." in name
        random = np.random.default_rng([seed, *name.split(".")[-1].encode()] if book else [seed, number])
        writer.add(name, random.standard_normal(shape, np.float32).astype(dtype))
    (writer.folder / "config.json").write_text(json.dumps(c))
    writer.finish()
    return listed
