"""What codes cost a language model: bits per image of one small fixed model, the same for every cell of a sweep.

The model is dina's own (trunk and visual depth head, dina/model.py), a document is one image as the grammar writes it, and
training is the ordinary step over the ordinary packs: a fixed number of them, drawn alike for all cells. Its size tag tells
the model the grid, so bits are those of the codes alone. Level l of a cell is predicted from all levels of the cells before
it and the levels before l of its own; the sum over levels is therefore an exact code length of all levels, and of the first
few only as far as what the later levels of earlier cells tell is allowed for.

Letters: B rows, S positions, M places of image cells, L levels, N cells of an image, R images.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from dina import grammar, losses, model as model_lib, optim, sharding, stages, step as steps
from dina.data import packing
from dina.data.documents import KINDS, Sample
from dina.embed import code_rows, holds_codes, level_rows
from dina.grammar import Document, Image, Vocabulary
from dina.heads import depth
from dina.tasks.language import Language

TEXT_IDS = 16  # the digits of size tags behind the first special ids
PARTS = ("embed", "backbone", "visual_head")
Pictures = Sequence[tuple[Int[np.ndarray, "N L"], tuple[int, int]]]  # codes and grid of each image


def default_options() -> ConfigDict:
    """`measure.language`. images: of training. steps, rows, positions, rate: of training. The rest: sizes of the model."""
    return ConfigDict({"images": 4096, "steps": 100, "rows": 8, "positions": 256, "rate": 4e-3, "seed": 5, "width": 64, "layers": 1,
                       "head_width": 64, "head_layers": 1})  # fmt: skip


def model_config(options: ConfigDict, levels: int) -> ConfigDict:
    """`config.model` of the fixed language model."""
    c = model_lib.default_config()
    c.update({"width": options.width, "layers": options.layers, "unroll": options.layers, "ffn": 2 * options.width})
    c.attention.update({"q_rank": 48, "kv_rank": 32, "nope": 16, "rope": 16, "v": 16})
    c.experts.update({"real": 4, "zero": 2, "top_k": 2, "hidden": options.width, "target_top_k": 1.5})
    c.ngram.update({"order": 2, "splits": 1, "ratio": 1.0})  # there is next to no text
    c.pre_buffer.hidden = 2 * options.width
    c.visual_head.update({"width": options.head_width, "layers": options.head_layers})
    c.audio_head.update({"width": 4, "layers": 1, "heads": 1})  # there is no speech
    # All levels of a cell count as one label does, whatever their number.
    c.losses.update({"visual_level": 1.0 / levels, "text_chunk": options.rows * options.positions, "remat": "none"})
    return c


def experiment(options: ConfigDict, sizes: tuple[int, ...]) -> tuple[ConfigDict, ConfigDict]:
    """(config, stage) as the language task reads them."""
    config = ConfigDict({
        "text": {"vocab_size": TEXT_IDS}, "audio": {"quantizer": {"sizes": (1,)}},
        "vision": {"quantizer": {"sizes": tuple(sizes)}, "patch": 14, "merge": 2, "max_pixels": 28**2},
        "model": model_config(options, len(sizes)),
    })  # fmt: skip
    stage = stages.default_stage()
    stage.task, stage.steps, stage.batch, stage.train = "language", options.steps, options.rows, PARTS
    stage.loss_weights = ConfigDict({"visual": 1.0, "router_z": 1e-4})
    stage.optimizer.learning_rate, stage.optimizer.warmup_steps = options.rate, 10
    return config, stage


@functools.lru_cache(maxsize=2)
def _program(options_text: str, sizes: tuple[int, ...]):
    """(task, stage, mesh, compiled step): cells of equal sizes share it."""
    options = ConfigDict(json.loads(options_text))
    config, stage = experiment(options, sizes)
    task, mesh = Language(config, stage), sharding.make_mesh({}, jax.devices()[:1])
    return task, stage, mesh, jax.jit(steps.make_train_step(task, stage, options.seed, mesh), donate_argnums=0)


def vocabulary(sizes: tuple[int, ...], grids: Sequence[tuple[int, int]]) -> Vocabulary:
    """Ids of the model, with size tags of these grids."""
    plain = Vocabulary(TEXT_IDS, visual=tuple(sizes), audio=(1,))
    return plain.with_sizes(lambda text: [4 + int(c) if c != " " else 14 for c in text], grids)


def bits(
    options: ConfigDict, sizes: tuple[int, ...], train: Pictures, held_out: Pictures
) -> tuple[Float[np.ndarray, "R L"], list[float]]:
    """Bits of every level of every held-out image, by a model trained on the codes of others.

    Args:
        options: of `default_options`.
        sizes: codes per level.
        train, held_out: codes [N, L] and grid of each image.

    Returns:
        (bits [R, L] summed over an image's cells, the training loss of some steps in nats a level).
    """
    task, stage, mesh, step = _program(options.to_json(), tuple(sizes))
    words = vocabulary(sizes, [grid for _, grid in (*train, *held_out)])
    as_document = lambda codes, grid: (Image(codes, *grid, target=True),)
    longest = max(grammar.cost(as_document(*picture), words).positions for picture in (*train, *held_out))
    length = max(options.positions, -(-longest // 64) * 64)
    budget = ConfigDict({"positions": length, "visual": length, "audio": 1, "cells": length, "window": 512})
    kind = KINDS.index("text_to_image")

    def document(number: int) -> Sample:
        epoch, index = divmod(number, len(train))
        return Sample(kind, as_document(*train[int(_order(options.seed, epoch, len(train))[index])]))

    batches = packing.PackedDocuments(document, words, budget, options.rows, (options.seed, 1))
    rates = np.asarray(optim.schedule(stage.optimizer, stage.steps)(np.arange(stage.steps)), np.float32)
    with jax.set_mesh(mesh):
        abstract = steps.abstract_state(task, stage, mesh)
        init, key = stages.initialiser(ConfigDict({"seed": options.seed}), task, abstract)
        state = steps.init_state(task, stage, init(key))
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)
        curve = []
        for number in range(stage.steps):
            state, values = step(state, sharding.put_batch(batches.batch(number), mesh), rates[number])
            if number % 10 == 0 or number + 1 == stage.steps:
                curve.append(values["loss/visual"])
        params, stats = jax.device_get((state["params"], state["stats"]))
    rows = _rows([as_document(*picture) for picture in held_out], words, budget)
    return _held_out(task.model, params, stats, rows, len(held_out), options.rows), [float(x) for x in curve]


@functools.lru_cache(maxsize=64)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 2, epoch]).permutation(count)


def _rows(documents: Sequence[Document], words: Vocabulary, budget: ConfigDict) -> list[tuple[list[int], dict[str, np.ndarray]]]:
    """(image numbers, arrays of one row) of every row that the documents fill."""
    sizes = {name: int(budget[name]) for name in packing.BUDGETS}
    costs = np.array([grammar.cost(document, words) for document in documents])
    plan, _ = packing.pack(costs, tuple(sizes.values()))
    kind = KINDS.index("text_to_image")
    return [(row, packing.assemble([[Sample(kind, documents[n]) for n in row]], words, sizes)) for row in plan]


def _held_out(model, params, stats, rows, images: int, together: int) -> Float[np.ndarray, "R L"]:
    """Sums cell_nll over the cells of each image."""
    levels = len(model.vocabulary.visual)
    out = np.zeros((images, levels))
    blank = {name: np.full_like(x, -1 if name.endswith("index") else 0) for name, x in rows[0][1].items()}
    for start in range(0, len(rows), together):
        chunk = rows[start : start + together]
        parts = [arrays for _, arrays in chunk] + [blank] * (together - len(chunk))
        batch = {name: np.concatenate([part[name] for part in parts]) for name in blank}
        nll_BML = np.asarray(cell_nll(model, params, stats, batch))
        for b, (numbers, arrays) in enumerate(chunk):
            index_M = arrays["visual_index"][0]
            used_M = index_M >= 0
            image_M = np.array(numbers)[arrays["segment"][0][index_M[used_M] + 1] - 1]
            np.add.at(out, image_M, nll_BML[b][used_M] / np.log(2.0))
    return out


@functools.partial(jax.jit, static_argnums=0)
def cell_nll(model, params, stats, batch) -> Float[jax.Array, "B M L"]:
    """Teacher-forced cross-entropy in nats of every level of every painted cell; garbage in unused places."""
    h_BSD = model_lib.run(model, params, stats, batch).h_BSD
    holders = holds_codes(model.vocabulary, batch["tokens"], batch["segment"])
    row_BSL = code_rows(model.vocabulary, batch["codes"], *holders)
    levels, table_RD = len(model.visual_head.sizes), params["embed"]["table"]

    def one(row):
        h_SD, row_SL, codes_SL, index_M = row
        here_M = jnp.maximum(index_M, 0)
        known_MLD = level_rows(table_RD, row_SL[here_M + 1, :levels]).astype(h_SD.dtype)
        rows_LMD = depth.input_rows(h_SD[here_M], known_MLD)
        logits = depth.teacher_forced(model.visual_head, params["visual_head"], rows_LMD)
        return jnp.stack([losses.nll(logits[l], codes_SL[here_M + 1, l])[0] for l in range(levels)], -1)

    # Row by row: the logits of one row and 16 levels of 16,384 codes are what fits in memory.
    return jax.lax.map(one, (h_BSD, row_BSL, batch["codes"], batch["visual_index"]))
