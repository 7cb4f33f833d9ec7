"""The visual tokenizer: continuous cell features of the frozen encoder to residual codes, and codes to features.

A small perceptron ("quant_conv") moves the bridge's features into the space where they are quantised; a light decoder
predicts them back from the quantised sum, which is the only signal of the task that reaches the perceptron (paper
§1.4, reference/tokenizers.md A.4). Parameters are the part `vision_quantizer`; its codebooks are statistics, and what a
choice of quantizer trains by gradient is the parameters' `quantizer` (dina/quantize/variables.py).

Letters: B packs, N cells of a pack, L levels, Z width of a bridge feature, D width of a code vector.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dina.quantize import rvq
from dina.vision.bridge import VisionEncoder, make_encoder

PART = "vision_quantizer"
ENCODER_INPUTS = ("patches", "segment", "row", "col", "window")


def default_quantizer_config() -> ConfigDict:
    """`config.vision.quantizer`, the fields of `rvq.RVQConfig`: released 8 shared levels of 16,384 codes at width 3,584;
    small here."""
    return ConfigDict(
        {
            "sizes": (256,) * 8,
            "dim": 64,
            "codebook": "separate",
            # Short runs need a short memory: about 20 updates of some 2,000 cells.
            "decay": 0.95,
            "eps": 1e-5,
            "restart_fraction": 0.1,
            "restart_cap": 0.03,
            "commitment": "cumulative",
            "gradient": "straight_through",
            "kind": "rvq",
            "update": "ema",
            "metric": "euclidean",
            "factor_dim": 0,
            "beam": 1,
        }
    )


def default_feature_decoder_config() -> ConfigDict:
    """`config.vision.feature_decoder`: hidden width and residual layers of the light decoder (tokenizers.md C.2)."""
    return ConfigDict({"width": 192, "layers": 1})


class QuantConv(nn.Module):
    """LayerNorm, Dense, exact GELU, Dense: bridge features to the space of the codes (A.4)."""

    dim: int

    @nn.compact
    def __call__(self, z_BNZ: Float[Array, "*B Z"]) -> Float[Array, "*B D"]:
        h = nn.LayerNorm(epsilon=1e-5, name="norm")(z_BNZ)
        h = nn.gelu(nn.Dense(z_BNZ.shape[-1], name="fc1")(h), approximate=False)
        return nn.Dense(self.dim, name="fc2")(h)


class FeatureDecoder(nn.Module):
    """A few residual perceptron layers: quantised sum to the bridge feature before quantisation."""

    width: int
    layers: int
    out_dim: int

    @nn.compact
    def __call__(self, q_BND: Float[Array, "*B D"]) -> Float[Array, "*B Z"]:
        x = nn.Dense(self.width, name="in")(q_BND)
        for layer in range(self.layers):
            h = nn.Dense(2 * self.width, name=f"up_{layer}")(nn.LayerNorm(name=f"norm_{layer}")(x))
            x = x + nn.Dense(self.width, name=f"down_{layer}")(nn.gelu(h))
        return nn.Dense(self.out_dim, name="out")(nn.LayerNorm(name="norm_out")(x))


@dataclasses.dataclass(frozen=True)
class VisualTokenizer:
    """Encoder and quantizer of one config; hashable, so that compiled functions are shared between calls."""

    encoder: VisionEncoder
    rvq: rvq.RVQConfig
    quant_conv: QuantConv
    feature_decoder: FeatureDecoder

    def continuous(self, params: Mapping, pack: Mapping[str, Array]) -> Float[Array, "B N Z"]:
        """Bridge features of stacked packs; those of padding cells are garbage."""
        return self.encoder.apply({"params": params["vision_encoder"]}, pack)

    def project(self, params: Mapping, z_BNZ: Array) -> Array:
        """Bridge features to the vectors that are quantised."""
        return self.quant_conv.apply({"params": params[PART]["quant_conv"]}, z_BNZ)

    def reconstruct(self, params: Mapping, q_BND: Array) -> Array:
        """Quantised sums to predicted bridge features."""
        return self.feature_decoder.apply({"params": params[PART]["feature_decoder"]}, q_BND)

    def view(self, params: Mapping, stats: Mapping) -> rvq.Stats:
        """The quantizer's statistics as the parameters make them now, with gradient to those; for the stage that trains."""
        return rvq.view(self.rvq, params[PART].get("quantizer", {}), stats[PART])

    def codes(self, params: Mapping, stats: Mapping, pack: Mapping[str, Array]) -> Int[Array, "B N L"]:
        """Codes of stacked packs, -1 in padding cells."""
        x_BND = self.project(params, self.continuous(params, pack))
        codes_NL = rvq.encode(self.rvq, stats[PART], x_BND.reshape(-1, self.rvq.dim))
        codes_BNL = codes_NL.reshape(*x_BND.shape[:2], -1)
        return jnp.where(pack["cell_segment"][..., None] > 0, codes_BNL, -1)

    def sums(self, stats: Mapping, codes_BNL: Array, levels: int | Array | None = None) -> Float[Array, "B N D"]:
        """Sums of code vectors; `levels` is a number, one per cell [B, N], or None for all."""
        if levels is not None and not isinstance(levels, int):
            levels = levels.reshape(-1)
        q_ND = rvq.decode(self.rvq, stats[PART], codes_BNL.reshape(-1, self.rvq.levels), levels)
        return q_ND.reshape(*codes_BNL.shape[:-1], self.rvq.dim)


def make_tokenizer(config_vision: ConfigDict) -> VisualTokenizer:
    """The tokenizer of a config's `vision` section."""
    quantizer, decoder = config_vision.quantizer.to_dict(), config_vision.feature_decoder
    return VisualTokenizer(
        encoder=make_encoder(config_vision),
        rvq=rvq.RVQConfig(**quantizer),
        quant_conv=QuantConv(quantizer["dim"], parent=None),
        feature_decoder=FeatureDecoder(decoder.width, decoder.layers, config_vision.bridge.out_dim, parent=None),
    )


def init_quantizer(config_vision: ConfigDict, key: jax.Array) -> tuple[Mapping, Mapping]:
    """(parameters, statistics) of the part `vision_quantizer`."""
    tokenizer = make_tokenizer(config_vision)
    first, second, third = jax.random.split(key, 3)
    trained, stats = rvq.init(tokenizer.rvq, third)
    params = {
        "quant_conv": tokenizer.quant_conv.init(first, jnp.zeros((1, config_vision.bridge.out_dim)))["params"],
        "feature_decoder": tokenizer.feature_decoder.init(second, jnp.zeros((1, tokenizer.rvq.dim)))["params"],
    }
    return with_quantizer(params, trained), stats


def with_quantizer(params: Mapping, trained: Mapping) -> Mapping:
    """Parameters of the part with those of the quantizer, where it has any."""
    return params | ({"quantizer": trained} if trained else {})


@functools.partial(jax.jit, static_argnums=0)
def _tokenize(tokenizer, params, stats, pack):
    return tokenizer.codes(params, stats, pack)


def tokenize(config_vision: ConfigDict, variables: Mapping, pack: Mapping[str, Array]) -> Int[Array, "B N L"]:
    """Codes of stacked packs (arrays of `preprocess.pack_images`, further keys ignored), -1 in padding.

    Args:
        config_vision: the `vision` section.
        variables: {'params', 'stats'} with the parts vision_encoder and vision_quantizer (more parts are ignored).
        pack: arrays with a leading dimension B; compiled once per shape.
    """
    params = {part: variables["params"][part] for part in ("vision_encoder", PART)}
    inputs = {name: pack[name] for name in (*ENCODER_INPUTS, "cell_segment")}
    return _tokenize(make_tokenizer(config_vision), params, {PART: variables["stats"][PART]}, inputs)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _features(tokenizer, params, stats, codes_BNL, levels):
    q_BND = tokenizer.sums(stats, codes_BNL, levels)
    return q_BND, tokenizer.reconstruct(params, q_BND)


def features(
    config_vision: ConfigDict, variables: Mapping, codes_BNL: Int[Array, "B N L"], levels: int | None = None
) -> tuple[Float[Array, "B N D"], Float[Array, "B N Z"]]:
    """(sum of code vectors, bridge feature predicted from it) of codes; -1 adds nothing."""
    parts = {PART: variables["params"][PART]}, {PART: variables["stats"][PART]}
    return _features(make_tokenizer(config_vision), *parts, codes_BNL, levels)
