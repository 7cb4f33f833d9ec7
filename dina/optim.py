"""Optimizers over the trainable part of a parameter tree.

Parameters are addressed by flat paths `part/module/.../leaf`; a pattern is a path or a prefix of one, with `*` as
wildcard. Only what a stage trains has optimizer state; the rest is never touched (DESIGN §4.4).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
import optax.contrib
from flax import traverse_util

from dina.config import InputError

Flat = dict[str, jax.Array]


def flatten(tree: Any) -> Flat:
    """Nested dicts -> {'part/module/leaf': array}."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Flat) -> Any:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether `path` equals, lies under, or globs one of `patterns`."""
    return any(fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(path, p + "/*") for p in patterns)


def split(params: Any, patterns: Iterable[str]) -> tuple[Flat, Flat]:
    """Splits a parameter tree into (trainable, frozen) flat dicts.

    Raises:
        InputError: a pattern matches nothing (a misspelt part would otherwise train nothing, silently).
    """
    flat = flatten(params)
    for pattern in patterns:
        if not any(matches(path, [pattern]) for path in flat):
            raise InputError(f"stage.train names {pattern!r}, which matches no parameter; parts: {', '.join(sorted(params))}")
    train = {path: x for path, x in flat.items() if matches(path, patterns)}
    return train, {path: x for path, x in flat.items() if path not in train}


def default_config() -> ml_collections.ConfigDict:
    """AdamW as released for the language side (backbone.md §7.4), with the small runs' learning rate."""
    c = ml_collections.ConfigDict()
    c.learning_rate = 1e-3
    c.schedule = "cosine"  # 'cosine' to `final_fraction`, 'linear' likewise, or 'constant', each after a linear warm-up
    c.warmup_steps = 20
    c.final_fraction = 0.05
    c.beta1, c.beta2, c.epsilon = 0.9, 0.95, 1e-8
    c.weight_decay = 0.0
    c.clip_norm = 1.0
    c.multipliers = ()  # ((pattern, learning-rate multiplier), ...), first match wins
    # Matrices that Muon moves instead of AdamW: patterns of [..., in, out], leading axes being stacked matrices, or
    # (pattern, in, out): so many last axes make the rows and the columns, as in [D, heads, size]: (pattern, 1, 2).
    c.muon = ()
    c.muon_rate = 10.0  # their learning rate over `learning_rate`: an orthogonal update has norm 1, not 1 per entry
    # Hashed tables [..., rows, width] that `rowwise` moves instead of AdamW, as patterns. AdamW, as released, moves every row
    # at every step, those that no example read by what is left of their moments; it keeps two more values for each.
    c.rowwise = ()
    return c


def schedule(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Step -> learning rate."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, max(1, steps - 1))
    rest = max(1, steps - warmup)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.final_fraction, rest)
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise InputError(f"optimizer.schedule {config.schedule!r} is not one of cosine, linear, constant")
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup), after], [warmup])


def decays(path: str, x: jax.Array) -> bool:
    """Weight decay applies to matrices only: no norm scales, biases (stacked ones too) or tables (backbone.md §7.4)."""
    *_, module, leaf = ("", *path.split("/"))
    return x.ndim >= 2 and not any(word in path for word in ("embed", "table")) and "norm" not in module and "bias" not in leaf


def multiplier(config: ml_collections.ConfigDict, path: str) -> float:
    """Of a parameter's learning rate."""
    return next((float(m) for pattern, m in config.multipliers if matches(path, [pattern])), 1.0)


def kind(config: ml_collections.ConfigDict, path: str) -> str:
    """What moves a parameter: 'muon', 'rowwise' or 'adam'."""
    patterns = {"muon": [entry if isinstance(entry, str) else entry[0] for entry in config.muon], "rowwise": config.rowwise}
    return next((name for name, some in patterns.items() if matches(path, some)), "adam")


def alike(config: ml_collections.ConfigDict, flat: Flat, place: Callable[[str], Any]) -> dict[str, tuple[str, ...]]:
    """Parameters that one update can move together, by the first of them; each with an update of its own, the 164 arrays of the
    released language model are a fifth of what the TPU compiler does.

    Args:
        config: as of `make`.
        flat: the trainable ones.
        place: path -> anything that must be the same for those that go together.
    """
    groups: dict[Any, list[str]] = {}
    for path, x in flat.items():
        decayed = decays(path, x)
        own = decayed != decays(path, jax.ShapeDtypeStruct((1, *x.shape), x.dtype))
        key = path if own else (x.shape, str(x.dtype), multiplier(config, path), kind(config, path), decayed, place(path))
        groups.setdefault(key, []).append(path)
    return {paths[0]: tuple(paths) for paths in groups.values()}


def pack(groups: dict[str, tuple[str, ...]], tree: Any) -> Any:
    """Every flat dict of a tree (gradients, an optimizer's state) with what goes together stacked."""
    paths = {path for group in groups.values() for path in group}
    flat = lambda node: isinstance(node, dict) and set(node) == paths

    def stack(leaves):
        return jnp.stack(leaves) if len(leaves) > 1 and not isinstance(leaves[0], optax.MaskedNode) else leaves[0]

    each = lambda node: {name: stack([node[path] for path in group]) for name, group in groups.items()} if flat(node) else node
    return jax.tree.map(each, tree, is_leaf=flat)


def unpack(groups: dict[str, tuple[str, ...]], tree: Any) -> Any:
    """The inverse of `pack`."""
    packed = lambda node: isinstance(node, dict) and set(node) == set(groups)

    def apart(x, group):
        if len(group) == 1 or isinstance(x, optax.MaskedNode):
            return [x] * len(group)
        return [jax.lax.index_in_dim(x, i, keepdims=False) for i in range(len(group))]

    each = lambda node: {path: x for name, group in groups.items() for path, x in zip(group, apart(node[name], group), strict=True)}
    return jax.tree.map(lambda node: each(node) if packed(node) else node, tree, is_leaf=packed)


def make(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Clip, AdamW and per-group multipliers over a flat dict of trainable arrays, for a learning rate of 1.

    The caller multiplies by the rate: as an argument of the compiled step, and no constant in it, stages that differ
    in their schedule only share one compiled program.
    """

    def scale_groups(updates, state, params=None):
        del params
        return {path: u * multiplier(config, path) for path, u in updates.items()}, state

    direction = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    others = {}
    if config.muon:
        others["muon"] = muon(config.muon_rate, [(entry, 1, 1) if isinstance(entry, str) else tuple(entry) for entry in config.muon])
    if config.rowwise:
        others["rowwise"] = rowwise(config.beta2, config.epsilon)
    if others:
        ways = {"adam": direction} | others
        direction = optax.partition(ways, lambda flat: {path: kind(config, path) for path in flat})
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, lambda flat: {p: decays(p, x) for p, x in flat.items()}),
        optax.GradientTransformation(lambda _: optax.EmptyState(), scale_groups),
        optax.scale(-1.0),
    )


def muon(rate: float, sides: Sequence[tuple[str, int, int]]) -> optax.GradientTransformation:
    """Orthogonalised momentum (Jordan et al. 2024) of matrices, times `rate` and sqrt(max(1, out / in)).

    Args:
        rate: over the learning rate of everything else.
        sides: (pattern, number of axes that make the rows, and the columns), first match wins; the last axes of a leaf.
    """

    def split_axes(path, x):
        rows, columns = next((r, c) for pattern, r, c in sides if matches(path, [pattern]))
        if x.ndim < rows + columns:
            raise InputError(f"optimizer.muon: {path} has shape {tuple(x.shape)}, fewer axes than {rows} + {columns}")
        first = x.ndim - rows - columns
        return tuple(range(first, first + rows)), tuple(range(first + rows, x.ndim))

    def axes(flat):
        matrix = lambda path, x: optax.contrib.MuonDimensionNumbers(*split_axes(path, x))
        return {path: x if isinstance(x, optax.MaskedNode) else matrix(path, x) for path, x in flat.items()}

    def grow(path, u):
        if isinstance(u, optax.MaskedNode):
            return u
        rows, columns = (math.prod(u.shape[axis] for axis in side) for side in split_axes(path, u))
        return u * (rate * max(1.0, columns / rows) ** 0.5)

    def scale(updates, state, params=None):
        del params
        return {path: grow(path, u) for path, u in updates.items()}, state

    turn = optax.contrib.scale_by_muon(weight_dimension_numbers=axes)
    return optax.chain(turn, optax.GradientTransformation(lambda _: optax.EmptyState(), scale))


def rowwise(decay: float, epsilon: float) -> optax.GradientTransformation:
    """Each row's gradient over the root of its own mean square: one value of state a row, no first moment, and lazy.

    A row without a gradient neither moves nor forgets: a rare one would otherwise lose its scale between two readings.
    The first gradient sets the scale, later ones move it as `decay` says.
    """

    def init(params):
        return jax.tree.map(lambda x: jnp.zeros_like(x[..., 0]), params)

    def update(grads, second, params=None):
        del params
        square = jax.tree.map(lambda g: jnp.mean(jnp.square(g), -1), grads)
        moved = lambda v, s: jnp.where(s > 0, jnp.where(v > 0, decay * v + (1 - decay) * s, s), v)
        second = jax.tree.map(moved, second, square)
        return jax.tree.map(lambda g, v: g / (jnp.sqrt(v) + epsilon)[..., None], grads, second), second

    return optax.GradientTransformation(init, update)


def average(mean: Flat, new: Flat, decay: float, step: jax.Array) -> Flat:
    """Exponential moving average of weights with the usual start-up correction min(decay, (1+t)/(10+t))."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda m, x: m * d + x * (1.0 - d), mean, new)
