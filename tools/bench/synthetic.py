"""A released checkpoint of any size with official names and random values, and its config.json (tests and benchmarks)."""

import dataclasses
import json

import ml_dtypes
import numpy as np

from dina.convert import hf, language, rules
from dina.backbone.config import DepthConfig
from dina.convert.released import Writer

SMALL = {
    "num_layers": 2, "hidden_size": 64, "vocab_size": 512, "text_vocab_size": 200, "text_vocab_plus_multimodal_special_token_size": 253,
    "num_attention_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "ffn_hidden_size": 96, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 3, "expert_ffn_hidden_size": 24,
    "routed_scaling_factor": 6.0, "rope_theta": 1e7, "rms_norm_eps": 1e-5, "ngram_vocab_size_ratio": 3, "emb_neighbor_num": 3,
    "emb_split_num": 2, "visual_embedding_layer_intermediate_size": 40, "eos_token_id": 2,
}  # fmt: skip
AUDIO, VISUAL, HEAD = (16, 8, 8), (32, 32), DepthConfig(width=128, layers=1, heads=1, ffn_scale=6)
OTHERS = {"model.visual_tokenizer.visual_bridge_model.quantizer.codebooks.0": (33, 20), "model.audio_tokenizer.codes": (5, 4, 3)}


def tensors(c=SMALL, audio=AUDIO, visual=VISUAL, head=HEAD):
    """name -> (shape, dtype) of every tensor, in an order that cuts stacks across shards."""
    cfg, ngram, width = hf.backbone(c), hf.ngram(c), c["hidden_size"]
    tables = [
        (language.trunk(), *language.trunk_sizes(cfg)), (language.text_head(), {}, {"V": c["text_vocab_plus_multimodal_special_token_size"], "d": width}),
        (language.joint_table(), {}, {"R": c["vocab_size"], "d": width}), (language.ngram(), *language.ngram_sizes(ngram, c["text_vocab_size"], width)),
        (language.pre_buffer(), {}, {"d": width, "b": c["visual_embedding_layer_intermediate_size"]}),
        *((language.depth_head(name), *language.depth_sizes(head, width, sizes)) for name, sizes in (("visual_head", visual), ("audio_head", audio))),
    ]  # fmt: skip
    half, full = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    found = {p.name: (p.shape, full if p.exact else half) for table in tables for p in rules.pieces(*table)}
    found |= {name: (shape, full) for name, shape in OTHERS.items()}
    return dict(sorted(found.items()))


def write(folder, c=SMALL, shard_bytes=120_000, seed=0, **sizes):
    """Writes the checkpoint; the same seed gives the same bits."""
    return write_tensors(folder, tensors(c, **sizes), c, shard_bytes, seed)


def write_tensors(folder, listed, c=SMALL, shard_bytes=120_000, seed=0):
    """The same for any tensors: name -> (shape, dtype)."""
    writer, random = Writer(folder, listed, shard_bytes), np.random.default_rng(seed)
    for name, (shape, dtype) in listed.items():
        writer.add(name, random.standard_normal(shape, np.float32).astype(dtype))
    (writer.folder / "config.json").write_text(json.dumps(c))
    writer.finish()
    return listed
