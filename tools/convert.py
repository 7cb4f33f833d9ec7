"""Released checkpoints in and out: `python -m tools.convert import|export|verify|qwen-vision|whisper|hift`.

    import --checkpoint DIR --workdir W [--parts backbone,embed]   released safetensors -> W/released, a finished stage
    export --workdir W [--stage NAME] --out DIR                    that stage -> released names, layouts and dtypes
    verify --checkpoint DIR [--against DIR2]                       names, shapes, dtypes; bit by bit against another
    qwen-vision --checkpoint DIR --workdir W                       a Qwen2.5-VL vision tower -> W/qwen_vision, part vision_encoder
    whisper --checkpoint DIR --workdir W                           a Whisper encoder -> W/whisper, part audio_encoder
    hift PATH DIR                                                  hift.pt -> DIR/hift, part vocoder; or that stage -> DIR/hift.pt

Imported are the language side, the visual tokenizer (vision_encoder, vision_quantizer), the audio tokenizer (audio_encoder,
audio_quantizer, audio_decoder, flow) and, where DIR holds image_decoder/image_decoder.safetensors, the image detokenizers
(pixel_decoder, refiner).
An experiment takes an imported part by `init_from: {"backbone": "released"}` and names the import with the identity that
this prints: `imports: {"released": "<identity>"}`. `dina.convert.settings.apply` does the latter and takes over model and
vocabulary (experiments/finetune.py), `apply_vision` and `apply_audio` the settings of the tokenizers,
`dina.convert.hift.apply` those of the vocoder. Memory stays at a few tensors whatever the size of the checkpoint. Bad input: exit code 2, naming file and tensor, and nothing is left half-written.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np

from dina import checkpoint as checkpoint_lib, process
from dina.config import InputError, run_main
from dina.convert import hift, plan, qwen, stream, whisper
from dina.convert.released import INDEX, Released, Writer, apart, same_bits
from dina.convert.rules import by_name
from dina.convert.settings import FILES

STAGE, QWEN, WHISPER = "released", "qwen_vision", "whisper"
SHARD_BYTES = 10 * 10**9
SAMPLE = 4096  # bytes of each tensor in the identity


def import_(args: argparse.Namespace) -> int:
    """Reads a released checkpoint into a finished stage of a workdir."""
    folder = _fresh(args.workdir / STAGE, args.checkpoint)
    released = Released(args.checkpoint)
    made = plan.make(released, _parts(args))
    plan.check_codes(released, made)
    notes = plan.unequal_copies(released, made)
    record = {
        "parts": args.parts, "files": _files(args.checkpoint, args.workdir, folder), "notes": notes,
        "model": made.config.to_dict() if made.config else None,
        "vocabulary": dataclasses.asdict(made.vocabulary) if made.vocabulary else None,
        "joint_rows": made.config and released.config()["vocab_size"], "projections": made.projections, "vision": made.vision,
        "audio": made.audio,
    }  # fmt: skip
    _write(folder, released, made.leaves, plan.feature_decoder(made.vision), record)
    print("".join(f"WARNING: {note}\n" for note in notes), end="")
    if not args.parts and not plan.has_detokenizers(released):
        print(f"{args.checkpoint} holds no image_decoder folder: without {', '.join(plan.BESIDE)}")
    return 0


def qwen_vision(args: argparse.Namespace) -> int:
    """Reads the vision tower of a Qwen2.5-VL checkpoint into a finished stage of a workdir."""
    folder = _fresh(args.workdir / QWEN, args.checkpoint)
    released = Released(args.checkpoint)
    leaves, vision = qwen.make(released)
    record = {"parts": "vision_encoder", "files": [], "notes": [], "model": None, "vocabulary": None, "vision": vision, "audio": {}}
    _write(folder, released, leaves, {}, record)
    return 0


def whisper_encoder(args: argparse.Namespace) -> int:
    """Reads the encoder of a Whisper checkpoint into a finished stage of a workdir; its bridge is started fresh."""
    folder = _fresh(args.workdir / WHISPER, args.checkpoint)
    released = Released(args.checkpoint)
    leaves, audio = whisper.make(released)
    record = {"parts": "audio_encoder", "files": [], "notes": [], "model": None, "vocabulary": None, "vision": {}, "audio": audio}
    _write(folder, released, leaves, whisper.bridge(audio), record)
    return 0


def vocoder(args: argparse.Namespace) -> int:
    """Reads the released vocoder into a finished stage, or writes a stage's vocoder under released names."""
    if args.path.is_dir():
        count = hift.export_stage(args.path, args.folder / hift.FILE)
        print(f"{count} tensors in {args.folder / hift.FILE}")
    else:
        record = hift.import_file(args.path, args.folder / hift.STAGE)
        print(f"{args.path} in {args.folder / hift.STAGE}; identity {record['identity']}")
    return 0


def _parts(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(filter(None, args.parts.split(",")))


def _fresh(folder: pathlib.Path, checkpoint: pathlib.Path) -> pathlib.Path:
    """The folder to import into. Raises InputError if that may hold anything but what a killed import left there."""
    if folder.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise InputError(f"{checkpoint} lies where the import would be written, {folder}; choose another --workdir")
    if (folder / "stage.json").exists():
        raise InputError(f"{folder} already holds an import; delete it, or choose another --workdir")
    if folder.exists():
        foreign = sorted(set(folder.iterdir()) - set(_remains(folder))) if folder.is_dir() else [folder]
        if foreign:
            raise InputError(f"{foreign[0]} is in the import's place and no import wrote it; move it, or choose another --workdir")
    return folder


def _remains(folder: pathlib.Path) -> list[pathlib.Path]:
    """What an unfinished import left in its folder."""
    return [path for pattern in (FILES, "result", "result.orbax*", "stage.json.part") for path in folder.glob(pattern)]


def _write(folder: pathlib.Path, released: Released, leaves: Mapping[str, plan.Leaf], fresh: Mapping[str, np.ndarray], record: dict) -> None:
    """Writes all arrays, files and the record, which makes a finished stage, and says so; or writes nothing."""
    width = lambda leaf: released.tensors[leaf.pieces[0].name].numpy_dtype.itemsize
    arrays = sum(math.prod(leaf.shape) * width(leaf) for leaf in leaves.values())
    _room(folder.parent, arrays + sum((released.folder / name).stat().st_size for name in record["files"]))
    identity, there = _identity(released), folder.exists()
    own = {"identity": identity, "stage": folder.name, "source": str(released.folder), "jax": jax.__version__}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        stream.write(folder / "result", released, leaves, fresh)
        for name in record["files"]:
            (folder / FILES / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(released.folder / name, folder / FILES / name)
        checkpoint_lib.write_record(folder, own | record)
    except BaseException as error:
        _remove(folder, there)
        if isinstance(error, (OSError, ValueError)):  # what the file system or tensorstore says of it
            raise InputError(f"{folder}: the import could not be written and was removed ({error})") from None
        raise
    count = len(by_name(leaf.pieces for leaf in leaves.values()))
    print(f"{count} tensors of {released.folder} in {len(leaves)} arrays of {folder}; identity {identity}")


def _remove(folder: pathlib.Path, there: bool) -> None:
    """Takes away what an import wrote, and its folder unless that was `there` before."""
    for path in _remains(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if not there:
        with contextlib.suppress(OSError):  # somebody else has put something there
            folder.rmdir()


def _files(checkpoint: pathlib.Path, workdir: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """What a checkpoint holds besides tensors: without its code, tokenizer and processor an export cannot be loaded elsewhere."""
    root = checkpoint.resolve()
    files, own = [], (workdir if root in workdir.resolve().parents else folder).resolve()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts[:-1])  # what download tools keep for themselves
        foreign = hidden or own in path.parents or path.name.endswith((".safetensors", INDEX))
        if path.is_file() and not foreign:
            files.append(name.as_posix())
    return files


def _room(workdir: pathlib.Path, needed: int) -> None:
    """Raises InputError if the disk of `workdir` has less than `needed` bytes left."""
    there = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(f"{workdir}: the import needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left")


def _identity(released: Released) -> str:
    """A hash that tells a checkpoint from others without reading all of it.

    It covers names, shapes and types, config.json, `SAMPLE` bytes from the middle of every tensor (a smaller one whole) and
    the last MiB of every shard. Training changes values in the middle of whatever it trains; an edit of single values
    elsewhere, such as a few rows of an embedding, goes unseen.
    """
    known = hashlib.sha256(json.dumps(released.config() if (released.folder / "config.json").exists() else {}, sort_keys=True).encode())
    for tensor in sorted(released.tensors.values(), key=lambda t: t.name):
        known.update(f"{tensor.name} {tensor.shape} {tensor.dtype}".encode())
    for shard in released.shards:
        path = released.folder / shard
        with path.open("rb") as file:
            for tensor in sorted(released.in_shard(shard), key=lambda t: t.offset):
                take = min(SAMPLE, tensor.nbytes)
                file.seek(tensor.offset + (tensor.nbytes - take) // 2)
                known.update(file.read(take))
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
    lost = [path for path in lost if path.split("/")[1] in plan.PARTS and not path.startswith(plan.FEATURE_DECODER)]
    if lost:
        raise InputError(f"stage {args.stage!r} trained {lost[0]}, which the import {origin} does not hold; import that part too")
    holder = {path: args.stage if path in stored[args.stage].shapes else STAGE for path in leaves}
    for path, leaf in leaves.items():
        found = stored[holder[path]].shapes[path][0]
        if found != leaf.shape:
            raise InputError(f"stage {args.stage!r}: {path} has shape {list(found)}, the import had {list(leaf.shape)}")
    pieces = by_name(leaf.pieces for leaf in leaves.values())
    pieces = {name: pieces[name] for name in sorted(pieces, key=apart)}  # a file of its own in one go
    tensors = {name: (parts[0].shape, stored[STAGE].shapes[parts[0].path][1]) for name, parts in pieces.items()}
    writer = Writer(args.out, tensors, int(args.shard_gb * 10**9))
    for name, parts in pieces.items():
        array = stream.released_tensor({piece.path: stored[holder[piece.path]] for piece in parts}, parts)
        writer.add(name, array.astype(tensors[name][1], copy=False))
    for name in record["files"]:
        (writer.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin / FILES / name, writer.folder / name)
    writer.finish()
    print(f"{len(tensors)} tensors in {len(writer.groups)} shards of {args.out}")
    print("".join(f"WARNING: of the import: {note}\n" for note in record["notes"]), end="")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Accounts for every tensor of a checkpoint, and compares it with another one's bits."""
    released = Released(args.checkpoint)
    made = plan.make(released, _parts(args))
    plan.check_codes(released, made)
    names = by_name(leaf.pieces for leaf in made.leaves.values())
    families = collections.Counter(parts[0].path.split("/")[1] for parts in names.values())
    for family, count in sorted(families.items()):
        print(f"{family:<20} {count:>6} tensors")
    print("".join(f"WARNING: {line}\n" for line in plan.unequal_copies(released, made)), end="")
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
        elif not same_bits(released, name, other, name):
            different.append(f"{name}: other values")
    print("\n".join(different[:20]) if different else f"all {len(names)} tensors are equal, bit by bit")
    if len(different) > 20:
        print(f"and {len(different) - 20} more")
    return 1 if different else 0


def main(argv: list[str] | None = None) -> int:
    """Runs one of the commands."""
    whole = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=__doc__, formatter_class=whole)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("import", help="a released checkpoint -> W/released")
    one.add_argument("--checkpoint", type=pathlib.Path, required=True)
    one.add_argument("--workdir", type=pathlib.Path, required=True)
    one.add_argument("--parts", default="", help=f"comma list of {', '.join(plan.PARTS)}; default all")
    one.set_defaults(run=import_)
    one = commands.add_parser("export", help="a stage -> released names")
    one.add_argument("--workdir", type=pathlib.Path, required=True)
    one.add_argument("--stage", default=STAGE)
    one.add_argument("--out", type=pathlib.Path, required=True)
    one.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 10**9)
    one.set_defaults(run=export)
    one = commands.add_parser("verify", help="accounts for every tensor, or compares two checkpoints")
    one.add_argument("--checkpoint", type=pathlib.Path, required=True)
    one.add_argument("--against", type=pathlib.Path)
    one.add_argument("--parts", default="", help="what the checkpoint holds, if not everything")
    one.set_defaults(run=verify)
    one = commands.add_parser("qwen-vision", help="a Qwen2.5-VL vision tower -> W/qwen_vision")
    one.add_argument("--checkpoint", type=pathlib.Path, required=True)
    one.add_argument("--workdir", type=pathlib.Path, required=True)
    one.set_defaults(run=qwen_vision)
    one = commands.add_parser("whisper", help="a Whisper encoder -> W/whisper")
    one.add_argument("--checkpoint", type=pathlib.Path, required=True)
    one.add_argument("--workdir", type=pathlib.Path, required=True)
    one.set_defaults(run=whisper_encoder)
    one = commands.add_parser("hift", help="the released vocoder -> DIR/hift, or a stage's vocoder -> DIR/hift.pt")
    one.add_argument("path", type=pathlib.Path, metavar="PATH", help="hift.pt, a safetensors file of its names, or the folder of a stage")
    one.add_argument("folder", type=pathlib.Path, metavar="DIR")
    one.set_defaults(run=vocoder)
    args = parser.parse_args(argv)
    process.keep_memory()
    return args.run(args)


if __name__ == "__main__":
    run_main(main)
