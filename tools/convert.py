"""Released checkpoints in and out: `python -m tools.convert import|export|verify`.

    import --checkpoint DIR --workdir W [--parts backbone,embed]   released safetensors -> W/released, a finished stage
    export --workdir W [--stage NAME] --out DIR                    that stage -> released names, layouts and dtypes
    verify --checkpoint DIR [--against DIR2]                       names, shapes, dtypes; bit by bit against another

An experiment takes an imported part by `init_from: {"backbone": "released"}` and names the import with the identity that
this prints: `imports: {"released": "<identity>"}`. `dina.convert.settings.apply` does the latter, and takes over model and
vocabulary (experiments/finetune.py). Memory stays at a few tensors whatever the size of the checkpoint. Bad input: exit
code 2, naming file and tensor, and nothing is left half-written.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import pathlib
import shutil

import jax

from dina import checkpoint as checkpoint_lib
from dina.config import InputError, run_main
from dina.convert import plan, stream
from dina.convert.released import INDEX, Released, Writer
from dina.convert.settings import FILES

STAGE = "released"
BLOCK_BYTES = 256 * 2**20  # compared at once
SHARD_BYTES = 10 * 10**9


def import_(args: argparse.Namespace) -> int:
    """Reads a released checkpoint into a finished stage of a workdir."""
    folder = args.workdir / STAGE
    if (folder / "stage.json").exists():
        raise InputError(f"{folder} already holds an import; delete it, or choose another --workdir")
    released = Released(args.checkpoint)
    made = plan.make(released, tuple(filter(None, args.parts.split(","))))
    plan.check_codes(released, made)
    _room(args.workdir, sum(released.tensors[piece.name].nbytes for leaf in made.leaves.values() for piece in leaf.pieces))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        stream.write(folder / "result", released, made.leaves)
    except (OSError, ValueError) as error:  # what the file system or tensorstore says of it
        shutil.rmtree(folder)
        raise InputError(f"{folder}: the import could not be written and was removed ({error})") from None
    # Code, tokenizer and processor files belong to the checkpoint: an export without them cannot be loaded elsewhere.
    files = [path.name for path in sorted(args.checkpoint.iterdir()) if path.is_file() and not path.name.endswith((".safetensors", INDEX))]
    (folder / FILES).mkdir(exist_ok=True)
    for name in files:
        shutil.copyfile(args.checkpoint / name, folder / FILES / name)
    identity = _identity(released)
    record = {
        "identity": identity, "stage": STAGE, "source": str(args.checkpoint), "parts": args.parts, "files": files, "jax": jax.__version__,
        "model": made.config.to_dict() if made.config else None, "vocabulary": dataclasses.asdict(made.vocabulary) if made.vocabulary else None,
        "joint_rows": made.config and released.config()["vocab_size"], "projections": made.projections,
    }  # fmt: skip
    checkpoint_lib.write_record(folder, record)
    count = sum(len(leaf.pieces) for leaf in made.leaves.values())
    print(f"{count} tensors of {args.checkpoint} in {len(made.leaves)} arrays of {folder}; identity {identity}")
    return 0


def _room(workdir: pathlib.Path, needed: int) -> None:
    """Raises InputError if the disk of `workdir` has less than `needed` bytes left."""
    there = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(f"{workdir}: the import needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left")


def _identity(released: Released) -> str:
    """Of names, shapes and types, config.json, and the last MiB of every shard, so that other weights have another one."""
    known = hashlib.sha256(json.dumps(released.config() if (released.folder / "config.json").exists() else {}, sort_keys=True).encode())
    for tensor in sorted(released.tensors.values(), key=lambda t: t.name):
        known.update(f"{tensor.name} {tensor.shape} {tensor.dtype}".encode())
    for shard in released.shards:
        path = released.folder / shard
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2**20))
            known.update(file.read())
    return known.hexdigest()[:16]


def export(args: argparse.Namespace) -> int:
    """Writes a stage under released names."""
    source, origin = args.workdir / args.stage, args.workdir / STAGE
    record = checkpoint_lib.finished(origin)
    if record is None:
        raise InputError(f"{origin} holds no import; its config and the tensors that are carried along are needed for an export")
    stored = {STAGE: stream.Stored(origin / "result")}
    leaves = plan.remember(record, {path: shape for path, (shape, _) in stored[STAGE].shapes.items()})
    stored[args.stage] = stored[STAGE] if args.stage == STAGE else stream.Stored(source / "result")
    lost = sorted(path for path in stored[args.stage].shapes if path.startswith("params/") and path not in leaves)
    lost = [path for path in lost if path.split("/")[1] in plan.PARTS]
    if lost:
        raise InputError(f"stage {args.stage!r} trained {lost[0]}, which the import {origin} does not hold; import that part too")
    holder = {path: args.stage if path in stored[args.stage].shapes else STAGE for path in leaves}
    for path, leaf in leaves.items():
        found = stored[holder[path]].shapes[path][0]
        if found != leaf.shape:
            raise InputError(f"stage {args.stage!r}: {path} has shape {list(found)}, the import had {list(leaf.shape)}")
    dtypes = {path: stored[STAGE].shapes[path][1] for path in leaves}
    tensors = {piece.name: (piece.shape, dtypes[path]) for path, leaf in leaves.items() for piece in leaf.pieces}
    writer = Writer(args.out, tensors, int(args.shard_gb * 10**9))
    for path, leaf in leaves.items():
        for name, array in stream.released_tensors(stored[holder[path]], leaf):
            writer.add(name, array.astype(dtypes[path], copy=False))
    for name in record["files"]:
        shutil.copyfile(origin / FILES / name, writer.folder / name)
    writer.finish()
    print(f"{len(tensors)} tensors in {len(writer.groups)} shards of {args.out}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Accounts for every tensor of a checkpoint, and compares it with another one's bits."""
    released = Released(args.checkpoint)
    made = plan.make(released, tuple(filter(None, args.parts.split(","))))
    plan.check_codes(released, made)
    families = collections.Counter(path.split("/")[1] for path, leaf in made.leaves.items() for _ in leaf.pieces)
    for family, count in sorted(families.items()):
        print(f"{family:<20} {count:>6} tensors")
    if args.against is None:
        return 0
    other, different = Released(args.against), []
    names = sorted(set(released.tensors) | set(other.tensors))
    for name in names:
        ours, theirs = released.tensors.get(name), other.tensors.get(name)
        if ours is None or theirs is None:
            different.append(f"{name}: only in {args.checkpoint if theirs is None else args.against}")
        elif (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            different.append(f"{name}: {ours.dtype} {list(ours.shape)} and {theirs.dtype} {list(theirs.shape)}")
        elif not _same_bits(released, other, name):
            different.append(f"{name}: other values")
    print("\n".join(different[:20]) if different else f"all {len(names)} tensors are equal, bit by bit")
    if len(different) > 20:
        print(f"and {len(different) - 20} more")
    return 1 if different else 0


def _same_bits(one: Released, two: Released, name: str) -> bool:
    """Compares as bytes, so that a NaN equals itself, and in blocks of the first axis."""
    tensor = one.tensors[name]
    with one.open(tensor.shard) as a, two.open(two.tensors[name].shard) as b:
        if not tensor.shape:
            return a.get_tensor(name).tobytes() == b.get_tensor(name).tobytes()
        rows = max(1, BLOCK_BYTES * tensor.shape[0] // max(1, tensor.nbytes))
        left, right = a.get_slice(name), b.get_slice(name)
        blocks = [(start, min(start + rows, tensor.shape[0])) for start in range(0, tensor.shape[0], rows)]
        return all(left[i:j].tobytes() == right[i:j].tobytes() for i, j in blocks)


def main(argv: list[str] | None = None) -> int:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("import")
    one.add_argument("--checkpoint", type=pathlib.Path, required=True)
    one.add_argument("--workdir", type=pathlib.Path, required=True)
    one.add_argument("--parts", default="", help=f"comma list of {', '.join(plan.PARTS)}; default all")
    one.set_defaults(run=import_)
    one = commands.add_parser("export")
    one.add_argument("--workdir", type=pathlib.Path, required=True)
    one.add_argument("--stage", default=STAGE)
    one.add_argument("--out", type=pathlib.Path, required=True)
    one.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 10**9)
    one.set_defaults(run=export)
    one = commands.add_parser("verify")
    one.add_argument("--checkpoint", type=pathlib.Path, required=True)
    one.add_argument("--against", type=pathlib.Path)
    one.add_argument("--parts", default="", help="what the checkpoint holds, if not everything")
    one.set_defaults(run=verify)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    run_main(main)
