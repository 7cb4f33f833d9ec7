"""Measures one trained cell, at every depth: fidelity, codebooks, cost, and what its codes cost a language model.

Numbers that have an image are kept per image, in the order of the same held-out pictures for all cells, so that cells can be
compared picture by picture. Letters: R images, L levels.
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dina.backbone.config import DepthConfig, parse
from dina.eval import metrics
from tools.sweep import cost, language
from tools.sweep.codec import Pictures, choose
from tools.sweep.plan import resolve


def default_options() -> ConfigDict:
    """`config.measure`.

    codec: 'module:class' of what is measured (tools/sweep/codec.py). split, images: held-out pictures of fidelity and language.
    window: held-out pictures over which codebooks are judged. depths: of fidelity; () = all. timed: depths of latency and memory.
    repeats: of a timing. head, trunk: the depth head that is priced. language: of the language model; 0 steps = none.
    seed: draws pictures.
    """
    return ConfigDict({
        "function": "tools.sweep.measure:measure", "codec": "tools.sweep.codec:TokenizerCodec", "split": "test", "images": 192,
        "window": 2800, "depths": (), "timed": (1, 2, 4, 8, 16), "repeats": 9, "seed": 11, "trunk": 192,
        "head": {"width": 128, "layers": 2, "heads": 4, "ffn_scale": 16, "class_multiple": 1, "loss_chunk": 0, "dtype": "float32"},
        "language": language.default_options(),
    })  # fmt: skip


def measure(config: ConfigDict, options: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
    """Everything that a sweep's page and table say about a cell.

    Args:
        config: the cell's experiment.
        options: of `default_options`.
        folder: of the cell; its stages are finished.

    Returns:
        levels, sizes; pictures {split, count, identity, cells [R]}; depths; psnr_db, ssim {depth: [R]}; bits [L] of a code;
        codebooks {usage, perplexity, dead, energy [L], window}; latency {encoder, search {depth}}; head_flops [L];
        language {bits [R][L], curve} or {}; phases {name: seconds}. A cell without codes has levels 0 and one depth, 0.
    """
    clock = _Clock()
    codec = resolve(options.codec, "measure.codec")(config, folder)
    held_out = choose(config, options.split, options.images, options.seed)
    levels = len(codec.sizes)
    depths = [d for d in options.depths or range(1, levels + 1) if d <= levels] if levels else [0]
    out: dict[str, Any] = {
        "levels": levels, "sizes": list(codec.sizes), "depths": depths,
        "pictures": {"split": options.split, "count": len(held_out.images), "identity": held_out.identity, "cells": held_out.cells},
        "bits": [float(np.log2(size)) for size in codec.sizes],
        "head_flops": [cost.head_flops(parse(DepthConfig, options.head), options.trunk, codec.sizes[:d]) for d in range(1, levels + 1)],
    }  # fmt: skip
    clock.tick("load")
    codes, _ = codec.search(held_out)
    clock.tick("encode")
    out |= fidelity(codec, held_out, codes, depths)
    clock.tick("fidelity")
    out["codebooks"] = codebooks(codec, choose(config, options.split, options.window, options.seed)) if levels else {}
    clock.tick("codebooks")
    out["latency"] = latency(codec, held_out, [d for d in options.timed if d <= levels], options.repeats)
    clock.tick("latency")
    out["language"] = {}
    if levels and options.language.steps:
        train = choose(config, "train", options.language.images, options.seed)
        pictures = list(zip(codec.search(train)[0], train.grids, strict=True))
        bits_RL, curve = language.bits(options.language, codec.sizes, pictures, list(zip(codes, held_out.grids, strict=True)))
        out["language"] = {"bits": [[round(float(b), 3) for b in row] for row in bits_RL], "curve": curve}
        clock.tick("language")
    return out | {"phases": clock.seconds}


def fidelity(codec, pictures: Pictures, codes, depths) -> dict[str, dict[str, list[float]]]:
    """psnr_db and ssim of each picture at each depth."""
    out: dict[str, dict[str, list[float]]] = {"psnr_db": {}, "ssim": {}}
    for depth in depths:
        pairs = list(zip(codec.pictures(codes, pictures.grids, depth), pictures.images, strict=True))
        out["psnr_db"][str(depth)] = [round(metrics.psnr_db(made, true), 4) for made, true in pairs]
        out["ssim"][str(depth)] = [round(metrics.ssim(made, true), 5) for made, true in pairs]
    return out


def codebooks(codec, window: Pictures) -> dict[str, Any]:
    """Usage, perplexity, dead codes (never chosen in the window) and energy left, of every level."""
    codes, energy = codec.search(window)
    found = metrics.codebook_statistics(np.concatenate(codes), codec.sizes)
    dead = [round(size * (1 - used)) for size, used in zip(codec.sizes, found["usage"], strict=True)]
    return {name: found[name] for name in ("usage", "perplexity", "window")} | {"dead": dead, "energy": energy}


def latency(codec, pictures: Pictures, depths, repeats: int) -> dict[str, Any]:
    """Time and memory of the encoder, and of the search of some depths."""
    search = {str(depth): cost.program(codec.search_program(depth), repeats) for depth in depths}
    return {"encoder": cost.program(codec.encoder_program(pictures), repeats), "search": search}


class _Clock:
    """Seconds of each phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.time()

    def tick(self, phase: str) -> None:
        now = time.time()
        self.seconds[phase], self.last = round(now - self.last, 2), now
