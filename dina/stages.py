"""Stages as data: what an experiment runs, in which order, and how variables pass from one stage to the next.

A stage is a sub-config: its task, what it trains (everything else stays bit-identical), which parts it takes over from
which earlier stage, its losses, optimizer, batch and length. Every stage has a folder `<workdir>/<stage>`.
"""

from __future__ import annotations

import importlib
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from dina import checkpoint, optim
from dina.config import InputError, check_name, identity
from dina.data import sources as data_sets
from dina.sharding import BATCH_AXES
from dina.tasks.base import Task, Variables

# task name -> (class, the config sections that its result depends on)
TASKS = {
    "align": ("dina.tasks.align:Align", ("vision",)),
    "captions": ("dina.tasks.captions:Captions", ("vision",)),
    "visual_tokens": ("dina.tasks.visual_tokens:VisualTokens", ("vision",)),
    "pixels": ("dina.tasks.pixels:Pixels", ("vision",)),
    "adversarial": ("dina.tasks.adversarial:Adversarial", ("vision",)),
    "refiner": ("dina.tasks.refiner:RefinerTask", ("vision",)),
    "audio_tokens": ("dina.tasks.audio_tokens:AudioTokens", ("audio",)),
    "flow": ("dina.tasks.flow:FlowTask", ("audio",)),
    "vocoder": ("dina.tasks.vocoder:VocoderTask", ("audio",)),
    "language": ("dina.tasks.language:Language", ("vision", "audio", "model")),
}
# What changes speed and memory only (DESIGN §4.4): dotted paths by section.
SPEED = {
    "model": ("remat", "unroll", "ngram.lookup", "losses.text_chunk", "losses.code_chunk", "losses.remat"),
    "vision": ("encoder.remat", "pixel_decoder.remat", "refiner.remat"),
    "audio": ("batches.read",),
}
DATA_JOBS = ("data", "codes", "codes:images", "codes:speech")


def default_stage() -> ml_collections.ConfigDict:
    """The fields that every stage has."""
    s = ml_collections.ConfigDict()
    s.task = ""
    s.steps = 100
    s.batch = 8  # global batch, in rows
    s.accumulate = 1
    s.train = ()  # patterns of parameter paths
    s.freeze_stats = ()  # parts whose codebooks or router biases stay as they are
    s.init_from = ml_collections.ConfigDict()  # part -> earlier stage
    s.after = ()  # stages whose results the data depends on
    s.loss_weights = ml_collections.ConfigDict()
    s.optimizer = optim.default_config()
    s.ema_decay = 0.0
    s.options = ml_collections.ConfigDict()  # the task's own
    return s


def make_task(config: ml_collections.ConfigDict, name: str) -> Task:
    """Builds the task of stage `name`.

    Raises:
        InputError: no such stage or task.
    """
    if name not in config.stages:
        raise InputError(f"no stage {name!r} in this experiment; it has {', '.join(config.stages)}")
    stage = config.stages[name]
    if stage.task not in TASKS:
        raise InputError(f"stages.{name}.task {stage.task!r} is not one of {', '.join(sorted(TASKS))}")
    module, _, attribute = TASKS[stage.task][0].partition(":")
    return getattr(importlib.import_module(module), attribute)(config, stage)


def check(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError for jobs that do not exist and batches that cannot be cut for the mesh, before anything runs."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    for job in config.jobs:
        name = job.removeprefix("compile:")
        if job in DATA_JOBS:
            continue
        check_name(name, (*config.stages, *DATA_JOBS), "config key jobs: job")
        stage = config.stages[name]
        if stage.accumulate < 1 or stage.batch < 1 or stage.batch % (shards * stage.accumulate):
            raise InputError(
                f"stages.{name}.batch={stage.batch} is not a multiple of {shards} devices (mesh axes "
                f"{', '.join(BATCH_AXES)}) times accumulate={stage.accumulate}"
            )


# Tasks that read no text: their results are the same with any tokenizer. Their identities hold the section that was first.
TEXTLESS, UNREAD = ("audio_tokens", "flow", "vocoder"), {"vocab_size": 512, "algorithm": "unigram"}


def stage_identity(config: ml_collections.ConfigDict, name: str) -> str:
    """Hash of all that the result of stage `name` depends on, the stages before it included.

    A name under `config.imports` is a released checkpoint that tools.convert brought in; its identity stands there. Files of
    a user count by their content, not by where they are. Raises InputError if they are not there.
    """
    if name not in config.stages:
        check_name(name, (*config.stages, *config.get("imports", {})), "stage or import")
        return config.imports[name]
    stage = config.stages[name]
    sections = TASKS[stage.task][1]
    before = sorted({*stage.init_from.values(), *stage.after})
    data = config.data
    if "path" in data:
        data = _without(data.to_dict(), "path") | {"content": data_sets.cache_path(config).name}
    own = ml_collections.ConfigDict({
        "seed": config.seed,
        "stage": _without(stage.to_dict(), "accumulate"),
        "data": data,
        "text": UNREAD if stage.task in TEXTLESS else _without(config.text.to_dict(), "path"),
        "sections": {section: _without(config[section].to_dict(), *SPEED.get(section, ())) for section in sections},
        "before": {other: stage_identity(config, other) for other in before},
    })
    if stage.task == "language" and "tokenize" in config:
        own.speech_views = config.tokenize.speech_views
    return identity(own)


def _without(tree: dict[str, Any], *paths: str) -> dict[str, Any]:
    """A copy of a nested dict that lacks the dotted `paths`."""
    drop, deeper = set(), {}
    for path in paths:
        head, _, rest = path.partition(".")
        if rest:
            deeper.setdefault(head, []).append(rest)
        else:
            drop.add(head)
    kept = {key: value for key, value in tree.items() if key not in drop}
    return kept | {key: _without(kept[key], *rests) for key, rests in deeper.items() if key in kept}


def initialiser(config: ml_collections.ConfigDict, task: Task, like: Variables) -> tuple[Callable[[jax.Array], Variables], jax.Array]:
    """The jitted `task.init`, and the key that the experiment calls it with.

    Tables are made in their owners' shards, as `like` has them; other parts whole on every device, because `Task.start` works with them.
    """
    placed = {path: x.sharding if path in task.tables else None for path, x in optim.flatten(like["params"]).items()}
    # Run once: compiling it with little optimisation takes 3 s instead of 15 for the language model on a CPU.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    where = {"params": optim.unflatten(placed), "stats": None} if task.tables else None
    return jax.jit(task.init, out_shardings=where, compiler_options=quick), jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)


def starts_fresh(config: ml_collections.ConfigDict, name: str, variables: Variables) -> bool:
    """Whether stage `name` has a part that it does not take over; `variables` may be abstract."""
    return not {*variables["params"], *variables["stats"]} <= set(config.stages[name].init_from)


def initial_variables(config: ml_collections.ConfigDict, name: str, task: Task, workdir: pathlib.Path, like: Variables) -> Variables:
    """Fresh variables of a stage with the parts of `init_from` taken over from finished stages.

    Args:
        config: the experiment.
        name: the stage.
        task: its task.
        workdir: the experiment's folder.
        like: shapes, types and placements of the variables, in which parts are read.
    """
    init, key = initialiser(config, task, like)
    variables = jax.eval_shape(init, key)
    if starts_fresh(config, name, variables):
        variables = init(key)
    sources: dict[str, list[str]] = {}
    for part, source in config.stages[name].init_from.items():
        sources.setdefault(source, []).append(part)
    for source, parts in sources.items():
        strange = [part for part in parts if part not in variables["params"]]
        if strange:
            raise InputError(f"stages.{name}.init_from names part {strange[0]!r}, which the task does not have")
        if source not in config.stages:
            from dina.convert import settings  # builds the model, which stages of tokenizers do not need

            record = checkpoint.finished(workdir / source, stage_identity(config, source))
            if record is None:
                raise InputError(f"stages.{name}: {workdir / source} holds no import; `python -m tools.convert import` makes it")
            settings.check(record, config, parts, str(workdir / source))
        wanted = {kind: [part for part in parts if part in variables[kind]] for kind in ("params", "stats")}
        found = checkpoint.result(workdir / source, wanted, like)
        for kind, names in wanted.items():
            variables[kind] |= {part: found[kind][part] for part in names}
    return variables


def load_parts(config: ml_collections.ConfigDict, workdir: pathlib.Path, parts: list[str]) -> tuple[dict, dict]:
    """Loads parts of a trained model, each from the last finished stage that has it, or else from an import, which it says.

    Args:
        config: the experiment.
        workdir: its folder.
        parts: part names (see DESIGN §3).

    Returns:
        (params, stats), each {part: tree} of host arrays; stats only for parts that have any.

    Raises:
        InputError: a part is in no finished stage and no import, or as `dina.convert.settings.load`.
    """
    workdir = pathlib.Path(workdir)
    params, stats = {}, {}
    for name in reversed(list(stage_order(config))):
        wanted = [part for part in parts if part not in params]
        if not wanted or checkpoint.finished(workdir / name, stage_identity(config, name)) is None:
            continue
        found = checkpoint.result(workdir / name)
        for part in wanted:
            if part in found["params"]:
                params[part] = found["params"][part]
                if part in found.get("stats", {}):
                    stats[part] = found["stats"][part]
    for name in config.get("imports", {}):
        wanted = [part for part in parts if part not in params]
        if wanted:
            from dina.convert import settings  # builds the model, which stages of tokenizers do not need

            found = settings.load(config, workdir / name, wanted)
            for part in found["params"]:
                print(f"dina: {part}: no finished stage of this config has it; taken from the import {workdir / name}", flush=True)
            params, stats = params | found["params"], stats | found["stats"]
    missing = [part for part in parts if part not in params]
    if missing:
        raise InputError(f"{workdir} has no trained {', '.join(missing)}: run dina.train on this config first")
    return params, stats


def stage_order(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """All stages in the order of the full run."""
    return tuple(name for name in config.order if name in config.stages)
