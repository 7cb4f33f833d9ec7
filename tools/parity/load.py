"""Weights of a case in our layout, through the conversion tables that the import uses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

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
    used = {path: group for path, group in found.items() if not path.startswith("carried/")}
    names = {piece.name for group in used.values() for piece in group}
    for piece in (piece for path, group in found.items() if path not in used for piece in group):
        if piece.name not in names:  # else only a part of the tensor is carried
            case.drop_weight(piece.name, "stored in the release, unused by its model")
    return jax.tree.map(jnp.asarray, unflatten(rules.assemble_all(used, case.weight, shapes)))
