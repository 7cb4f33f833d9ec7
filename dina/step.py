"""The compiled train step, the same for every task.

One `jax.shard_map` over the batch axes: each device gathers the parameters, runs the task on its own examples (in
micro-batches where asked), and the gradients are summed back into the parameters' own placement. A term's weight is
summed over the whole global batch before it divides anything, so the result does not depend on how examples are
spread (DESIGN §4.5). A non-finite loss or gradient leaves the whole state as it was and raises `refused` (§4.14).
Tables that a task reads by rows only are never gathered (dina/tables.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from dina import optim, sharding, tables as row_tables
from dina.tasks.base import LossOut, Task

State = dict[str, Any]


def init_state(task: Task, stage, variables: Any) -> State:
    """The full train state around `variables` ({'params', 'stats'})."""
    trainable, _ = optim.split(variables["params"], stage.train)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": variables["params"],
        "stats": variables["stats"],
        "opt": optim.make(stage.optimizer).init(trainable),
    }
    if stage.ema_decay > 0:
        state["ema"] = jax.tree.map(jnp.copy, trainable)
    return state


def abstract_state(task: Task, stage, mesh: jax.sharding.Mesh) -> State:
    """Shapes, dtypes and shardings of the train state; allocates nothing."""

    def build():
        return init_state(task, stage, task.init(jax.random.key(0)))

    abstract = sharding.place(jax.eval_shape(build), mesh)
    flat = optim.flatten(abstract["params"])
    for path in task.tables:
        row_tables.check(flat[path].shape, mesh, path)
    # A table's moments and averages lie where its rows do: whatever has its shape, or that without the width.
    own = {shape for path in task.tables for shape in (flat[path].shape, flat[path].shape[:2])}
    place = jax.sharding.NamedSharding(mesh, row_tables.spec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) if x.shape in own else x, abstract)


def result(state: State) -> Any:
    """What a stage hands over: averaged weights where it kept them, trained ones otherwise."""
    params = optim.flatten(state["params"]) | state.get("ema", {})
    return {"params": optim.unflatten(params), "stats": state["stats"]}


def make_train_step(task: Task, stage, seed: int, mesh: jax.sharding.Mesh) -> Callable:
    """Builds `step(state, batch, rate) -> (state, metrics)`, `rate` the float32 learning rate, ready for `jax.jit` with the state donated.

    Args:
        task: what is optimised.
        stage: its config: `train` patterns, `freeze_stats`, `loss_weights`, `accumulate`, `optimizer`, `ema_decay`.
        seed: the run's seed; the key of a step is fold_in(seed, step).
        mesh: where state and batch live.
    """
    tx = optim.make(stage.optimizer)
    coefficients = dict(stage.loss_weights)
    axes = tuple(a for a in sharding.BATCH_AXES if mesh.shape[a] > 1)

    def sums(trainable, found, rest, batch):
        """Differentiable sums of the local micro-batch; everything else rides along."""
        params = optim.unflatten(rest["frozen"] | trainable | row_tables.as_read(found))
        out = task.loss(params, rest["stats"], batch, rest["key"], axes)
        unknown = sorted(set(out.terms) - set(coefficients))
        if unknown:
            raise KeyError(f"stage.loss_weights lacks {unknown}")
        return {name: total for name, (total, _) in out.terms.items()}, out

    def weights_of(rest, trainable, found, batch):
        return {name: weight for name, (_, weight) in sums(trainable, found, rest, batch)[1].terms.items()}

    def one(trainable, found, rest, batch, weights):
        """Gradients and sums of one micro-batch; `weights` are global, None when this is the whole batch."""
        _, vjp, out = jax.vjp(lambda t, f: sums(t, f, rest, batch), trainable, found, has_aux=True)
        if weights is None:
            weights = sharding.psum({name: weight for name, (_, weight) in out.terms.items()}, axes)
        scale = {name: coefficients[name] / jnp.maximum(weights[name], 1e-9) for name in out.terms}
        grads, of_rows = vjp({name: jnp.asarray(scale[name], total.dtype) for name, (total, _) in out.terms.items()})
        return grads, of_rows, out

    def local(replicated, batch):
        (trainable, rest), (found, batch) = replicated, batch
        if stage.accumulate == 1:
            grads, of_rows, out = one(trainable, found, rest, batch, None)
        else:
            grads, of_rows, out = _accumulate(one, weights_of, trainable, found, rest, batch, stage.accumulate, axes)
        totals = sharding.psum({"terms": out.terms, "metrics": out.metrics}, axes)
        return (sharding.psum(grads, axes), totals, out.updates), of_rows

    def step(state: State, batch: Any, rate: jax.Array) -> tuple[State, Any]:
        trainable, frozen = optim.split(state["params"], stage.train)
        whole = {path: (trainable | frozen)[path] for path in task.tables}
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        loss_key, stats_key = jax.random.split(key)
        others, still = _without(trainable, whole), _without(frozen, whole)
        rest = {"frozen": still, "stats": state["stats"], "key": loss_key}
        rows, found, rounds = row_tables.read(whole, task.table_rows, batch, mesh) if whole else ({}, {}, None)
        gathered = sharding.gathered((others, rest))
        (grads, totals, updates), of_rows = sharding.on_batch_shards(local, mesh)(gathered, (found, batch))
        grads = jax.tree.map(lambda g, p: jax.reshard(g, jax.typeof(p).sharding.spec), grads, others)
        trained = {path: x for path, x in whole.items() if path in trainable}
        if trained:
            grads |= row_tables.give_back(trained, of_rows, rows, mesh)
        means = {name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in totals["terms"].items()}
        loss = sum(coefficients[name] * mean for name, mean in means.items())
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        changes, opt = tx.update(grads, state["opt"], trainable)
        moved = {path: x + rate * changes[path] for path, x in trainable.items()}
        new = {
            "step": state["step"],
            "params": optim.unflatten(frozen | moved),
            "stats": _update_stats(task, stage, state, updates, stats_key),
            "opt": opt,
        }
        if "ema" in state:
            new["ema"] = optim.average(state["ema"], moved, stage.ema_decay, state["step"])
        new = jax.tree.map(lambda fresh, old: jnp.where(finite, fresh, old), new, state)
        new["step"] = state["step"] + 1
        metrics = {name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in totals["metrics"].items()}
        metrics |= {f"loss/{name}": mean for name, mean in means.items()}
        metrics |= {"loss": loss, "grad_norm": norm, "refused": 1.0 - finite.astype(jnp.float32)}
        metrics["learning_rate"] = rate
        if whole:
            metrics["tables/rounds"] = rounds.astype(jnp.float32)
        return new, metrics

    return step


def _without(flat: dict[str, Any], names) -> dict[str, Any]:
    return {path: x for path, x in flat.items() if path not in names}


def _update_stats(task: Task, stage, state: State, updates: Any, key: jax.Array) -> Any:
    """Non-gradient state after the step; parts that the stage freezes keep theirs bit for bit."""
    new = task.update_stats(state["stats"], updates, key, state["step"])
    return {part: old if optim.matches(part, stage.freeze_stats) else new[part] for part, old in state["stats"].items()}


def _accumulate(one, weights_of, trainable, found, rest, batch, count: int, axes) -> tuple[Any, Any, LossOut]:
    """Sums gradients and totals over `count` micro-batches of the local examples; rows' gradients stand side by side."""
    micro = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), (found, batch))
    # Weights come from masks alone, so the compiler drops the rest of this first pass.
    weights = jax.lax.map(lambda m: weights_of(rest, trainable, *m), micro)
    weights = sharding.psum(jax.tree.map(lambda w: w.sum(0), weights), axes)

    def body(carry, m):
        found, b = m
        grads, of_rows, out = one(trainable, found, rest, b, weights)
        return jax.tree.map(jnp.add, carry, (grads, out)), of_rows

    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(lambda m: one(trainable, m[0], rest, m[1], weights), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[2]))
    (grads, out), of_rows = jax.lax.scan(body, zeros, micro)
    return grads, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), of_rows), out
