"""The loss of a depth head whose parameters are in parts: layers, then levels, each gathered while it runs, and one program for all.

`depth.losses` wants the whole head on every device, once for every layer and level in the compiled program. Here layers are
one loop and levels with equally many classes another, so a device holds one layer or classifier at a time and the compiler
sees each once. Positions go through a layer in chunks, and chunks without any that count are skipped; parts are gathered
outside of that choice, for devices skip different ones. A classifier keeps its gradient (linear_loss.py), so its logits are
made once; layers are made again in the backward pass.

Legend: K chunks of C positions, L levels, D trunk width, W head width, V classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dina import sharding
from dina.backbone.linear import product
from dina.backbone.norm import RMSNorm
from dina.heads import depth
from dina.heads.linear_loss import linear_cross_entropy


def level_losses(module: depth.DepthHead, params: Any, pieces: dict[str, Array], used: Int[Array, ""], remat: str = "full") -> depth.LevelLoss:
    """What `depth.losses` returns for all positions.

    Args:
        module: the head.
        params: its parameters, `sharding.Shard`s and arrays.
        pieces: chunks (`losses.cut`) of h [K, C, D] and embedded [K, C, L, D], see `depth.input_rows`; label [K, C, L], codes, or
            sizes[l] for the end class, -1 leaves a level out; and weight [K, C].
        used: how many positions count; they come first (`losses.front`).
        remat: 'full' makes layers again in the backward pass, 'none' keeps what they need.
    """
    cfg, levels = module.cfg, len(module.sizes)
    again = {"full": jax.checkpoint, "none": lambda fn: fn}[remat]
    live_K = jnp.arange(len(pieces["h"])) * pieces["h"].shape[1] < used

    def enter(own, piece):
        x_LCD = depth.input_rows(piece["h"], piece["embedded"])
        x_LCD = RMSNorm(depth.EPS).apply({"params": own["hidden_norm"]}, x_LCD).astype(jnp.dtype(cfg.dtype))
        return product(x_LCD, own["hidden_proj"], cfg.dtype)

    def layer(own, x_LCW):
        return depth.DepthLayer(cfg, levels).apply({"params": own}, x_LCW)[0]

    rest = {name: tree for name, tree in params.items() if name in ("hidden_norm", "hidden_proj")}
    x_KLCW = again(lambda own, pieces: where_used(enter, sharding.whole(own, cfg.dtype), live_K, pieces))(rest, pieces)
    stacked = _stack([params[f"layer_{i}"] for i in range(cfg.layers)])
    one = again(lambda own, x_KLCW: where_used(layer, sharding.whole(own, cfg.dtype), live_K, x_KLCW))
    x_KLCW = jax.lax.scan(lambda x, own: (one(own, x), None), x_KLCW, stacked)[0]
    x_KLCW = RMSNorm(depth.EPS).apply({"params": sharding.whole(params["head_norm"])}, x_KLCW)
    return _classify(module, params, x_KLCW, pieces["label"], pieces["weight"])


def where_used(fn: Callable, own: Any, live_K: Array, pieces: Any) -> Array:
    """`fn(own, piece)` of every chunk that counts, zeros for the others, one after another."""
    shape = jax.eval_shape(fn, own, jax.tree.map(lambda x: x[0], pieces))
    nothing = lambda own, piece: jnp.zeros(shape.shape, shape.dtype)
    return jax.lax.scan(lambda _, at: (None, jax.lax.cond(at[0], fn, nothing, own, at[1])), None, (live_K, pieces))[1]


def runs(sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first level, levels) of neighbours with equally many codes."""
    first = 0
    for _, group in itertools.groupby(sizes):
        count = len(list(group))
        yield first, count
        first += count


def _classify(module, params, x_KLCW, label_KCL, weight_KC) -> depth.LevelLoss:
    parts = []
    for first, count in runs(module.sizes):
        names = range(first, first + count)
        own = _stack([(params[f"head_{i}"], params[f"head_{i}_bias"]) for i in names])
        at = slice(first, first + count)
        own = own, jnp.swapaxes(x_KLCW[:, at], 0, 1), jnp.moveaxis(label_KCL[..., at], -1, 0)

        def level(_, one, size=module.sizes[first]):
            own, x_KCW, label_KC = one
            weights_KC = jnp.where(label_KC >= 0, weight_KC, 0.0)
            return None, _level(module, size, own, x_KCW, label_KC, weights_KC)

        parts.append(jax.lax.scan(level, None, own)[1])
    return depth.LevelLoss(*(jnp.concatenate(each) for each in zip(*parts, strict=True)))


def _level(module, size: int, own, x_KCW, label_KC, weight_KC):
    """(loss, correct, weight) of one level."""
    flat = [x.reshape(-1, *x.shape[2:]) for x in (x_KCW, label_KC, weight_KC)]
    sums = linear_cross_entropy(flat[0], *sharding.whole(own, module.cfg.dtype), *flat[1:], size + 1, x_KCW.shape[1])
    return *sums, jnp.sum(weight_KC)


def _stack(trees: list[Any]) -> Any:
    """Equal trees as one with a leading dimension; parts stay parts, for their splits count from the end."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
