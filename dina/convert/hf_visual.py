"""The visual side of a released `config.json` as our settings, and the table of all its tensors (tokenizers.md A).

`visual_config` is the config of a Qwen2.5-VL vision tower with two more sections, `vq_config` and `visual_decoder_config`.
Settings are plain values that a stage's record can hold: sections of `config.vision` for the parts that are there, and
'refiner', 'autoencoder' and 'code_dim', which make the modules of the release's own refiner (`refiner_modules`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from dina.config import InputError
from dina.convert import hf, visual
from dina.convert.released import Released, Tensor
from dina.quantize.rvq import RVQConfig
from dina.vision import bridge, config as vision_config, pixel_decoder, preprocess, tokenizer
from dina.vision.encoder import ROPE_THETA
from dina.vision.kl import KLAutoencoder
from dina.vision.refiner import Refiner

PARTS = ("vision_encoder", "vision_quantizer", "pixel_decoder", "refiner")
# Sections of `config.vision` that belong to each part. A release's refiner has none: it works in a latent space of its own.
SECTIONS = {"vision_encoder": ("encoder", "bridge"), "vision_quantizer": ("quantizer", "feature_decoder"),
            "pixel_decoder": ("pixel_decoder",)}  # fmt: skip
# Where the detokenizers' config may be instead: the release's serving code reads it there.
SERVING = "nmm_infer/config.json"
PROCESSOR = "preprocessor_config.json"
# What a tower's config need not say: the defaults of its class in transformers, which leaves them out when it saves.
TOWER = {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584, "window_size": 112,
         "fullatt_block_indexes": (7, 15, 23, 31)}  # fmt: skip
# Keys that change what is computed, and the values that our modules compute; absent is fine.
PIXELS = {"patch_size": preprocess.PATCH, "temporal_patch_size": preprocess.TEMPORAL, "spatial_merge_size": preprocess.MERGE}
REQUIRED = {
    "tower": PIXELS | {"hidden_act": "silu", "in_channels": 3, "in_chans": 3},
    "vq_config": {"quantizer_type": "rq", "quant_conv": True},
    "image_decoder_config": PIXELS,
    "transformer_config": {"patch_size": 2},
    "vae_config": {"act_fn": "silu", "in_channels": 3, "out_channels": 3},
    PROCESSOR: {"patch_size": preprocess.PATCH, "temporal_patch_size": preprocess.TEMPORAL, "merge_size": preprocess.MERGE},
}
DECAY = 0.99  # of the released quantizer's code
PLAIN = ("kind", "metric", "factor_dim")  # our quantizer's choices of which the release has the default
STACKS = ("layers", "transformer_blocks")  # names of the refiner's joint layers
COND, INDEX = "image_refiner.cond_proj.weight", "image_refiner.base_transformer.image_index_embedding"


def settings(checkpoint: Released, parts: Collection[str]) -> dict[str, Any]:
    """Settings of `parts` (of `PARTS`).

    Raises:
        InputError: a key is missing or has a value that our modules do not compute, or a tensor whose shape is needed is missing.
    """
    if not set(parts) & set(PARTS):
        return {}
    config = hf.section(checkpoint.config(), "visual_config", "config.json")
    if "visual_decoder_config" not in config and (checkpoint.folder / SERVING).exists():
        config = config | {"visual_decoder_config": checkpoint.read_json(SERVING).get("visual_decoder_config")}
    return pixels(checkpoint) | of_config(config, checkpoint.tensors, parts)


def of_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor], parts: Collection[str] = PARTS) -> dict[str, Any]:
    """The same from a `visual_config`, and from `tensors` what only shapes tell."""
    found: dict[str, Any] = {}
    if {"vision_encoder", "vision_quantizer"} & set(parts):
        made = tower(config, "visual_config")
        found["bridge"] = made["bridge"]
        if "vision_encoder" in parts:
            found["encoder"] = made["encoder"] | {"pixels": "bfloat16"}  # as the released code rounds them, in any precision
    if "vision_quantizer" in parts:
        found |= quantizer(hf.section(config, "vq_config", "visual_config"), found["bridge"]["out_dim"])
    if {"pixel_decoder", "refiner"} & set(parts):
        decoder = hf.section(config, "visual_decoder_config", f"visual_config (or {SERVING})")
        dim = found.get("quantizer", {}).get("dim")
        if "pixel_decoder" in parts:
            found |= _pixel_decoder(hf.section(decoder, "image_decoder_config", "visual_decoder_config"), tensors)
            dim = _code_dim(tensors, "image_decoder.post_quant_conv.weight", dim)
        if "refiner" in parts:
            found |= _refiner(hf.section(decoder, "transformer_config", "visual_decoder_config"), tensors)
            found |= _autoencoder(hf.section(decoder, "vae_config", "visual_decoder_config"), tensors)
            dim = _code_dim(tensors, COND, dim) if COND in tensors else dim or found["caption_dim"]
        found["code_dim"] = dim
    return found


def tower(c: Mapping[str, Any], where: str) -> dict[str, Any]:
    """'encoder' and 'bridge' of the config of a Qwen2.5-VL vision tower; `where` names it in errors."""
    hf.refuse(c, REQUIRED["tower"], where)
    rope = c.get("rope_parameters") or {}
    if rope.get("rope_theta", ROPE_THETA) != ROPE_THETA or rope.get("rope_type", "axial") not in ("axial", "default"):
        raise InputError(f"{where}.rope_parameters is {rope}; this code computes rope_theta {ROPE_THETA:g} without scaling")
    sizes = {name: hf.number(c, name, where, default) for name, default in TOWER.items() if name != "fullatt_block_indexes"}
    full, width, heads = c.get("fullatt_block_indexes", TOWER["fullatt_block_indexes"]), sizes["hidden_size"], sizes["num_heads"]
    if any(isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < sizes["depth"] for layer in full):
        raise InputError(f"{where}.fullatt_block_indexes is {list(full)}, of {sizes['depth']} layers")
    if width % (4 * heads):
        raise InputError(f"{where}: hidden_size {width} must be num_heads {heads} times a multiple of 4 (positions are of two dimensions)")
    window = sizes["window_size"] // preprocess.CELL  # rounded down, as transformers does
    if not window:
        raise InputError(f"{where}.window_size is {sizes['window_size']}, less than a cell of {preprocess.CELL} px")
    encoder = {"width": width, "depth": sizes["depth"], "heads": heads, "ff": sizes["intermediate_size"], "window_cells": window,
               "full_layers": sorted(full)}  # fmt: skip
    return {"encoder": encoder, "bridge": {"out_dim": sizes["out_hidden_size"]}}


def quantizer(c: Mapping[str, Any], width: int) -> dict[str, Any]:
    """'quantizer' and 'feature_decoder' of a `vq_config` behind features of `width`.

    The release has no feature decoder; ours, which a stage that goes on training the quantizer needs, is started fresh.
    """
    where = "visual_config.vq_config"
    hf.refuse(c, REQUIRED["vq_config"], where)
    if c.get("in_channels", width) != width:
        raise InputError(f"{where}.in_channels is {c['in_channels']}, but visual_config.out_hidden_size is {width}")
    sizes = c.get("codebook_size", c.get("codebook_sizes"))
    depth = hf.number(c, "depth", where, len(sizes) if isinstance(sizes, list) else None)
    sizes = sizes if isinstance(sizes, list) else [sizes] * depth
    if len(sizes) != depth or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise InputError(f"{where}: codebook_size (or codebook_sizes) must be a number, or one for each of {depth} levels, not {sizes}")
    if not isinstance(c.get("shared_codebook"), bool):  # shapes do not tell
        raise InputError(f"{where}.shared_codebook is {c.get('shared_codebook')!r}, not true or false")
    book = "shared" if c["shared_codebook"] else "separate"
    if book == "shared" and len(set(sizes)) > 1:
        raise InputError(f"{where}: a shared codebook has one size, codebook_size is {sizes}")
    found = {field.name: field.default for field in dataclasses.fields(RVQConfig) if field.name in PLAIN}
    found |= {"sizes": sizes, "dim": hf.number(c, "codebook_dim", where), "codebook": book, "decay": float(hf.number(c, "decay", where, DECAY))}
    return {"quantizer": found, "feature_decoder": {"width": max(1, width // 2), "layers": 2}}  # C.2 names 2 to 4 layers


def pixels(checkpoint: Released) -> dict[str, int]:
    """'min_pixels' and 'max_pixels' of the checkpoint's image processor, if it has one."""
    if not (checkpoint.folder / PROCESSOR).exists():
        return {}
    c = checkpoint.read_json(PROCESSOR)
    for name, wanted in (("image_mean", preprocess.CLIP_MEAN), ("image_std", preprocess.CLIP_STD)):
        if name in c and [round(x, 6) for x in c[name]] != [round(x, 6) for x in wanted.tolist()]:
            raise InputError(f"{checkpoint.folder / PROCESSOR}: {name} is {c[name]}; this code computes {wanted.tolist()}")
    hf.refuse(c, REQUIRED[PROCESSOR], PROCESSOR)
    size = c.get("size") or {}
    bounds = {name: c.get(name, size.get(other)) for name, other in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))}
    return {name: value for name, value in bounds.items() if value}


def _pixel_decoder(c: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    where, layer = "visual_decoder_config.image_decoder_config", "image_decoder.encoder.layers.0"
    hf.refuse(c, REQUIRED["image_decoder_config"], where)
    gated = f"{layer}.mlp.w2.weight" in tensors
    if not gated and c.get("hidden_act", "gelu") != "gelu":
        raise InputError(f"{where}.hidden_act is {c['hidden_act']!r}; without a gate this code computes 'gelu'")
    names = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads", "ff": "intermediate_size",
             "eps": "layer_norm_eps"}  # fmt: skip
    found = {ours: hf.number(c, theirs, where) for ours, theirs in names.items()} | {"positions": "raster", "attn_scale": "double"}
    found |= {"norms": "sub" if f"{layer}.mlp.ffn_ln.weight" in tensors else "pre", "ffn": "swiglu" if gated else "gelu"}
    return {"pixel_decoder": found | {"qkv_bias": "".join(x for x in "qkv" if f"{layer}.self_attn.{x}_proj.bias" in tensors)}}


def _refiner(c: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    where = "visual_decoder_config.transformer_config"
    hf.refuse(c, REQUIRED["transformer_config"], where)
    stack = next((s for s in STACKS if f"image_refiner.base_transformer.{s}.0.norm2.weight" in tensors), STACKS[0])
    names = {"width": "hidden_size", "depth": "num_layers", "refiner_layers": "num_refiner_layers", "heads": "num_attention_heads",
             "kv_heads": "num_kv_heads", "eps": "norm_eps", "time_scale": "timestep_scale"}  # fmt: skip
    found = {ours: hf.number(c, theirs, where) for ours, theirs in names.items()}
    axes, caption = c.get("axes_dim_rope"), hf.number(c, "text_feat_dim", where)
    if not isinstance(axes, list) or sum(axes) * found["heads"] != found["width"]:
        head = found["width"] // found["heads"]
        raise InputError(f"{where}.axes_dim_rope is {axes!r}; it must list three parts of a head of {head} values")
    # The width of the feed-forward is a formula of three more keys; the tensor says it.
    hidden = shape_of(tensors, f"image_refiner.base_transformer.{stack}.0.feed_forward.linear_1.weight")[0]
    found |= {"axes": axes, "ff": hidden, "cond_dim": caption if COND in tensors else 0, "references": shape_of(tensors, INDEX)[0],
              "token_dim": 4 * hf.number(c, "in_channels", where)}  # fmt: skip
    return {"refiner": found, "refiner_stack": stack, "caption_dim": caption}


def _autoencoder(c: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    where = "visual_decoder_config.vae_config"
    hf.refuse(c, REQUIRED["vae_config"], where)
    channels = c.get("block_out_channels")
    if not isinstance(channels, list) or not channels:
        raise InputError(f"{where}.block_out_channels is {channels!r}, not a list of channels")
    names = {"layers": "layers_per_block", "latent": "latent_channels", "groups": "norm_num_groups", "scale": "scaling_factor",
             "shift": "shift_factor"}  # fmt: skip
    found = {ours: hf.number(c, theirs, where) for ours, theirs in names.items()}
    point = "both" if "image_refiner.vae.quant_conv.weight" in tensors else "none"
    return {"autoencoder": found | {"channels": channels, "point_convs": point}}


def as_config(found: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """`config.vision` with these settings in it; what they do not name is the default."""
    config = vision_config.default_config()
    update(config, found)
    return config


def update(config: ml_collections.ConfigDict, found: Mapping[str, Any]) -> None:
    """Puts settings into a `config.vision`."""
    with config.unlocked():
        config.update({name: found[name] for name in ("min_pixels", "max_pixels") if name in found})
        for section in (section for sections in SECTIONS.values() for section in sections if section in found):
            config[section].update(_fields(found[section]))


def refiner_modules(found: Mapping[str, Any]) -> tuple[KLAutoencoder, Refiner]:
    """Latent space and transformer of the release's refiner, for `dina.vision.refine`."""
    return KLAutoencoder(**_fields(found["autoencoder"])), Refiner(**_fields(found["refiner"]), parent=None)


def _fields(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}


def tables(found: Mapping[str, Any]) -> list[tuple]:
    """(rules, counts, sizes) of everything that the settings name."""
    config, listed = as_config(found), []
    if "encoder" in found:
        listed.append((visual.encoder(), *visual.encoder_sizes(bridge.make_encoder(config))))
    if "quantizer" in found:
        cfg = tokenizer.make_tokenizer(config).rvq
        rules = [*visual.quant_conv(), *visual.codebooks(cfg), *visual.averages(cfg)]
        listed.append((rules, *visual.quantizer_sizes(cfg, config.bridge.out_dim)))
    if "pixel_decoder" in found:
        module = pixel_decoder.make_pixel_decoder(config)
        listed.append((visual.pixel_decoder(module), *visual.pixel_decoder_sizes(module, found["code_dim"])))
    if "refiner" in found:
        auto, flow = refiner_modules(found)
        listed.append((visual.refiner(flow, layers=found["refiner_stack"]), *visual.refiner_sizes(flow, found["code_dim"])))
        listed.append((visual.autoencoder(auto), *visual.autoencoder_sizes(auto)))
    return listed


def differs(found: Mapping[str, Any], config: ml_collections.ConfigDict, part: str) -> str:
    """How `config.vision` would read the weights of `part` otherwise than the settings say; '' if it does not."""
    fields = {field.name: field.default for field in dataclasses.fields(pixel_decoder.PixelDecoder)}
    for section in SECTIONS.get(part, ()):
        for key, theirs in found.get(section, {}).items():
            ours = config[section].get(key, fields.get(key))
            plain = list(ours) if isinstance(ours, tuple) else ours
            if key != "decay" and plain != theirs:
                return f"config.vision.{section}.{key} is {ours!r}, the imported weights have {theirs!r}"
    return ""


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor that says a size. Raises InputError without it."""
    if name not in tensors:
        raise InputError(f"released checkpoint: tensor {name} is missing, and with it a size of the model")
    return tensors[name].shape


def _code_dim(tensors: Mapping[str, Tensor], name: str, known: int | None) -> int:
    dim = shape_of(tensors, name)[1]
    if known not in (None, dim):
        raise InputError(f"tensor {name} takes code vectors of {dim}, other parts have {known} (visual_config.vq_config.codebook_dim)")
    return dim
