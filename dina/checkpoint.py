"""One stage's state on disk: parameters, statistics, optimizer, step, data position and identity as one atom.

Orbax writes it asynchronously and commits it by a marker; a step without its marker does not exist. Restoring always
goes through an abstract state with shardings, so any mesh can read what another wrote. Data position is one global
index (examples consumed), because every batch is a pure function of its step.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from dina.config import InputError


# Of a finished stage's arrays: an export reads region by region, and a chunk is decoded whole.
CHUNK_BYTES = 64 * 2**20


class Checkpoints:
    """The checkpoints of one stage folder.

    Args:
        folder: `<workdir>/<stage>`; checkpoints go to its `checkpoints/`.
        identity: hash of what the stage's result depends on; another identity in the folder is refused.
        keep: how many steps are kept.
    """

    def __init__(self, folder: pathlib.Path, identity: str, keep: int = 2):
        self.folder = folder
        self.identity = identity
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, examples: int, seconds: float) -> None:
        """Starts an asynchronous save of `state` after `step` steps, `examples` examples and `seconds` of work."""
        meta = {"step": step, "examples": examples, "seconds": seconds, "identity": self.identity, "jax": jax.__version__}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self.manager.save(step, args=items, force=True)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict]:
        """Reads the state of `step` into the placement that `abstract` names.

        Raises:
            InputError: the folder belongs to another config.
        """
        meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        check_identity(self.folder, meta["identity"], self.identity)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self.manager.restore(step, args=items)["state"], meta

    def close(self) -> None:
        """Waits for pending saves and raises their errors."""
        self.manager.wait_until_finished()
        self.manager.check_for_errors()
        self.manager.close()


def check_identity(folder: pathlib.Path, found: str, wanted: str) -> None:
    """Refuses a folder made by another config."""
    if found != wanted:
        raise InputError(
            f"{folder} holds a run of another config (identity {found}, this config has {wanted}); "
            "choose another --workdir, or give the config that began it"
        )


# ----------------------------------------------------------------------------------------------- finished stages
def finish(folder: pathlib.Path, variables: Any, record: dict) -> None:
    """Writes the stage's result, the variables that later stages take over, and then its `stage.json`."""
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), variables)
    with ocp.StandardCheckpointer() as writer:
        writer.save((folder / "result").absolute(), variables, save_args=chunks, force=True)
    write_record(folder, record)


def write_record(folder: pathlib.Path, record: dict) -> None:
    """Writes the `stage.json` that makes a stage finished; its result must be there."""
    temporary = folder / "stage.json.part"
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(folder / "stage.json")


def finished(folder: pathlib.Path, identity: str | None = None) -> dict | None:
    """The record of a finished stage, or None; with `identity`, another config's folder is refused."""
    path = folder / "stage.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        found = record["identity"]
    except (json.JSONDecodeError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}); delete {folder} to train this stage again") from None
    if identity is not None:
        check_identity(folder, found, identity)
    return record


def result(folder: pathlib.Path, parts: dict[str, list[str]] | None = None, like: Any = None) -> Any:
    """Reads a finished stage's variables: {'params': {part: tree}, 'stats': {part: tree}}.

    Args:
        folder: `<workdir>/<stage>`.
        parts: {'params': [...], 'stats': [...]} to keep; default all.
        like: the same trees, of ShapeDtypeStructs with shardings: every host reads only its own slices, cast to these
            types, and arrays stay on the devices. Without it they are host arrays.

    Raises:
        InputError: the stage is not finished, lacks a part, or has another shape than `like`.
    """
    if finished(folder) is None:
        raise InputError(f"stage {folder.name!r} is not finished in {folder.parent}: run dina.train for it first")
    path = (folder / "result").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path).item_metadata.tree
        kept = {kind: {part: sub for part, sub in tree.get(kind, {}).items() if parts is None or part in parts.get(kind, ())}
                for kind in (tree if parts is None else parts)}  # fmt: skip
        missing = [part for kind in parts or () for part in parts[kind] if part not in kept[kind]]
        if missing:
            raise InputError(f"stage {folder.name!r} has no part {missing}; it has {sorted(tree.get('params', {}))}")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        some = {kind: found for kind, found in kept.items() if found}
        if not some:
            return kept
        abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), some)
        if like is not None:
            wanted = {kind: {part: like[kind][part] for part in some[kind]} for kind in some}
            check_shapes(wanted, abstract, f"{folder}/")
            abstract = wanted
        args = ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True)
        found = reader.restore(path, args=args)
        return kept | (jax.device_get(found) if like is None else found)


def check_shapes(wanted: Any, found: Any, where: str) -> None:
    """Raises InputError naming the first array that `found` lacks, has beyond `wanted`, or has in another shape."""
    shapes = [{jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
              for tree in (wanted, found)]  # fmt: skip
    for path in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(path) != shapes[1].get(path):
            raise InputError(f"{where}{path}: shape {shapes[1].get(path)} in the checkpoint, {shapes[0].get(path)} in this config")
