"""Offline tokenisation: raw records to code shards. `python -m dina.tokenize --config=experiments/X.py --workdir=DIR`.

Reads the raw records of `config.tokenize.splits`, encodes images packed into rows and clips in batches of one shape,
and writes shards (dina/data/codes.py) under DIR/codes. Run it again and it resumes: a finished shard of the same
tokenizer is verified and skipped. A record that cannot be read or encoded is left out, counted and named. A kind needs
its own tokenizer alone, so it can be made as soon as that is trained: `--kind=images`, or train.py's job codes:images.

Letters: B rows of a batch, N cells of a row or samples of a clip, U frames, L levels.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import pathlib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import ml_collections
import numpy as np

from dina import config as configs
from dina import stages
from dina.audio import augment, features
from dina.audio import tokenizer as audio_tokenizer
from dina.config import InputError
from dina.data import codes, sources
from dina.interrupt import Stopper, abandonable
from dina.tasks.vision_batches import pack_rows
from dina.vision import preprocess
from dina.vision import tokenizer as vision_tokenizer

PARTS = {"images": ["vision_encoder", "vision_quantizer"], "speech": ["audio_encoder", "audio_quantizer"]}
KINDS = tuple(PARTS)
VIEWS = ("clean", "noisy")
_FORMAT = 1  # of the codes; raise it when this file makes other codes from the same tokenizer

# Arrays of preprocess.pack_images with a leading B -> codes [B, N, L], -1 in padding.
EncodeImages = Callable[[dict[str, np.ndarray]], np.ndarray]
# (waves [B, N] float32, samples [B]) -> (codes [B, U, L], lengths [B]).
EncodeSpeech = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Encoder(typing.NamedTuple):
    """The tokenizer of a kind, and a hash of its parameters and statistics."""

    encode: EncodeImages | EncodeSpeech
    identity: str


def default_config() -> ml_collections.ConfigDict:
    """`config.tokenize`: records of a shard, rows of a batch, splits, and the forms in which a clip is heard.

    Training reads no split but 'train'; evaluation encodes its own prompts. 'noisy' is a clip as the speech tokenizer's
    training hears it: with speed, gain, room and noise, drawn once a clip.
    """
    return ml_collections.ConfigDict({"shard_records": 4096, "image_rows": 32, "speech_rows": 32, "splits": ("train",),
                                      "speech_views": VIEWS})


def prepare_data(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Makes the raw records of the experiment unless they are there; returns their folder."""
    path = sources.prepare(config)
    print(f"dina: data: raw records in {path}", flush=True)
    return path


def load_encoder(config: ml_collections.ConfigDict, workdir: pathlib.Path, kind: str) -> Encoder:
    """The trained tokenizer of a kind in a workdir. Raises InputError if a stage that makes it is not finished."""
    params, stats = stages.load_parts(config, workdir, PARTS[kind])
    variables = {"params": params, "stats": stats}
    content = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        content.update(jax.tree_util.keystr(path).encode())
        content.update(np.ascontiguousarray(leaf).tobytes())
    if kind == "images":
        encode = lambda pack: jax.device_get(vision_tokenizer.tokenize(config.vision, variables, pack))
    else:
        hear = audio_tokenizer.make_tokenize(config.audio)
        encode = lambda wave_BN, samples_B: jax.device_get(hear(params, stats, wave_BN, samples_B))
    return Encoder(encode, content.hexdigest()[:16])


def tokenize(config: ml_collections.ConfigDict, workdir: pathlib.Path | str, kinds: Sequence[str] = KINDS) -> dict:
    """Tokenises everything of some kinds with the workdir's trained tokenizers; see `run`.

    Raises:
        InputError: a kind is unknown, or as `load_encoder` and `run`.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"codes of kind {kind!r}: must be one of {', '.join(KINDS)}")
    workdir = pathlib.Path(workdir)
    return run(config, workdir, {kind: load_encoder(config, workdir, kind) for kind in kinds})


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path | str, encoders: Mapping[str, Encoder]) -> dict:
    """Tokenises `config.tokenize.splits` of some kinds.

    Args:
        config: the experiment; `tokenize` may be missing.
        workdir: shards go to its folder `codes`.
        encoders: kind ('images', 'speech') -> its tokenizer, which is called with batches of one shape.

    Returns:
        kind -> {'counts': {split: records}, 'errors': [line per record left out], 'made': shards, 'kept': shards}.

    Raises:
        InputError: the raw data is missing, or a split has no good record.
    """
    options = config.get("tokenize", default_config())
    unknown = [view for view in options.speech_views if view not in VIEWS]
    if unknown or not options.speech_views or min(options.shard_records, options.image_rows, options.speech_rows) < 1:
        raise InputError(f"config key tokenize: speech_views must be some of {VIEWS}, sizes at least 1;"
                         f" it is {options.to_dict()}")
    report = {}
    for kind, encoder in encoders.items():
        worker = {"images": _Images, "speech": _Speech}[kind](config, options, encoder.encode)
        identity = _identity(config, options, kind, encoder)
        report[kind] = _run_kind(config, options, workdir, kind, worker, identity)
        counts = ", ".join(f"{n} {split}" for split, n in report[kind]["counts"].items())
        print(f"dina: codes: {kind}: {counts}; {report[kind]['made']} shards made, {report[kind]['kept']} kept", flush=True)
        for line in report[kind]["errors"]:
            print(f"dina: codes: left out: {line}", flush=True)
    return report


def _identity(config, options, kind: str, encoder: Encoder) -> str:
    """Everything that the codes of a kind depend on."""
    section = "vision" if kind == "images" else "audio"
    parts = [str(_FORMAT), encoder.identity, sources.cache_path(config).name, configs.identity(config, section)]
    # Neither batch nor shard sizes change a code, but shards of different sizes do not fit together.
    parts += [str(options.shard_records), *(options.speech_views if kind == "speech" else ()), str(config.seed)]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def _run_kind(config, options, workdir, kind: str, worker, identity: str) -> dict:
    totals, made, kept = {}, 0, 0
    for split in options.splits:
        source = sources.open_source(config, kind, split)
        totals[split] = max(1, -(-len(source) // options.shard_records))
        for shard in range(totals[split]):
            path = codes.shard_path(workdir, kind, split, shard, totals[split])
            if codes.verify_shard(path, identity) is not None:
                kept += 1
                continue
            if jax.process_count() > 1:
                raise InputError(f"{kind}/{split}: codes are missing; make them with one process first, by `python -m dina.tokenize`")
            # Until all shards are of one kind again, nobody may read them.
            (path.parent / "dataset_info.json").unlink(missing_ok=True)
            first = shard * options.shard_records
            records, errors = worker(source, split, range(first, min(first + options.shard_records, len(source))))
            codes.write_shard(path, kind, records, identity, errors)
            made += 1
    report = codes.finish(workdir, kind, worker.levels, totals)
    empty = [split for split, count in report["counts"].items() if not count]
    if empty:
        first = (report["errors"] or ["no records"])[0]
        raise InputError(f"{kind}/{empty[0]}: no record could be tokenised; the first: {first}")
    return report | {"made": made, "kept": kept}


@contextlib.contextmanager
def _counted(errors: list[str], where: str) -> Iterator[None]:
    """Notes what is wrong with one record instead of ending the run."""
    try:
        yield
    except InputError as error:
        errors.append(f"{where}: {error}")
    except (OSError, SyntaxError, ValueError) as error:  # how Pillow and numpy say that bytes are damaged
        errors.append(f"{where}: cannot be decoded ({error})")


class _Images:
    """Encodes records of images: whole images packed into rows."""

    def __init__(self, config, options, encode: EncodeImages):
        self.vision, self.rows, self.encode = config.vision, options.image_rows, encode
        self.levels = len(config.vision.quantizer.sizes)

    def __call__(self, source, split: str, numbers: range) -> tuple[list[dict], list[str]]:
        """(code records in order, one line per record left out)."""
        images, records, errors = [], [], []
        pixels = self.vision.min_pixels, self.vision.max_pixels
        for number in numbers:
            with _counted(errors, f"images/{split} record {number}"):
                raw = source[number]
                image = preprocess.resize_image(np.asarray(raw["image"]), preprocess.CELL, *pixels, "image")
                h, w = (side // preprocess.CELL for side in image.shape[:2])
                if h * w > self.vision.pack.cells:
                    raise InputError(f"{h * w} cells do not fit a row of {self.vision.pack.cells} (vision.pack.cells)")
                images.append(image)
                fields = {name: raw[name] for name in codes.FIELDS["images"] if name in raw}
                records.append(fields | {"h": h, "w": w, "record": number})
        if images:
            self._encode(images, records)
        return records, errors

    def _encode(self, images: list[np.ndarray], records: list[dict]) -> None:
        """Sets `codes` of every record."""
        pack = self.vision.pack
        areas = np.array([record["h"] * record["w"] for record in records], np.int32)
        table = pack_rows(areas, np.arange(len(images)), pack.cells, pack.images)
        for start in range(0, len(table), self.rows):
            rows = [[int(i) for i in row if i >= 0] for row in table[start : start + self.rows]]
            rows += [[]] * (self.rows - len(rows))
            window = self.vision.encoder.window_cells
            packs = [preprocess.pack_images([images[i] for i in row], pack.cells, pack.images, window) for row in rows]
            codes_BNL = self.encode({name: np.stack([p[name] for p in packs]) for name in packs[0]})
            for row, codes_NL in zip(rows, codes_BNL, strict=True):
                at = 0
                for i in row:
                    records[i]["codes"] = np.asarray(codes_NL[at : at + areas[i]])
                    at += areas[i]


class _Speech:
    """Encodes records of speech, each in all its views."""

    def __init__(self, config, options, encode: EncodeSpeech):
        self.audio, self.rows, self.views, self.encode = config.audio, options.speech_rows, options.speech_views, encode
        self.levels, self.seed = len(config.audio.quantizer.sizes), config.seed
        self.longest = self.audio.features.max_frames * self.audio.features.hop

    def __call__(self, source, split: str, numbers: range) -> tuple[list[dict], list[str]]:
        """(code records in order, views of a clip together; one line per record left out)."""
        waves, records, errors = [], [], []
        for number in numbers:
            with _counted(errors, f"speech/{split} record {number}"):
                raw = source[number]
                wave = np.asarray(raw["audio16"]).astype(np.float32) / 32768
                features.check_wave(wave, "wave")
                if len(wave) > self.longest:
                    raise InputError(f"{len(wave)} samples, longer than one chunk of {self.longest}"
                                     " (audio.features.max_frames)")
                fields = {name: raw[name] for name in codes.FIELDS["speech"] if name in raw}
                for view in self.views:
                    waves.append(self._heard(wave, view, split, number))
                    records.append(fields | {"noisy": int(view == "noisy"), "record": number})
        for start in range(0, len(waves), self.rows):
            wave_BN, samples_B = audio_tokenizer.pad_waves(waves[start : start + self.rows], self.audio, self.rows)
            codes_BUL, length_B = self.encode(wave_BN, samples_B)
            for row, record in enumerate(records[start : start + self.rows]):
                record["codes"] = np.asarray(codes_BUL[row, : length_B[row]])
        return records, errors

    def _heard(self, wave: np.ndarray, view: str, split: str, number: int) -> np.ndarray:
        """A clip as it reaches the encoder; the noise depends on seed, split and record alone."""
        if view == "clean":
            return features.complete(wave, self.audio.features)
        rng = np.random.default_rng([self.seed, *split.encode(), number])
        drawn = augment.draw(rng, self.audio.augment)
        speed = max(drawn.speed, len(wave) / self.longest)  # a slower clip must still fit
        if speed != 1.0:
            wave = augment.change_speed(wave, speed)[: self.longest]
        wave = features.complete(wave * np.float32(drawn.gain), self.audio.features)
        return augment.overlay(rng, wave, drawn, self.audio.features.rate)


def main(argv: list[str]) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dina.tokenize", description=__doc__)
    parser.add_argument("--config", required=True, help="experiments/X.py[:variant,key=value,...]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--kind", choices=KINDS, help="one kind only; default all")
    args = parser.parse_args(argv)
    config = configs.load(args.config)
    with contextlib.closing(Stopper()), abandonable("codes"):  # finished shards are kept
        prepare_data(config)
        tokenize(config, args.workdir, [args.kind] if args.kind else KINDS)
    return configs.EXIT_DONE


if __name__ == "__main__":
    configs.run_main(main)
