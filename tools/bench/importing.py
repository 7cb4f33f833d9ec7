"""Import of a synthetic released checkpoint of real widths against copying the same bytes to new files with fsync."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from dina.backbone.config import DepthConfig
from dina.convert.released import Released, Writer
from tools.bench import harness, synthetic

# Real widths and names with fewer layers, experts, n-gram rows and levels of codes.
VISUAL_CONFIG = {
    "depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [1],
    "vq_config": {"depth": 2, "codebook_size": 16384, "codebook_dim": 3584, "shared_codebook": True, "quant_conv": True},
    "visual_decoder_config": {
        "image_decoder_config": {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "intermediate_size": 2730, "layer_norm_eps": 1e-6},
        "transformer_config": {"patch_size": 2, "in_channels": 16, "hidden_size": 2520, "num_layers": 2, "num_refiner_layers": 1,
                               "num_attention_heads": 21, "num_kv_heads": 7, "norm_eps": 1e-5, "axes_dim_rope": [40, 40, 40], "text_feat_dim": 2048,
                               "timestep_scale": 1000.0},
        "vae_config": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32,
                       "scaling_factor": 0.3611, "shift_factor": 0.1159},
    },
}  # fmt: skip
AUDIO_CONFIG = {
    "num_mel_bins": 128, "n_fft": 400, "hop_length": 160, "sampling_rate": 16000, "max_audio_seconds": 30, "kernel_size": 3, "stride_size": 2,
    "avg_pooler": 4, "d_model": 1280, "encoder_layers": 2, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120,
    "decoder_layers": 1, "decoder_attention_heads": 20, "decoder_ffn_dim": 5120, "decoder_kernel_size": 3, "decoder_stride_size": 2,
    "vq_config": {"codebook_sizes": [2048, 1024]},
    "vocoder_config": {"num_mel_bins": 80, "sampling_rate": 16000, "hop_length": 256, "channels": [256] * 5},
    "flow_matching_config": {
        "in_channels": 80, "diffusion_steps": 10, "prenet_in_dim": 1280, "prenet_d_model": 512, "prenet_attention_heads": 8, "prenet_ffn_dim": 2048,
        "prenet_nlayers": 2, "prenet_max_source_positions": 5000, "prenet_target_mel_length_scale_ratio": 1.0, "channels": [256],
        "attention_head_dim": 64, "n_blocks": 4, "num_mid_blocks": 2, "num_heads": 8, "act_fn": "gelu",
        "cfm_params": {"t_scheduler": "cosine", "inference_cfg_rate": 0.7},
    },
}  # fmt: skip
CONFIG = {
    "num_layers": 2, "hidden_size": 3072, "vocab_size": 282624, "text_vocab_size": 131072, "text_vocab_plus_multimodal_special_token_size": 131125,
    "num_attention_heads": 32, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "ffn_hidden_size": 6144, "n_routed_experts": 64, "zero_expert_num": 32, "moe_topk": 12, "expert_ffn_hidden_size": 1024,
    "routed_scaling_factor": 6.0, "rope_theta": 1e7, "rms_norm_eps": 1e-5, "ngram_vocab_size_ratio": 3, "emb_neighbor_num": 4,
    "emb_split_num": 4, "visual_embedding_layer_intermediate_size": 8192, "eos_token_id": 2,
    "visual_config": VISUAL_CONFIG, "audio_config": AUDIO_CONFIG,
}  # fmt: skip
AUDIO, VISUAL = (8192, 4096, 2048, *(1024,) * 5), (16384,) * 8
HEAD = DepthConfig(width=2048, layers=1, heads=16, ffn_scale=16)
SHARD_BYTES = 2 * 10**9
CHILD = """
import resource, sys
from tools import convert
if len(sys.argv) > 1:
    convert.main(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def run(rounds: int | None = None) -> dict:
    """Rates in GB/s of both, interleaved, and the peak memory of the import over that of a process that only starts."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("DINA_BENCH_DIR")) as name:
        folder = pathlib.Path(name)
        _write(folder / "released")
        source = Released(folder / "released")
        total = sum(tensor.nbytes for tensor in source.tensors.values())
        ours, peer, peaks = [], [], []
        start, base = _child([])
        for _ in range(rounds or 3):
            peer.append(harness.copy(folder / "released", folder / "copy"))
            seconds, peak = _child(["import", "--checkpoint", str(folder / "released"), "--workdir", str(folder / "work")])
            ours.append(seconds - start)  # what Python and JAX take to load is not the import
            peaks.append(peak - base)
            shutil.rmtree(folder / "work")
    shard = max(sum(t.nbytes for t in source.in_shard(s)) for s in source.shards)
    stacked = CONFIG["num_layers"] * CONFIG["n_routed_experts"] * CONFIG["hidden_size"] * CONFIG["expert_ffn_hidden_size"] * 2
    tables = 12 * CONFIG["ngram_vocab_size_ratio"] * CONFIG["text_vocab_size"] * CONFIG["hidden_size"] // 12 * 2
    mine, theirs = total / 1e9 / statistics.median(ours), total / 1e9 / statistics.median(peer)
    return {
        "name": "import", "ours": mine, "peer": theirs, "ratio": mine / theirs, "floor": theirs, "peer_version": "file copy with fsync",
        "unit": "GB/s", "samples": {"ours": ours, "peer": peer, "peak_bytes": peaks}, "machine": harness.machine_name(),
        "gigabytes": total / 1e9, "peak_memory_ratio": max(peaks) / max(shard, stacked, tables),
        "largest_gigabytes": max(shard, stacked, tables) / 1e9,
    }  # fmt: skip


def _write(folder: pathlib.Path) -> None:
    """Writes the checkpoint; its values repeat, because nothing on the way compresses and drawing all anew takes minutes."""
    listed = synthetic.tensors(CONFIG, audio=AUDIO, visual=VISUAL, head=HEAD, files="all", refiner_ff=10240)
    writer = Writer(folder, listed, SHARD_BYTES)
    noise = np.random.default_rng(0).standard_normal(2**23, np.float32)
    for name, (shape, dtype) in listed.items():
        writer.add(name, np.resize(noise.astype(dtype), shape))
    (writer.folder / "config.json").write_text(json.dumps(CONFIG))
    writer.finish()


def _child(arguments: list[str]) -> tuple[float, int]:
    """(seconds of the whole process, its peak resident bytes)."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], cwd=harness.ROOT, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(done.stdout.split("PEAK ")[1])
