"""Tables too large to gather: sharded by rows over the whole mesh, read and trained by the rows that a batch needs.

The hashed n-gram tables are 44 % of the language side (backbone.md §2). Gathering them on every device, as the rest of
the parameters are, is out of the question. So a micro-batch
  1. asks for rows (`read`): each device lists those that its examples read, each once, and an all-to-all brings them;
  2. differentiates the loss by those rows, never by the table;
  3. gives the gradients back along the same way (`give_back`): every device gets the gradient of its own rows, micro-batches
     add up there, and the optimizer goes on as with any sharded parameter.

Buffers are bounded: C rows for each pair of devices and round. How many rounds a step takes depends on the busiest pair,
is exact whatever it is, and is logged. It is more than one where frequent words meet: a hash is some word's id plus a
multiple of the vocabulary, modulo 78 vocabularies, so rows of frequent ids are neighbours, and one device holds them.
Counted for the released tables, 8,192 positions a device and words of Zipf frequency: 1 or 2 rounds among 8 and 64 devices,
2 to 5 among 256, 3 to 12 among 1,024, the most where ids are ordered by frequency. Rows stored in another order than hashed
would spread better; imports and exports would have to know it. A whole train step with it compiles for 8 and 256 v5e and 64 v5p chips
(libtpu 0.0.52): four all-to-alls.

All functions but `spec`, `check` and `as_read` run inside a `shard_map`.

Legend: n devices, T tables, R rows of each, K = R / n of them here, W width, N positions, Q requests = N * T of this
device, C places of a pair of devices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dina import sharding
from dina.config import InputError

READ = "read"  # name of the rows that were read, beside the table's
# Places of a pair of devices over what an even spread would need. A round moves all places, used or not: larger ones move
# more of the unused, smaller ones take more rounds.
SLACK = 1.25
SPARE_AXES = tuple(axis for axis in sharding.AXES if axis not in sharding.BATCH_AXES)  # devices along these hold the same examples


class Requests(NamedTuple):
    """Which rows this device wants, each once, ordered by owner.

    Attributes:
        key_Q: owner * T * K + place of the row at its owner; unused entries come last and are n * T * K.
        of_Q: for every request the entry of `key_Q` that answers it.
        start_n, count_n: entries of every owner.
        rounds: how many rounds of C rows the busiest pair of devices needs, equal on all devices.
    """

    key_Q: Int[Array, " Q"]
    of_Q: Int[Array, " Q"]
    start_n: Int[Array, " n"]
    count_n: Int[Array, " n"]
    rounds: Int[Array, ""]


def spec() -> P:
    """Placement of [T, R, ...]: rows over all devices."""
    return P(None, sharding.AXES)


def check(shape: tuple[int, ...], mesh: jax.sharding.Mesh, path: str) -> None:
    """Raises InputError unless every table's rows divide among the devices."""
    if shape[1] % mesh.size:
        raise InputError(f"{path}: {shape[1]} stored rows a table do not divide among {mesh.size} devices; see model.ngram.row_multiple")


def as_read(found: dict[str, Array]) -> dict[str, Array]:
    """Rows under the paths where `Task.loss` finds them."""
    return {f"{path.rpartition('/')[0]}/{READ}": x for path, x in found.items()}


@jax.named_scope("read_rows")
def read(tables: dict[str, Array], rows: dict[str, Array], axes: tuple[str, ...]) -> tuple[dict[str, Array], dict[str, Requests]]:
    """Rows that this device's examples read.

    Args:
        tables: path -> this device's rows [T, K, W].
        rows: path -> numbers of rows [B, ..., T], -1 = none; the same on devices along `SPARE_AXES`.
        axes: mesh axes with more than one device.

    Returns:
        ({path: rows [B, ..., T, W], zero where there is none}, {path: how they were asked for}).
    """
    asked = {path: ask(table.shape, rows[path], axes) for path, table in tables.items()}
    return {path: lookup(table, rows[path].shape, asked[path], axes) for path, table in tables.items()}, asked


@jax.named_scope("give_rows_back")
def give_back(tables: dict[str, Array], grads: dict[str, Array], asked: dict[str, Requests], axes: tuple[str, ...]) -> dict[str, Array]:
    """Gradients of this device's rows.

    Args:
        tables: path -> [T, K, W], for its shape.
        grads: by path; [B, ..., T, W], gradients of what `read` returned, each device's share of the global sum.
        asked: by path; what `read` returned.
        axes: as there.
    """
    return {path: _sum_at_owner(table.shape, grads[path], asked[path], axes) for path, table in tables.items()}


def blank(tables: dict[str, Array], rows: dict[str, Array]) -> dict[str, Array]:
    """What `read` returns where nothing is read."""
    return {path: jnp.zeros((*rows[path].shape, table.shape[-1]), table.dtype) for path, table in tables.items()}


def rounds(asked: dict[str, Requests]) -> Array:
    """Of the busiest exchange; 0 without tables."""
    return jnp.max(jnp.stack([jnp.int32(0), *(a.rounds.astype(jnp.int32) for a in asked.values())]))


def places(requests: int, devices: int) -> int:
    """C."""
    return requests if devices == 1 else min(requests, math.ceil(SLACK * requests / devices) + 8)


def ask(shape: tuple[int, ...], row_NT: Int[Array, "*N T"], axes: tuple[str, ...]) -> Requests:
    """Plans the exchange for this device's share of the requests.

    Args:
        shape: of the rows here, [T, K, W].
        row_NT: row of every table that a position reads, -1 = none; the same on devices along `SPARE_AXES`.
        axes: mesh axes with more than one device.
    """
    tables, here = shape[:2]
    devices = math.prod(jax.lax.axis_size(axis) for axis in axes)
    none = devices * tables * here
    key_NT = row_NT // here * (tables * here) + jnp.arange(tables) * here + row_NT % here
    key_Q = _share(jnp.where(row_NT < 0, none, key_NT).reshape(-1), axes, none)
    sorted_Q, order_Q = jax.lax.sort((key_Q, jnp.arange(len(key_Q))), num_keys=1)
    first_Q = jnp.concatenate([jnp.ones(1, bool), sorted_Q[1:] != sorted_Q[:-1]])
    entry_Q = jnp.cumsum(first_Q) - 1
    unique_Q = jnp.full_like(key_Q, none).at[entry_Q].set(sorted_Q)
    of_Q = jnp.zeros_like(entry_Q).at[order_Q].set(entry_Q, unique_indices=True)
    bound = jnp.searchsorted(unique_Q, jnp.arange(devices + 1, dtype=unique_Q.dtype) * (tables * here))
    count_n = bound[1:] - bound[:-1]
    rounds = -(-jnp.max(count_n) // places(len(key_Q), devices))
    return Requests(unique_Q, of_Q, bound[:-1], count_n, jax.lax.pmax(rounds, axes) if axes else rounds)


def lookup(table_TKW: Float[Array, "T K W"], shape: tuple[int, ...], asked: Requests, axes: tuple[str, ...]) -> Array:
    """The rows that were asked for, [*shape, W]; zero where there was none."""
    flat = table_TKW.reshape(-1, table_TKW.shape[-1])

    def round_(number, found_QW):
        entry_nC, place_nC = _round(asked, number, len(flat))
        wanted_nC = _exchange(place_nC, axes)
        rows_nCW = jnp.where(wanted_nC[..., None] >= 0, flat[jnp.maximum(wanted_nC, 0)], 0)
        return found_QW.at[entry_nC].set(_exchange(rows_nCW, axes), mode="drop")

    found_QW = jax.lax.fori_loop(0, asked.rounds, round_, jnp.zeros((len(asked.key_Q), flat.shape[1]), flat.dtype))
    found_QW = found_QW[asked.of_Q]
    for axis in reversed([axis for axis in axes if axis in SPARE_AXES]):
        found_QW = jax.lax.all_gather(found_QW, axis, tiled=True)
    return found_QW[: math.prod(shape)].reshape(*shape, -1)


def _sum_at_owner(shape, grad_NTW, asked: Requests, axes) -> Float[Array, "T K W"]:
    """The gradient of the rows here, in float32: what all devices send, which each has summed over its own requests."""
    grad_QW = _share(grad_NTW.reshape(-1, shape[2]).astype(jnp.float32), axes, 0)
    sum_QW = jax.ops.segment_sum(grad_QW, asked.of_Q, len(grad_QW))

    def round_(number, total_XW):
        entry_nC, place_nC = _round(asked, number, len(total_XW))
        sent_nCW = sum_QW.at[entry_nC].get(mode="fill", fill_value=0)
        place_nC = _exchange(place_nC, axes)
        return total_XW.at[jnp.where(place_nC < 0, len(total_XW), place_nC)].add(_exchange(sent_nCW, axes), mode="drop")

    zeros_XW = jnp.zeros((shape[0] * shape[1], shape[2]))
    return jax.lax.fori_loop(0, asked.rounds, round_, zeros_XW).reshape(shape)


def _share(x_Q, axes, fill):
    """This device's part of a list that all devices along the spare axes hold, filled up to equal parts."""
    spare = tuple(axis for axis in axes if axis in SPARE_AXES)
    parts = math.prod(jax.lax.axis_size(axis) for axis in spare)
    if parts == 1:
        return x_Q
    length = -(-len(x_Q) // parts)
    x_Q = jnp.pad(x_Q, [(0, parts * length - len(x_Q))] + [(0, 0)] * (x_Q.ndim - 1), constant_values=fill)
    return jax.lax.dynamic_slice_in_dim(x_Q, jax.lax.axis_index(spare) * length, length)


def _round(asked: Requests, number, held: int):
    """Entries of `key_Q` that go to each owner in a round, past the end where there are none, and their places among the
    `held` rows of an owner, -1 likewise."""
    devices = len(asked.count_n)
    capacity = places(len(asked.key_Q), devices)
    place_C = number * capacity + jnp.arange(capacity)
    inside_nC = place_C < asked.count_n[:, None]
    entry_nC = jnp.where(inside_nC, asked.start_n[:, None] + place_C, len(asked.key_Q))
    key_nC = asked.key_Q.at[entry_nC].get(mode="fill", fill_value=0)
    return entry_nC, jnp.where(inside_nC, key_nC - held * jnp.arange(devices)[:, None], -1)


def _exchange(x_nC, axes):
    """Entry j of the first axis goes to device j; what comes back is ordered by sender."""
    return jax.lax.all_to_all(x_nC, axes, 0, 0, tiled=True) if axes else x_nC
