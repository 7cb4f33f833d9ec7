"""The compiled train step, the same for every task.

One `jax.shard_map` over the batch axes: each device runs the task on its own examples (in micro-batches where asked) with
the parts of the parameters that it stores. A language model gathers each where it is used, one layer at a time; other tasks
get theirs whole (`Task.gather`). Gradients come out as parts too, and that is what micro-batches are added up in. A term's
weight is summed over the whole global batch before it divides anything, so the result does not depend on how examples are
spread (DESIGN §4.5). A non-finite loss or gradient leaves the whole state as it was and raises `refused` (§4.14).
Tables that a task reads by rows only are never gathered (dina/tables.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from dina import optim, sharding, tables as row_tables
from dina.tasks.base import LossOut, Task

State = dict[str, Any]
TOGETHER = 2**25  # values of a device's part up to which parameters of one shape share their update
# Moves reductions of gradients out of the loop over micro-batches, which would add them up whole and not in parts. On our loops
# of gathered layers it ends with an internal error (libtpu 0.0.52).
PASSES_OFF = "while-loop-all-reduce-code-motion"


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


def shapes(task: Task, stage) -> State:
    """Shapes and dtypes of the train state; allocates nothing."""
    return jax.eval_shape(lambda: init_state(task, stage, task.init(jax.random.key(0))))


def abstract_state(task: Task, stage, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> State:
    """Shapes, dtypes and shardings of the train state; allocates nothing.

    Raises:
        InputError: experts, or a table's rows, do not divide among the mesh's devices.
    """
    return placed(shapes(task, stage), task, mesh)


def placed(state: State, task: Task, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> State:
    """What `shapes` made, with shardings; errors as of `abstract_state`."""
    flat = optim.flatten(state["params"])
    for path in task.tables:
        row_tables.check(flat[path].shape, mesh, path)
    return sharding.place(state, mesh, dict.fromkeys(task.tables, row_tables.spec()))


def result(state: State) -> Any:
    """What a stage hands over: averaged weights where it kept them, trained ones otherwise."""
    params = optim.flatten(state["params"]) | state.get("ema", {})
    return {"params": optim.unflatten(params), "stats": state["stats"]}


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """What the compiler of the mesh's devices is told about a train step."""
    return {"xla_disable_hlo_passes": PASSES_OFF} if mesh.devices.flat[0].platform == "tpu" else {}


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

    everywhere = tuple(a for a in sharding.AXES if mesh.shape[a] > 1)

    def sums(trainable, found, rest, batch):
        """Differentiable sums of the local micro-batch; everything else rides along."""
        parts = sharding.as_shards(rest["frozen"] | trainable, rest["specs"])
        params = optim.unflatten((sharding.whole(parts) if task.gather == "whole" else parts) | row_tables.as_read(found))
        out = task.loss(params, rest["stats"], batch, rest["key"], axes)
        unknown = sorted(set(out.terms) - set(coefficients))
        if unknown:
            raise KeyError(f"stage.loss_weights lacks {unknown}")
        return {name: total for name, (total, _) in out.terms.items()}, out

    def weights_of(trainable, rest, batch):
        """Weights come from masks alone: nobody reads rows for them, and the compiler drops everything else."""
        found = row_tables.blank(rest["tables"], task.table_rows(batch))
        return {name: weight for name, (_, weight) in sums(trainable, found, rest, batch)[1].terms.items()}

    def one(trainable, rest, batch, weights):
        """Gradients and sums of one micro-batch, and the rounds that reading rows took; `weights` are global, None when
        this is the whole batch."""
        found, asked = row_tables.read(rest["tables"], task.table_rows(batch), everywhere)
        _, vjp, out = jax.vjp(lambda t, f: sums(t, f, rest, batch), trainable, found, has_aux=True)
        if weights is None:
            weights = sharding.psum({name: weight for name, (_, weight) in out.terms.items()}, axes)
        scale = {name: coefficients[name] / jnp.maximum(weights[name], 1e-9) for name in out.terms}
        grads, of_rows = vjp({name: jnp.asarray(scale[name], total.dtype) for name, (total, _) in out.terms.items()})
        trained = {path: x for path, x in rest["tables"].items() if path in rest["trained"]}
        return grads | row_tables.give_back(trained, of_rows, asked, everywhere), out, row_tables.rounds(asked)

    def local(specs, stored, key, batch):
        trainable, frozen, stats = stored
        stats = sharding.whole(jax.tree.map(sharding.as_shard, stats, specs[2]))
        tables = {path: (trainable | frozen)[path] for path in task.tables}
        rest = {"frozen": _without(frozen, tables), "stats": stats, "key": key, "specs": specs[0] | specs[1],
                "tables": tables, "trained": tuple(path for path in tables if path in trainable)}
        trainable = _without(trainable, tables)
        if stage.accumulate == 1:
            grads, out, rounds = one(trainable, rest, batch, None)
        else:
            grads, out, rounds = _accumulate(one, weights_of, trainable, rest, batch, stage.accumulate, axes)
        totals = sharding.psum({"terms": out.terms, "metrics": out.metrics}, axes)
        return sharding.sum_left(grads, specs[0], axes), (totals, out.updates, rounds)

    def step(state: State, batch: Any, rate: jax.Array) -> tuple[State, Any]:
        trainable, frozen = optim.split(state["params"], stage.train)
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        loss_key, stats_key = jax.random.split(key)
        stored = trainable, frozen, state["stats"]
        specs = sharding.specs(stored)
        in_specs, out_specs = (specs, P(), sharding.batch_spec()), (specs[0], P())
        run = jax.shard_map(functools.partial(local, specs), mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        grads, (totals, updates, rounds) = run(stored, loss_key, batch)
        means = {name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in totals["terms"].items()}
        loss = sum(coefficients[name] * mean for name, mean in means.items())
        together = optim.alike(stage.optimizer, trainable, functools.partial(_place, trainable, mesh))
        grads, own, opt = (optim.pack(together, tree) for tree in (grads, trainable, state["opt"]))
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        chosen = lambda fresh, old: jax.tree.map(lambda f, o: jnp.where(finite, f, o), fresh, old)

        with jax.named_scope("optimizer"):
            changes, moments = tx.update(grads, opt, own)
            moved = {path: x + rate * changes[path] for path, x in own.items()}
            new = {"params": chosen(moved, own), "opt": chosen(moments, opt)}
            if "ema" in state:
                mean = optim.pack(together, state["ema"])
                new["ema"] = chosen(optim.average(mean, moved, stage.ema_decay, state["step"]), mean)
            new = optim.unpack(together, new)
        new["params"] = optim.unflatten(frozen | new["params"])
        new["stats"] = chosen(_update_stats(task, stage, state, updates, stats_key), state["stats"])
        new["step"] = state["step"] + 1
        metrics = {name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in totals["metrics"].items()}
        metrics |= {f"loss/{name}": mean for name, mean in means.items()}
        metrics |= {"loss": loss, "grad_norm": norm, "refused": 1.0 - finite.astype(jnp.float32)}
        metrics["learning_rate"] = rate
        if task.tables:
            metrics["tables/rounds"] = rounds.astype(jnp.float32)
        return new, metrics

    return step


def _place(flat: dict[str, jax.Array], mesh: jax.sharding.Mesh, path: str) -> Any:
    """What parameters must share to be moved together: where they live; nobody shares with a large one, which would be copied
    for that, nor on other machines than TPUs, whose compilers are quick and whose copies are not."""
    spec = jax.typeof(flat[path]).sharding.spec
    part = flat[path].size / math.prod(mesh.shape[axis] for entry in spec for axis in sharding.axes_of(entry))
    return spec if part <= TOGETHER and mesh.devices.flat[0].platform == "tpu" else path


def _without(flat: dict[str, Any], names) -> dict[str, Any]:
    return {path: x for path, x in flat.items() if path not in names}


def _update_stats(task: Task, stage, state: State, updates: Any, key: jax.Array) -> Any:
    """Non-gradient state after the step; parts that the stage freezes keep theirs bit for bit."""
    new = task.update_stats(state["stats"], updates, key, state["step"])
    return {part: old if optim.matches(part, stage.freeze_stats) else new[part] for part, old in state["stats"].items()}


def _accumulate(one, weights_of, trainable, rest, batch, count: int, axes) -> tuple[Any, LossOut, jax.Array]:
    """Sums gradients and totals over `count` micro-batches of the local examples; the most rounds of any."""
    micro = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
    weights = jax.lax.map(lambda m: weights_of(trainable, rest, m), micro)
    weights = sharding.psum(jax.tree.map(lambda w: w.sum(0), weights), axes)

    def body(carry, m):
        grads, out, rounds = one(trainable, rest, m, weights)
        return jax.tree.map(jnp.add, carry, (grads, out)), rounds

    shapes = jax.eval_shape(lambda m: one(trainable, rest, m, weights)[:2], jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, out), rounds = jax.lax.scan(body, zeros, micro)
    return grads, out, jnp.max(rounds)
