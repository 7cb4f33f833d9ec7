"""Stamps: the visual tokenizer on real pictures, from captions to pixels at 28x.

Run card
    make stamps                                  packages, training, scores and page: runs/stamps/report.html
    python -m dina.train --config=experiments/stamps.py --workdir=DIR            the stages alone
    python -m dina.train --config=experiments/stamps.py:smoke --workdir=DIR      each in a few steps
Variants: refiner (a last stage V4, by flow matching; the page then shows its pictures as well), smoke (tiny numbers, comes last).
Data: captioned stamps, drawings and clip art from Debian packages (dina/data/stamps.py), split by picture and caption;
photographs of scikit-image and scikit-learn as an out-of-domain test. Hardware: 2 CPU cores.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from dina import tokenize
from dina.config import check_name
from dina.data import stamps
from dina.text import tokenizer as text
from dina.vision import config as vision
from experiments.digits import running, stage

ORDER = ("V0", "V1", "V2", "V2w")
# Rows of one part of 224 x 224 pixels: a step on whole pictures sees two for the time of eight parts.
PARTS = {"augment": "zoom", "parts": 4, "part_side": 8, "cells": 64, "images": 4}


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is a comma list of variant names."""
    c = ConfigDict()
    c.name, c.seed = "stamps", 17
    c.order = ORDER
    c.jobs = ("data", *ORDER)
    running(c)
    c.data, c.text, c.tokenize = stamps.default_config(), text.default_config(), tokenize.default_config()
    c.data.update({"side": 476, "fit": "area", "native_pixels": 448 * 448})
    c.vision = vision.default_config()
    # Pictures are read at 448 x 448 pixels or a little more: 256 to 324 cells.
    c.vision.update({"min_pixels": 448 * 448, "max_pixels": 504 * 504, "pack": {"cells": 324, "images": 4}})
    c.vision.encoder.update({"width": 128, "depth": 6, "ff": 344, "window_cells": 4, "full_layers": (2, 5)})
    c.vision.bridge.out_dim = 256
    c.vision.align.text_tokens = 192
    c.vision.quantizer.update({"sizes": (1024,) * 8, "dim": 128, "decay": 0.97})
    c.vision.feature_decoder.width = 256
    c.vision.pixel_decoder.update({"width": 192, "depth": 6, "heads": 6, "ff": 512})
    c.stages = ConfigDict(vision_stages())
    for name in filter(None, arg.split(",")):
        check_name(name, VARIANTS, "--config: variant")
        VARIANTS[name](c)
    return c


def vision_stages() -> dict[str, ConfigDict]:
    """V0 captions, V1 quantizer, V2 pixel decoder on parts of pictures, V2w the same on whole ones."""
    seen = {"vision_encoder": "V0"}
    coded = seen | {"vision_quantizer": "V1"}
    stages_ = {
        "V0": stage("captions", 600, 8, 2e-3, ("vision_encoder", "align_lm"), {"text": 0.3, "pixels": 5.0}, ema_decay=0.99,
                    options=PARTS),
        "V1": stage("visual_tokens", 100, 64, 3e-4, ("vision_quantizer",), {"commit": 0.25, "cosine": 1.0, "smooth_l1": 1.0},
                    init_from=seen, options=PARTS | {"kmeans_vectors": 32768, "pixel_share": 0.75}),
        "V2": stage("pixels", 750, 8, 2e-3, ("pixel_decoder",), {"l1": 1.0, "l2": 1.0}, init_from=coded,
                    freeze_stats=("vision_quantizer",), ema_decay=0.99,
                    options=PARTS | {"truncate": 0.3, "align_stride": 0}),
        "V2w": stage("pixels", 60, 2, 3e-4, ("pixel_decoder",), {"l1": 1.0, "l2": 1.0},
                     init_from=coded | {"pixel_decoder": "V2"}, freeze_stats=("vision_quantizer",), ema_decay=0.98,
                     options={"truncate": 0.3, "align_stride": 0}),
    }
    stages_["V0"].optimizer.weight_decay = 0.05
    stages_["V0"].optimizer.muon = ("vision_encoder/vit/blocks/*/kernel", "vision_encoder/bridge/fc2/kernel")
    for name in ("V2", "V2w"):
        stages_[name].optimizer.muon = ("pixel_decoder/layers/*/kernel", "pixel_decoder/unmerge*/kernel")
    return stages_


def refiner(c: ConfigDict) -> None:
    """One more stage: V4, the refiner, on parts of pictures; the stages before it stay what they are."""
    before = {"vision_encoder": "V0", "vision_quantizer": "V1", "pixel_decoder": "V2w"}
    c.stages.V4 = stage("refiner", 150, 4, 2e-3, ("refiner",), {"velocity": 1.0}, init_from=before,
                        freeze_stats=("vision_quantizer",), ema_decay=0.98, options=PARTS)
    c.order, c.jobs = (*c.order, "V4"), (*c.jobs, "V4")


def smoke(c: ConfigDict) -> None:
    """A few steps of everything on few records."""
    c.data = stamps.smoke_config()
    c.checkpoint.every, c.log.every = 2, 1
    for s in c.stages.values():
        s.steps, s.batch = 4, 2
    c.vision.update({"min_pixels": 112 * 112, "max_pixels": 140 * 140, "pack": {"cells": 25, "images": 2}})
    c.vision.encoder.update({"depth": 2, "full_layers": (1,)})
    c.vision.pixel_decoder.depth = 1
    c.stages.V1.options.kmeans_vectors = 1024


VARIANTS = {"refiner": refiner, "smoke": smoke}
