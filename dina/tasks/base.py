"""The contract between the training loop and what it trains.

A task owns modules, builds their variables and turns one batch into sums. It runs inside one `jax.shard_map`
over the batch axes of the mesh (dina/sharding.py), so its code sees plain local arrays; the loop adds the sums
over micro-batches and devices and divides once, so that no number is ever a mean of means (DESIGN §4.5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dina.config import check_name

Tree = Any
Variables = dict[str, dict[str, Tree]]
Sums = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class LossOut:
    """What a task returns for its local examples.

    Attributes:
        terms: name -> (sum, weight). The loss is the sum over names of `stage.loss_weights[name] * sum / weight`.
        metrics: name -> (sum, weight), logged and never differentiated.
        updates: statistics for `Task.update_stats`, already summed over `axes`; leaves must be additive over
            micro-batches.
    """

    terms: Sums
    metrics: Sums
    updates: Tree = None


jax.tree_util.register_dataclass(LossOut, ["terms", "metrics", "updates"], [])


def merge_options(defaults: ConfigDict, stage) -> ConfigDict:
    """The stage's options over the task's defaults; an unknown one is an InputError."""
    for name in stage.options:
        check_name(name, defaults, f"option of a stage of task {stage.task!r}")
    defaults.lock()
    defaults.update(stage.options)
    return defaults


class Task:
    """One training run. Subclasses state which parts they own in `init`.

    Attributes:
        tables: paths of parameters [T, R, W] that stay sharded by rows and are read through `table_rows` only.
        gather: 'whole' finds all parameters whole in `loss`; 'use' finds those that are split as `dina.sharding.Shard`s,
            and gathers each where it is used.
    """

    tables: tuple[str, ...] = ()
    gather: str = "whole"

    def __init__(self, config, stage):
        """Keeps the experiment's config and this stage's sub-config; builds modules, allocates nothing."""
        self.config = config
        self.stage = stage

    def init(self, key: jax.Array) -> Variables:
        """Returns {'params': {part: tree}, 'stats': {part: tree}}; traceable by `jax.eval_shape`."""
        raise TypeError(f"{type(self).__name__} must define init")

    def batches(self) -> "Batches":
        """Returns the stage's data: a pure function of (config, stage, step)."""
        raise TypeError(f"{type(self).__name__} must define batches")

    def start(self, variables: Variables, batches: Iterator[dict[str, np.ndarray]], key: jax.Array) -> Variables:
        """Data-dependent initialisation (k-means); runs once, before step 0 of a fresh stage."""
        del batches, key
        return variables

    def loss(self, params: Tree, stats: Tree, batch: Tree, key: jax.Array, axes: tuple[str, ...]) -> LossOut:
        """Sums over the local examples of `batch`; `key` is the step's, fold in `batch['example']`."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def table_rows(self, batch: Tree) -> dict[str, jax.Array]:
        """Path of every table -> row of each table at every position of the local examples [B, ..., T], -1 = none.

        `loss` then finds [B, ..., T, W], those rows and zeros, under `dina.tables.READ` beside the table's place.
        """
        del batch
        return {}

    def update_stats(self, stats: Tree, updates: Tree, key: jax.Array, step: jax.Array) -> Tree:
        """Applies the non-gradient rules (codebook EMA, router balance) after the optimizer."""
        del updates, key, step
        return stats


class Batches:
    """Index-addressable training data of one stage."""

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Returns the global batch of `step`: arrays with a leading batch dimension, 'example' int32 included."""
        raise TypeError(f"{type(self).__name__} must define batch")

    def part(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Those rows of `batch(step)`, for a host that holds no others; worth its own definition where rows are made one by one."""
        return {name: x[rows] for name, x in self.batch(step).items()}
