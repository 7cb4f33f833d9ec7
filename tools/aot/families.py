"""Parameters and bytes by family: trunk (n-gram tables apart), heads, bridge; padding is not counted as parameters.

The trunk is embedding, n-gram tables, layers and text head, as the release counts its 68.5B; the bridge is the block that
re-encodes image cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from dina import grammar, optim
from dina.backbone import config as trunk_config
from dina.backbone.ngram import table_sizes

FAMILIES = ("trunk", "ngram", "visual_head", "audio_head", "bridge")
NGRAM, BRIDGE = ("embed/ngram",), ("embed/pre_buffer",)


def family(path: str) -> str:
    """Of a parameter's path; the n-gram's own, which `count` adds to the trunk too. Tokenizers' parts are their own families."""
    if optim.matches(path, NGRAM):
        return "ngram"
    if optim.matches(path, BRIDGE):
        return "bridge"
    part = path.split("/")[0]
    return "trunk" if part in ("embed", "backbone", "lm_head") else part


def true_sizes(config, params: Any) -> dict[str, int]:
    """Path -> values that are no padding (DESIGN §4.12)."""
    voc = grammar.from_config(config)
    sizes = {path: math.prod(x.shape) for path, x in optim.flatten(params).items()}
    shapes = {path: x.shape for path, x in optim.flatten(params).items()}
    ngram = trunk_config.parse(trunk_config.NgramConfig, config.model.ngram)
    for path, shape in shapes.items():
        if path == "embed/ngram/table":
            sizes[path] = sum(table_sizes(ngram, voc.text)) * shape[2]
        elif path == "embed/table":
            sizes[path] = voc.rows * shape[1]
        elif path == "lm_head/kernel":
            sizes[path] = shape[0] * voc.classes
    for head, codes in (("visual_head", voc.visual), ("audio_head", voc.audio)):
        for level, size in enumerate(codes):
            for path in (f"{head}/head_{level}", f"{head}/head_{level}_bias"):
                if path in shapes:
                    sizes[path] = math.prod(shapes[path][:-1]) * (size + 1)
    return sizes


def count(config, params: Any) -> dict[str, int]:
    """Parameters by family; 'trunk' includes 'ngram', 'all' is their sum without counting those twice."""
    found = dict.fromkeys(FAMILIES, 0)
    for path, size in true_sizes(config, params).items():
        name = family(path)
        found[name] = found.get(name, 0) + size
    found["trunk"] += found["ngram"]
    return found | {"all": sum(size for name, size in found.items() if name != "ngram")}


def held(state: dict[str, Any], batch: Any, size: Callable[[Any], int]) -> dict[str, int]:
    """Bytes that one device holds between steps, by kind: parameters and optimizer (n-gram tables apart), n-gram, the rest.

    Args:
        state: abstract or real.
        batch: of one step.
        size: bytes of one array on a device.
    """
    found = {"parameters": 0, "optimizer": 0, "ngram": 0, "statistics": 0, "batch": sum(size(x) for x in jax.tree.leaves(batch))}
    tables = {x.shape for path, x in optim.flatten(state["params"]).items() if family(path) == "ngram"}
    tables |= {shape[:-1] for shape in tables if len(shape) == 3}
    for kind, tree in state.items():
        for leaf in jax.tree.leaves(tree):
            name = {"params": "parameters", "opt": "optimizer", "ema": "optimizer"}.get(kind, "statistics")
            found["ngram" if leaf.shape in tables and name != "statistics" else name] += size(leaf)
    return found
