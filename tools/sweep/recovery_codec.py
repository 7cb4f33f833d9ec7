"""A trained recovery cell as what is measured of it; the counterpart of codec.py. Letters as in recovery.py."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from dina import checkpoint, stages
from dina.quantize import rvq
from dina.tasks.base import merge_options
from dina.vision import pixel_decoder, preprocess, tokenizer
from tools.sweep.codec import VECTORS, Pictures, measured_search, packs, search_all, split_rows
from tools.sweep.recovery import READER, default_options, make_reader, shuffled


class RecoveryCodec:
    """What tools/sweep/measure.py measures of a recovery cell; `sizes` is empty where features are read."""

    def __init__(self, config: ConfigDict, folder: pathlib.Path):
        params, stats = stages.load_parts(config, folder, ["vision_encoder", pixel_decoder.PART])
        name = config.order[-1]
        self.options = merge_options(default_options(), config.stages[name])
        self.vision, self.params = config.vision, params
        self.reader = make_reader(config.vision, self.options.source)
        self.stats = checkpoint.result(folder / name)["stats"][READER]
        self.decoder = pixel_decoder.make_pixel_decoder(config.vision)
        self.cfg = self.reader.rvq
        self.sizes = self.cfg.sizes if self.options.read == "codes" else ()
        self._search = jax.jit(lambda books, x_MZ, mask_M: measured_search(self.cfg, books, x_MZ, mask_M))
        self._run = jax.jit(self.reader.features)
        self._paint = jax.jit(lambda params, x_BNZ, pack: self.decoder.apply({"params": params}, x_BNZ, pack))

    def features(self, pictures: Pictures) -> list[Float[np.ndarray, "N Z"]]:
        """Features of each picture's cells, those of other cells where the source is shuffled."""
        out: list[Any] = [None] * len(pictures.images)
        for chunk, pack in packs(self.vision, pictures.images, pictures.grids):
            x_BNZ = self._run(self.params, self.stats, {name: pack[name] for name in tokenizer.ENCODER_INPUTS})
            if self.options.source == "shuffled":
                x_BNZ = shuffled(jax.random.key(0), x_BNZ, jnp.asarray(pack["cell_segment"] > 0))
            split_rows(chunk, pictures.cells, np.asarray(x_BNZ), out)
        return out

    def search(self, pictures: Pictures) -> tuple[list[np.ndarray], list[float]]:
        """Codes and the energy left; where features are read, those and nothing."""
        features = self.features(pictures)
        if not self.sizes:
            return features, []
        return search_all(lambda x_MZ, mask_M: self._search(self.stats, x_MZ, mask_M), features, self.sizes)

    def pictures(self, codes: Sequence[np.ndarray], grids: Sequence[tuple[int, int]], depth: int) -> list[np.ndarray]:
        """Pictures from the first `depth` levels, or from features."""
        blank = [np.zeros((28 * h, 28 * w, 3), np.uint8) for h, w in grids]  # of which only the layout is used
        out: list[Any] = [None] * len(grids)
        for chunk, pack in packs(self.vision, blank, grids):
            x_BNZ = np.zeros((*pack["cell_segment"].shape, self.cfg.dim), np.float32)
            for row, numbers in enumerate(chunk):
                vectors = [self._vectors(codes[n], depth) for n in numbers]
                if vectors:
                    joined = np.concatenate(vectors)
                    x_BNZ[row, : len(joined)] = joined
            made_BPV = np.asarray(self._paint(self.params[pixel_decoder.PART], x_BNZ, pack))
            for row, numbers in enumerate(chunk):
                at = 0
                for n in numbers:
                    area = 4 * grids[n][0] * grids[n][1]
                    out[n] = preprocess.patches_to_image(made_BPV[row, at : at + area], grids[n])
                    at += area
        return out

    def _vectors(self, code: np.ndarray, depth: int) -> np.ndarray:
        if not self.sizes:
            return code
        books = self.stats["codebook"]
        return sum(np.asarray(books[self.cfg.book(level)])[code[:, level]] for level in range(depth))

    def encoder_program(self, pictures: Pictures) -> tuple[Callable, tuple, int]:
        """As TokenizerCodec."""
        chunk, pack = next(packs(self.vision, pictures.images, pictures.grids))
        inputs = {name: pack[name] for name in tokenizer.ENCODER_INPUTS}
        return self.reader.features, (self.params, self.stats, inputs), int(sum(pictures.cells[n] for row in chunk for n in row))

    def search_program(self, depth: int) -> tuple[Callable, tuple, int]:
        """As TokenizerCodec."""
        cfg = dataclasses.replace(self.cfg, sizes=self.sizes[:depth])
        books = {"codebook": {book: self.stats["codebook"][book] for book in cfg.books}}
        x_MZ = np.random.default_rng(0).standard_normal((VECTORS, cfg.dim), np.float32)
        return lambda books, x: rvq.encode(cfg, books, x), (books, x_MZ), VECTORS
