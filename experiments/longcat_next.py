"""LongCat-Next: the released model at its own size, its four training stages, and the pods that they run on.

Run card
    python -m tools.aot --config=experiments/longcat_next.py:stage=pretrain --topology=v5p:4x4x8    compiles and fits? (no TPU needed)
    python -m dina.train --config=experiments/longcat_next.py:v5p_256,stage=pretrain --workdir=DIR  on every host of the pod
Variants: a size (`3b`, `0.3b`; the default is the release) and a row of `HARDWARE`. `stage=` picks one of the stages, which
every process of a run must be told; without it they run one after another.
Data: code shards that dina.tokenize wrote to the workdir. Text is that of the release: `text.path` names its tokenizer.json.
Hardware and time: docs/scaling.md. Stages, batches and sequences are the paper's Table 7 (paper.md §2.2), the model is
backbone.md §1.1; shares of modalities, learning rates and lengths of stages are not published and ours.
"""

from __future__ import annotations

from typing import NamedTuple

from ml_collections import ConfigDict

from dina import checkpoint, guard, model, stages, tokenize
from dina.audio import config as audio
from dina.config import check_name
from dina.data import digits
from dina.vision import config as vision

ARGUMENTS = ("stage",)
ORDER = ("prealign", "pretrain", "midtrain", "sft")
PARTS = ("embed", "backbone", "lm_head", "visual_head", "audio_head")
AUDIO_CODES = (8192, 4096, 2048, *(1024,) * 5)
VISUAL_CODES = (16384,) * 8
# Shares of a row that are image cells, cells with a loss, and audio frames with a loss: sizes of the buffers.
CELLS, VISUAL, AUDIO = 1 / 2, 1 / 4, 1 / 4
# Of audio data 40 % are spoken text, 44 % interleaved with it, 11 % transcripts (paper.md §2.3); modalities alike, for the paper
# does not say. Pre-alignment has no plain text.
AUDIO_SHARES = {"text_to_speech": 0.40, "conversation": 0.44, "speech_to_text": 0.11, "speech_to_image": 0.025, "image_to_speech": 0.025}
IMAGE_SHARES = {"image_to_text": 0.5, "text_to_image": 0.5}


class Size(NamedTuple):
    """A trunk with the proportions of the release; `ratio` n-gram rows a text id, heads of 128 values."""

    width: int
    layers: int
    heads: int
    real: int
    top_k: int
    ratio: float


SIZES = {
    "68b": Size(3072, 14, 32, 256, 12, 78.0),
    "3b": Size(768, 10, 8, 256, 12, 13.5),
    "0.3b": Size(384, 4, 4, 128, 6, 1.5),
}


class Hardware(NamedTuple):
    """How a pod runs the experiment.

    Attributes:
        topology: as tools.aot reads it.
        chips: as people buy them; `devices` as JAX shows them.
        expert: devices that share the experts of a layer; a product of sides of the slice, or a mesh does not lie on it.
        remat: of a layer.
        slices: that the data-centre network connects; each has the whole state.
        copies: of the state within a slice, so that parameters are gathered among a part of it.
        rowwise: the n-gram tables keep one float32 a row instead of Adam's two a value.
    """

    topology: str
    chips: int
    devices: int
    expert: int
    remat: str = "full"
    rowwise: bool = False
    slices: int = 1
    copies: int = 1


# Masters and moments are float32 everywhere. `python -m tools.aot` prints what each row takes: docs/scaling.md.
HARDWARE = {
    "v5e_256": Hardware("v5e:16x16", 256, 256, 16, rowwise=True),
    "v5p_64": Hardware("v5p:4x4x4", 64, 64, 4),
    "v5p_128": Hardware("v5p:4x4x8", 128, 128, 8),
    "v5p_256": Hardware("v5p:4x8x8", 256, 256, 8),
    "v5p_1024": Hardware("v5p:8x8x16", 1024, 1024, 8),
    "v5p_4096": Hardware("v5p:16x16x16", 4096, 4096, 8, copies=16),
    "v6e_256": Hardware("v6e:16x16", 256, 256, 16),
    "v6e_1024": Hardware("v6e:16x16*4", 1024, 1024, 16, slices=4),
    "tpu7x_64": Hardware("tpu7x:4x4x4", 64, 128, 8),
    "tpu7x_256": Hardware("tpu7x:4x8x8", 256, 512, 8),
}


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `arg` is a comma list of a size, a row of `HARDWARE` and a stage (`pretrain` or `stage=pretrain`), each optional."""
    chosen = {"size": "68b", "hardware": "", "stage": ""}
    kinds = {"size": SIZES, "hardware": HARDWARE, "stage": ORDER}
    for name in (part.removeprefix("stage=") for part in arg.split(",") if part):
        check_name(name, [*SIZES, *HARDWARE, *ORDER], "--config: size, hardware or stage")
        chosen[next(kind for kind, known in kinds.items() if name in known)] = name
    c = ConfigDict()
    c.name, c.seed, c.order = "longcat_next", 17, ORDER
    c.jobs = (chosen["stage"],) if chosen["stage"] else ORDER
    c.log = ConfigDict({"every": 10, "arrays_every": 1000})
    c.checkpoint, c.guard = checkpoint.default_config(), guard.default_config()
    c.checkpoint.update({"every": 500, "keep": 2})
    c.run = ConfigDict({"data_dir": "", "workdir": ""})
    c.data, c.tokenize = digits.default_config(), tokenize.default_config()
    c.text = ConfigDict({"algorithm": "released", "vocab_size": 131072, "path": "", "sha256": "", "roles": (4, 5, 6), "row_multiple": 1024})
    c.vision, c.audio = vision.default_config(), audio.default_config()
    c.vision.quantizer.sizes, c.audio.quantizer.sizes = VISUAL_CODES, AUDIO_CODES
    c.model = language(SIZES[chosen["size"]])
    heads = tuple(part for part in PARTS if part != "backbone")
    c.stages = ConfigDict({
        "prealign": one("prealign", 8192, 8192, 2_000, 1e-3, "", heads),
        "pretrain": one("pretrain", 8192, 8192, 20_000, 3e-4, "prealign"),
        "midtrain": one("midtrain", 1024, 32768, 15_000, 1e-4, "pretrain"),
        "sft": one("sft", 128, 65536, 10_000, 1e-5, "midtrain"),
    })
    c.stages.prealign.freeze_stats = ("backbone",)
    c.mesh = ConfigDict({"replica": 1, "data": 1, "expert": 1, "seq": 1})
    # What tools.aot places a config by where none is named, and what a row of it does.
    c.hardware = ConfigDict({name: row._asdict() for name, row in HARDWARE.items()})
    if chosen["hardware"]:
        place(c, chosen["hardware"], chosen["stage"])
    return c


def language(size: Size) -> ConfigDict:
    """`config.model`: of the release, or narrower with the same ratios of everything to the width."""
    width, m = size.width, model.default_config()
    m.update({"width": width, "layers": size.layers, "unroll": 1, "ffn": 2 * width, "norm_eps": 1e-5, "dtype": "bfloat16", "remat": "full"})
    m.attention.update({"heads": size.heads, "q_rank": width // 2, "kv_rank": width // 6, "nope": 128, "rope": 64, "v": 128, "theta": 1e7,
                        "block": 1024})
    m.experts.update({"real": size.real, "zero": size.real // 2, "top_k": size.top_k, "hidden": width // 3, "scale": size.top_k / 2,
                      "target_top_k": size.top_k * 2 / 3, "dispatch": "all_to_all"})
    m.ngram.update({"order": 4, "splits": 4, "ratio": size.ratio, "variant": "hf", "blank": "row0", "row_multiple": 8192, "lookup": "exchange"})
    m.visual_head.update({"width": width * 2 // 3, "layers": 4, "heads": width // 192, "class_multiple": 128, "dtype": "bfloat16"})
    m.audio_head.update({"width": width, "layers": 4, "heads": width // 128, "class_multiple": 128, "dtype": "bfloat16"})
    m.pre_buffer.hidden = width * 8 // 3
    m.losses.code_chunk = 1024
    return m


def mixture(name: str) -> dict[str, float]:
    """Shares of the task kinds: an equal number of positions for each modality of the stage."""
    return AUDIO_SHARES | IMAGE_SHARES | {"plain_text": 0.0 if name == "prealign" else 1.0}


def one(name: str, batch: int, length: int, steps: int, rate: float, before: str, train: tuple[str, ...] = PARTS) -> ConfigDict:
    """One stage of `batch` sequences of `length` positions."""
    s = stages.default_stage()
    s.task, s.steps, s.batch, s.train = "language", steps, batch, train
    s.loss_weights = ConfigDict({"text": 1.0, "visual": 1.0, "audio": 1.0, "router_z": 1e-4, "hidden_z": 1e-7})
    s.init_from = ConfigDict({part: before for part in PARTS} if before else {})
    s.optimizer.update({"learning_rate": rate, "warmup_steps": min(2_000, steps // 10), "weight_decay": 0.1, "final_fraction": 0.1})
    # backbone.md §7.4: tables move 3072/576 times as fast.
    s.optimizer.multipliers = (("embed/table", 16 / 3), ("embed/ngram/*", 16 / 3))
    pack = {"positions": length, "visual": int(VISUAL * length), "audio": int(AUDIO * length), "cells": int(CELLS * length), "window": 4096}
    s.options = ConfigDict({"mixture": mixture(name), "mixture_of": "positions", "pack": pack})
    return s


def place(c: ConfigDict, name: str, stage: str = "") -> None:
    """Mesh, remat, accumulation and the tables' optimizer of row `name` of `HARDWARE`.

    A device takes one sequence at a time. Where a stage has fewer of them than the pod has devices, several share one;
    without a stage, the mesh is that of the stages that have enough.
    """
    row = HARDWARE[name]
    sharing = max(1, row.devices // c.stages[stage or "pretrain"].batch)
    replica = row.slices * row.copies
    c.mesh = ConfigDict({"replica": replica, "data": row.devices // replica // row.expert // sharing, "expert": row.expert, "seq": sharing})
    for s in c.stages.values():
        s.accumulate = max(1, s.batch // row.devices)
        s.optimizer.rowwise = ("embed/ngram/table",) if row.rowwise else ()
    c.model.remat = row.remat
