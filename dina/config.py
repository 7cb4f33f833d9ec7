"""Experiment files and the errors that users see.

An experiment is one Python file with `get_config(arg)`; the command line is `--config=FILE[:arg]`, where arg is a
comma list of variant names and `dotted.path=value` overrides. An unknown key is an error that names it.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib.util
import json
import pathlib
import sys
import traceback
from collections.abc import Callable, Collection

import ml_collections

EXIT_DONE, EXIT_BUG, EXIT_INPUT, EXIT_RESTART = 0, 1, 2, 75


class InputError(Exception):
    """The user's input is wrong: the message says what, where, and what to do. Exit code 2."""


def load(spec: str) -> ml_collections.ConfigDict:
    """Loads `FILE[:arg]` and returns the locked config.

    Args:
        spec: path of an experiment file, optionally followed by `:` and its argument.

    Returns:
        A locked ConfigDict.

    Raises:
        InputError: the file, variant or a key does not exist.
    """
    path, _, arg = spec.partition(":")
    file = pathlib.Path(path)
    if not file.is_file():
        raise InputError(f"--config: no experiment file {path!r}; the project's own are in experiments/")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"--config: {path} has no get_config(arg)")
    own = getattr(module, "ARGUMENTS", ())  # keys that the file reads itself
    parts = [part for part in arg.split(",") if part]
    names = [part for part in parts if "=" not in part or part.split("=")[0] in own]
    config = module.get_config(",".join(names))
    config.unlock()
    for assignment in (part for part in parts if part not in names):
        override(config, *assignment.split("=", 1))
    config.lock()
    return config


def check_name(name: str, known: Collection[str], what: str, path: str = "") -> None:
    """Raises InputError unless `name` is one of `known`; `what` says what it should name, `path` where it stands."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        listed = f"; known{' here' if path else ''}: {', '.join(sorted(known)) or 'none'}"
        hint = f"; did you mean {near[0]!r}?" if near else listed
        raise InputError(f"{what} {path or name!r} does not exist{hint}")


def override(config: ml_collections.ConfigDict, path: str, text: str) -> None:
    """Sets `path` (dotted) to the literal `text`; the key must exist and keep its type."""
    *parents, leaf = path.split(".")
    node = config
    for depth, name in enumerate([*parents, leaf]):
        known = list(node.keys()) if isinstance(node, ml_collections.ConfigDict) else []
        check_name(name, known, "config key", ".".join([*parents, leaf][: depth + 1]))
        if depth < len(parents):
            node = node[name]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    try:
        with node.ignore_type() if isinstance(value, (list, tuple)) else contextlib.nullcontext():
            node[leaf] = tuple(value) if isinstance(value, list) else value
    except TypeError as error:
        raise InputError(f"config key {path!r}: {text!r} has the wrong type ({error})") from None


def name_import(config: ml_collections.ConfigDict, name: str, identity_: str) -> None:
    """Enters an import's identity under its folder's name in `config.imports`, beside others; stages refuse another one there."""
    with config.unlocked():
        config.imports = ml_collections.ConfigDict({**config.get("imports", {}), name: identity_})


def dump(config: ml_collections.ConfigDict) -> str:
    """The config as sorted JSON text, the form that is hashed, stored beside runs and diffed in tests."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True, default=list)


# What may change between a run and its resumption without changing its result (DESIGN §4.4).
RECORDED_ONLY = ("mesh", "log", "checkpoint", "jobs", "run")


def identity(config: ml_collections.ConfigDict, *sections: str) -> str:
    """A hash of everything that changes the result; `sections` limits it to some top-level keys."""
    tree = json.loads(dump(config))
    keep = {k: v for k, v in tree.items() if k not in RECORDED_ONLY and (not sections or k in sections)}
    return hashlib.sha256(json.dumps(keep, sort_keys=True).encode()).hexdigest()[:16]


def run_main(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Runs an entry point and maps its end to an exit code: 0 done, 2 bad input, 75 restart me, 1 bug."""
    try:
        code = main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"dina: {error}", file=sys.stderr)
        sys.exit(EXIT_INPUT)
    except KeyboardInterrupt:
        sys.exit(EXIT_RESTART)
    except Exception:  # the boundary of the program: say it is ours, keep the trace
        traceback.print_exc()
        sys.exit(EXIT_BUG)
    sys.exit(code or EXIT_DONE)
