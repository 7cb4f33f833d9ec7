"""Stage V0 on captioned images: the encoder learns to mean something by having captions read off its features.

As `align`, whose reader it shares, for images of which nothing is known but a caption: it is continued byte by byte, in
any language and without a tokenizer. Terms: text, and pixels (a linear map must recover each cell's pixels).

Letters: B rows, N cells, T text positions of a row.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dina.config import InputError
from dina.losses import nll
from dina.tasks.align import Align
from dina.tasks.base import Batches, LossOut, merge_options
from dina.tasks.vision_batches import data_options, make_batches

BOS, EOS, FIRST_BYTE = 1, 2, 3  # 0 is padding
WORDS = FIRST_BYTE + 256


def default_options() -> ConfigDict:
    """`stage.options` of this task: the data's (`vision_batches.data_options`)."""
    return ConfigDict(data_options())


def caption_ids(caption: str) -> list[int]:
    """BOS, the bytes of the caption's UTF-8, EOS."""
    return [BOS, *(FIRST_BYTE + byte for byte in caption.encode()), EOS]


class CaptionBatches(Batches):
    """Packed images and, packed alike, their captions: the text arrays of `align.AlignBatches`, in bytes.

    A caption that no longer fits its row is cut at the end, which is then not learnt as its end.
    """

    def __init__(self, config, stage, options, table=None):
        self.images = make_batches(config, stage, options, table)
        self.length = config.vision.align.text_tokens
        if not any(self.images.table.captions):
            raise InputError("a stage of task 'captions' needs images with captions; this data has none (config section data)")

    def batch(self, step: int) -> dict[str, np.ndarray]:
        out = self.images.batch(step)
        shape = len(out["record"]), self.length
        text = {name: np.zeros(shape, np.int32) for name in ("text_in", "text_target", "text_segment", "text_position")}
        used = np.zeros(len(out["record"]), np.int32)
        for row, slot in np.argwhere(out["record"] >= 0):
            ids = caption_ids(self.images.table.captions[out["record"][row, slot]])
            start = used[row]
            stop = used[row] = min(self.length, start + len(ids) - 1)
            text["text_in"][row, start:stop] = ids[: stop - start]
            text["text_target"][row, start:stop] = ids[1 : stop - start + 1]
            text["text_segment"][row, start:stop] = slot + 1
            text["text_position"][row, start:stop] = np.arange(stop - start)
        return out | text | {"text_weight": (text["text_segment"] > 0).astype(np.float32)}


class Captions(Align):
    """Trains `vision_encoder` with `align_lm`; terms: text, pixels."""

    @staticmethod
    def words() -> int:
        return WORDS

    def batches(self):
        return CaptionBatches(self.config, self.stage, merge_options(default_options(), self.stage))

    def loss(self, params, stats, batch, key, axes):
        del stats, key, axes
        z_BNZ = self.encoder.apply({"params": params["vision_encoder"]}, batch)
        out = self.reader.apply({"params": params["align_lm"]}, z_BNZ, batch)
        text_nll, text_right = nll(out["text"], batch["text_target"])
        total = lambda value_BT: (jnp.sum(value_BT * batch["text_weight"]), jnp.sum(batch["text_weight"]))
        terms = {"text": total(text_nll), "pixels": self.pixel_error(out["pixels"], batch)}
        return LossOut(terms, {"text_accuracy": total(text_right)})
