"""A sweep as data: which cells there are, and what each of them trains. Pure functions of the config file.

A cell is the base experiment with some config paths set. Its stages run one after another; those named `shared` are
trained once and taken over by the cells as imports (`config.imports`); of a cell's axes only `shared_paths` reach them. So
three seeds of a quantizer stand on one frozen encoder. A cell's key is a hash of all that
its training depends on: the same key is the same result, wherever and whenever it was made.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from dina import config as configs
from dina import executor, stages
from dina.config import InputError, check_name

ROOT = pathlib.Path(__file__).parents[2]
SEED = "seed"  # the axis over which configurations are averaged


def default_config() -> ConfigDict:
    """What every sweep file has.

    base: the experiment, FILE[:variants]. stages: what a cell trains, in order. shared: those of them that are trained once
    for many cells, as the base has them; shared_paths: axes that reach them all the same, the seed included where it stands there.
    trained: workdir of a run of the base, whose finished stages serve as shared ones where they are the same; '' = none.
    fixed: ((config path, value), ...) of all cells, but not of what they share. products: each ((config path, (value, ...)), ...), of which every
    combination is a cell; a cell that two products have is one. labels: ((config path, its name on the page, what stands before
    its value in a configuration's name), ...).
    measure: `function` is 'module:name' of what measures a trained cell (tools/sweep/execute.py); the rest are its options.
    lead, notes: what the page says first, and what its readers should see under the figures; paragraphs.
    """
    c = ConfigDict()
    c.name, c.title = "sweep", ""
    c.base = "experiments/digits.py"
    c.stages, c.shared, c.shared_paths = ("V0", "V1", "V2"), ("V0",), ()
    c.trained, c.fixed, c.products = "", (), ()
    c.measure = ConfigDict({"function": "tools.sweep.measure:measure"})
    c.executor = executor.default_config()
    c.labels, c.lead, c.notes = (), (), ()
    return c


@dataclasses.dataclass(frozen=True)
class Shared:
    """Stages that several cells stand on.

    Attributes:
        key: hash of their identities; the folder `<workdir>/shared/<key>` is theirs.
        config: the experiment that trains them.
        identities: stage -> identity, in order.
    """

    key: str
    config: ConfigDict
    identities: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        key: hash of what its training depends on; `<workdir>/cells/<key>` is its folder.
        axes: config path -> value, of the paths that its product varies.
        group: what all seeds of one configuration have in common, in words.
        config: the experiment; its shared stages are imports.
        stages: names of its own stages, in order.
        shared: what it stands on; None if it trains everything itself.
    """

    key: str
    axes: dict[str, Any]
    group: str
    config: ConfigDict
    stages: tuple[str, ...]
    shared: Shared | None

    @property
    def seed(self) -> int:
        """Of its own stages."""
        return int(self.config.seed)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All cells of a sweep, each once, and what they stand on."""

    sweep: ConfigDict
    cells: tuple[Cell, ...]

    @functools.cached_property
    def shared(self) -> dict[str, Shared]:
        """Key -> shared stages, each once."""
        return {cell.shared.key: cell.shared for cell in self.cells if cell.shared}

    def cell(self, key: str) -> Cell:
        """The cell of a key."""
        return next(cell for cell in self.cells if cell.key == key)


@functools.lru_cache(maxsize=8)
def load(spec: str) -> Plan:
    """The plan of a sweep file, `FILE[:variants and overrides]`; made once in a process.

    Raises:
        InputError: the file or its base is wrong, a path does not exist, or a product is empty.
    """
    return make(configs.load(spec))


def make(sweep: ConfigDict) -> Plan:
    """The plan of a sweep's config. Raises as `load`."""
    cells: dict[str, Cell] = {}
    if not sweep.products:
        raise InputError("config key products: it is empty, so there is no cell; () inside of it is the base alone")
    for product in sweep.products:
        for path, values in product:
            if not values:
                raise InputError(f"config key products: {path} has no values")
        paths = [path for path, _ in product]
        for values in itertools.product(*(values for _, values in product)):
            cell = make_cell(sweep, dict(zip(paths, values, strict=True)))
            cells.setdefault(cell.key, cell)
    return Plan(sweep, tuple(cells.values()))


def make_cell(sweep: ConfigDict, axes: dict[str, Any]) -> Cell:
    """The cell in which `axes` have these values."""
    config = base(sweep.base)
    for name in (*sweep.stages, *sweep.shared):
        check_name(name, config.stages, "config keys stages and shared: stage")
    for path, value in axes.items():
        if path in sweep.shared_paths:
            set_path(config, path, value)
    own = tuple(name for name in sweep.stages if name not in sweep.shared)
    shared = _shared(config, [name for name in sweep.stages if name in sweep.shared])
    for path, value in (*sweep.fixed, *axes.items()):
        set_path(config, path, value)
    config.jobs, config.order = (*_data_job(config), *own), own
    if shared:
        for name in shared.identities:
            del config.stages[name]
        config.imports = ConfigDict(shared.identities)
    identities = [stages.stage_identity(config, name) for name in own] or [shared.key]
    before = {path: word for path, _, word in sweep.labels}
    group = ", ".join(f"{before.get(path, short(path))} {describe(value)}".strip() for path, value in axes.items() if path != SEED)
    return Cell(_hash(identities), dict(axes), group or "base", config, own, shared)


def base(spec: str) -> ConfigDict:
    """A copy of the base experiment, unlocked; a path that is not found from here is looked for in the project."""
    config = _loaded(spec).copy_and_resolve_references()
    config.unlock()
    return config


@functools.lru_cache(maxsize=8)
def _loaded(spec: str) -> ConfigDict:
    path, colon, arg = spec.partition(":")
    return configs.load(f"{path if pathlib.Path(path).is_file() else ROOT / path}{colon}{arg}")


def set_path(config: ConfigDict, path: str, value: Any) -> None:
    """Sets a dotted path to a value of the type that it has; a mapping is merged into what is there.

    Raises:
        InputError: there is no such key.
    """
    if not isinstance(value, Mapping):
        return configs.override(config, path, repr(value))
    node = config
    for depth, name in enumerate(path.split("."), 1):
        check_name(name, node.keys(), "config key", ".".join(path.split(".")[:depth]))
        node = node[name]
    node.update(dict(value))  # of options, those that are named nowhere have their task's default


def _shared(config: ConfigDict, names: list[str]) -> Shared | None:
    if not names:
        return None
    config = config.copy_and_resolve_references()
    config.unlock()
    config.jobs = (*_data_job(config), *names)
    identities = {name: stages.stage_identity(config, name) for name in names}
    return Shared(_hash(list(identities.values())), config, identities)


def _data_job(config: ConfigDict) -> tuple[str, ...]:
    return tuple(job for job in config.jobs if job == "data")


def _hash(texts: list[str]) -> str:
    return hashlib.sha256("/".join(texts).encode()).hexdigest()[:16]


def resolve(name: str, key: str) -> Callable:
    """What 'module:name' names. Raises InputError, naming the config key, if there is nothing."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"config key {key}: {name!r} cannot be loaded ({error}); it is 'module:name'") from None


def short(path: str) -> str:
    """A config path as a column's name: its last part, with the one before where that says too little."""
    parts = path.split(".")
    return parts[-1] if len(parts) < 3 or parts[-1] not in ("steps", "batch", "width", "depth") else ".".join(parts[-2:])


def describe(value: Any) -> str:
    """A value as a cell of a table: `16 x 1024` for sixteen equal numbers."""
    if isinstance(value, (tuple, list)) and value and len(set(value)) == 1:
        return f"{len(value)} x {value[0]}"
    return str(value)
