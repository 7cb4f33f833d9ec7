"""Defaults of `config.vision`: the laptop-sized visual tokenizer (the big one: tokenizers.md section 0)."""

from __future__ import annotations

import importlib

from ml_collections import ConfigDict

# Sub-configs that live beside the code they describe: key -> (module, function).
PARTS = {
    "quantizer": ("dina.vision.tokenizer", "default_quantizer_config"),
    "feature_decoder": ("dina.vision.tokenizer", "default_feature_decoder_config"),
    "pixel_decoder": ("dina.vision.pixel_decoder", "default_pixel_decoder_config"),
    "refiner": ("dina.vision.refiner", "default_refiner_config"),
}


def encoder_config() -> ConfigDict:
    """`config.vision` without the parts of `PARTS`: what preprocessing, encoder, bridge and stage V0 need."""
    return ConfigDict(
        {
            "patch": 14,
            "merge": 2,
            "temporal": 2,
            # Images are read at 1 to 16 cells of 28 px (released: 64 to 4,096).
            "min_pixels": 28 * 28,
            "max_pixels": 16 * 28 * 28,
            # A row of the encoder's input: cells of it, and at most so many images.
            "pack": {"cells": 16, "images": 12},
            "encoder": {
                "width": 96,
                "depth": 6,
                "heads": 4,
                "ff": 256,
                "window_cells": 2,
                "full_layers": (2, 5),
                "pixels": "float32",  # 'bfloat16': rounded as the released code does
                # Recomputing costs 6 % more arithmetic, but keeps the step's buffers under 32 MiB: above, every step
                # gets fresh pages from the kernel, which took a third of the step (measured, 16 rows).
                "remat": "block",
            },
            "bridge": {"out_dim": 128},
            # The throw-away reader of stage V0; text_tokens: words of a row, longer texts are left out.
            "align": {"width": 96, "layers": 1, "heads": 4, "text_tokens": 64},
        }
    )


def default_config() -> ConfigDict:
    """All of `config.vision`."""
    config = encoder_config()
    for key, (module, function) in PARTS.items():
        config[key] = getattr(importlib.import_module(module), function)()
    return config
