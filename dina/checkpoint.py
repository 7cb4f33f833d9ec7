"""One stage's state on disk: parameters, statistics, optimizer, step, data position and identity as one atom.

Orbax writes the arrays, asynchronously, into a folder of their own, named STEP.TOKEN.NUMBER after the step, the lease's
fencing token and the holder's count of saves, so that two holders never write in one place. Then every file is hashed
and a manifest is created beside the folder: that commits the step, and a step without it does not exist. Restoring
verifies all files and takes the newest good step, saying what was wrong with newer ones; it goes through an abstract
state with shardings, so any mesh can read what another wrote. Who takes a folder over lists what it accepts: a step
that an earlier holder commits after that is ignored.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dina import files, manifest, retention
from dina.config import RECORDED_ONLY, InputError
from dina.lease import Lease
from dina.manifest import Damaged

# Of a finished stage's arrays: an export reads region by region, and a chunk is decoded whole.
CHUNK_BYTES = 64 * 2**20
_CHECKED: dict[pathlib.Path, tuple] = {}  # stage folder -> its files as they were when their hashes were right


def default_config() -> ml_collections.ConfigDict:
    """`config.checkpoint`; what a config leaves out is as here.

    Steps between saves, what is kept (retention.py), seconds within which a signal's save must end, seconds after which
    a holder without heartbeat is dead (lease.py), and the compiler's cache and effort on a CPU.
    """
    return ml_collections.ConfigDict({
        "every": 150, "keep": 1, "keep_every": 0, "keep_best": "", "grace": 30.0, "lease": 30.0,
        "compile_cache": "~/.cache/dina/xla", "cpu_effort": 1,
    })  # fmt: skip


class SaveFailed(Exception):
    """A checkpoint is not committed; the message says why. Earlier ones stand."""


class Name(NamedTuple):
    """The name of one attempt to save a step; later ones are greater."""

    step: int
    token: int
    number: int

    def __str__(self) -> str:
        return f"{self.step:08d}.{self.token}.{self.number}"


def parse_name(text: str) -> Name | None:
    """The attempt that a file or folder is of, None if it is of none."""
    parts = text.removesuffix(".json").split(".")
    return Name(*map(int, parts)) if len(parts) == 3 and all(part.isdigit() for part in parts) else None


class Checkpoints:
    """The checkpoints of one stage folder.

    Args:
        folder: `<workdir>/<stage>`; checkpoints go to its `checkpoints/`.
        identity: hash of what the stage's result depends on; another identity in the folder is refused.
        keep: how many of the newest steps are kept.
        keep_every: all multiples of it are kept as well, 0 = none.
        keep_best: 'min:METRIC' or 'max:METRIC' of what `save` is told; '' = none.
        lease: the folder's; without one, nobody else may be at work there.
    """

    def __init__(self, folder: pathlib.Path, identity: str, keep: int = 2, keep_every: int = 0, keep_best: str = "",
                 lease: Lease | None = None):
        if keep_best:
            retention.parse_best(keep_best)
        self.folder, self.identity, self.lease = folder, identity, lease
        self.keep, self.keep_every, self.keep_best = keep, keep_every, keep_best
        self.root = (folder / "checkpoints").absolute()
        self.store = files.Folder(self.root)
        self.token = _agree(lease.token if lease else 0)
        self.saves = 0
        self._writer: ocp.AsyncCheckpointer | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "commit")
        self._pending: concurrent.futures.Future | None = None
        self._good: Name | None = None  # what `latest` has verified
        if lease is not None and jax.process_index() == 0:
            self._accept()

    # ------------------------------------------------------------------------------------------------------- reading
    def latest(self) -> int | None:
        """The newest good step, or None; says of every newer one what is wrong with it."""
        self._good = _agree_name(self._newest_good() if jax.process_index() == 0 else None)
        return None if self._good is None else self._good.step

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict]:
        """Reads the state of `step` into the placement that `abstract` names; returns it and the step's manifest.

        Raises:
            InputError: the folder belongs to another config, or has no such good step.
        """
        name = self._good
        if name is None or name.step != step:
            name = _agree_name(self._newest_good(step) if jax.process_index() == 0 else None)
        if name is None:
            raise InputError(f"{self.folder} has no good checkpoint of step {step}")
        meta = self.manifest_of(name)
        check_identity(self.folder, meta["identity"], self.identity)
        changed = manifest.other_versions(meta["versions"])
        if changed:
            print(f"dina: {self.folder.name}: step {step} was written with other libraries ({changed}); results may differ in "
                  "their last bits from a run that was never interrupted", flush=True)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            return reader.restore(self.root / str(name), args=ocp.args.StandardRestore(abstract)), meta

    def committed(self) -> list[Name]:
        """Steps with a manifest that the newest holder of the folder accepts, in order."""
        accepted, token = _accepted(self.store)
        names = [name for text in self.store.names() if text.endswith(".json") and (name := parse_name(text))]
        return sorted(name for name in names if accepted is None or name in accepted or name.token >= token)

    def verify(self, name: Name) -> dict:
        """The manifest of a step all of whose files are what was written. Raises Damaged."""
        body = self.manifest_of(name)
        manifest.check(self.root / str(name), body["files"])
        return body

    def problems(self) -> list[tuple[Name, str]]:
        """What is there and cannot be used, with the reason; files are not read."""
        committed = set(self.committed())
        found = [(name, "incomplete: no manifest") for path in self.root.iterdir()
                 if path.is_dir() and (name := parse_name(path.name)) and not (self.root / f"{name}.json").exists()]  # fmt: skip
        late = [name for text in self.store.names() if text.endswith(".json") and (name := parse_name(text)) and name not in committed]
        return sorted(found + [(name, "committed by a process whose lease had been taken over") for name in late])

    def manifest_of(self, name: Name) -> dict:
        """What was written with a step; its files are not read. Raises Damaged."""
        data = self.store.read(f"{name}.json")
        if data is None:
            raise Damaged("its manifest is missing")
        return manifest.unseal(data)

    def _newest_good(self, step: int | None = None) -> Name | None:
        for name, why in self.problems():
            print(f"dina: {self.folder.name}: checkpoint of step {name.step} ({name}) is not used: {why}", flush=True)
        for name in reversed(self.committed()):
            if step is not None and name.step != step:
                continue
            try:
                self.verify(name)
                return name
            except Damaged as error:
                print(f"dina: {self.folder.name}: checkpoint of step {name.step} ({name}) is damaged: {error}; an older one is taken",
                      flush=True)  # fmt: skip
        if step is None and self.committed():
            print(f"dina: {self.folder.name}: no good checkpoint is left; the stage begins anew", flush=True)
        return None

    def _accept(self) -> None:
        """Lists what earlier holders committed, before this one writes anything."""
        accepted = [list(name) for name in self.committed()]
        old = [name for name in self.store.names() if name.startswith("accepted.")]
        self.store.create(f"accepted.{self.token}", json.dumps(accepted).encode())
        for name in old:
            self.store.delete(name)

    # ------------------------------------------------------------------------------------------------------- writing
    def save(self, step: int, state: Any, examples: int, seconds: float, metrics: dict[str, float] | None = None,
             skipped: tuple[int, ...] = ()) -> None:
        """Starts an asynchronous save.

        Args:
            step: steps done.
            state: copied to the host before this returns.
            examples: consumed.
            seconds: of work so far.
            metrics: of this step, for `keep_best`.
            skipped: numbers of batches that were left out (train.py's rewind).

        Raises:
            Fenced: another process has the folder now.
            SaveFailed: this save or the one before it failed; what was committed earlier stands, and the next may be tried.
        """
        self.wait()
        if self.lease is not None:
            self.lease.check()
        name = Name(step, self.token, self.saves)
        self.saves += 1
        if self._writer is None:
            self._writer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        try:
            self._writer.save(self.root / str(name), args=ocp.args.StandardSave(state))
        except Exception as error:  # of the file system, in the words of whichever library met it
            self._writer = None
            raise SaveFailed(f"checkpoint of step {step} could not be written ({error})") from error
        body = {"step": step, "examples": examples, "seconds": seconds, "metrics": metrics or {}, "skipped": list(skipped),
                "identity": self.identity, "versions": manifest.versions()}  # fmt: skip
        self._pending = self._pool.submit(self._commit, name, body)

    @property
    def idle(self) -> bool:
        """Whether no save is under way."""
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        """Waits for the pending save. Raises SaveFailed, or Fenced."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except InputError:
                raise
            except Exception as error:
                self._writer = None
                raise SaveFailed(f"a checkpoint could not be written ({error})") from error

    def close(self) -> None:
        """Waits for the pending save. Raises as `wait`."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._writer is not None:
                self._writer.close()

    def _commit(self, name: Name, body: dict) -> None:
        """The end of a save, on a thread of its own: hash, commit, prune."""
        self._writer.wait_until_finished()
        if jax.process_index() != 0:
            return
        body["files"] = manifest.digest(self.root / str(name))
        if self.lease is not None:
            self.lease.check()
        self.store.create(f"{name}.json", manifest.seal(body))
        self.prune()

    def prune(self) -> list[Name]:
        """Removes what the policy does not keep, and what is damaged or incomplete and older than the newest good step."""
        good: dict[int, dict] = {}
        newest: dict[int, Name] = {}
        for name in self.committed():
            try:
                good[name.step] = self.manifest_of(name)["metrics"]
                newest[name.step] = name
            except Damaged:
                continue
        keep = {newest[step] for step in retention.kept(good, self.keep, self.keep_every, self.keep_best)} if good else set()
        last = max(keep, default=None)
        there = {name for path in self.root.iterdir() if (name := parse_name(path.name))}
        gone = sorted(name for name in there - keep if last is not None and (name.token, name.number) < (last.token, last.number))
        for name in gone:
            self._remove(name)
        return gone

    def _remove(self, name: Name) -> None:
        self.store.delete(f"{name}.json")
        shutil.rmtree(self.root / str(name), ignore_errors=True)


def _accepted(store: files.Store) -> tuple[set[Name] | None, int]:
    """(what the newest holder found and accepted, its token); (None, 0) if no holder ever wrote it down."""
    tokens = [int(name.removeprefix("accepted.")) for name in store.names() if name.startswith("accepted.")]
    if not tokens:
        return None, 0
    return {Name(*entry) for entry in json.loads(store.read(f"accepted.{max(tokens)}") or b"[]")}, max(tokens)


def _agree(number: int) -> int:
    """Process 0's number, on every process."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _agree_name(name: Name | None) -> Name | None:
    if jax.process_count() == 1:
        return name
    found = multihost_utils.broadcast_one_to_all(np.asarray(name or (-1, -1, -1), np.int32))
    return None if found[0] < 0 else Name(*map(int, found))


# ------------------------------------------------------------------------------------------------------------ identity
def write_config(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Keeps the config beside a stage's state, so that another one can be told apart from it key by key."""
    files.open_store(folder).write("config.json", json.dumps(config.to_dict(), indent=1, sort_keys=True, default=list).encode())


def check_identity(folder: pathlib.Path, found: str, wanted: str, config: ml_collections.ConfigDict | None = None) -> None:
    """Refuses a folder made by another config; with `config`, names keys that differ from what is written there."""
    if found != wanted:
        raise InputError(
            f"{folder} holds a run of another config (identity {found}, this config has {wanted}{_difference(folder, config)}); "
            "choose another --workdir, or give the config that began it"
        )


def _difference(folder: pathlib.Path, config: ml_collections.ConfigDict | None) -> str:
    """Up to five keys in which `config` differs from the one that is written in the folder."""
    path = folder / "config.json"
    if config is None or not path.is_file():
        return ""
    own = json.loads(json.dumps(config.to_dict(), default=list))
    try:
        was, now = (flat(tree) for tree in (json.loads(path.read_text()), own))
    except ValueError:
        return ""
    keys = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key) and key.split(".")[0] not in RECORDED_ONLY]
    shown = [f"{key} was {was.get(key, 'absent')!r}, is {now.get(key, 'absent')!r}" for key in keys[:5]]
    return "".join(f"; {text}" for text in shown) + (f"; and {len(keys) - 5} more" if len(keys) > 5 else "")


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value of a nested dict."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, sub in tree.items() for key, value in flat(sub, f"{path}.{name}" if path else name).items()}


# ----------------------------------------------------------------------------------------------- finished stages
def finish(folder: pathlib.Path, variables: Any, record: dict) -> None:
    """Writes the stage's result, the variables that later stages take over, and then its `stage.json`."""
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), variables)
    with ocp.StandardCheckpointer() as writer:
        writer.save((folder / "result").absolute(), variables, save_args=chunks, force=True)
    if jax.process_index() == 0:
        write_record(folder, record | {"versions": manifest.versions(), "result_files": manifest.digest(folder / "result"), "seal": ""})
    _agree(0)  # it is there before any process goes on


def write_record(folder: pathlib.Path, record: dict) -> None:
    """Writes the `stage.json` that makes a stage finished; its result must be there. A record with a `seal` gets its own."""
    if "seal" in record:
        record = record | {"seal": _seal(record)}
    files.open_store(folder).write("stage.json", json.dumps(record, indent=1).encode())


def _seal(record: dict) -> str:
    """A hash of all else in a record."""
    rest = json.loads(json.dumps({key: value for key, value in record.items() if key != "seal"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class DamagedRecord(InputError):
    """A `stage.json` is not what was written."""


def finished(folder: pathlib.Path, identity: str | None = None, config: ml_collections.ConfigDict | None = None) -> dict | None:
    """The record of a finished stage, or None; with `identity`, another config's folder is refused (see `check_identity`)."""
    path = folder / "stage.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        found = record["identity"]
        if record.get("seal", "") not in ("", _seal(record)):
            raise ValueError("its text is not what was written")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedRecord(f"{path} is damaged ({error}); run dina.train, or delete it, to make this stage's result again") from None
    if identity is not None:
        check_identity(folder, found, identity, config)
    return record


def check_result(folder: pathlib.Path, record: dict) -> None:
    """Raises Damaged unless the result of a finished stage is what `finish` wrote; files seen unchanged are not read again."""
    wanted = record.get("result_files")
    if wanted is None:  # an import, or of an earlier version: nothing to compare with
        return
    paths = sorted(path for path in (folder / "result").rglob("*") if path.is_file())
    stamp = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    if stamp and _CHECKED.get(folder.absolute()) == stamp:
        return
    manifest.check(folder / "result", wanted)
    _CHECKED[folder.absolute()] = stamp


def redo(folder: pathlib.Path, why: str) -> None:
    """Makes a finished stage unfinished, so that it goes on from its last checkpoint."""
    print(f"dina: {folder.name}: the finished result is damaged: {why}; it is made again", flush=True)
    (folder / "stage.json").unlink()


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
    record = finished(folder)
    if record is None:
        raise InputError(f"stage {folder.name!r} is not finished in {folder.parent}: run dina.train for it first")
    try:
        check_result(folder, record)
    except Damaged as error:
        raise InputError(f"stage {folder.name!r} in {folder.parent} is damaged ({error}): run dina.train, which makes it again") from None
    path = (folder / "result").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path).item_metadata.tree
        kept = {kind: {part: sub for part, sub in tree.get(kind, {}).items() if parts is None or part in parts.get(kind, ())}
                for kind in (tree if parts is None else parts)}  # fmt: skip
        missing = [part for kind in parts or () for part in parts[kind] if part not in kept[kind]]
        if missing:
            raise InputError(f"stage {folder.name!r} has no part {missing}; it has {sorted(tree.get('params', {}))}")
        some = {kind: found for kind, found in kept.items() if found}
        if not some:
            return kept
        abstract = structs(some)
        if like is not None:
            wanted = {kind: {part: like[kind][part] for part in some[kind]} for kind in some}
            check_shapes(wanted, abstract, f"{folder}/")
            abstract = wanted
        found = read_part(reader, path, abstract)
        return kept | (jax.device_get(found) if like is None else found)


def structs(metadata: Any) -> Any:
    """Shapes and types of a saved tree, to be read on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata)


def read_part(reader: ocp.Checkpointer, path: pathlib.Path, wanted: Any) -> Any:
    """Those arrays of a saved tree that `wanted` has, placed as its ShapeDtypeStructs say."""
    args = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True)
    return reader.restore(path, args=args)


def check_shapes(wanted: Any, found: Any, where: str) -> None:
    """Raises InputError naming the first array that `found` lacks, has beyond `wanted`, or has in another shape."""
    shapes = [{jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
              for tree in (wanted, found)]  # fmt: skip
    for path in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(path) != shapes[1].get(path):
            raise InputError(f"{where}{path}: shape {shapes[1].get(path)} in the checkpoint, {shapes[0].get(path)} in this config")
