"""A sweep over the toy experiment, and what measures its cells; a sweep file and a base at once, as recovery.py is."""

import json
import os
import pathlib
import signal

import ml_collections

from dina import checkpoint
from tests import toy
from tools.sweep import execute, plan

FILE = "tests/tools/sweep/toy_sweep.py"
RATE = "stages.two.optimizer.learning_rate"
BROKEN: list[str] = []  # groups whose measurement fails


def get_config(arg: str = ""):
    """The base with the argument `base`, else the sweep: two rates by two seeds on one shared stage."""
    if arg == "base":
        c = toy.config(steps=4)
        c.mesh.data = 8
        return c
    c = plan.default_config()
    c.base, c.stages, c.shared = f"{FILE}:base", ("one", "two"), ("one",)
    c.labels = ((RATE, "rate", "rate"),)
    c.products = ((("seed", (3, 4)), (RATE, (0.05, 0.02))),)  # cells of one seed share a compiled step
    c.measure = ml_collections.ConfigDict({"function": "tests.tools.sweep.toy_sweep:measure", "kill": ""})
    return c


def measure(config, options, folder: pathlib.Path) -> dict:
    """Numbers of the trained weights, in the form of tools/sweep/measure.py; notes that it ran."""
    name = f"{config.stages.two.optimizer.learning_rate}-{config.seed}"
    if name in BROKEN:
        raise RuntimeError("broken")
    with (folder.parents[1] / "calls").open("a") as file:
        file.write(f"{name}\n")
    marker = folder.parents[1] / "killed"
    if name == options.kill and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    weights = checkpoint.result(folder / "two")["params"]
    total = float(weights["head"]["w"].sum())
    return record([total, total + 1, total - 1], body=float(weights["body"]["w"].sum()))


def record(values, **more) -> dict:
    """A measurement of three pictures at one depth of one level of four codes."""
    return {
        "levels": 1, "sizes": [4], "depths": [1], "pictures": {"split": "test", "count": 3, "identity": "p", "cells": [1, 2, 3]}, "bits": [2.0],
        "psnr_db": {"1": values}, "ssim": {"1": values}, "head_flops": [1e6], "language": {},
        "codebooks": {"usage": [1.0], "perplexity": [3.0], "dead": [0], "energy": [0.5], "window": 9},
        "latency": {"encoder": {"us_cell": [1.0, 2.0, 3.0], "mib": 1.0}, "search": {"1": {"us_cell": [1.0, 2.0, 3.0], "mib": 2.0}}},
        "phases": {}, **more,
    }  # fmt: skip


def calls(workdir: pathlib.Path) -> list[str]:
    """Measurements that ran, in order."""
    path = workdir / "calls"
    return path.read_text().split() if path.exists() else []


def results(workdir: pathlib.Path, spec: str = FILE) -> dict[str, dict]:
    """Key -> what was measured as the spec says, without times."""
    out = {}
    for path in workdir.glob(f"cells/*/measured-{execute.measure_id(plan.load(spec).sweep)}.json"):
        found = json.loads(path.read_text())
        out[found["key"]] = {name: value for name, value in found.items() if name != "seconds"}
    return out
