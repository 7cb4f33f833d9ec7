"""Scores a visual tokenizer as a codec of pictures: `python -m dina.eval.codec --config=experiments/X.py --workdir=DIR`.

Held-out pictures of any sizes (at most 128 of split 'test', and of 'photos' where there is one) go to codes and back at
several depths, beside JPEG and WebP of as many bytes; through the refiner too, where the experiment has one. Writes to
`<workdir>/eval/`:
  pictures.jsonl     one line a picture and codec: split, index, source, native, height, width, codec ('dina', 'jpeg', 'webp',
                     'refined'), levels (whose bytes the other codecs had), bytes (of codes or of compressed pixels, without
                     headers), psnr_db, ssim, lpips_like; `file` where one was kept
  pictures/          kept originals and reconstructions
  codebooks.json     usage and perplexity of every level over the codes of these held-out pictures, and over those of cells
                     that are not of one colour (half of a drawing may be its ground); `bound`, see `perplexity_bound`
  scores.json        KID of every codec and depth, milliseconds a picture, and the protocol of every number
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from dina import config as configs, metrics as run_metrics, stages
from dina.config import InputError
from dina.data import cache, feature_weights, sources
from dina.eval import image_codecs, metrics
from dina.eval.fidelity import Fidelity
from dina.train import settle
from dina.vision import detokenize, preprocess
from dina.vision.tokenize import tokenize_images

PARTS = ["vision_encoder", "vision_quantizer", "pixel_decoder"]
REFINER = "refiner"  # the task of the stage that trains it, and its part
LEVELS = (1, 2, 4, 8)
NETWORK = "efficientnet_lite0"
SPLITS = ("test", "photos")
PICTURES = 128  # most of a split, evenly over it: searching JPEG's and WebP's settings takes seconds a picture
COMPARED = (2, 8)  # depths at whose bytes JPEG and WebP are given
_SHOWN = 8  # pictures of a split whose files are kept
_TIMED = 16  # pictures of a split that are encoded and decoded once more, for the time that it takes


def code_bytes(cells: int, sizes: Sequence[int], levels: int) -> int:
    """Bytes of the codes of a picture: whole bits a code, whole bytes a picture, no header."""
    return math.ceil(cells * sum(math.ceil(math.log2(size)) for size in sizes[:levels]) / 8)


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices, evenly over `total`; records are in the order of their packages."""
    return sorted({int(i) for i in np.linspace(0, total - 1, min(count, total))})


def cells_of(image: np.ndarray) -> np.ndarray:
    """The cells of a picture [H, W, 3] in raster order, [cells, pixels of one, 3]."""
    h, w, cell = image.shape[0] // preprocess.CELL, image.shape[1] // preprocess.CELL, preprocess.CELL
    return image.reshape(h, cell, w, cell, 3).swapaxes(1, 2).reshape(h * w, cell * cell, 3)


def busy_cells(image: np.ndarray) -> np.ndarray:
    """Whether each cell, in raster order, has more than one colour."""
    cells = cells_of(image)
    return (cells != cells[:, :1]).any((1, 2))


def perplexity_bound(counts: Sequence[int], size: int) -> float:
    """The largest perplexity of `size` codes where equal things have equal codes: those that are frequent, one code each, and
    all others spread evenly over the codes that are left.

    Args:
        counts: how often each different thing occurs.
        size: codes.
    """
    total = sum(counts)
    shares = sorted((count / total for count in counts), reverse=True)
    left, own = 1.0, 0
    while own < min(size - 1, len(shares)) and shares[own] * (size - own) > left:
        left, own = left - shares[own], own + 1
    rest = left * math.log((size - own) / left) if left > 1e-9 else 0.0
    return math.exp(rest - sum(share * math.log(share) for share in shares[:own]))


def read(config, split: str) -> dict[str, list]:
    """At most `PICTURES` of a split, at the size at which they are tokenised, with source and native."""
    records = sources.open_source(config, "images", split)
    vision, found = config.vision, {"image": [], "source": [], "native": []}
    for index in spread(len(records), PICTURES):
        record = records[index]
        size = vision.min_pixels, vision.max_pixels
        found["image"].append(preprocess.resize_image(record["image"], preprocess.CELL, *size, record["source"]))
        found["source"].append(record["source"])
        found["native"].append(int(record["native"]))
    return found


class Measured:
    """Scores of one split, as they are made: `rows` for pictures.jsonl, `scores` for scores.json."""

    def __init__(self, split: str, pictures: dict[str, list], against: Fidelity, folder: pathlib.Path):
        self.split, self.pictures, self.against, self.folder = split, pictures, against, folder
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[str, Any] = {}
        self.shown = spread(len(pictures["source"]), _SHOWN)
        for index in self.shown:
            self.rows.append(self._about(index, "original", 0) | {"file": self._keep(index, "original", pictures["image"][index])})

    def add(self, codec: str, levels: int, made: Sequence[np.ndarray], sizes: Sequence[int]) -> None:
        """Scores the reconstructions of all pictures by one codec."""
        scores, values = self.against.scores(made)
        self.scores |= {f"{name}_{self.split}_{codec}_{levels}": score for name, score in scores.items()}
        for index, size in enumerate(sizes):
            row = self._about(index, codec, levels) | {"bytes": int(size)}
            row |= {name: round(float(column[index]), 5) for name, column in values.items()}
            if index in self.shown:
                row["file"] = self._keep(index, f"{codec}_{levels}", made[index])
            self.rows.append(row)

    def _about(self, index: int, codec: str, levels: int) -> dict[str, Any]:
        height, width = self.pictures["image"][index].shape[:2]
        return {"split": self.split, "index": index, "source": self.pictures["source"][index], "native": self.pictures["native"][index],
                "height": height, "width": width, "codec": codec, "levels": levels}

    def _keep(self, index: int, name: str, image: np.ndarray) -> str:
        path = pathlib.Path("pictures") / f"{self.split}_{index:04d}_{name}.png"
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(self.folder / path)
        return str(path)


def evaluate(config, workdir: pathlib.Path) -> None:
    """Measures the workdir's tokenizer and writes everything.

    Raises:
        InputError: a stage is not finished, or the data is not prepared or has no split 'test'.
    """
    begun, folder = time.time(), workdir / "eval"
    refined = any(stage.task == REFINER for stage in config.stages.values())
    params, stats = stages.load_parts(config, workdir, PARTS + [REFINER] * refined)
    network = feature_weights.load(NETWORK, cache.directory(config))
    rows, scores = [], {}
    for split in SPLITS:
        try:
            pictures = read(config, split)
        except InputError:
            if split == SPLITS[0]:
                raise
            print(f"dina: codec: no split {split!r} in this data; left out", flush=True)
            continue
        measured = Measured(split, pictures, Fidelity(pictures["image"], NETWORK, network), folder)
        codes = measure(config.vision, {"params": params, "stats": stats}, measured)
        if split == SPLITS[0]:
            write(folder / "codebooks.json", json.dumps(health(config.vision, pictures["image"], codes), indent=1))
        rows, scores = rows + measured.rows, scores | measured.scores
    write(folder / "pictures.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    write(folder / "scores.json", json.dumps(scores, indent=1))
    record = {"seconds": round(time.time() - begun, 1), "peak_memory_mib": round(run_metrics.peak_memory_mib()), "skipped": ""}
    write(folder / "stage.json", json.dumps(record, indent=1))


def measure(config_vision, variables, measured: Measured) -> list[np.ndarray]:
    """Takes the pictures of a split through every codec; returns their codes."""
    images, sizes, split = measured.pictures["image"], config_vision.quantizer.sizes, measured.split
    codes = tokenize_images(config_vision, variables, images)
    few = images[:_TIMED]
    measured.scores[f"encode_ms_{split}"] = _milliseconds(lambda: tokenize_images(config_vision, variables, few), len(few))
    grids = [(image.shape[0] // preprocess.CELL, image.shape[1] // preprocess.CELL) for image in images]
    for levels in sorted({n for n in LEVELS if n < len(sizes)} | {len(sizes)}):
        made = detokenize.detokenize(config_vision, variables, codes, grids, levels=levels, refine="none")
        room = [code_bytes(len(code), sizes, levels) for code in codes]
        measured.add("dina", levels, made, room)
        for codec in image_codecs.QUALITIES if levels in COMPARED else ():
            found = [image_codecs.at_bytes(image, codec, size) for image, size in zip(images, room, strict=True)]
            measured.add(codec, levels, [coded.image for coded in found], [coded.payload_bytes for coded in found])
        print(f"dina: codec: {split}: {levels} levels done", flush=True)
    if REFINER in variables["params"]:
        made = detokenize.detokenize(config_vision, variables, codes, grids, refine="flow")
        measured.add("refined", len(sizes), made, [code_bytes(len(code), sizes, len(sizes)) for code in codes])
    decode = lambda: detokenize.detokenize(config_vision, variables, codes[:_TIMED], grids[:_TIMED], refine="none")
    measured.scores[f"decode_ms_{split}"] = _milliseconds(decode, len(few))
    return codes


def health(config_vision, images: Sequence[np.ndarray], codes: Sequence[np.ndarray]) -> dict[str, Any]:
    """Usage and perplexity over all cells, and over those of more than one colour, and what perplexity could be at most."""
    every, busy = np.concatenate(codes), np.concatenate([busy_cells(image) for image in images])
    seen = np.array([hashlib.blake2b(cell.tobytes(), digest_size=16).digest() for image in images for cell in cells_of(image)])
    sizes, found = config_vision.quantizer.sizes, {}
    for name, chosen in (("visual", np.ones_like(busy)), ("visual_busy", busy)):
        counts = np.unique(seen[chosen], return_counts=True)[1]
        bounds = {size: perplexity_bound(counts, size) if chosen.any() else 1.0 for size in set(sizes)}
        found[name] = metrics.codebook_statistics(every[chosen], sizes) | {"bound": [bounds[size] for size in sizes]}
    return found


def _milliseconds(work, count: int) -> float:
    """Milliseconds an item of the second of two calls: the first compiles."""
    work()
    begun = time.perf_counter()
    work()
    return round(1000 * (time.perf_counter() - begun) / count, 2)


def write(path: pathlib.Path, text: str) -> None:
    """A whole file or none, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def command(argv: list[str], prog: str, about: str, work: Callable[[Any, pathlib.Path], None]) -> int:
    """The command line of scores of one experiment: `work(config, workdir)`."""
    parser = argparse.ArgumentParser(prog=prog, description=about.splitlines()[0])
    parser.add_argument("--config", required=True, help="experiments/X.py[:variant,key=value,...]")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    args = parser.parse_args(argv)
    config = configs.load(args.config)
    settle(config)
    work(config, args.workdir)
    return 0


def main(argv: list[str]) -> int:
    """Command line."""
    return command(argv, "python -m dina.eval.codec", __doc__, evaluate)


if __name__ == "__main__":
    configs.run_main(main)
