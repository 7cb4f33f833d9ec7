"""Small packs of random images and a tiny vision config, for the tests of tokenizer, decoders and tasks."""

import ml_collections
import numpy as np

from dina import stages
from dina.vision import config as vision_config
from dina.vision import preprocess


def tiny_config():
    """An experiment config whose vision part is as small as it can be."""
    vision = vision_config.default_config()
    vision.update({
        "pack": {"cells": 6, "images": 3},
        "encoder": {"width": 16, "depth": 2, "heads": 2, "ff": 24, "full_layers": (1,)},
        "bridge": {"out_dim": 12},
        "quantizer": {"sizes": (8, 8, 8), "dim": 6},
        "feature_decoder": {"width": 16},
        "pixel_decoder": {"width": 16, "depth": 2, "heads": 2, "ff": 24},
        "refiner": {"width": 24, "depth": 1, "heads": 2, "kv_heads": 1, "ff": 24, "cond_dim": 8, "prediction": "clean"},
    })
    return ml_collections.ConfigDict({"vision": vision, "seed": 0})


def stage(task, **options):
    """A stage of `task` with these options."""
    s = stages.default_stage()
    s.task, s.options = task, ml_collections.ConfigDict(options)
    return s


def batch(vision, rows, seed=0):
    """Stacked packs of random images; `rows` lists the grids of each row's images."""
    rng = np.random.default_rng(seed)
    packs = []
    for grids in rows:
        images = [rng.integers(0, 256, (28 * h, 28 * w, 3), dtype=np.uint8) for h, w in grids]
        packs.append(preprocess.pack_images(images, vision.pack.cells, vision.pack.images, vision.encoder.window_cells))
    out = {name: np.stack([pack[name] for pack in packs]) for name in packs[0]}
    real = out["grid"].prod(-1) > 0
    out["digit"] = np.where(real, rng.integers(0, 10, real.shape), -1).astype(np.int32)
    return out | {"example": np.arange(len(rows), dtype=np.int32) + 100 * seed}


def patch_slices(vision, grids):
    """Slices of a row's patches, one per image."""
    ends = np.cumsum([0] + [4 * h * w for h, w in grids])
    return [slice(a, b) for a, b in zip(ends, ends[1:])]
