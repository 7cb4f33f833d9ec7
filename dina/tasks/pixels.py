"""Stage V2: the pixel decoder under frozen encoder and codes (reference/tokenizers.md I, V2; paper §1.5).

Terms: l1 and l2 in normalised pixel values, align (the re-encoded reconstruction must have the original's bridge
features; gradient flows through the frozen encoder), perceptual (distance in a frozen network's feature maps, on
windows cut out of the pack; computed only where its weight is > 0). A share of the images is decoded from their first
levels only, so that reconstructions at 1, 2, 4 levels mean something.

Letters: B rows, P patches, N = P/4 cells, V values of a patch, D code width, Z bridge width, M windows of the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dina.config import InputError
from dina.data import cache, feature_weights
from dina.quantize import rvq
from dina.tasks.base import LossOut, Sums, Task, merge_options
from dina.tasks.vision_batches import data_options, make_batches
from dina.tasks.visual_tokens import feature_errors, image_keys
from dina.vision import bridge, perceptual, pixel_decoder, tokenizer


def default_options() -> ConfigDict:
    """`stage.options` of this task.

    truncate: share of images cut at a random level. align_stride: the alignment loss, which costs an encoder forward
    and backward, is taken on every so-many-th row; 0 = never. network, window, windows: the perceptual loss's feature
    network (dina/vision/perceptual.py), the side of its windows in pixels, and how many a row gives. The data's:
    `vision_batches.data_options`.
    """
    return ConfigDict({"truncate": 0.5, "align_stride": 4, "network": "efficientnet_lite0", "window": 112, "windows": 1,
                       **data_options()})


class Pixels(Task):
    """Trains `pixel_decoder`. With a perceptual loss it has the frozen part `perceptual` as well."""

    defaults = staticmethod(default_options)

    def __init__(self, config, stage):
        super().__init__(config, stage)
        self.tokenizer = tokenizer.make_tokenizer(config.vision)
        self.decoder = pixel_decoder.make_pixel_decoder(config.vision)
        self.options = merge_options(self.defaults(), stage)
        self.network = perceptual.network(self.options.network) if self.wants_network() else None
        self.window = perceptual.check_window(self.options.window)

    def wants_network(self) -> bool:
        """Whether the stage needs the feature network."""
        return self.stage.loss_weights.get("perceptual", 0.0) > 0

    def init(self, key):
        vision = self.config.vision
        first, second, third = jax.random.split(key, 3)
        params, stats = tokenizer.init_quantizer(vision, second)
        frozen = {perceptual.PART: self.network.blank()} if self.network else {}
        return {
            "params": {
                "vision_encoder": bridge.init_encoder(vision, first),
                tokenizer.PART: params,
                pixel_decoder.PART: pixel_decoder.init_pixel_decoder(vision, third),
            }
            | frozen,
            "stats": {tokenizer.PART: stats},
        }

    def start(self, variables, batches, key):
        """The feature network's weights: from here on they are part of the state, and no restart fetches them."""
        del batches, key
        if self.network is None:
            return variables
        weights = feature_weights.load(self.network.name, cache.directory(self.config))
        return variables | {"params": variables["params"] | {perceptual.PART: weights}}

    def batches(self):
        return make_batches(self.config, self.stage, self.options)

    def loss(self, params, stats, batch, key, axes):
        del axes
        z_BNZ, q_BND, depth_BN = self.conditions(params, stats, batch, key)
        made_BPV = self.decoder.apply({"params": params[pixel_decoder.PART]}, q_BND, batch)
        terms, metrics = self.pixel_terms(params, batch, made_BPV, z_BNZ, depth_BN)
        if self.network:
            terms["perceptual"] = self._perceptual_term(params, batch, made_BPV, key)
        return LossOut(terms, metrics)

    def conditions(self, params, stats, batch, key) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(bridge features [B, N, Z], sums of code vectors [B, N, D], their levels [B, N]), without gradient."""
        tokens = self.tokenizer
        z_BNZ = jax.lax.stop_gradient(tokens.continuous(params, batch))
        x_BND = tokens.project(params, z_BNZ)
        codes_NL = rvq.encode(tokens.rvq, stats[tokenizer.PART], x_BND.reshape(-1, tokens.rvq.dim))
        cell_keys = image_keys(key, batch["example"], batch["cell_segment"])
        depth_N = rvq.draw_depth(tokens.rvq, cell_keys, len(codes_NL), self.options.truncate)
        codes_BNL, depth_BN = codes_NL.reshape(*x_BND.shape[:2], -1), depth_N.reshape(x_BND.shape[:2])
        return z_BNZ, jax.lax.stop_gradient(tokens.sums(stats, codes_BNL, depth_BN)), depth_BN

    def pixel_terms(self, params, batch, made_BPV, z_BNZ, depth_BN) -> tuple[Sums, Sums]:
        """Terms l1, l2 and, where asked for, align of decoded patches, and metrics."""
        tokens, rows = self.tokenizer, batch["example"].shape[0]
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
        return terms, metrics

    def feature_maps(self, params, patches_BPV, windows: perceptual.Windows) -> tuple[jax.Array, ...]:
        """The feature network's maps of the windows, clipped to black and white as pictures are shown: what a decoder says
        beyond white costs nothing here."""
        return self.network.run(params[perceptual.PART], jnp.clip(perceptual.cut(patches_BPV, windows), 0.0, 1.0))[0]

    def draw_windows(self, batch, key) -> tuple[perceptual.Windows, list[jax.Array], jax.Array]:
        """(windows, weights of the maps' positions, weights [M] of the windows)."""
        windows = perceptual.draw_windows(key, batch["example"], batch["grid"], self.window, self.options.windows)
        weights = perceptual.cell_weights(perceptual.window_mask(windows), self.network.strides)
        return windows, weights, windows.used.reshape(-1)

    def _perceptual_term(self, params, batch, made_BPV, key) -> tuple[jax.Array, jax.Array]:
        windows, weights, used_M = self.draw_windows(batch, key)
        real = jax.lax.stop_gradient(self.feature_maps(params, batch["patches"], windows))
        distance_M = perceptual.map_distance(self.feature_maps(params, made_BPV, windows), real, weights)
        return jnp.sum(distance_M * used_M), jnp.sum(used_M)
