"""Stage V0: the visual encoder learns to mean something by being read in words.

A small causal reader (the part `align_lm`, thrown away afterwards) looks at the encoder's continuous cell features and
continues captions and answers questions; every cell is also asked what lies in it, and a linear map must recover its
pixels, so that a feature keeps what language does not mention. The encoder that results is frozen and quantised by
the later stages (tokenizers.md I, stage V0).

Letters: B rows, P patches, N cells of a row, I images of a row, T text positions of a row, Z feature width, W reader
width, V words.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dina.data import phrases
from dina.losses import nll
from dina.tasks.base import Batches, LossOut, Task, merge_options
from dina.tasks.vision_batches import VisionBatches, image_table, with_views
from dina.vision import bridge, preprocess
from dina.vision.attention import MASKED
from dina.vision.encoder import RMSNorm

# The reader's words: the written grammar is closed, so a table of its words needs no trained tokenizer.
PAD, BOS, EOS, NOTHING = "<pad>", "<bos>", "<eos>", "nothing"
EMPTY_WEIGHT = 0.2  # of a cell that holds nothing: there are three times as many, and they are easy
FIRST_DIGIT = 4  # ids 4..13 are the digit words
INK_MARGIN = 4 / 28  # MNIST centres a digit in the inner 20 of 28 pixels


def default_options() -> ConfigDict:
    """`stage.options` of this task.

    augment, canvas_power: as of `VisionBatches`. views: smaller canvases cut out of each image. captions: share of
    texts that are captions; the rest are questions, half of them for the digit.
    """
    return ConfigDict({"augment": "affine", "canvas_power": -0.7, "views": 3, "captions": 0.5})


@functools.cache
def vocabulary() -> dict[str, int]:
    """Word -> id: the special words, the digit words as 4..13, then every word of captions, questions and answers."""
    words = set()
    for canvas in phrases.CANVASES:
        for placement in phrases.placements(canvas):
            for variant in range(12):
                words.update(phrases.caption(canvas, 0, *placement, variant).split())
                words.update(" ".join(sum(phrases.questions(canvas, 0, *placement, variant), ())).split())
    ordered = [PAD, BOS, EOS, NOTHING, *phrases.DIGIT_WORDS, *sorted(words - set(phrases.DIGIT_WORDS))]
    return {word: number for number, word in enumerate(ordered)}


def utterance(
    canvas: tuple[int, int], digit: int, size: int, top: int, left: int, captions: float, rng: np.random.Generator
) -> tuple[str, str]:
    """(prompt, answer) about one image: an unprompted caption (share `captions`), or a question."""
    variant, kind, other = int(rng.integers(1 << 20)), rng.random(), rng.random()
    if kind < captions:
        return "", phrases.caption(canvas, digit, size, top, left, variant)
    pairs = phrases.questions(canvas, digit, size, top, left, variant)
    if kind < (1 + captions) / 2:
        return pairs[0]
    return pairs[1 + int(other * (len(pairs) - 1))]


class AlignBatches(Batches):
    """`VisionBatches` and, for each row, packed text and what each cell holds.

    Adds int32 [B, T]: text_in, text_target (the next word), text_segment (number of the image in its row, 0 =
    padding), text_position (within its image's text); float32 [B, T] text_weight (1 where the word is predicted); and
    int32 [B, N] cell_word (word id, PAD where nothing is asked). An image whose text no longer fits goes without.
    """

    def __init__(self, config, stage, table=None):
        options = merge_options(default_options(), stage)
        table = image_table(config, "train") if table is None else table
        table = with_views(table, options.views, config.seed)
        self.images = VisionBatches(config, stage, table, options.augment, options.canvas_power)
        self.captions = options.captions
        self.length = config.vision.align.text_tokens

    def batch(self, step: int) -> dict[str, np.ndarray]:
        out = self.images.batch(step)
        return out | self._text(out, self.images.rng(step, 2)) | {"cell_word": cell_words(out)}

    def _text(self, out, rng) -> dict[str, np.ndarray]:
        names = ("text_in", "text_target", "text_segment", "text_position", "text_weight")
        text = {name: np.zeros((len(out["record"]), self.length), np.int32) for name in names}
        words = vocabulary()
        for row, slot in np.argwhere(out["record"] >= 0):
            canvas = tuple(out["grid"][row, slot].tolist())
            about = (int(out[name][row, slot]) for name in ("digit", "size", "top", "left"))
            prompt, answer = utterance(canvas, *about, self.captions, rng)
            ids = [words[word] for word in (BOS, *prompt.split(), *answer.split(), EOS)]
            start = int(np.count_nonzero(text["text_segment"][row]))
            stop = start + len(ids) - 1
            if stop > self.length:
                continue
            text["text_in"][row, start:stop], text["text_target"][row, start:stop] = ids[:-1], ids[1:]
            text["text_segment"][row, start:stop] = slot + 1
            text["text_position"][row, start:stop] = np.arange(stop - start)
            text["text_weight"][row, start + len(prompt.split()) : stop] = 1
        return text | {"text_weight": text["text_weight"].astype(np.float32)}


def cell_words(batch: dict[str, np.ndarray]) -> np.ndarray:
    """[B, N] the word for what lies in each cell: the digit's where a fair part of it does, NOTHING where none."""
    image_BN = np.maximum(batch["cell_segment"] - 1, 0)
    here = {name: np.take_along_axis(batch[name], image_BN, axis=1) for name in ("digit", "size", "top", "left")}
    margin = INK_MARGIN * here["size"]
    covered = 1.0
    for offset, position in (("top", batch["row"]), ("left", batch["col"])):
        start = position[:, :: preprocess.MERGE**2] * preprocess.PATCH
        low, high = here[offset] + margin, here[offset] + here["size"] - margin
        overlap = np.minimum(high, start + preprocess.CELL) - np.maximum(low, start)
        covered = covered * np.maximum(0.0, overlap) / (here["size"] - 2 * margin)
    word = np.where(covered >= 0.1, FIRST_DIGIT + here["digit"], 0)
    word = np.where(covered <= 0.0, vocabulary()[NOTHING], word)
    return np.where(batch["cell_segment"] > 0, word, 0).astype(np.int32)


def dense(name: str, width: int, x: Float[Array, "*B D"], use_bias: bool = True) -> Float[Array, "*B W"]:
    """A dense layer of the calling module on flat rows (why: dina/vision/encoder.py)."""
    return nn.Dense(width, use_bias=use_bias, name=name)(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], width)


class Attention(nn.Module):
    """Plain multi-head attention of a query stream on a memory under a mask."""

    heads: int

    @nn.compact
    def __call__(self, x_BTW, memory_BMW, mask_BTM):
        w = x_BTW.shape[-1]
        q = dense("query", w, x_BTW)
        k, v = dense("key", w, memory_BMW, use_bias=False), dense("value", w, memory_BMW)
        q, k, v = (y.reshape(*y.shape[:2], self.heads, w // self.heads) for y in (q, k, v))
        scores = jnp.einsum("bthk,bmhk->bhtm", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask_BTM[:, None], scores, MASKED), axis=-1)
        return dense("out", w, jnp.einsum("bhtm,bmhk->bthk", weights, v).reshape(x_BTW.shape))


class Reader(nn.Module):
    """Causal reader of packed texts, each seeing the cells of its own image; also reads single cells and pixels."""

    words: int
    width: int
    layers: int
    heads: int
    cells: int
    cell_values: int

    @nn.compact
    def __call__(self, z_BNZ: Float[Array, "B N Z"], batch) -> dict[str, Array]:
        """Returns text [B, T, V] and cell [B, N, V] logits, and pixels [B, N, values of a cell's first slice]."""
        init = nn.initializers.normal(0.02)
        table_VW = self.param("words", nn.initializers.normal(self.width**-0.5), (self.words, self.width))
        place_4RW = self.param("places", init, (4, self.cells + 1, self.width))
        position_TW = self.param("positions", init, (batch["text_in"].shape[1], self.width))
        memory = dense("cells", self.width, RMSNorm(name="norm_cells")(z_BNZ))
        cell_logits = _logits(RMSNorm(name="norm_cell_out")(memory), table_VW)
        # A feature says what is there; where it is, the reader knows, as the language model later does from the order.
        memory = memory + sum(place_4RW[axis][index] for axis, index in enumerate(_places(batch)))
        self_mask, cross_mask = _masks(batch)
        x = table_VW[batch["text_in"]] + position_TW[batch["text_position"]]
        for layer in range(self.layers):
            h = RMSNorm(name=f"norm_self_{layer}")(x)
            x = x + Attention(self.heads, name=f"self_{layer}")(h, h, self_mask)
            h = RMSNorm(name=f"norm_cross_{layer}")(x)
            x = x + Attention(self.heads, name=f"cross_{layer}")(h, memory, cross_mask)
            h = nn.gelu(dense(f"up_{layer}", 2 * self.width, RMSNorm(name=f"norm_ff_{layer}")(x)))
            x = x + dense(f"down_{layer}", self.width, h)
        text_logits = _logits(RMSNorm(name="norm_out")(x), table_VW)
        return {"text": text_logits, "cell": cell_logits, "pixels": dense("pixels", self.cell_values, z_BNZ)}


def _logits(x, table_VW):
    return (x.reshape(-1, x.shape[-1]) @ table_VW.T).reshape(*x.shape[:-1], len(table_VW))


def _masks(batch):
    """Text on earlier text of its image; text on the cells of its image."""
    segment, position = batch["text_segment"], batch["text_position"]
    earlier = position[:, :, None] >= position[:, None, :]
    cross = segment[:, :, None] == batch["cell_segment"][:, None, :]
    return (segment[:, :, None] == segment[:, None, :]) & earlier, cross


def _places(batch):
    """Row, column, and the image's height and width, in cells, of every cell."""
    every, side = preprocess.MERGE**2, preprocess.MERGE
    image = jnp.maximum(batch["cell_segment"] - 1, 0)[..., None]
    grid = jnp.take_along_axis(batch["grid"], image, axis=1)
    return batch["row"][:, ::every] // side, batch["col"][:, ::every] // side, grid[..., 0], grid[..., 1]


class Align(Task):
    """Trains `vision_encoder` with `align_lm`; terms: text, cells, pixels, nothing."""

    def __init__(self, config, stage):
        super().__init__(config, stage)
        vision = config.vision
        self.encoder = bridge.make_encoder(vision)
        align = vision.align
        self.reader = Reader(
            words=self.words(),
            width=align.width,
            layers=align.layers,
            heads=align.heads,
            cells=vision.pack.cells,
            cell_values=3 * preprocess.CELL**2,
        )

    @staticmethod
    def words() -> int:
        """Size of the reader's vocabulary."""
        return len(vocabulary())

    def init(self, key):
        vision = self.config.vision
        first, second = jax.random.split(key)
        n, t = vision.pack.cells, vision.align.text_tokens
        shapes = {"text_in": t, "text_segment": t, "text_position": t, "row": 4 * n, "col": 4 * n, "cell_segment": n}
        batch = {name: jnp.zeros((1, size), jnp.int32) for name, size in shapes.items()}
        batch["grid"] = jnp.zeros((1, vision.pack.images, 2), jnp.int32)
        reader = self.reader.init(second, jnp.zeros((1, n, vision.bridge.out_dim)), batch)["params"]
        return {"params": {"vision_encoder": bridge.init_encoder(vision, first), "align_lm": reader}, "stats": {}}

    def batches(self):
        return AlignBatches(self.config, self.stage)

    def loss(self, params, stats, batch, key, axes):
        del stats, key, axes
        z_BNZ = self.encoder.apply({"params": params["vision_encoder"]}, batch)
        out = self.reader.apply({"params": params["align_lm"]}, z_BNZ, batch)
        text_weight = batch["text_weight"]
        text_nll, text_right = nll(out["text"], batch["text_target"])
        cell_weight = (batch["cell_word"] > 0) * jnp.where(_is_digit(batch["cell_word"]) > 0, 1.0, EMPTY_WEIGHT)
        cell_nll, cell_right = nll(out["cell"], batch["cell_word"])
        terms = {
            "text": _total(text_nll, text_weight),
            "cells": _total(cell_nll, cell_weight),
            "pixels": self.pixel_error(out["pixels"], batch),
            "nothing": self._nothing(params, z_BNZ, batch),
        }
        digit_weight = text_weight * _is_digit(batch["text_target"])
        metrics = {
            "text_accuracy": _total(text_right, text_weight),
            "digit_accuracy": _total(text_right, digit_weight),
            "cell_digit_accuracy": _total(cell_right, cell_weight * _is_digit(batch["cell_word"])),
        }
        return LossOut(terms, metrics)

    def _nothing(self, params, z_BNZ, batch):
        """Squared distance from the bridge's bias, per value, of cells that hold nothing.

        Attention copies what the image shows into its empty cells too. Read off their codes, that is 1.9 nats about the
        digit on canvases of two cells, which the language model would have to predict before it paints the digit.
        """
        empty_BN = (batch["cell_word"] == vocabulary()[NOTHING]).astype(jnp.float32)
        told_BN = jnp.mean((z_BNZ - params["vision_encoder"]["bridge"]["fc2"]["bias"]) ** 2, axis=-1)
        return _total(told_BN, empty_BN)

    def pixel_error(self, predicted_BNX, batch):
        """Squared error of the first temporal slice, per pixel value, over the cells of images."""
        b, p, _ = batch["patches"].shape
        target = batch["patches"].reshape(b, p, 3, preprocess.TEMPORAL, -1)[:, :, :, 0].reshape(predicted_BNX.shape)
        error_BN = jnp.mean((predicted_BNX - target) ** 2, axis=-1)
        return _total(error_BN, (batch["cell_segment"] > 0).astype(jnp.float32))


def _total(value, weight):
    return jnp.sum(value * weight), jnp.sum(weight)


def _is_digit(word):
    return ((word >= FIRST_DIGIT) & (word < FIRST_DIGIT + 10)).astype(jnp.float32)
