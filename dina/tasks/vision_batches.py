"""Training batches of packed images, shared by the vision stages V0, V1, V2 and V4.

Every stage sees the same shapes: rows of `vision.pack.cells` merged cells filled with whole images of any size, so one
program is compiled and little of it is padding. Which records share a row is a plan: each epoch's records are shuffled,
packed window by window (best fit, largest first), and the rows shuffled again; step n takes rows n*B..(n+1)*B-1 of
the endless list of epochs. A batch is a pure function of (config, stage, step).

Letters: B rows, P patches and N = P/4 cells of a row, I images of a row, R records, S side of a digit's box.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Int32
from ml_collections import ConfigDict

from dina.config import InputError
from dina.data import sources
from dina.tasks.base import Batches
from dina.tasks.vision_augment import bend_digits, crop_views, zoom_views
from dina.vision import preprocess

FIELDS = ("digit", "size", "top", "left", "aligned", "source")  # of digits; other data has none of them, or `caption`
AUGMENT = ("none", "affine", "zoom")
PLAN_WINDOW = 512  # records packed together: rows are > 97 % full from about 256 on
_LAST: dict[tuple, ImageTable] = {}  # what `image_table` returned last: the stages of a process mostly want the same


@dataclasses.dataclass(frozen=True)
class ImageTable:
    """All records of a split, decoded and resized, in memory, which is cheaper than decoding every step.

    Digits take tens of MB, the stamps 2.0 GB: 2,828 pictures of 448 to 504 px a side, about 0.7 MB each. Sets larger than
    memory are not for it yet.

    Attributes:
        images: uint8 [H, W, 3], sides multiples of 28.
        fields: name of `FIELDS` -> int32 [R].
        grid: [R, 2] (h, w) in merged cells; smaller than the image where a part of it is shown (`zoom_views`).
        captions: text of each record; empty where the data has none.
    """

    images: list[np.ndarray]
    fields: dict[str, np.ndarray]
    grid: Int32[np.ndarray, "R 2"]
    captions: tuple[str, ...] = ()


def make_table(columns: Mapping, min_pixels: int, max_pixels: int) -> ImageTable:
    """Image records that are in memory as columns (dina/data/sources.py); see `read_table`."""
    return read_table((dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)), min_pixels, max_pixels)


def read_table(records: Iterable[Mapping], min_pixels: int, max_pixels: int) -> ImageTable:
    """Image records, resized one by one where their size asks for it; the originals are not kept.

    Raises:
        InputError: an image that preprocessing refuses; the message names the record.
    """
    images, columns = [], collections.defaultdict(list)
    for index, record in enumerate(records):
        images.append(preprocess.resize_image(record["image"], preprocess.CELL, min_pixels, max_pixels, f"image record {index}"))
        for name in (*FIELDS, "caption"):
            if name in record:
                columns[name].append(record[name])
    grid = np.array([image.shape[:2] for image in images], np.int32).reshape(-1, 2) // preprocess.CELL
    fields = {name: columns[name] for name in FIELDS if name in columns and not isinstance(columns[name][0], str)}
    fields = {name: np.asarray(values, np.int32) for name, values in fields.items()}
    return ImageTable(images, fields, grid, tuple(columns["caption"]))


def image_table(config, split: str) -> ImageTable:
    """The image records of a split of the experiment's prepared data; the table is shared, its arrays are read-only.

    Raises:
        InputError: as `sources.open_source` and `read_table`, or the split is empty.
    """
    bounds = config.vision.min_pixels, config.vision.max_pixels
    key = (str(sources.cache_path(config)), split, *bounds)
    if key not in _LAST:
        _LAST.clear()  # first, so that two tables are never in memory
        source = sources.open_source(config, "images", split)
        if not len(source):
            raise InputError(f"data split {split!r} of images has no records")
        table = read_table((source[index] for index in range(len(source))), *bounds)
        for array in (*table.images, *table.fields.values(), table.grid):
            array.flags.writeable = False
        _LAST[key] = table
    return _LAST[key]


def with_views(table: ImageTable, views: int, seed: int) -> ImageTable:
    """The table and, behind it, smaller canvases cut out of its images (vision_augment.crop_views)."""
    images, fields = crop_views(table.images, table.fields, views, seed)
    grid = np.array([image.shape[:2] for image in images], np.int32).reshape(-1, 2) // preprocess.CELL
    both = {name: np.concatenate([values, fields[name]]) for name, values in table.fields.items()}
    return ImageTable([*table.images, *images], both, np.concatenate([table.grid, grid]))


def with_parts(table: ImageTable, side: int, parts: int) -> ImageTable:
    """The records as parts of at most `side` x `side` cells, `parts` entries an image; `zoom_views` chooses which part.

    Rows of small parts cost less than rows of whole images, for attention grows with the square of a row, and more
    images share a step.
    """
    grid = np.repeat(np.minimum(table.grid, side), parts, axis=0)
    again = lambda values: [value for value in values for _ in range(parts)]
    fields = {name: np.repeat(values, parts) for name, values in table.fields.items()}
    return ImageTable(again(table.images), fields, grid, tuple(again(table.captions)))


def pack_rows(
    areas: Int32[np.ndarray, "R"], order: Int32[np.ndarray, "M"], cells: int, max_images: int, window: int = PLAN_WINDOW
) -> Int32[np.ndarray, "rows I"]:
    """Fills rows of `cells` with records, at most `max_images` each.

    Args:
        areas: cells of each record.
        order: record numbers in the order in which they are taken; each is placed exactly once.
        cells, max_images: budgets of a row.
        window: how many records are packed together, largest first.

    Returns:
        Record numbers per row, -1 where unused.

    Raises:
        InputError: a record is larger than a row.
    """
    if len(order) and areas[order].max() > cells:
        raise InputError(
            f"an image of {areas[order].max()} cells does not fit a row of {cells}: raise config key vision.pack.cells or, where "
            "it is set, the stage's options.cells; or lower vision.max_pixels"
        )
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        chunk = order[start : start + window]
        open_rows: list[list[list[int]]] = [[] for _ in range(cells + 1)]  # by free cells
        for record in chunk[np.argsort(-areas[chunk], kind="stable")]:
            area = int(areas[record])
            free = next((f for f in range(area, cells + 1) if open_rows[f]), None)
            if free is None:
                row, free = [], cells
                rows.append(row)
            else:
                row = open_rows[free].pop()
            row.append(int(record))
            if len(row) < max_images and free > area:
                open_rows[free - area].append(row)
    table = np.full((len(rows), max_images), -1, np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def data_options() -> dict:
    """`stage.options` that say what a stage sees, shared by the vision tasks.

    augment, canvas_power: as of `VisionBatches`. parts, part_side: as of `with_parts`; 0 parts = whole images, more go with
    augment='zoom'. cells, images: of a row; 0 = as in `vision.pack`.
    """
    return {"augment": "none", "canvas_power": 0.0, "parts": 0, "part_side": 8, "cells": 0, "images": 0}


def make_batches(config, stage, options, table: ImageTable | None = None) -> VisionBatches:
    """Training batches of a stage with the options of `data_options`; `table` stands in for the prepared data.

    Raises:
        InputError: parts without augment='zoom', which shows them, or the reverse; or as `image_table`.
    """
    if (options.parts > 0) != (options.augment == "zoom"):
        raise InputError(
            f"stage options parts={options.parts} and augment={options.augment!r} do not go together: parts of images are "
            "shown by augment='zoom', which needs parts of 1 or more; whole images by 'none' or 'affine' with parts=0"
        )
    table = image_table(config, "train") if table is None else table
    if options.parts:
        table = with_parts(table, options.part_side, options.parts)
    pack = config.vision.pack
    row = ConfigDict({name: options[name] or pack[name] for name in ("cells", "images")})
    return VisionBatches(config, stage, table, options.augment, options.canvas_power, row)


class VisionBatches(Batches):
    """Rows of packed images.

    `batch(step)` returns, with a leading dimension B: the arrays of `preprocess.pack_images` (patches, segment, row,
    col, window, cell_segment, grid), per image [B, I] `record` (-1 = none) and the table's fields (-1 where there is no
    image), and `example` [B] (the global number of the row).

    Args:
        config: the experiment (uses seed and vision).
        stage: uses task (as the name of the random stream) and batch.
        table: the decoded records.
        augment: 'none', 'affine' (vision_augment.bend_digits) or 'zoom' (zoom_views), drawn anew for every (step, image).
        pack: {cells, images} of a row; None = `vision.pack`.
        canvas_power: an epoch keeps a record with probability (cells / cells that its digit needs) ** canvas_power;
            0 keeps all. A step costs in proportion to cells, so -0.7 shows more digits, large and small alike, in the
            same time, and still some on large canvases.
    """

    def __init__(self, config, stage, table: ImageTable, augment: str = "none", canvas_power: float = 0.0,
                 pack=None):
        if augment not in AUGMENT:
            raise ValueError(f"augment {augment!r} is not one of {', '.join(AUGMENT)}")
        if "digit" not in table.fields and (augment == "affine" or canvas_power):
            raise InputError("augment='affine' and canvas_power are about digits; this data has none: use 'zoom' or 'none', and 0")
        self.vision, self.table, self.augment = config.vision, table, augment
        self.pack = config.vision.pack if pack is None else pack
        self.rows = stage.batch
        self.stream = (config.seed, zlib.crc32(stage.task.encode()))
        self.areas = table.grid.prod(axis=1).astype(np.int32)
        self.keep = np.ones(len(self.areas))
        if canvas_power:
            needed = np.ceil(table.fields["size"] / preprocess.CELL) ** 2
            self.keep = np.maximum(1.0, self.areas / needed) ** min(0.0, canvas_power)
        self._ends = [0]
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)

    def _plan(self, epoch: int) -> Int32[np.ndarray, "rows I"]:
        rng = np.random.default_rng([*self.stream, 0, epoch])
        order = rng.permutation(len(self.areas))
        order = order[rng.random(len(order)) < self.keep[order]]
        rows = pack_rows(self.areas, order, self.pack.cells, self.pack.images)
        return rows[rng.permutation(len(rows))]

    def plan(self, step: int) -> Int32[np.ndarray, "B I"]:
        """Record numbers of the step's rows, -1 where unused."""
        first, last = step * self.rows, (step + 1) * self.rows
        while self._ends[-1] < last:
            self._ends.append(self._ends[-1] + len(self._epoch(len(self._ends) - 1)))
        epoch = int(np.searchsorted(self._ends, first, side="right")) - 1
        parts = []
        while first < last:
            start, stop = first - self._ends[epoch], min(last, self._ends[epoch + 1]) - self._ends[epoch]
            parts.append(self._epoch(epoch)[start:stop])
            first, epoch = self._ends[epoch] + stop, epoch + 1
        return np.concatenate(parts)

    def rng(self, step: int, purpose: int) -> np.random.Generator:
        """The random stream of one purpose (1 augmentation, further ones the task's) at one step."""
        return np.random.default_rng([*self.stream, purpose, step])

    def batch(self, step: int) -> dict[str, np.ndarray]:
        record_BI = self.plan(step)
        slots = np.argwhere(record_BI >= 0)
        records = record_BI[slots[:, 0], slots[:, 1]]
        images = [self.table.images[r] for r in records]
        if self.augment == "affine":
            fields = {name: values[records] for name, values in self.table.fields.items()}
            images = bend_digits(images, fields, self.rng(step, 1))
        if self.augment == "zoom":
            images = zoom_views(images, self.table.grid[records], self.rng(step, 1))
        out = self._assemble(record_BI, images)
        out |= {name: np.where(record_BI >= 0, values[record_BI], -1) for name, values in self.table.fields.items()}
        example = step * self.rows + np.arange(self.rows)
        return out | {"record": record_BI, "example": (example % 2**31).astype(np.int32)}

    def _assemble(self, record_BI, images) -> dict[str, np.ndarray]:
        """Lays the images (in row order) into arrays that are written once."""
        pack, window = self.pack, self.vision.encoder.window_cells
        patches = np.zeros((len(record_BI), pack.cells * 4, preprocess.PATCH_DIM), np.float32)
        layouts, number = [], 0
        for row, records in enumerate(record_BI):
            records = records[records >= 0]
            grids = [tuple(g) for g in self.table.grid[records].tolist()]
            layouts.append(preprocess.pack_layout(grids, pack.cells, pack.images, window))
            start = 0
            for h, w in grids:
                patches[row, start : start + 4 * h * w] = preprocess.image_to_patches(images[number])
                start, number = start + 4 * h * w, number + 1
        return {name: np.stack([layout[name] for layout in layouts]) for name in layouts[0]} | {"patches": patches}
