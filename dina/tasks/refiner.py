"""Stage V4: the flow-matching refiner; everything before it is frozen (reference/tokenizers.md I, V4; A.7).

The conditions are made as they will be at sampling: code vectors and the pixel decoder's image, both from codes that
are disturbed (some replaced at random, some images cut at a random level), so that the refiner repairs what a
language model gets wrong. x_t = (1 - t) noise + t data with t logit-normal, per image; the target is data - noise.

Letters: B rows, N cells, L levels, P patches, T latent tokens, C values of a token, I images of a row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from dina.quantize import rvq
from dina.tasks.base import LossOut, Task, merge_options
from dina.tasks.vision_batches import data_options, make_batches
from dina.vision import bridge, detokenize, pixel_decoder, refiner, tokenizer
from dina.vision.autoencoder import make_autoencoder


def default_options() -> ConfigDict:
    """`stage.options` of this task: shares of images whose conditions are dropped, and how codes are disturbed; and the
    data's (`vision_batches.data_options`)."""
    return ConfigDict(
        {
            "drop_cond": 0.1,
            "drop_ref": 0.1,
            "drop_both": 0.05,
            "code_noise": 0.1,  # an image's share of replaced codes is uniform in [0, code_noise]
            "truncate": 0.1,
            **data_options(),
        }
    )


class RefinerTask(Task):
    """Trains `refiner`."""

    def __init__(self, config, stage):
        super().__init__(config, stage)
        self.tokenizer = tokenizer.make_tokenizer(config.vision)
        self.decoder = pixel_decoder.make_pixel_decoder(config.vision)
        self.refiner = refiner.make_refiner(config.vision)
        self.autoencoder = make_autoencoder(config.vision.refiner.autoencoder)
        self.options = merge_options(default_options(), stage)

    def init(self, key):
        vision = self.config.vision
        first, second, third, fourth = jax.random.split(key, 4)
        params, stats = tokenizer.init_quantizer(vision, second)
        return {
            "params": {
                "vision_encoder": bridge.init_encoder(vision, first),
                tokenizer.PART: params,
                pixel_decoder.PART: pixel_decoder.init_pixel_decoder(vision, third),
                refiner.PART: refiner.init_refiner(vision, fourth),
            },
            "stats": {tokenizer.PART: stats},
        }

    def batches(self):
        return make_batches(self.config, self.stage, self.options)

    def loss(self, params, stats, batch, key, axes):
        del axes
        images = batch["grid"].shape[1]
        row_key = jax.vmap(lambda example: jax.random.fold_in(key, example))(batch["example"])
        draw = jax.vmap(lambda k: self._draw(k, images, batch["cell_segment"].shape[1]))(row_key)
        layout = self.autoencoder.layout(batch)
        auto_params = params[refiner.PART].get("autoencoder", {})
        q_BND, ref_BTC = self._conditions(params, stats, batch, draw, auto_params)
        data_BTC = self.autoencoder.encode(auto_params, batch["patches"], batch)
        frozen = jax.lax.stop_gradient((q_BND, ref_BTC, data_BTC))
        q_BND, ref_BTC, data_BTC = frozen
        shape = data_BTC.shape[1:]
        noise_BTC = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), shape))(row_key)
        t_BT1 = refiner.spread(draw["t"][..., None], refiner.image_index(layout["segment"]))
        x_BTC = (1 - t_BT1) * noise_BTC + t_BT1 * data_BTC
        dit = {"params": params[refiner.PART]["dit"]}
        v_BTC = self.refiner.apply(dit, x_BTC, draw["t"], q_BND, ref_BTC, batch, layout, draw["keep"])
        weight_BT = (layout["segment"] > 0).astype(jnp.float32)
        error_BT = jnp.mean((v_BTC - (data_BTC - noise_BTC)) ** 2, -1)
        total = lambda value: (jnp.sum(value * weight_BT), jnp.sum(weight_BT))
        metrics = {
            "reference_l2": total(jnp.mean((ref_BTC - data_BTC) ** 2, -1)),
            "clean_l2": total(jnp.mean((x_BTC + (1 - t_BT1) * v_BTC - data_BTC) ** 2, -1)),
        }
        return LossOut({"velocity": total(error_BT)}, metrics)

    def _draw(self, key, images: int, cells: int):
        """All random choices of one row but the noise: times, dropped conditions, disturbed codes."""
        o, levels = self.options, self.tokenizer.rvq.levels
        keys = jax.random.split(jax.random.fold_in(key, 0), 7)
        kind_I = jax.random.uniform(keys[0], (images,))
        both = kind_I < o.drop_both
        no_cond = kind_I < o.drop_both + o.drop_cond
        no_ref = both | (~no_cond & (kind_I < o.drop_both + o.drop_cond + o.drop_ref))
        rate_I = o.code_noise * jax.random.uniform(keys[1], (images,))
        sizes = jnp.array(self.tokenizer.rvq.sizes)
        return {
            "t": jax.nn.sigmoid(jax.random.normal(keys[2], (images,))),
            "keep": {"cond": 1.0 - no_cond, "ref": 1.0 - no_ref},
            "rate": rate_I,
            "depth": rvq.draw_depth(self.tokenizer.rvq, keys[3], images, o.truncate),
            "hit": jax.random.uniform(keys[4], (cells, levels)),
            "other": jax.random.randint(keys[5], (cells, levels), 0, sizes),
        }

    def _conditions(self, params, stats, batch, draw, auto_params) -> tuple[Array, Array]:
        """Code vectors [B, N, D] of the disturbed codes, and latent tokens of the image decoded from them."""
        codes_BNL = self.tokenizer.codes(params, stats, batch)
        image_BN = refiner.image_index(batch["cell_segment"])
        at = lambda value_BI: jnp.take_along_axis(value_BI, image_BN, axis=1)
        codes_BNL = disturb(codes_BNL, draw["hit"] < at(draw["rate"])[..., None], draw["other"])
        q_BND = self.tokenizer.sums(stats, codes_BNL, at(draw["depth"]))
        made_BPV = self.decoder.apply({"params": params[pixel_decoder.PART]}, q_BND, batch)
        made_BPV = jnp.clip(made_BPV, *detokenize.pixel_range())
        return q_BND, self.autoencoder.encode(auto_params, made_BPV, batch)


def disturb(codes: Int[Array, "*S L"], hit: Array, other: Int[Array, "*S L"]) -> Int[Array, "*S L"]:
    """Codes with `other` where `hit`; absent ones stay absent."""
    return jnp.where(hit & (codes >= 0), other, codes)
