"""A two-part regression task with a codebook-like statistic: the smallest thing the training loop can train."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dina import sharding, stages
from dina.tasks.base import Batches, LossOut, Task


class ToyBatches(Batches):
    """Rows of a linear map; weights are very uneven over the batch, `poison_step` has a NaN."""

    def __init__(self, stage):
        self.stage = stage

    def batch(self, step):
        rng = np.random.default_rng([7, step])
        x = rng.normal(size=(self.stage.batch, 6)).astype(np.float32)
        if step == self.stage.options.poison_step:
            x[0, 0] = np.nan
        example = step * self.stage.batch + np.arange(self.stage.batch, dtype=np.int32)
        weight = (np.arange(self.stage.batch) ** 2 % 5 + 0.1).astype(np.float32)
        return {"x": x, "weight": weight, "example": example}


class Toy(Task):
    """Predicts x @ ones from x @ body @ head; `count` adds up what it saw."""

    def init(self, key):
        a, b = jax.random.split(key)
        params = {"body": {"w": jax.random.normal(a, (6, 8))}, "head": {"w": jax.random.normal(b, (8, 1))}}
        return {"params": params, "stats": {"body": {"count": jnp.zeros(())}, "head": {"count": jnp.zeros(())}}}

    def batches(self):
        return ToyBatches(self.stage)

    def loss(self, params, stats, batch, key, axes):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(batch["example"])
        y = (batch["x"] @ params["body"]["w"] @ params["head"]["w"])[:, 0] + 0.01 * noise
        error = (y - batch["x"].sum(-1)) ** 2
        seen = sharding.psum(jnp.sum(batch["weight"]), axes)
        return LossOut({"fit": ((error * batch["weight"]).sum(), batch["weight"].sum())}, {}, seen)

    def update_stats(self, stats, updates, key, step):
        return {part: {"count": value["count"] + updates} for part, value in stats.items()}


def config(**stage_fields) -> ml_collections.ConfigDict:
    """An experiment with stages 'one' (trains all) and 'two' (body taken over and frozen)."""
    c = ml_collections.ConfigDict()
    c.seed, c.name, c.order, c.jobs = 3, "toy", ("one", "two"), ("one", "two")
    c.data, c.text = ml_collections.ConfigDict(), ml_collections.ConfigDict()
    c.mesh = ml_collections.ConfigDict({"data": 1})
    c.log = ml_collections.ConfigDict({"every": 1, "arrays_every": 2})
    c.checkpoint = ml_collections.ConfigDict({"every": 4, "keep": 2, "compile_cache": "~/.cache/dina/xla", "cpu_effort": 1})
    c.run = ml_collections.ConfigDict({"workdir": ""})
    c.stages = ml_collections.ConfigDict()
    for name in ("one", "two"):
        s = stages.default_stage()
        s.task, s.steps, s.batch, s.train = "toy", 10, 16, ("body", "head")
        s.loss_weights = ml_collections.ConfigDict({"fit": 1.0})
        s.options.poison_step = -1
        s.optimizer.warmup_steps, s.optimizer.learning_rate = 2, 0.05
        s.update(stage_fields)
        c.stages[name] = s
    c.stages.two.train, c.stages.two.freeze_stats, c.stages.two.init_from = ("head",), ("body",), {"body": "one"}
    return c


stages.TASKS["toy"] = ("tests.toy:Toy", ())
