"""Saving and restoring a state of 2 GB: what a save costs the steps beside it, and restoring against copying the same bytes.

The steps run in a process of their own whose arithmetic has one thread, so that a core is left, as on a machine whose
accelerator computes. `python -m tools.bench saving`.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from dina import checkpoint
from tools.bench import harness

ARRAYS, SIDE = 32, 4096  # 64 MiB each
FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def run(rounds: int | None) -> dict:
    """step_ratio: median step beside a save over the median step without. blocked: seconds that a save keeps the caller.
    restore_ratio: rate of restoring, the check of all hashes included, over that of copying the files with fsync."""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}", "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        command = [sys.executable, "-m", "tools.bench.saving", folder, str(rounds or 3)]
        found = json.loads(subprocess.run(command, env=environment, cwd=harness.ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    return {"name": "saving", **found, "machine": harness.machine_name()}


def measure(folder: pathlib.Path, rounds: int) -> dict:
    """One process's measurements; see `run`."""
    state = {f"layer_{n}": jax.random.normal(jax.random.key(n), (SIDE, SIDE)) for n in range(ARRAYS)}  # as weights: hardly to be compressed
    step, x = jax.jit(lambda x: jnp.sin(x @ x)), jnp.ones((1024, 1024), jnp.float32)

    def timed() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(step(x))
        return time.perf_counter() - begun

    saves, alone, beside, blocked, saving = checkpoint.Checkpoints(folder / "stage", "bench"), [], [], [], []
    timed()
    for number in range(rounds):
        alone += [timed() for _ in range(40)]
        begun = time.perf_counter()
        saves.save(number, state, 0, 0.0)
        blocked.append(time.perf_counter() - begun)
        while not saves.idle:
            beside.append(timed())
        saves.wait()
        saving.append(time.perf_counter() - begun)
    size, restored, copied = sum(a.nbytes for a in state.values()), [], []
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    for _ in range(rounds):
        copied.append(harness.copy(saves.root / str(saves.committed()[-1]), folder / "copy"))
        begun = time.perf_counter()
        found, _ = saves.restore(saves.latest(), abstract)
        jax.block_until_ready(found)
        restored.append(time.perf_counter() - begun)
        del found
    saves.close()
    middle = statistics.median
    return {
        "state_gb": size / 1e9, "step": middle(alone), "step_beside_a_save": middle(beside), "step_ratio": middle(beside) / middle(alone),
        "blocked": middle(blocked), "save": middle(saving), "restore": middle(restored), "copy": middle(copied),
        "restore_ratio": middle(copied) / middle(restored), "samples": {"restore": restored, "copy": copied, "blocked": blocked, "save": saving},
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(pathlib.Path(sys.argv[1]).absolute(), int(sys.argv[2]))))
