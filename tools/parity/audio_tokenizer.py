"""Mel to codes, and codes to the mel decoder's input (case 08b): both convolutions, every layer, the bridge, the codes."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dina.audio import encoder, features, tokenizer
from dina.audio.config import default_config
from dina.convert import audio as tables
from dina.quantize import rvq
from tools.parity import load
from tools.parity.case import Case

PROJECTION = "audio_bridge_model.proj_decoder.weight"  # its name's beginning is that of all names


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "bridge_prequant" in case and "codes_packed" in case


def settings(c) -> ml_collections.ConfigDict:
    """`config.audio` of a case's config, residuals rounded as released."""
    found = default_config()
    with found.unlocked():
        found.encoder = {"width": c["d_model"], "layers": c["encoder_layers"], "heads": c["encoder_attention_heads"], "ff": c["encoder_ffn_dim"],
                         "stride": c["stride_size"], "activation": c["activation_function"]}  # fmt: skip
    found.bridge.pool, found.decoder.width = c["avg_pooler"], c["d_model"]
    found.quantizer.sizes, found.quantizer.residual = tuple(c["codebook_sizes"]), "activation"
    return found


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    found, mel_BTM, frames_B = settings(case.config), case.input("mel").swapaxes(1, 2), case.input("frames")
    length_B = features.encoder_length(frames_B, found.encoder.stride)
    codes_B = features.code_length(length_B, found.bridge.pool)
    case.compare_ids("encoder_length", length_B)
    case.compare_ids("bridge_length", codes_B)
    model, cfg = encoder.make_encoder(found), tokenizer.quantizer_config(found)
    variables = _variables(case, model, cfg, mel_BTM.shape[-1])
    apply = jax.jit(lambda params, mel, frames: model.apply({"params": params}, mel, frames, capture_intermediates=True))
    z_BUZ, state = apply(variables["params"]["audio_encoder"], mel_BTM, frames_B)
    seen = state["intermediates"]["encoder"]
    for name in ("conv1", "conv2"):
        case.compare(f"{name}_gelu", nn.gelu(seen[name]["__call__"][0], approximate=False).swapaxes(1, 2))
    out_BTD = seen["__call__"][0]
    case.compare("positional_embedding", encoder.sinusoid(*out_BTD.shape[1:]))
    for layer in range(found.encoder.layers):
        case.compare(f"layer{layer}_out_packed", packed(seen[f"layer{layer}"]["__call__"][0], length_B))
    case.compare("encoder_out", out_BTD)
    case.compare("bridge_prequant", z_BUZ)
    _codes(case, found, variables, packed(z_BUZ, codes_B))


def packed(x_BTD, length_B) -> np.ndarray:
    """The valid frames of all rows, one after the other."""
    return np.concatenate([np.asarray(x_TD)[:n] for x_TD, n in zip(x_BTD, length_B, strict=True)])


def _variables(case: Case, model, cfg: rvq.RVQConfig, mels: int):
    """Our parameters and statistics; buffers that only some cases hold are declared unused."""
    prefix = next(name for name in case.weight_names if name.endswith(PROJECTION)).removesuffix(PROJECTION)
    named = lambda end: any(name.endswith(end) for name in case.weight_names)
    table = f"{prefix}audio_model.positional_embedding"
    if table in case.weight_names:
        case.drop_weight(table, "sinusoids, which our module computes")
    rules = [*tables.codebooks(prefix), *tables.projection(prefix), *(tables.averages(prefix) if named(".embed_avg") else [])]
    return load.variables(
        case, (tables.encoder(prefix), *tables.encoder_sizes(model, mels)), (rules, *tables.quantizer_sizes(cfg, model.encoder.width))
    )


def _codes(case: Case, found, variables, z_NZ) -> None:
    stats, params = variables["stats"]["audio_quantizer"], variables["params"]["audio_quantizer"]
    codes_NL = np.asarray(jax.jit(lambda z: tokenizer.search(found, stats, z))(z_NZ[None])[0])
    margin_NL, residual_NZ = [], jnp.asarray(z_NZ)
    for level, code_N in enumerate(codes_NL.T):
        book_KZ = stats["codebook"][str(level)]
        distance_NK = np.asarray(tokenizer.distances(residual_NZ, book_KZ))
        nearest = np.partition(distance_NK, 1, axis=-1) if distance_NK.shape[1] > 1 else None
        margin_NL.append(np.zeros(len(code_N)) if nearest is None else nearest[:, 1] - nearest[:, 0])
        residual_NZ = residual_NZ - book_KZ[code_N]
        scale = float(distance_NK.max()) if level == 0 else scale
    margin_NL, golden_NL = np.stack(margin_NL, -1), case.golden("codes_packed")
    # Until a level differs, both chose between the same distances, and a margin's error is theirs.
    same_NL = np.cumsum(codes_NL != golden_NL, axis=1) == 0
    error = float(np.max(np.abs(margin_NL - case.golden("quant_margin")), where=same_NL, initial=0.0))
    other_NL = case.compare_ids("codes_packed", codes_NL, case.golden("quant_margin"), error, along=1)
    case.compare("quant_margin", margin_NL, scale=scale, lost=np.maximum.accumulate(other_NL, axis=1))
    back_BNL = jnp.asarray(golden_NL, jnp.int32)[None]
    case.compare("recover", rvq.decode(tokenizer.quantizer_config(found), stats, back_BNL[0]))
    case.compare("decode_emb", tokenizer.decoder_input(found, params, stats, back_BNL)[0])
