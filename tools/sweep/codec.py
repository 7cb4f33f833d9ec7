"""A trained cell as what is measured of it: pictures to features, features to codes, codes of any depth to pictures.

Features are those of the frozen encoder, which many cells share: they are made once per encoder and choice of pictures
in a process. Depth d means the first d levels; the others are absent (-1), so that one program serves all depths.

Letters: N cells, R images, L levels, D code width, Z feature width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from dina import stages
from dina.quantize import rvq
from dina.tasks.vision_batches import image_table
from dina.vision import bridge, detokenize, preprocess, tokenizer

ROWS = 16  # packs that go through the encoder or the decoder at once
VECTORS = 4096  # that are quantised at once
_FEATURES: dict[tuple, list[np.ndarray]] = {}  # what `features` has made in this process, newest last
_KEPT = 8


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Some pictures of a split.

    Attributes:
        images: uint8 [H, W, 3], sides multiples of 28.
        grids: (h, w) in cells.
        identity: hash of their pixels.
    """

    images: list[UInt8[np.ndarray, "H W 3"]]
    grids: list[tuple[int, int]]
    identity: str

    @property
    def cells(self) -> list[int]:
        """Cells of each picture."""
        return [h * w for h, w in self.grids]


def choose(config: ConfigDict, split: str, count: int, seed: int) -> Pictures:
    """At most `count` pictures of a split, drawn by `seed` alone."""
    table = image_table(config, split)
    numbers = np.random.default_rng([seed, *split.encode()]).permutation(len(table.images))[:count]
    images = [table.images[int(n)] for n in numbers]
    content = hashlib.sha256()
    for image in images:
        content.update(str(image.shape).encode() + np.ascontiguousarray(image).tobytes())
    return Pictures(images, [tuple(int(side) for side in table.grid[int(n)]) for n in numbers], content.hexdigest()[:16])


def packs(config_vision: ConfigDict, images: Sequence[np.ndarray], grids: Sequence[tuple[int, int]]):
    """Yields (image numbers of each row, stacked packs of at most ROWS rows) until all images are there."""
    areas, pack, window = [h * w for h, w in grids], config_vision.pack, config_vision.encoder.window_cells
    cells = detokenize.row_cells(config_vision, max(areas))
    plan = detokenize.first_fit(areas, cells, pack.images)
    rows = detokenize.row_count(config_vision, cells, len(plan), ROWS)
    for start in range(0, len(plan), rows):
        chunk = plan[start : start + rows] + [[]] * (start + rows - len(plan))
        parts = [preprocess.pack_images([images[n] for n in row], cells, pack.images, window) for row in chunk]
        yield chunk, {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def split_rows(chunk: Sequence[Sequence[int]], areas: Sequence[int], x_BN: np.ndarray, out: list) -> None:
    """Puts the cells of each image of packed rows into its place of `out`."""
    for row, numbers in enumerate(chunk):
        ends = np.cumsum([areas[n] for n in numbers])
        for number, end in zip(numbers, ends, strict=True):
            out[number] = x_BN[row, end - areas[number] : end]


class TokenizerCodec:
    """Encoder, quantizer and pixel decoder of the ordinary stages.

    Attributes:
        sizes: codes per level.
    """

    PARTS = ("vision_encoder", "vision_quantizer", "pixel_decoder")

    def __init__(self, config: ConfigDict, folder: pathlib.Path):
        params, stats = stages.load_parts(config, folder, list(self.PARTS))
        self.vision, self.variables = config.vision, {"params": params, "stats": stats}
        self.tokenizer = tokenizer.make_tokenizer(config.vision)
        self.cfg, self.sizes = self.tokenizer.rvq, self.tokenizer.rvq.sizes
        self._encoder = fingerprint(params["vision_encoder"])
        self.quantizer = {"params": {tokenizer.PART: params[tokenizer.PART]}, "stats": stats[tokenizer.PART]}

    def features(self, pictures: Pictures) -> list[Float[np.ndarray, "N Z"]]:
        """Continuous features of each picture's cells."""
        key = (self._encoder, pictures.identity)
        if key not in _FEATURES:
            out: list[Any] = [None] * len(pictures.images)
            for chunk, pack in packs(self.vision, pictures.images, pictures.grids):
                z_BNZ = np.asarray(bridge.encode(self.vision, self.variables["params"]["vision_encoder"], pack))
                split_rows(chunk, pictures.cells, z_BNZ, out)
            while len(_FEATURES) >= _KEPT:
                _FEATURES.pop(next(iter(_FEATURES)))
            _FEATURES[key] = out
        return _FEATURES[key]

    def search(self, pictures: Pictures) -> tuple[list[Int[np.ndarray, "N L"]], list[float]]:
        """Codes of each picture's cells, and the share of the vectors' energy that is left after each level."""
        run = lambda z_NZ, mask_N: _quantise(self.tokenizer, *self.quantizer.values(), z_NZ, mask_N)
        return search_all(run, self.features(pictures), self.sizes)

    def pictures(self, codes: Sequence[np.ndarray], grids: Sequence[tuple[int, int]], depth: int) -> list[np.ndarray]:
        """Pictures from the first `depth` levels."""
        cut = [np.where(np.arange(code.shape[1]) < depth, code, -1).astype(np.int32) for code in codes]
        return detokenize.detokenize(self.vision, self.variables, cut, grids, refine="none", rows=ROWS)

    def encoder_program(self, pictures: Pictures) -> tuple[Callable, tuple, int]:
        """(function of these arguments, its arguments, cells) of the encoder on one batch."""
        chunk, pack = next(packs(self.vision, pictures.images, pictures.grids))
        inputs = {name: pack[name] for name in tokenizer.ENCODER_INPUTS}
        apply = lambda params, pack: self.tokenizer.encoder.apply({"params": params}, pack)
        cells = int(sum(pictures.cells[n] for row in chunk for n in row))
        return apply, (self.variables["params"]["vision_encoder"], inputs), cells

    def search_program(self, depth: int) -> tuple[Callable, tuple, int]:
        """The same of projection and search of the first `depth` levels, on VECTORS features."""
        cfg = dataclasses.replace(self.cfg, sizes=self.sizes[:depth])
        stats = self.quantizer["stats"]
        books = {name: {book: stats[name][book] for book in cfg.books} for name in ("codebook", "in", "out") if name in stats}
        z_NZ = np.random.default_rng(0).standard_normal((VECTORS, self.vision.bridge.out_dim), np.float32)
        search = lambda params, books, z_NZ: rvq.encode(cfg, books, self.tokenizer.project(params, z_NZ))
        return search, (self.quantizer["params"], books, z_NZ), VECTORS


@functools.partial(jax.jit, static_argnums=0)
def _quantise(tokens: tokenizer.VisualTokenizer, params: Mapping, stats: Mapping, z_NZ, mask_N):
    """(codes, energy left after each level, energy) of the vectors that the mask keeps."""
    x_ND = tokens.project(params, z_NZ)
    return measured_search(tokens.rvq, stats, x_ND, mask_N)


def measured_search(cfg: rvq.RVQConfig, stats: Mapping, x_ND, mask_N):
    """Codes of vectors, the energy left after each level, and all of it; sums over the vectors that the mask keeps."""
    codes_NL = rvq.encode(cfg, stats, x_ND)
    square = lambda y_ND: jnp.sum(jnp.where(mask_N[:, None], y_ND, 0.0) ** 2)
    left = [square(x_ND - rvq.decode(cfg, stats, codes_NL, level + 1)) for level in range(cfg.levels)]
    return codes_NL, jnp.stack(left), square(x_ND)


def search_all(run: Callable, features: Sequence[np.ndarray], sizes: Sequence[int]) -> tuple[list[np.ndarray], list[float]]:
    """(codes of each picture, share of energy left after each level), VECTORS cells at a time.

    Args:
        run: (vectors, mask) -> as `measured_search`.
        features: of each picture's cells.
        sizes: codes per level.
    """
    x_NZ = np.concatenate(features)
    codes, left_L, total = [], np.zeros(len(sizes)), 0.0
    for start in range(0, len(x_NZ), VECTORS):
        part = x_NZ[start : start + VECTORS]
        filled = np.zeros((VECTORS, part.shape[1]), np.float32)
        filled[: len(part)] = part
        code_NL, energy_L, whole = jax.device_get(run(filled, np.arange(VECTORS) < len(part)))
        codes.append(code_NL[: len(part)])
        left_L, total = left_L + energy_L, total + float(whole)
    ends = np.cumsum([len(cells) for cells in features])[:-1]
    return np.split(np.concatenate(codes), ends), [float(v) for v in left_L / max(total, 1e-30)]


def fingerprint(tree: Any) -> str:
    """Hash of a tree of arrays."""
    content = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        content.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return content.hexdigest()[:16]
