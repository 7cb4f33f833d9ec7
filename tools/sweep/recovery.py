"""How much of a picture is left in a frozen representation, whatever it was trained for (paper §1.6, §3.7): the task.

The paper trains one decoder per encoder and finds that a random vision transformer keeps more of the pixels than a trained
one. What it lacks is here: a transformer without skips, plain linear maps of the pixels, features of other pictures, and equal
widths and equal bits for all. One pixel decoder of one size is trained on each `source`:
  encoder     the stage's `vision_encoder`, trained or (0 steps) random
  no_skips    the same parameters with every skip left out
  linear      a random linear map of a cell's pixels to as many numbers as the encoder gives
  principal   their first principal components: the best linear map of that width
  shuffled    the encoder's features of other cells: what can be known from the grid alone
Features are centred and scaled by one number; `read` = 'codes' quantises them by k-means books, without any training, so that
all sources also have the same bits.

Letters: B rows, P patches, N cells, V pixel values of a cell, Z feature width, L levels, M cells of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dina import stages
from dina.config import check_name
from dina.quantize import rvq
from dina.tasks.base import LossOut, Task, merge_options
from dina.tasks.vision_batches import data_options, make_batches
from dina.tasks.visual_tokens import image_keys
from dina.vision import bridge, encoder, pixel_decoder, preprocess, tokenizer

READER = "reader"  # the part whose statistics are what `start` finds: mean, scale, map and books
SOURCES = ("encoder", "no_skips", "linear", "principal", "shuffled")
READS = ("features", "codes")
TASK = "recovery"
stages.TASKS[TASK] = ("tools.sweep.recovery:Recovery", ("vision",))


def default_options() -> ConfigDict:
    """`stage.options`: source and read as at the top of this file; truncate: share of images cut at a random level;
    sample: cells from which `start` takes means, components and books; and those of `vision_batches.data_options`."""
    return ConfigDict({"source": "encoder", "read": "features", "truncate": 0.5, "sample": 8192, **data_options()})


class NoSkips(encoder.Block):
    """The encoder's layer without its two skips; parameters are the same."""

    @nn.compact
    def __call__(self, x_TD, is_full, ids, rotary):
        x_TD = self.mix(encoder.RMSNorm(name="norm1")(x_TD), is_full, ids, rotary)
        h_TD = encoder.RMSNorm(name="norm2")(x_TD)
        gate_TF, up_TF = (nn.Dense(self.ff, name=name)(h_TD) for name in ("gate", "up"))
        return self.branch_out("down", x_TD.shape[-1])(nn.silu(gate_TF) * up_TF), None


def without_skips(whole: bridge.VisionEncoder, params: Mapping, pack: Mapping[str, Array]) -> Float[Array, "B N Z"]:
    """What `whole` computes, without skips."""
    vit, (b, p, values) = whole.vit, pack["patches"].shape
    x_TD = pack["patches"].reshape(b * p, values) @ params["vit"]["patch_embed"]["kernel"]
    rotary = encoder.rotary_tables(pack["row"], pack["col"], vit.width // vit.heads)
    block = NoSkips(vit.heads, vit.ff, vit.depth, parent=None)
    for layer in range(vit.depth):
        own = jax.tree.map(lambda w, layer=layer: w[layer], params["vit"]["blocks"])
        x_TD, _ = block.apply({"params": own}, x_TD, layer in vit.full_layers, (pack["segment"], pack["window"]), rotary)
    return whole.bridge.apply({"params": params["bridge"]}, x_TD.reshape(b, p, vit.width))


@dataclasses.dataclass(frozen=True)
class Reader:
    """A source of features and the books that quantise them; hashable, so that compiled functions are shared."""

    source: str
    encoder: bridge.VisionEncoder
    rvq: rvq.RVQConfig

    def raw(self, params: Mapping, reader: Mapping, pack: Mapping[str, Array]) -> Float[Array, "B N Z"]:
        """Features as the source gives them."""
        if self.source in ("linear", "principal"):
            pixels_BNV = pack["patches"].reshape(pack["patches"].shape[0], -1, reader["map"].shape[0])
            return pixels_BNV @ reader["map"]
        if self.source == "no_skips":
            return without_skips(self.encoder, params["vision_encoder"], pack)
        return self.encoder.apply({"params": params["vision_encoder"]}, pack)

    def features(self, params: Mapping, reader: Mapping, pack: Mapping[str, Array]) -> Float[Array, "B N Z"]:
        """Features, centred and of unit size."""
        return (self.raw(params, reader, pack) - reader["mean"]) / reader["scale"]


def make_reader(config_vision: ConfigDict, source: str) -> Reader:
    """The reader of a config; its books are as wide as the bridge, whatever `quantizer.dim` says of itself."""
    cfg = tokenizer.make_tokenizer(config_vision).rvq
    return Reader(source, bridge.make_encoder(config_vision), dataclasses.replace(cfg, dim=config_vision.bridge.out_dim))


def shuffled(key: Array, x_BNZ: Float[Array, "B N Z"], mask_BN: Array) -> Float[Array, "B N Z"]:
    """Every real cell gets the feature of a real cell drawn without replacement; padding stays."""
    mask_M, x_MZ = mask_BN.reshape(-1), x_BNZ.reshape(-1, x_BNZ.shape[-1])
    target_M = jnp.argsort(~mask_M, stable=True)
    drawn_M = jnp.argsort(jnp.where(mask_M, jax.random.uniform(key, mask_M.shape), 2.0 + jnp.arange(len(mask_M))))
    return jnp.zeros_like(x_MZ).at[target_M].set(x_MZ[drawn_M]).reshape(x_BNZ.shape)


class Recovery(Task):
    """Trains `pixel_decoder` on one source."""

    def __init__(self, config, stage):
        super().__init__(config, stage)
        self.options = merge_options(default_options(), stage)
        check_name(self.options.source, SOURCES, "option source:")
        check_name(self.options.read, READS, "option read:")
        self.reader = make_reader(config.vision, self.options.source)
        self.decoder = pixel_decoder.make_pixel_decoder(config.vision)

    def init(self, key):
        vision, width = self.config.vision, self.config.vision.bridge.out_dim
        values = preprocess.MERGE**2 * preprocess.PATCH_DIM
        first, second, third, fourth = jax.random.split(key, 4)
        reader = {"mean": jnp.zeros(width), "scale": jnp.ones(()), "map": jax.random.normal(third, (values, width)) / values**0.5}
        blank = {name: jnp.zeros((1, 4), jnp.int32) for name in ("segment", "row", "col")} | {"grid": jnp.ones((1, 1, 2), jnp.int32)}
        return {
            "params": {
                "vision_encoder": bridge.init_encoder(vision, first),
                pixel_decoder.PART: self.decoder.init(second, jnp.zeros((1, 1, width)), blank)["params"],
            },
            "stats": {READER: reader | rvq.init_stats(self.reader.rvq, fourth)},
        }

    def batches(self):
        return make_batches(self.config, self.stage, self.options)

    def start(self, variables, batches, key):
        """Components, mean and scale of the source's features, and k-means books of them."""
        reader, params, packs_ = dict(variables["stats"][READER]), variables["params"], []
        count = 0
        for batch in batches:
            packs_.append(batch)
            count += int((batch["cell_segment"] > 0).sum())
            if count >= self.options.sample:
                break
        if self.options.source == "principal":
            reader["map"] = components(packs_, self.config.vision.bridge.out_dim)
        raw = jax.jit(self.reader.raw)
        inputs = [{name: batch[name] for name in tokenizer.ENCODER_INPUTS} for batch in packs_]
        real = [batch["cell_segment"] > 0 for batch in packs_]
        x_MZ = np.concatenate([np.asarray(raw(params, reader, pack))[mask] for pack, mask in zip(inputs, real, strict=True)])
        x_MZ = x_MZ[: self.options.sample]
        mean_Z = x_MZ.mean(0)
        scale = float(np.sqrt(np.mean((x_MZ - mean_Z) ** 2))) + 1e-12
        reader |= {"mean": jnp.asarray(mean_Z), "scale": jnp.float32(scale)}
        if self.options.read == "codes":
            books = rvq.kmeans_init(self.reader.rvq, (x_MZ - mean_Z) / scale, np.ones(len(x_MZ)), key)
            reader |= books
        return {"params": params, "stats": variables["stats"] | {READER: reader}}

    def loss(self, params, stats, batch, key, axes):
        del axes
        reader, mask_BN = stats[READER], batch["cell_segment"] > 0
        x_BNZ = jax.lax.stop_gradient(self.reader.features(params, reader, batch))
        mix_key, cut_key = jax.random.split(key)
        if self.options.source == "shuffled":
            x_BNZ = shuffled(jax.random.fold_in(mix_key, batch["example"][0]), x_BNZ, mask_BN)
        if self.options.read == "codes":
            cfg, flat_MZ = self.reader.rvq, x_BNZ.reshape(-1, x_BNZ.shape[-1])
            depth_M = rvq.draw_depth(cfg, image_keys(cut_key, batch["example"], batch["cell_segment"]), len(flat_MZ), self.options.truncate)
            x_BNZ = jax.lax.stop_gradient(rvq.decode(cfg, reader, rvq.encode(cfg, reader, flat_MZ), depth_M)).reshape(x_BNZ.shape)
        made_BPV = self.decoder.apply({"params": params[pixel_decoder.PART]}, x_BNZ, batch)
        error_BPV = made_BPV - batch["patches"]
        weight_BP = (batch["segment"] > 0).astype(jnp.float32)
        total = lambda value_BP: (jnp.sum(value_BP * weight_BP), jnp.sum(weight_BP))
        terms = {"l1": total(jnp.mean(jnp.abs(error_BPV), -1)), "l2": total(jnp.mean(error_BPV**2, -1))}
        return LossOut(terms, {"l2": terms["l2"]})


def components(batches: Sequence[Mapping[str, np.ndarray]], width: int, rounds: int = 4) -> Float[Array, "V Z"]:
    """First principal components of cells' pixels, by subspace iteration; zeros where there are fewer."""
    cells = [batch["patches"].reshape(*batch["cell_segment"].shape, -1)[batch["cell_segment"] > 0] for batch in batches]
    x_MV = np.concatenate(cells)
    x_MV = x_MV - x_MV.mean(0)
    found = min(width, *x_MV.shape)
    basis_VC = np.random.default_rng(0).standard_normal((x_MV.shape[1], min(found + 8, *x_MV.shape)), np.float32)
    for _ in range(rounds):
        basis_VC, _ = np.linalg.qr(x_MV.T @ (x_MV @ basis_VC))
    _, _, turn_CC = np.linalg.svd(x_MV @ basis_VC, full_matrices=False)
    return jnp.asarray(np.pad(basis_VC @ turn_CC[:found].T, ((0, 0), (0, width - found))), jnp.float32)
