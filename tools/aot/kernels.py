"""FLOPs of kernels, which the text of a compiled program does not show: from their runs and their shapes.

Legend: K values of a query, V of a value, H heads, S positions of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

from dina.backbone.config import AttentionConfig

AGAIN = " again"  # ends the name of a kernel that rematerialisation runs
SPLASH = "splash_mha"


def attention(cfg: AttentionConfig, rows: int, length: int, calls: Mapping[str, int]) -> tuple[float, float]:
    """(FLOPs, FLOPs of recomputation) of one device's attention kernels (dina/backbone/splash.py).

    Blocks after the diagonal are skipped, those on it run whole. Forward there are two products (scores, values); backward
    five: the scores again, and the gradients of probabilities, values, keys and queries.

    Args:
        cfg: heads and their sizes; `block` queries and keys run together.
        rows: of a micro-batch and device.
        length: S.
        calls: kernel -> runs in a step.
    """
    blocks = length // cfg.block if cfg.block else 1
    block = cfg.block or length
    product = 2.0 * rows * cfg.heads * block**2 * blocks * (blocks + 1) / 2
    score, value = product * (cfg.nope + cfg.rope), product * cfg.v
    done = again = 0.0
    for name, runs in calls.items():
        if not name.startswith(SPLASH):
            continue
        if "_fwd" in name and name.endswith(AGAIN):
            again += runs * (score + value)
        elif "_fwd" in name:
            done += runs * (score + value)
        else:
            done += runs * 2 * (score + value)
            again += runs * score
    return done, again
