"""The trunk against transformers' LongcatFlash on random configurations; needs the extra `bench` or `make peers`."""

import functools
import subprocess

import jax
import numpy as np
import pytest
import safetensors.numpy

from dina.config import InputError
from tools.bench import harness, lm


def _reason():
    try:
        python = harness.peer_python()
    except InputError as error:
        return str(error)
    done = subprocess.run([python, "-c", "import torch, transformers, safetensors"], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


REASON = _reason()


def random_config(seed):
    """Odd sizes of everything, as HF names it."""
    draw = np.random.default_rng(seed)
    pick = lambda *options: int(draw.choice(options))
    return {
        "num_layers": pick(1, 2, 3), "hidden_size": pick(48, 60, 80), "vocab_size": pick(97, 130), "num_attention_heads": pick(1, 3, 4),
        "q_lora_rank": pick(20, 36), "kv_lora_rank": pick(12, 28), "qk_nope_head_dim": pick(8, 14), "qk_rope_head_dim": pick(4, 8, 12),
        "v_head_dim": pick(6, 10), "ffn_hidden_size": pick(50, 72), "n_routed_experts": pick(3, 6, 9), "zero_expert_num": pick(1, 4),
        "moe_topk": pick(2, 3),  # the peer fails with one choice (a squeeze too many)
        "expert_ffn_hidden_size": pick(18, 26), "routed_scaling_factor": float(draw.choice([1.0, 2.5, 6.0])),
        "rope_theta": float(draw.choice([1e4, 1e7])), "rms_norm_eps": float(draw.choice([1e-5, 1e-3])),
    }  # fmt: skip


@pytest.fixture(scope="module")
def peer():
    with harness.Peer() as process:
        yield process


@pytest.mark.skipif(REASON is not None, reason=f"no transformers to compare with: {REASON}")
@pytest.mark.parametrize("seed", range(4))
def test_logits_equal_those_of_transformers(peer, tmp_path, seed):
    c = random_config(seed)
    released, variables, cfg = lm.random_weights(c, seed)
    for name in released:  # biases that select otherwise than the scores do
        if name.endswith("e_score_correction_bias"):
            released[name] = np.random.default_rng(seed).normal(0, 0.1, released[name].shape).astype(np.float32)
    bias = np.stack([released[f"model.layers.{i}.mlp.router.e_score_correction_bias"] for i in range(cfg.layers)])
    variables["stats"]["backbone"]["router_bias"] = jax.numpy.asarray(bias)
    ids = np.random.default_rng(seed).integers(0, c["vocab_size"], (2, 17))
    ours = np.asarray(jax.jit(functools.partial(lm._logits, cfg))(variables, jax.numpy.asarray(ids, jax.numpy.int32)))
    safetensors.numpy.save_file(released | {"input_ids": ids}, tmp_path / "in.safetensors")
    peer.ask(setup="lm_forward", config=c, weights=str(tmp_path / "in.safetensors"))
    peer.ask(run=True, result=str(tmp_path / "out.safetensors"))
    theirs = safetensors.numpy.load_file(tmp_path / "out.safetensors")["result"]
    assert np.max(np.abs(ours - theirs)) <= 1e-5 * np.max(np.abs(theirs))
