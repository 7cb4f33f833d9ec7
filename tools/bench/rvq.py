"""Search and training of a residual quantizer against vector-quantize-pytorch and the released formulas in plain PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dina.quantize import rvq
from tools.bench.harness import Workload

DIMS, PEERS = (256, 3584), ("formula", "library")
PROBE = 64  # rows of each book that the check of a training step reads
DEAD, DEAD_COUNT = 0.03, 0.01  # the last codes of each book are dead: this share, with this count (others have one)


def encode(dim: int, peer: str, tokens: int = 4096, levels: int = 8, codes: int = 16384) -> Workload:
    """Codes of `tokens` vectors from books of their own for each level."""
    cfg, stats, x_ND, tensors = _random(dim, tokens, levels, codes)
    search = jax.jit(lambda stats, x: rvq.encode(cfg, stats, x))
    return Workload(
        name=f"dim {dim}, {peer}", ours=lambda: search(stats, x_ND), peer=f"rvq_encode_{peer}", config={"codes": codes, "levels": levels},
        tensors=tensors, amount=tokens, check=lambda a, b: _same_codes(np.asarray(x_ND), stats, a, b),
        flops=2.0 * tokens * levels * codes * dim, bytes=4.0 * levels * codes * dim, threads="all",
    )  # fmt: skip


def train_step(dim: int, peer: str, tokens: int = 4096, levels: int = 8, codes: int = 16384) -> Workload:
    """Codes, moving averages and restarts of dead codes; the step's old books are given away, as in training."""
    cfg, stats, x_ND, tensors = _random(dim, tokens, levels, codes)
    alive = codes - int(DEAD * codes)
    count_K = jnp.where(jnp.arange(codes) < alive, jnp.float32(1), jnp.float32(DEAD_COUNT))
    stats = rvq.from_codebooks(list(stats["codebook"].values()), [count_K + 0 for _ in range(levels)])  # arrays of their own: given away
    mask_N, state = jnp.ones(tokens), [stats, jax.random.key(0)]

    def update(stats, key, x_ND):
        key, draw = jax.random.split(key)
        codes_NL = rvq.encode(cfg, stats, x_ND)
        stats = rvq.apply(cfg, stats, rvq.statistics(cfg, stats, x_ND, codes_NL, mask_N, draw), draw)
        probe = [jnp.sum(stats["codebook"][str(i)][:PROBE], -1) for i in range(levels)]
        counts = [stats["count"][str(i)][:alive] for i in range(levels)]
        return (stats, key), jnp.concatenate([codes_NL.ravel().astype(jnp.float32), *probe, *counts])

    step = jax.jit(update, donate_argnums=(0, 1))

    def ours():
        state[:], result = step(*state, x_ND)
        return result

    return Workload(
        name=f"dim {dim}, {peer}", ours=ours, peer=f"rvq_train_step_{peer}",
        config={
            "codes": codes, "levels": levels, "decay": cfg.decay, "eps": cfg.eps, "threshold": cfg.restart_fraction, "probe": PROBE,
            "dead": int(DEAD * codes), "dead_count": DEAD_COUNT,
        },
        tensors=tensors, amount=tokens, check=lambda a, b: _same_step(a, b, tokens * levels, levels * PROBE),
        flops=2.0 * tokens * levels * codes * dim, bytes=4.0 * 5 * levels * codes * dim, threads="all",
    )  # fmt: skip


def _random(dim: int, tokens: int, levels: int, codes: int):
    """Configuration, statistics, vectors, and the peer's tensors: views of the same memory."""
    cfg, random = rvq.RVQConfig(sizes=(codes,) * levels, dim=dim), np.random.default_rng(0)
    books = [jnp.asarray(random.standard_normal((codes, dim), np.float32) * 0.3 * 0.9**i) for i in range(levels)]
    x_ND = jnp.asarray(random.standard_normal((tokens, dim), np.float32))
    tensors = {f"book.{i}": np.asarray(book) for i, book in enumerate(books)} | {"hidden": np.asarray(x_ND)}
    return cfg, rvq.from_codebooks(books), x_ND, tensors


def _same_codes(x_ND, stats, ours_NL, theirs_NL) -> None:
    """Equal, but where two codes of a level are equally near in float64 as far as float32 can tell; what follows is not compared."""
    rows = np.flatnonzero((ours_NL != theirs_NL).any(-1))
    if len(rows) > 1e-3 * len(x_ND) + 1:
        raise AssertionError(f"{len(rows)} of {len(x_ND)} vectors have other codes")
    for row in rows:
        level = int(np.argmax(ours_NL[row] != theirs_NL[row]))
        residual = x_ND[row].astype(np.float64)
        for before in range(level):
            residual = residual - np.asarray(stats["codebook"][str(before)][ours_NL[row, before]])
        a, b = (((residual - np.asarray(stats["codebook"][str(level)][c])) ** 2).sum() for c in (ours_NL[row, level], theirs_NL[row, level]))
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=f"vector {row}, level {level}")


def _same_step(ours, theirs, codes: int, rows: int) -> None:
    """Codes, sums of rows of the new books and the counts of those that did not restart, but for what a tie changed."""
    assert (ours[:codes] == theirs[:codes]).mean() > 0.999
    cut = codes + rows
    close = np.isclose(ours[codes:cut], theirs[codes:cut], rtol=1e-4, atol=1e-4), np.isclose(ours[cut:], theirs[cut:], rtol=1e-5, atol=1e-6)
    assert all(part.mean() > 0.999 for part in close), [part.mean() for part in close]
