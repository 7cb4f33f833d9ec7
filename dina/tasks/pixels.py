"""Stage V2: the pixel decoder under frozen encoder and codes (reference/tokenizers.md I, V2; paper §1.5).

Terms: l1 and l2 in normalised pixel values, align (the re-encoded reconstruction must have the original's bridge
features; gradient flows through the frozen encoder). A share of the images is decoded from their first levels only,
so that reconstructions at 1, 2, 4 levels mean something.

Letters: B rows, P patches, N = P/4 cells, V values of a patch, D code width, Z bridge width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dina.config import InputError
from dina.quantize import rvq
from dina.tasks.base import LossOut, Task, merge_options
from dina.tasks.vision_batches import VisionBatches, image_table
from dina.tasks.visual_tokens import feature_errors, image_keys
from dina.vision import bridge, pixel_decoder, tokenizer


def default_options() -> ConfigDict:
    """`stage.options` of this task.

    truncate: share of images cut at a random level. align_stride: the alignment loss, which costs an encoder forward
    and backward, is taken on every so-many-th row; 0 = never.
    """
    return ConfigDict({"truncate": 0.5, "align_stride": 4, "augment": "none", "canvas_power": 0.0})


class Pixels(Task):
    """Trains `pixel_decoder`."""

    def __init__(self, config, stage):
        super().__init__(config, stage)
        self.tokenizer = tokenizer.make_tokenizer(config.vision)
        self.decoder = pixel_decoder.make_pixel_decoder(config.vision)
        self.options = merge_options(default_options(), stage)

    def init(self, key):
        vision = self.config.vision
        first, second, third = jax.random.split(key, 3)
        params, stats = tokenizer.init_quantizer(vision, second)
        return {
            "params": {
                "vision_encoder": bridge.init_encoder(vision, first),
                tokenizer.PART: params,
                pixel_decoder.PART: pixel_decoder.init_pixel_decoder(vision, third),
            },
            "stats": {tokenizer.PART: stats},
        }

    def batches(self):
        table = image_table(self.config, "train")
        return VisionBatches(self.config, self.stage, table, self.options.augment, self.options.canvas_power)

    def loss(self, params, stats, batch, key, axes):
        del axes
        tokens, rows = self.tokenizer, batch["example"].shape[0]
        z_BNZ = jax.lax.stop_gradient(tokens.continuous(params, batch))
        x_BND = tokens.project(params, z_BNZ)
        codes_NL = rvq.encode(tokens.rvq, stats[tokenizer.PART], x_BND.reshape(-1, tokens.rvq.dim))
        cell_keys = image_keys(key, batch["example"], batch["cell_segment"])
        depth_N = rvq.draw_depth(tokens.rvq, cell_keys, len(codes_NL), self.options.truncate)
        codes_BNL, depth_BN = codes_NL.reshape(*x_BND.shape[:2], -1), depth_N.reshape(x_BND.shape[:2])
        q_BND = jax.lax.stop_gradient(tokens.sums(stats, codes_BNL, depth_BN))
        made_BPV = self.decoder.apply({"params": params[pixel_decoder.PART]}, q_BND, batch)
        error_BPV = made_BPV - batch["patches"]
        weight_BP = (batch["segment"] > 0).astype(jnp.float32)
        full_BP = weight_BP * jnp.repeat(depth_BN == tokens.rvq.levels, 4, axis=1)
        total = lambda value, weight: (jnp.sum(value * weight), jnp.sum(weight))
        square_BP = jnp.mean(error_BPV**2, -1)
        terms = {"l1": total(jnp.mean(jnp.abs(error_BPV), -1), weight_BP), "l2": total(square_BP, weight_BP)}
        metrics = {"l2_all_levels": total(square_BP, full_BP)}
        stride = self.options.align_stride
        if stride:
            if rows % stride:
                raise InputError(
                    f"stage option align_stride={stride} does not divide the {rows} rows of a device's (micro-)batch: "
                    "change it, or the stage's batch or accumulate"
                )
            part = {name: batch[name][::stride] for name in tokenizer.ENCODER_INPUTS}
            again_BNZ = tokens.continuous(params, part | {"patches": made_BPV[::stride]})
            cosine_BN, smooth_BN = feature_errors(again_BNZ, z_BNZ[::stride])
            terms["align"] = total(cosine_BN + smooth_BN, (batch["cell_segment"][::stride] > 0).astype(jnp.float32))
        return LossOut(terms, metrics)
