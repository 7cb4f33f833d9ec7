"""MNIST digits on canvases of many sizes and shapes: the image records of the embedded default.

Every source image is placed several times by a rule that depends on (seed, split, source, placement) alone. Most
placements stand where the grammar has words (14-pixel grid), the others at an arbitrary pixel offset (`aligned` 0).
Legend: S x S pixels of a digit, H x W of a canvas.
"""

from __future__ import annotations

import collections
import io
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np
import scipy.ndimage
from jaxtyping import UInt8
from PIL import Image

from dina.data import mnist, phrases

_SPLIT_IDS = {name: i for i, name in enumerate(mnist.SPLITS)}


def default_config() -> ml_collections.ConfigDict:
    """Placements per source image and how they are drawn.

    `canvas_power`: a canvas of n cells is drawn with weight n ** canvas_power; -0.7 gives 4.7 cells on average (7.2 if
    uniform), because a training step costs in proportion to cells. `train.unaligned` is a share of all placements;
    valid and test give whole placements of each type, `held_out` on the canvas that training never shows the digit on.
    `train.straddle`: an aligned placement that crosses cell borders is drawn with this weight, others with 1. Where a
    digit stands is told by which cells hold which part of it, and large digits across borders are rare: with 1 they are
    4 % of placements, and 0.15 of them were painted right (20 prompts) when 0.91 of other large ones were.
    """
    return ml_collections.ConfigDict({
        "seed": 2, "canvas_power": -0.7,
        "train": {"placements": 4, "unaligned": 0.2, "straddle": 4.0},
        "valid": {"aligned": 1, "unaligned": 1, "held_out": 0},
        "test": {"aligned": 2, "unaligned": 1, "held_out": 1},
        # Light, and only for train placements after the first, which show the image as it is.
        "augment": {"rotate_degrees": 10.0, "scale": 0.08, "shift_pixels": 1.0},
    })


def augment(digit_SS: UInt8[np.ndarray, "S S"], rng: np.random.Generator,
            config: ml_collections.ConfigDict) -> UInt8[np.ndarray, "S S"]:
    """Rotates, scales and shifts about the centre, each uniform within plus or minus the config's bound."""
    angle = np.deg2rad(rng.uniform(-config.rotate_degrees, config.rotate_degrees))
    scale = 1 + rng.uniform(-config.scale, config.scale)
    shift = rng.uniform(-config.shift_pixels, config.shift_pixels, 2)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    center = (np.array(digit_SS.shape) - 1) / 2
    moved = scipy.ndimage.affine_transform(digit_SS.astype(np.float32), matrix, center - matrix @ (center + shift),
                                           order=1)
    return np.clip(np.round(moved), 0, 255).astype(np.uint8)


def paste(digit_SS: UInt8[np.ndarray, "S S"], canvas: tuple[int, int], size: int, top: int,
          left: int) -> UInt8[np.ndarray, "H W"]:
    """The digit, enlarged (bicubic) to `size` pixels if need be, on a black canvas of (rows, cols) cells."""
    if size != digit_SS.shape[0]:
        digit_SS = np.asarray(Image.fromarray(digit_SS).resize((size, size), Image.Resampling.BICUBIC))
    canvas_HW = np.zeros((canvas[0] * phrases.CELL, canvas[1] * phrases.CELL), np.uint8)
    canvas_HW[top:top + size, left:left + size] = digit_SS
    return canvas_HW


def _draw(options: list, rng: np.random.Generator, power: float | None = None):
    if power is None:
        return options[rng.integers(len(options))]
    weights = np.array([float(rows * cols) ** power for rows, cols in options])
    return options[rng.choice(len(options), p=weights / weights.sum())]


def _aligned(canvas: tuple[int, int], rng: np.random.Generator, straddle: float) -> tuple[int, int, int]:
    """Draws (size, top, left): sizes alike but for the weight of the placements that cross cell borders."""
    options = phrases.placements(canvas)
    counts = collections.Counter(size for size, *_ in options)
    weights = np.array([(straddle if top % phrases.CELL or left % phrases.CELL else 1.0) / counts[size]
                        for size, top, left in options])
    return options[rng.choice(len(options), p=weights / weights.sum())]


def _place(kind: str, digit: int, rng: np.random.Generator, power: float,
           straddle: float) -> tuple[tuple[int, int], int, int, int]:
    """Draws (canvas, size, top, left) of one placement; kind is 'aligned', 'unaligned' or 'held_out'."""
    canvases = [canvas for canvas in phrases.CANVASES if phrases.is_held_out(digit, canvas) == (kind == "held_out")]
    if kind == "unaligned":
        canvases = [canvas for canvas in canvases if canvas != (1, 1)]
    canvas = _draw(canvases, rng, power)
    if kind != "unaligned":
        return canvas, *_aligned(canvas, rng, straddle)
    size = _draw([px for px in phrases.sizes(canvas) if phrases.CELL * max(canvas) > px], rng)
    while True:  # an offset on the 14-pixel grid in both axes would be an aligned one
        top, left = (int(rng.integers(phrases.CELL * cells - size + 1)) for cells in canvas)
        if top % 14 or left % 14:
            return canvas, size, top, left


def _plan(config: ml_collections.ConfigDict, split: str, rng: np.random.Generator) -> list[str]:
    """Kinds of the placements of one source image."""
    if split == "train":
        share = config.train.unaligned
        return ["unaligned" if rng.random() < share else "aligned" for _ in range(config.train.placements)]
    counts = config[split]
    return ["aligned"] * counts.aligned + ["unaligned"] * counts.unaligned + ["held_out"] * counts.held_out


def _png(canvas_HW: UInt8[np.ndarray, "H W"]) -> io.BytesIO:
    out = io.BytesIO()
    # Level 1: the files are small anyway, and level 6 takes twice the time.
    Image.fromarray(np.repeat(canvas_HW[..., None], 3, -1)).save(out, "PNG", compress_level=1)
    out.seek(0)
    return out


def records(config: ml_collections.ConfigDict, split: str) -> Iterator[dict[str, Any]]:
    """Yields the image records of a split; `image` is an open PNG, RGB.

    Args:
        config: the data config: `mnist` and `images`.
        split: 'train', 'valid' or 'test'.
    """
    pixels, labels = mnist.load()
    straddle = config.images.train.straddle if split == "train" else 1.0
    for source in mnist.split(config.mnist, labels)[split]:
        digit = int(labels[source])
        rng = np.random.default_rng((config.images.seed, _SPLIT_IDS[split], int(source)))
        for number, kind in enumerate(_plan(config.images, split, rng)):
            digit_SS = pixels[source]
            if split == "train" and number:
                digit_SS = augment(digit_SS, rng, config.images.augment)
            canvas, size, top, left = _place(kind, digit, rng, config.images.canvas_power, straddle)
            yield {"image": _png(paste(digit_SS, canvas, size, top, left)), "digit": digit, "source": int(source),
                   "size": size, "top": top, "left": left, "aligned": int(kind != "unaligned"), "split": split}
