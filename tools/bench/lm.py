"""The trunk against transformers' LongcatFlash with the same weights, float32: whole sequences, and greedy decoding."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dina.backbone import block, linear
from dina.backbone.config import BackboneConfig
from dina.convert import hf, language, rules
from dina.optim import unflatten
from tools.bench.harness import Workload

CONFIG = {
    "num_layers": 8, "hidden_size": 512, "vocab_size": 8192, "num_attention_heads": 8, "q_lora_rank": 192, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "ffn_hidden_size": 1024, "n_routed_experts": 32,
    "zero_expert_num": 16, "moe_topk": 4, "expert_ffn_hidden_size": 256, "routed_scaling_factor": 6.0, "rope_theta": 1e7, "rms_norm_eps": 1e-5,
}  # fmt: skip
LENGTH = 1024
PROMPT, NEW = 64, 64
TOLERANCE = 1e-3  # of the logits' own max: random weights of unit gain over eight layers


def random_weights(c: dict, seed: int = 0) -> tuple[dict[str, np.ndarray], Any, BackboneConfig]:
    """Released tensors N(0, 1/fan-in), the same in our layout, and our settings."""
    cfg = hf.backbone(c, unroll=c["num_layers"])
    tables = [(language.trunk(), *language.trunk_sizes(cfg)),
              ([*language.text_head(), rules.Rule("params/table", "model.embed_tokens.weight", "V d -> V d")], {}, {"V": c["vocab_size"], "d": cfg.width})]
    random = np.random.default_rng(seed)
    groups = rules.by_path(piece for table in tables for piece in rules.pieces(*table))
    released = {}
    for piece in (p for group in groups.values() for p in group):
        if len(piece.shape) > 1:
            released[piece.name] = random.normal(0, piece.shape[-1] ** -0.5, piece.shape).astype(np.float32)
        else:
            released[piece.name] = np.full(piece.shape, 0.0 if piece.name.endswith("bias") else 1.0, np.float32)
    released["model.embed_tokens.weight"] *= cfg.width**0.5
    variables = jax.tree.map(jnp.asarray, unflatten(rules.assemble_all(groups, released.__getitem__)))
    return released, variables, cfg


def forward(batch: int = 1, length: int = LENGTH) -> Workload:
    """Logits of `batch` rows of `length` ids."""
    released, variables, cfg = random_weights(CONFIG)
    ids = np.random.default_rng(1).integers(3, CONFIG["vocab_size"], (batch, length))
    run, variables = jax.jit(functools.partial(_logits, cfg)), _served(cfg, variables, batch * length)
    tokens = jnp.asarray(ids, jnp.int32)
    return Workload(
        name=f"batch {batch}, {length} tokens", ours=lambda: run(variables, tokens), peer="lm_forward", config=CONFIG,
        tensors=released | {"input_ids": ids}, amount=batch * length, check=_close, flops=flops(cfg, batch, length),
        bytes=_bytes(released),
    )  # fmt: skip


def decode(batch: int) -> Workload:
    """`NEW` greedy ids after prompts of `PROMPT` ids, prefill included."""
    released, variables, cfg = random_weights(CONFIG)
    ids = np.random.default_rng(1).integers(3, CONFIG["vocab_size"], (batch, PROMPT))
    run, tokens = jax.jit(functools.partial(_greedy, cfg)), jnp.asarray(ids, jnp.int32)
    variables = _served(cfg, variables, batch)
    return Workload(
        name=f"batch {batch}", ours=lambda: run(variables, tokens), peer="lm_decode", config=CONFIG | {"bench": {"new": NEW}},
        tensors=released | {"input_ids": ids}, amount=batch * NEW, check=_same_ids,
        flops=flops(cfg, batch, PROMPT) + NEW * flops(cfg, batch, 1), bytes=NEW * _step_bytes(cfg, released, batch),
    )  # fmt: skip


def _served(cfg: BackboneConfig, variables, rows: int):
    """Variables in the form in which `dina.model.serve` gives them to `rows` rows."""
    if not linear.rearranges():
        return variables
    serve = lambda p: {"backbone": block.serve(cfg, p["backbone"], rows), "lm_head": linear.turn_all(p["lm_head"], rows)}
    return variables | {"params": variables["params"] | jax.block_until_ready(jax.jit(serve)(variables["params"]))}


def _apply(cfg, variables, ids, **kwargs):
    bias = variables["stats"]["backbone"]["router_bias"]
    position = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape) + kwargs.get("slot", 0)
    x = variables["params"]["table"][ids]
    return block.Backbone(cfg).apply({"params": variables["params"]["backbone"]}, x, position, jnp.ones_like(ids), bias, **kwargs)


def _logits(cfg, variables, ids):
    return linear.product(_apply(cfg, variables, ids).h_BSD, variables["params"]["lm_head"]["kernel"])


def _greedy(cfg, variables, ids):
    def choose(out):
        return jnp.argmax(linear.product(out.h_BSD[:, -1], variables["params"]["lm_head"]["kernel"]), -1).astype(jnp.int32)

    out = _apply(cfg, variables, ids, cache=block.init_cache(cfg, len(ids), PROMPT + NEW, variables["params"]["backbone"]), slot=jnp.int32(0))

    def step(carry, slot):
        cache, token = carry
        out = _apply(cfg, variables, token[:, None], cache=cache, slot=slot)
        return (out.cache, choose(out)), token

    # The last id is chosen but not fed, as in the peer.
    (_, last), made = jax.lax.scan(step, (out.cache, choose(out)), PROMPT + jnp.arange(NEW - 1, dtype=jnp.int32))
    return jnp.concatenate([made.T, last[:, None]], 1)


def flops(cfg: BackboneConfig, batch: int, length: int, vocab: int = CONFIG["vocab_size"]) -> float:
    """Arithmetic of a forward pass: causal attention counted once, experts by the expected real ones."""
    a, e, d = cfg.attention, cfg.experts, cfg.width
    attention = d * a.q_rank + a.q_rank * a.heads * (a.nope + a.rope) + d * (a.kv_rank + a.rope)
    attention += a.kv_rank * a.heads * (a.nope + a.v) + a.heads * a.v * d + length / 2 * a.heads * (a.nope + a.rope + a.v)
    sparse = d * e.total + e.top_k * e.real / e.total * 3 * d * e.hidden
    return 2.0 * batch * length * (cfg.layers * (2 * attention + 2 * 3 * d * cfg.ffn + sparse) + d * vocab)


def _bytes(released) -> float:
    return float(sum(w.nbytes for name, w in released.items() if "embed_tokens" not in name))


def _step_bytes(cfg: BackboneConfig, released, batch: int) -> float:
    """Weights that one step must read: all but the experts that nobody of `batch` rows expects to choose."""
    e = cfg.experts
    experts = sum(w.nbytes for name, w in released.items() if ".mlp.experts." in name)
    used = 1 - (1 - e.top_k / e.total) ** batch
    return _bytes(released) - experts * (1 - used)


def _close(ours, theirs) -> None:
    error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
    if not error <= TOLERANCE:
        raise AssertionError(f"logits differ from the peer's by {error:.1e} of their max")


def _same_ids(ours, theirs) -> None:
    # One near-tie changes everything after it, so only the first ids must agree.
    if not (ours[:, :8] == theirs[:, :8]).all():
        raise AssertionError(f"greedy ids differ from the peer's: {ours[:, :8].tolist()} and {theirs[:, :8].tolist()}")
