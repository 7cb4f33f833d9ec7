"""A committed step of an unfinished stage as a finished stage in another work folder, to be scored, compared or exported."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from dina import checkpoint, step as steps
from dina.config import InputError

_PARTS = ("params", "stats", "ema")  # all of a state that a result is made of


def names(folder: pathlib.Path) -> list[checkpoint.Name]:
    """Committed steps of a stage folder, newest first; reads only."""
    if not (folder / "checkpoints").is_dir():
        return []
    return checkpoint.Checkpoints(folder, "").committed()[::-1]


def load(folder: pathlib.Path, name: checkpoint.Name) -> tuple[dict[str, Any], dict]:
    """(what the stage would hand over had it ended at this step, the step's manifest), host arrays.

    Raises:
        InputError: the step is damaged.
    """
    saves = checkpoint.Checkpoints(folder, "")
    try:
        meta = saves.verify(name)
    except checkpoint.Damaged as error:
        raise InputError(f"{folder}: checkpoint of step {name.step} ({name}) is damaged: {error}") from None
    path = saves.root / str(name)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path).item_metadata.tree
        wanted = checkpoint.structs({kind: tree[kind] for kind in _PARTS if tree.get(kind)})
        state = jax.device_get(checkpoint.read_part(reader, path, wanted))
    return steps.result({"stats": {}} | state), meta


def promote(workdir: pathlib.Path, stage: str, name: checkpoint.Name, target: pathlib.Path) -> None:
    """Makes `target` a work folder in which `stage` ended at this step and all else is that of `workdir`."""
    target.mkdir(parents=True, exist_ok=True)
    for path in workdir.iterdir():
        link = target / path.name
        if path.is_dir() and path.name != stage and path.resolve() not in target.resolve().parents and not link.exists():
            if path.name != "eval":
                link.symlink_to(os.path.abspath(path), target_is_directory=True)
    if checkpoint.finished(target / stage) is None:
        variables, meta = load(workdir / stage, name)
        record = {"stage": stage, "identity": meta["identity"], "steps": meta["step"], "examples": meta["examples"],
                  "seconds": meta["seconds"], "peak_memory_mib": 0, "promoted_from": f"{workdir / stage}: {name}"}  # fmt: skip
        checkpoint.finish(target / stage, variables, json.loads(json.dumps(record)))
