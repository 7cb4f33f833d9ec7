"""What a cell costs: time and memory of encoding, and the arithmetic of the depth head that must predict its codes.

Letters: L levels, W width of the head, D width of the trunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dina.backbone.config import DepthConfig


def head_flops(cfg: DepthConfig, trunk: int, sizes: Sequence[int]) -> float:
    """Multiplications and additions of one image cell in a forward pass of the depth head, all levels.

    Args:
        cfg: the head.
        trunk: D.
        sizes: codes per level; a classifier has one class more.

    Returns:
        Counted as dina/heads/depth.py computes them: attention over all L x L pairs, as its mask throws half of it away;
        norms and softmax are left out.
    """
    levels, width = len(sizes), cfg.width
    layer = levels * 4 * width * width + 2 * levels * levels * width + 2 * cfg.ffn_scale * width * width
    classifiers = sum(width * (size + 1) for size in sizes)
    return 2.0 * (levels * trunk * width + cfg.layers * layer + classifiers)


def program(make: tuple[Callable, tuple, int], repeats: int) -> dict[str, Any]:
    """Compiles a function, times it, and asks the compiler for its memory.

    Args:
        make: (function, arguments, cells that one call works on).
        repeats: timed calls, after one that is not.

    Returns:
        us_cell: [lower quartile, median, upper quartile] of microseconds a cell; mib: arguments, results and temporaries of
        the compiled program, in MiB.
    """
    function, arguments, cells = make
    arguments = jax.device_put(arguments)
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - begun)
    used = compiled.memory_analysis()
    total = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    quartiles = np.percentile(np.array(seconds) * 1e6 / cells, [25, 50, 75])
    return {"us_cell": [float(v) for v in quartiles], "mib": total / 2**20}
