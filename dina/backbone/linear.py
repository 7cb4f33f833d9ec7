"""The matrix product of the language side, always one flat 2-D product.

Legend: D contracted dimension, N all outputs, M all rows; leading dimensions of x and trailing dimensions of w are free.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dina.sharding import Shard


WIDE = 2048  # columns from which on XLA:CPU multiplies a single row at the speed of memory
LARGE = 2**21  # bytes of a weight that two cores multiply by a row in less time than one, waking the other included
PARTS = 4
FEW_ROWS = 16  # decoded together: up to here reading weights is what a step takes
TURNED_ROWS = 32  # up to so many rows, `product` multiplies a turned weight from the left


class Served:
    """What stands in for a parameter while serving."""


def rearranges() -> bool:
    """Whether serving wants weights in another form than the stored one: on a CPU."""
    return jax.default_backend() == "cpu"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned(Served):
    """A weight [D, *out] kept as [N, D], for a few rows on a CPU (`turn`)."""

    w_ND: Float[Array, "N D"]
    out: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def turn(w: Float[Array, "D *out"]) -> Turned:
    """The same weight for products of two to some ten rows on a CPU.

    XLA:CPU multiplies [8, 512] x [512, 1024] in 420 us, [1024, 512] x [512, 8] in 280 (two rows: 260, 145; both cores
    busy), and a single row in the usual layout in 117 (this one: 320).
    """
    return Turned(w.reshape(w.shape[0], -1).T, w.shape[1:])


def turn_all(tree: dict[str, Array], rows: int) -> dict[str, Array | Turned]:
    """Every weight of a module `turn`ed, if a few rows and more than one are decoded."""
    return {name: turn(w) for name, w in tree.items()} if turns(rows) else tree


def turns(rows: int) -> bool:
    """Whether so many rows want `turn`ed weights."""
    return 1 < rows <= FEW_ROWS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beside(Served):
    """Weights [D, N] that multiply the same input, as one matrix: the first of them holds it, the others nothing."""

    w_DM: Float[Array, "D M"] | Turned | None
    ends: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def beside(tree: dict[str, Array], names: tuple[str, ...], rows: int) -> dict[str, Array | Served]:
    """A module's weights with those of `names` side by side, for `products` of `rows` rows."""
    joint_DM = jnp.concatenate([tree[name] for name in names], -1)
    ends = tuple(itertools.accumulate(tree[name].shape[-1] for name in names[:-1]))
    first = Beside(turn(joint_DM) if turns(rows) else joint_DM, ends)
    return tree | dict.fromkeys(names, Beside(None, ends)) | {names[0]: first}


def weight(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Array | Served | Shard:
    """`module.param`, or what stands in for it: a form for serving, or a part that the caller can do with."""
    found = module.get_variable("params", name) if module.has_variable("params", name) else None
    return found if isinstance(found, (Served, Shard)) else module.param(name, init, shape)


def products(x: Float[Array, "... D"], weights: Sequence[Array | Served], dtype: DTypeLike = "float32") -> list[Array]:
    """x times each of the weights, in one product where they are `beside` each other."""
    if isinstance(weights[0], Beside):
        return jnp.split(product(x, weights[0].w_DM, dtype), weights[0].ends, axis=-1)
    return [product(x, w, dtype) for w in weights]


def product(x: Float[Array, "... D"], w: Float[Array, "D *out"] | Turned, dtype: DTypeLike = "float32", out: DTypeLike | None = None) -> Float[Array, "... *out"]:
    """x @ w with both cast to `dtype`; sums are made and returned in `out` if given.

    Flattened to two dimensions because XLA:CPU runs the weight gradient of a product over [B, S, D] 1.4 times slower
    in float32 and 2.5 times in bfloat16 than over [B*S, D] (feed-forward block, 2,048 positions); elsewhere it is free.
    """
    flat_MD, dot = x.reshape(-1, x.shape[-1]).astype(dtype), functools.partial(jnp.matmul, preferred_element_type=out)
    if isinstance(w, Turned):
        w_ND = w.w_ND.astype(dtype)
        # Without the barrier the transposition is folded into the product, which is the slow one again for few rows.
        few = len(flat_MD) <= TURNED_ROWS
        flat_MN = jax.lax.optimization_barrier(dot(w_ND, flat_MD.T)).T if few else dot(flat_MD, w_ND.T)
        return flat_MN.reshape(*x.shape[:-1], *w.out)
    w_DN = w.reshape(w.shape[0], math.prod(w.shape[1:])).astype(dtype)
    flat_MN = in_parts(flat_MD, w_DN, out) if _narrow(flat_MD, w_DN) else dot(flat_MD, w_DN)
    return flat_MN.reshape(*x.shape[:-1], *w.shape[1:])


def _narrow(flat_MD: Array, w_DN: Array) -> bool:
    """Whether `in_parts` is the faster product."""
    few = len(flat_MD) == 1 and len(w_DN) % PARTS == 0 and w_DN.shape[1] < WIDE
    return rearranges() and few and w_DN.nbytes >= LARGE


def in_parts(x_1D: Float[Array, "1 D"], w_DN: Float[Array, "D N"], out: DTypeLike | None = None) -> Float[Array, "1 N"]:
    """A row times a matrix on a CPU: sums over parts of D, which cores share, and their sum.

    XLA:CPU multiplies a row with one core, in streams as long as the matrix' rows: of [1024, 512] in float32 it reads 11 GB/s,
    this 15, of a memory that gives 20; of [512, 2048] it reads 16 to 18, and [512, 512] is over before the other core wakes.
    """
    part_PN = jnp.sum(x_1D.reshape(PARTS, -1, 1) * w_DN.reshape(PARTS, -1, w_DN.shape[1]), 1, dtype=out)
    return jnp.sum(jax.lax.optimization_barrier(part_PN), 0, dtype=out)[None]  # without the barrier it is one sum again
