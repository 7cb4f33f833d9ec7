"""Images of any sizes to codes: packed into rows of one static shape, a few rows at a time.

The counterpart of detokenize.py: an image larger than a row makes the rows of that call larger and fewer, nothing is tiled.

Letters: B rows of a call, N cells of a row, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from dina.vision import preprocess, tokenizer
from dina.vision.detokenize import first_fit, row_cells, row_count


def tokenize_images(
    config_vision: ConfigDict, variables: Mapping, images: Sequence[UInt8[np.ndarray, "*T H W 3"]], rows: int = 16
) -> list[Int[np.ndarray, "_ L"]]:
    """Codes of images, cells in raster order.

    Args:
        config_vision: the `vision` section.
        variables: {'params', 'stats'} with the parts vision_encoder and vision_quantizer.
        images: uint8, sides multiples of 28 (`preprocess.resize_image`); the pairs of a video's frames (`preprocess.frame_pairs`)
            are as many images [2, H, W, 3].
        rows: most packs encoded at once; see `row_count`.

    Returns:
        int32 [h*w, L] per image or pair, in order.

    Raises:
        ValueError: a side is no multiple of 28, or an image has another shape.
    """
    if not images:
        return []
    areas = [image.shape[-3] * image.shape[-2] // preprocess.CELL**2 for image in images]
    cells, most = row_cells(config_vision, max(areas)), config_vision.pack.images
    plan = first_fit(areas, cells, most)
    rows = row_count(config_vision, cells, len(plan), rows)
    out: list = [None] * len(images)
    for start in range(0, len(plan), rows):
        chunk = plan[start : start + rows] + [[]] * (start + rows - len(plan))
        packs = [preprocess.pack_images([images[n] for n in row], cells, most, config_vision.encoder.window_cells) for row in chunk]
        batch = {name: np.stack([pack[name] for pack in packs]) for name in packs[0]}
        codes_BNL = np.asarray(tokenizer.tokenize(config_vision, variables, batch))
        for row, numbers in enumerate(chunk):
            ends = np.cumsum([areas[n] for n in numbers])
            for number, end in zip(numbers, ends, strict=True):
                out[number] = codes_BNL[row, end - areas[number] : end]
    return out
