"""The n-gram embedding and the depth head against the same formulas in plain PyTorch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dina.backbone import linear
from dina.backbone import ngram as ngram_lib
from dina.backbone.config import DepthConfig, NgramConfig
from dina.convert import language, rules
from dina.heads import depth
from dina.optim import unflatten
from tools.bench.harness import Workload


def ngram(length: int = 2048, width: int = 528, vocab: int = 8192) -> Workload:
    """Twelve tables over `length` ids without specials."""
    cfg = NgramConfig(order=4, splits=4, ratio=8, variant="hf")
    sizes, random = ngram_lib.table_sizes(cfg, vocab), np.random.default_rng(0)
    counts, dims = language.ngram_sizes(cfg, vocab, width)
    groups = rules.by_path(rules.pieces(language.ngram("table.{table}", "proj.{table}"), counts, dims))
    named = {p.name: random.normal(0, 0.1, p.shape).astype(np.float32) for group in groups.values() for p in group}
    shapes = {"params/embed/ngram/table": (cfg.tables, ngram_lib.stored_rows(cfg, vocab), width // cfg.tables)}
    flat = rules.assemble_all(groups, named.__getitem__, shapes)
    params = jax.tree.map(jnp.asarray, unflatten(flat)["params"]["embed"]["ngram"])
    word, ids = random.normal(size=(vocab, width)).astype(np.float32), random.integers(3, vocab, (1, length))
    ids[0, ::97] = cfg.eos
    module, table, tokens = ngram_lib.NgramEmbedding(cfg, vocab), jnp.asarray(word), jnp.asarray(ids, jnp.int32)
    run = jax.jit(lambda p, w, t: module.apply({"params": p}, t, jnp.ones_like(t), w[t]))
    part = width // cfg.tables
    return Workload(
        name=f"{length} ids, {cfg.tables} tables", ours=lambda: run(params, table, tokens), peer="ngram",
        config={"order": cfg.order, "splits": cfg.splits, "vocab": vocab, "eos": cfg.eos, "sizes": sizes},
        tensors={name.removesuffix(".weight"): w for name, w in named.items()} | {"word": word, "input_ids": ids}, amount=length, check=_close,
        flops=2.0 * length * cfg.tables * part * width, bytes=4.0 * length * 2 * width,
    )  # fmt: skip


def depth_head(batch: int = 8, classes: int = 16384, levels: int = 8, width: int = 512, trunk: int = 512, layers: int = 4) -> Workload:
    """Greedy codes of all levels for `batch` positions."""
    cfg, sizes, random = DepthConfig(width=width, layers=layers, heads=width // 128), (classes,) * levels, np.random.default_rng(0)
    groups = rules.by_path(rules.pieces(language.depth_head("head"), *language.depth_sizes(cfg, trunk, sizes)))
    named = {}
    for piece in (p for group in groups.values() for p in group):
        scale = 0.1 if len(piece.shape) == 1 else piece.shape[-1] ** -0.5
        named[piece.name] = (random.normal(0, scale, piece.shape) + ("norm" in piece.name)).astype(np.float32)
    params = jax.tree.map(jnp.asarray, unflatten(rules.assemble_all(groups, named.__getitem__))["params"]["head"])
    embedding = random.normal(size=(levels, classes + 1, trunk)).astype(np.float32)
    hidden = random.normal(size=(batch, trunk)).astype(np.float32)
    module, tables, h_MD = depth.DepthHead(cfg, sizes), jnp.asarray(embedding), jnp.asarray(hidden)

    @jax.jit
    def run(params, tables_LVD, h_MD):
        def body(carry, level):
            row_MD, cache = carry
            logits_MV, cache = depth.step(module, params, level, row_MD, cache)
            code_M = jnp.argmax(logits_MV[:, :classes], -1).astype(jnp.int32)
            embedded_MD = tables_LVD[level, code_M]
            return (jnp.where(level == 0, embedded_MD, row_MD + embedded_MD), cache), code_M

        return jax.lax.scan(body, (h_MD, depth.init_cache(module, batch)), jnp.arange(levels))[1].T

    if linear.rearranges():
        params = jax.jit(functools.partial(depth.serve, rows=batch))(params)
    used = sum(w.nbytes for name, w in named.items() if not name.endswith(("linear1.bias", "linear2.bias")))
    tensors = named | {f"embedding.{i}": table for i, table in enumerate(embedding)} | {"hidden": hidden}
    return Workload(
        name=f"batch {batch}, {levels} levels of {classes}", ours=lambda: run(params, tables, h_MD), peer="depth_head",
        config={"width": width, "layers": layers, "heads": cfg.heads, "sizes": sizes}, tensors=tensors, amount=batch, check=_same,
        # Feed-forward and classifiers are read once over all levels, the rest of a layer at every level.
        flops=0.0, bytes=float(used + (levels - 1) * layers * 4 * width * width * 4),
    )  # fmt: skip


def _close(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def _same(ours, theirs) -> None:
    np.testing.assert_array_equal(ours, theirs)
