"""Tables too large to gather: sharded by rows over the whole mesh, read and trained by the rows that a batch needs.

The hashed n-gram tables are 44 % of the language side (backbone.md §2). Gathering them on every device, as the rest of
the parameters are, is out of the question, and so is a gradient of their size. So a step
  1. asks for rows (`read`): each device lists those that its examples read, each once, and one all-to-all brings them;
  2. differentiates the loss by those rows, micro-batch after micro-batch, never by the table;
  3. gives the gradients back along the same way (`move`): a row's owner adds what several devices send and moves it.

Buffers are bounded: C rows for each pair of devices. Hashed rows spread evenly, so that one round of C suffices; where
it does not, further rounds follow (slow, exact, and told as `rounds`), and the owner adds up one table at a time.

Optimizers of tables (`optimizer.tables`), both without weight decay:
  'adam'     as released: two moments for every value; all rows move at every step, those that no example read by what
             is left of their moments, which decay.
  'rowwise'  one second moment a row (its mean squared gradient) and no first. Lazy: only rows of the step move or
             decay, as a rare row would otherwise forget between two readings. The first reading sets the moment.

Legend: n devices, T tables, R rows of each, K = R / n of them here, W width, N positions, P requests = N * T of this
device, C places of a pair of devices, L = n * C rows given back to their owner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dina import sharding
from dina.config import InputError

READ = "read"  # name of the rows that were read, beside the table's
KINDS = ("adam", "rowwise")
# Places of a pair of devices over the expectation of P distinct, evenly hashed rows. 1.5: for 8,192 positions, 12 tables
# and 256 devices 384 are expected with a deviation of 20, so that more than 576 do not happen.
SLACK = 1.5
ALL_AXES = sharding.AXES
SPARE_AXES = tuple(axis for axis in ALL_AXES if axis not in sharding.BATCH_AXES)  # devices along these hold the same examples


class Requests(NamedTuple):
    """Which rows this device wants, each once, ordered by owner.

    Attributes:
        key_P: owner * T * K + place of the row at its owner; unused entries come last and are n * T * K.
        of_P: for every request the entry of `key_P` that answers it.
        start_n, count_n: entries of every owner.
        rounds: how many rounds of C rows the busiest pair of devices needs, equal on all devices.
    """

    key_P: Int[Array, " P"]
    of_P: Int[Array, " P"]
    start_n: Int[Array, " n"]
    count_n: Int[Array, " n"]
    rounds: Int[Array, ""]


def spec() -> P:
    """Placement of [T, R, ...]: rows over all devices."""
    return P(None, ALL_AXES)


def check(shape: tuple[int, ...], mesh: jax.sharding.Mesh, path: str) -> None:
    """Raises InputError unless every table's rows divide among the devices."""
    if len(shape) != 3 or shape[1] % mesh.size:
        raise InputError(f"{path}: {shape[1]} stored rows a table do not divide among {mesh.size} devices; raise model.ngram.row_multiple")


def init(kind: str, table_TRW: Float[Array, "T R W"]) -> dict[str, Array]:
    """Optimizer state of a table. Raises InputError for an unknown kind."""
    if kind not in KINDS:
        raise InputError(f"optimizer.tables is {kind!r}; known: {', '.join(KINDS)}")
    if kind == "rowwise":
        return {"second": jnp.zeros_like(table_TRW[..., 0])}
    return {"first": jnp.zeros_like(table_TRW), "second": jnp.zeros_like(table_TRW), "count": jnp.zeros((), jnp.int32)}


def state_spec(state: dict[str, Any]) -> dict[str, P]:
    """Placements of an optimizer state."""
    return {name: P() if x.ndim == 0 else spec() for name, x in state.items()}


def places(requests: int, devices: int) -> int:
    """C."""
    return requests if devices == 1 else min(requests, math.ceil(SLACK * requests / devices) + 8)


def as_read(found: dict[str, Array]) -> dict[str, Array]:
    """Rows under the paths where `Task.loss` finds them."""
    return {f"{path.rpartition('/')[0]}/{READ}": x for path, x in found.items()}


def read(whole: dict[str, Array], rows_of: Callable, batch: Any, mesh: jax.sharding.Mesh) -> tuple[dict, dict]:
    """Rows that a global batch reads.

    Args:
        whole: path -> table [T, R, W], placed as `spec`.
        rows_of: `Task.table_rows`.
        batch: placed over the batch axes.
        mesh: of both.

    Returns:
        ({path: rows' numbers [B, ..., T]}, {path: rows [B, ..., T, W]}), placed as the batch is.
    """
    axes = _axes(mesh)

    def local(tables, batch):
        rows = rows_of(batch)
        return rows, {path: lookup(table, rows[path], axes) for path, table in tables.items()}

    over_batch = P(sharding.BATCH_AXES)
    return jax.shard_map(local, mesh=mesh, in_specs=(spec(), over_batch), out_specs=over_batch, check_vma=False)(whole, batch)


def move(whole, states, grads, rows, rates, norm: Array, proceed: Array, optimizer, mesh: jax.sharding.Mesh):
    """Moves tables by the gradients of the rows that were read.

    Args:
        whole, states: by path; table [T, R, W] and its optimizer state.
        grads: by path; [B, ..., T, W], gradients of what `read` returned.
        rows: by path; what it returned first.
        rates: by path; learning rates.
        norm: of all other gradients.
        proceed: False leaves everything as it is, as does a gradient that is not finite.
        optimizer: `tables`, beta1, beta2, epsilon, clip_norm of the stage.
        mesh: of all.

    Returns:
        New tables and states, the norm of all gradients together, and the rounds of the busiest exchange.
    """
    axes = _axes(mesh)

    def local(whole, states, grads, rows, rates, norm, proceed):
        given = {path: _Gradient(table.shape, rows[path], grads[path], axes) for path, table in whole.items()}
        norm = jnp.sqrt(sum((g.squared_norm for g in given.values()), jnp.square(norm)))
        proceed &= jnp.isfinite(norm)
        clip = jnp.where(norm < optimizer.clip_norm, 1.0, optimizer.clip_norm / norm)
        kind = {"adam": _adam, "rowwise": _rowwise}[optimizer.tables]
        moved = {path: g.apply(kind, optimizer, whole[path], states[path], clip, rates[path], proceed) for path, g in given.items()}
        rounds = jnp.max(jnp.stack([g.wanted.rounds for g in given.values()])).astype(jnp.float32)
        return {path: t for path, (t, _) in moved.items()}, {path: s for path, (_, s) in moved.items()}, norm, rounds

    over_batch, own = P(sharding.BATCH_AXES), {path: state_spec(state) for path, state in states.items()}
    specs = (spec(), own, over_batch, over_batch, P(), P(), P())
    rows, grads = ({path: x[path] for path in whole} for x in (rows, grads))
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(spec(), own, P(), P()), check_vma=False)
    return run(whole, states, grads, rows, rates, norm, proceed)


def _axes(mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in ALL_AXES if mesh.shape[axis] > 1)


def lookup(table_TKW: Float[Array, "T K W"], row_NT: Int[Array, "*N T"], axes: tuple[str, ...]) -> Float[Array, "*N T W"]:
    """Rows of the tables, inside a shard_map; zero where the row is -1.

    Args:
        table_TKW: this device's rows of every table.
        row_NT: row of every table that a position reads, the same on devices along `SPARE_AXES`.
        axes: mesh axes with more than one device.
    """
    wanted = ask(table_TKW.shape, row_NT, axes)
    flat, (devices, capacity) = table_TKW.reshape(-1, table_TKW.shape[-1]), _sizes(wanted, axes)

    def round_(number, found_PW):
        entry_nC, place_nC = _round(wanted, number, flat.shape[0], devices, capacity)
        asked_nC = _exchange(place_nC, axes)
        rows_nCW = jnp.where(asked_nC[..., None] >= 0, flat[jnp.maximum(asked_nC, 0)], 0)
        return found_PW.at[entry_nC].set(_exchange(rows_nCW, axes), mode="drop")

    found_PW = jax.lax.fori_loop(0, wanted.rounds, round_, jnp.zeros((len(wanted.key_P), flat.shape[1]), flat.dtype))
    found_PW = found_PW[wanted.of_P]
    spare = [axis for axis in axes if axis in SPARE_AXES]
    for axis in reversed(spare):
        found_PW = jax.lax.all_gather(found_PW, axis, tiled=True)
    return found_PW[: row_NT.size].reshape(*row_NT.shape, -1)


def ask(shape: tuple[int, ...], row_NT: Int[Array, "*N T"], axes: tuple[str, ...]) -> Requests:
    """Plans the exchange for this device's share of `row_NT`; `shape` is that of its rows, [T, K, W]."""
    tables, here = shape[:2]
    devices, none = math.prod(jax.lax.axis_size(a) for a in axes), tables * here * math.prod(jax.lax.axis_size(a) for a in axes)
    key_NT = row_NT // here * (tables * here) + jnp.arange(tables) * here + row_NT % here
    key_P = _share(jnp.where(row_NT < 0, none, key_NT).reshape(-1), axes, none)
    sorted_P, order_P = jax.lax.sort((key_P, jnp.arange(len(key_P))), num_keys=1)
    first_P = jnp.concatenate([jnp.ones(1, bool), sorted_P[1:] != sorted_P[:-1]])
    entry_P = jnp.cumsum(first_P) - 1
    unique_P = jnp.full_like(key_P, none).at[entry_P].set(sorted_P)
    of_P = jnp.zeros_like(entry_P).at[order_P].set(entry_P, unique_indices=True)
    bound = jnp.searchsorted(unique_P, jnp.arange(devices + 1, dtype=unique_P.dtype) * (tables * here))
    count_n = bound[1:] - bound[:-1]
    rounds = -(-jnp.max(count_n) // places(len(key_P), devices))
    return Requests(unique_P, of_P, bound[:-1], count_n, jax.lax.pmax(rounds, axes) if axes else rounds)


class _Gradient:
    """The gradient of this device's rows: a list after one round, one table after another where one is not enough."""

    def __init__(self, shape, row_NT, grad_NTW, axes):
        self.shape, self.axes = shape, axes
        self.wanted = ask(shape, row_NT, axes)
        self.devices, self.capacity = _sizes(self.wanted, axes)
        flat_PW = _share(grad_NTW.reshape(-1, grad_NTW.shape[-1]).astype(jnp.float32), axes, 0)
        self.sum_PW = jax.ops.segment_sum(flat_PW, self.wanted.of_P, len(flat_PW))
        self.one_round = self.wanted.rounds <= 1
        self.list, squared = jax.lax.cond(self.one_round, self._list, self._only_norm)
        self.squared_norm = jax.lax.psum(squared, axes) if axes else squared

    def _received(self, number):
        """Places here, -1 = none, and gradients that the devices give back in a round, duplicates among them: [L], [L, W]."""
        entry_nC, place_nC = _round(self.wanted, number, self.shape[0] * self.shape[1], self.devices, self.capacity)
        grad_nCW = self.sum_PW.at[entry_nC].get(mode="fill", fill_value=0)
        return _exchange(place_nC, self.axes).reshape(-1), _exchange(grad_nCW, self.axes).reshape(-1, self.shape[2])

    def _list(self):
        place_L, grad_LW = self._received(0)
        past = self.shape[0] * self.shape[1]
        place_L, order_L = jax.lax.sort((jnp.where(place_L < 0, past, place_L), jnp.arange(len(place_L))), num_keys=1)
        first_L = jnp.concatenate([jnp.ones(1, bool), place_L[1:] != place_L[:-1]])
        entry_L = jnp.cumsum(first_L) - 1
        sum_LW = jax.ops.segment_sum(grad_LW[order_L], entry_L, len(place_L), indices_are_sorted=True)
        # Entries without a row get places past the end, all different: nothing is written twice.
        unique_L = (past + jnp.arange(len(place_L))).at[entry_L].set(jnp.where(place_L < past, place_L, past + entry_L))
        sum_LW = jnp.where((unique_L < past)[:, None], sum_LW, 0)
        return (unique_L, sum_LW), jnp.sum(jnp.square(sum_LW))

    def _only_norm(self):
        rows = self.devices * self.capacity
        none = self.shape[0] * self.shape[1] + jnp.arange(rows), jnp.zeros((rows, self.shape[2]))
        return none, jax.lax.fori_loop(0, self.shape[0], lambda t, total: total + jnp.sum(jnp.square(self._dense(t))), jnp.zeros(()))

    def _dense(self, table):
        """[K, W], from all rounds."""
        here = self.shape[1]

        def add(number, dense_KW):
            place_L, grad_LW = self._received(number)
            return dense_KW.at[jnp.where(place_L // here == table, place_L % here, here)].add(grad_LW, mode="drop")

        return jax.lax.fori_loop(0, self.wanted.rounds, add, jnp.zeros(self.shape[1:]))

    def apply(self, move, optimizer, table_TKW, state, clip, rate, proceed):
        """The table and the state after the step."""
        here = self.shape[1]
        use = lambda grad: jnp.where(proceed, grad * clip, 0)
        rate = jnp.where(proceed, rate, 0.0)
        if "count" in state:
            state = state | {"count": state["count"] + proceed.astype(jnp.int32)}

        def fast():
            flat = lambda x: x.reshape(self.shape[0] * here, *x.shape[2:]) if x.ndim else x
            place_L, grad_LW = self.list
            new, after = move(optimizer, flat(table_TKW), jax.tree.map(flat, state), place_L, use(grad_LW), rate, proceed)
            return new.reshape(self.shape), {k: x.reshape(state[k].shape) for k, x in after.items()}

        def slow():
            def one(t, carry):
                table, state = carry
                part = {k: x[t] if x.ndim else x for k, x in state.items()}
                new, part = move(optimizer, table[t], part, jnp.arange(here), use(self._dense(t)), rate, proceed)
                return table.at[t].set(new), {k: x.at[t].set(part[k]) if x.ndim else x for k, x in state.items()}

            return jax.lax.fori_loop(0, self.shape[0], one, (table_TKW, state))

        return jax.lax.cond(self.one_round, fast, slow)


def _adam(optimizer, table_RW, state, row_L, grad_LW, rate, proceed):
    """Adam over all rows, of which only `row_L` (past the end: nothing) have a gradient; exactly a dense gradient's step."""
    b1, b2 = (jnp.where(proceed, b, 1.0) for b in (optimizer.beta1, optimizer.beta2))
    add = lambda old, decay, x: (old * decay).at[row_L].add((1 - decay) * x, mode="drop", unique_indices=True)
    first, second = add(state["first"], b1, grad_LW), add(state["second"], b2, jnp.square(grad_LW))
    count = jnp.maximum(state["count"], 1).astype(jnp.float32)
    mean, variance = (x / (1 - decay**count) for x, decay in ((first, optimizer.beta1), (second, optimizer.beta2)))
    return table_RW - rate * mean / (jnp.sqrt(variance) + optimizer.epsilon), state | {"first": first, "second": second}


def _rowwise(optimizer, table_RW, state, row_L, grad_LW, rate, proceed):
    """Moves the rows with a gradient, each by its gradient over the root of its own second moment."""
    del proceed  # without a gradient nothing moves
    square_L = jnp.mean(jnp.square(grad_LW), -1)
    old_L = state["second"].at[row_L].get(mode="fill", fill_value=0)
    new_L = jnp.where(old_L > 0, old_L * optimizer.beta2 + (1 - optimizer.beta2) * square_L, square_L)
    new_L = jnp.where(square_L > 0, new_L, old_L)
    step_LW = rate * grad_LW / (jnp.sqrt(new_L) + optimizer.epsilon)[:, None]
    table_RW = table_RW.at[row_L].add(-step_LW, mode="drop", unique_indices=True)
    return table_RW, {"second": state["second"].at[row_L].set(new_L, mode="drop", unique_indices=True)}


def _share(x_P, axes, fill):
    """This device's part of a list that all devices along the spare axes hold, filled up to equal parts."""
    spare = tuple(axis for axis in axes if axis in SPARE_AXES)
    parts = math.prod(jax.lax.axis_size(axis) for axis in spare)
    if parts == 1:
        return x_P
    length = -(-len(x_P) // parts)
    x_P = jnp.pad(x_P, [(0, parts * length - len(x_P))] + [(0, 0)] * (x_P.ndim - 1), constant_values=fill)
    return jax.lax.dynamic_slice_in_dim(x_P, jax.lax.axis_index(spare) * length, length)


def _sizes(wanted: Requests, axes) -> tuple[int, int]:
    devices = len(wanted.count_n)
    return devices, places(len(wanted.key_P), devices)


def _round(wanted: Requests, number, here: int, devices: int, capacity: int):
    """Entries of `key_P` that go to each owner in a round, past the end where there are none, and their places there, -1 likewise."""
    place_C = number * capacity + jnp.arange(capacity)
    inside_nC = place_C < wanted.count_n[:, None]
    entry_nC = jnp.where(inside_nC, wanted.start_n[:, None] + place_C, len(wanted.key_P))
    key_nC = wanted.key_P.at[entry_nC].get(mode="fill", fill_value=0)
    return entry_nC, jnp.where(inside_nC, key_nC - here * jnp.arange(devices)[:, None], -1)


def _exchange(x_nC, axes):
    """Entry j of the first axis goes to device j; what comes back is ordered by sender."""
    return jax.lax.all_to_all(x_nC, axes, 0, 0, tiled=True) if axes else x_nC
