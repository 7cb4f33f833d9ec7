"""Weights of a case in our layout, through the conversion tables that the import uses."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from dina.convert import rules
from dina.optim import unflatten
from tools.parity.case import Case


def variables(case: Case, *tables: tuple[list[rules.Rule], dict, dict], shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    """{'params': {part: tree}, 'stats': ...}; weights that are only carried along are declared unused.

    Args:
        case: where released names are read.
        tables: (rules, counts, sizes) of each module.
        shapes: our shape by path where ours is padded; default: just what the pieces need.
    """
    found = rules.by_path(piece for table in tables for piece in rules.pieces(*table))
    flat = {}
    for path, group in found.items():
        if path.startswith("carried/"):
            for piece in group:
                case.drop_weight(piece.name, "stored in the release, unused by its model")
            continue
        shape = (shapes or {}).get(path, rules.least_shape(group))
        flat[path] = jnp.asarray(rules.assemble(group, case.weight, shape, np.float32))
    return unflatten(flat)
