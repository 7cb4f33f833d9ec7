"""The audio side of a released `config.json` as our settings, and the table of all its tensors (tokenizers.md B).

`audio_config` is the config of a Whisper encoder with one more section, `vq_config`; `vocoder_config` (the mel of the mel
decoder) and `flow_matching_config` (with `cfm_params`) stand in it, or beside it as the serving code has them. Settings are
plain values that a stage's record can hold: sections of `config.audio` for the parts that are there, and 'positions', how
long the stored tables of sinusoids are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from dina.audio import config as audio_config, encoder, flow, mel_decoder, tokenizer
from dina.config import InputError
from dina.convert import audio
from dina.convert.hf import number, refuse, section
from dina.convert.released import Released

PARTS = ("audio_encoder", "audio_quantizer", "audio_decoder", "flow")
# Dotted settings that say what the weights of a part mean; the others are how it is trained or run.
MEANING = {
    "audio_encoder": ("features.rate", "features.n_fft", "features.hop", "features.mels", "encoder", "bridge"),
    "audio_quantizer": ("bridge", "encoder.width", "decoder.width", "quantizer.sizes", "quantizer.residual"),
    "audio_decoder": ("bridge", "decoder", "recon"),
    "flow": ("decoder.width", "target", "flow.prenet", "flow.estimator", "flow.prediction"),
}
# Keys that change what is computed, and the values that our modules compute; absent is fine.
REQUIRED = {
    "audio_config": {"kernel_size": 3},
    "flow_matching_config": {"spk_emb_dim": 0, "use_hidden_states_before_dconv2": True, "enable": True},
    "cfm_params": {"solver": "euler"},
}
PLAIN = {"mean": 0.0, "scale": 1.0}  # of mels: the release does not normalise them
DEFAULTS = {"stride": 2, "kernel": 3, "activation": "gelu", "act": "gelu"}  # of the modules' fields that `config.audio` may leave out


def settings(checkpoint: Released, parts: Collection[str]) -> dict[str, Any]:
    """Settings of `parts` (of `PARTS`).

    Raises:
        InputError: a key is missing or has a value that our modules do not compute.
    """
    return of_config(checkpoint.config(), parts) if set(parts) & set(PARTS) else {}


def of_config(config: Mapping[str, Any], parts: Collection[str] = PARTS) -> dict[str, Any]:
    """The same from a whole `config.json`."""
    c = section(config, "audio_config", "config.json")
    refuse(c, REQUIRED["audio_config"], "audio_config")
    find = lambda name: section(c if name in c else config, name, "audio_config (or config.json)")
    found: dict[str, Any] = {"positions": {}, "bridge": {"pool": number(c, "avg_pooler", "audio_config")}}
    frames = number(c, "max_audio_seconds", "audio_config") * number(c, "sampling_rate", "audio_config") // number(c, "hop_length", "audio_config")
    if {"audio_encoder", "audio_quantizer"} & set(parts):
        found |= whisper(c, "audio_config", "encoder_", frames) | {"quantizer": _quantizer(c), "decoder": {"width": c["d_model"]}}
        found["positions"]["audio_encoder"] = frames // found["encoder"]["stride"]
    if {"audio_decoder", "flow"} & set(parts):
        found |= _decoder(c, find("vocoder_config"))
        found["positions"]["audio_decoder"] = frames
    if "flow" in parts:
        found |= _flow(find("flow_matching_config"))
        found["positions"]["flow"] = number(find("flow_matching_config"), "prenet_max_source_positions", "flow_matching_config")
    return found


def whisper(c: Mapping[str, Any], where: str, start: str, frames: int) -> dict[str, Any]:
    """'features' and 'encoder' of a Whisper encoder's config, for chunks of `frames` mel frames; `where` names it in errors."""
    act = c.get("activation_function", "gelu")
    if act not in encoder.ACTIVATIONS:
        raise InputError(f"{where}.activation_function is {act!r}; this code computes {', '.join(encoder.ACTIVATIONS)}")
    names = {"width": "d_model", "layers": f"{start}layers", "heads": f"{start}attention_heads", "ff": f"{start}ffn_dim"}
    sizes = {ours: number(c, theirs, where) for ours, theirs in names.items()}
    if sizes["width"] % (2 * sizes["heads"]):
        raise InputError(f"{where}: d_model {sizes['width']} must be {start}attention_heads {sizes['heads']} times an even number")
    features = {"rate": number(c, "sampling_rate", where, 16000), "n_fft": number(c, "n_fft", where, 400), "hop": number(c, "hop_length", where, 160),
                "mels": number(c, "num_mel_bins", where), "max_frames": frames, "resample": "linear", "tail": "drop"}  # fmt: skip
    return {"features": features, "encoder": sizes | {"stride": number(c, "stride_size", where, 2), "activation": act}}


def _quantizer(c: Mapping[str, Any]) -> dict[str, Any]:
    """Residuals are rounded after each level, as released (quirk Q2); how codebooks are trained stays ours."""
    sizes = section(c, "vq_config", "audio_config").get("codebook_sizes")
    if not isinstance(sizes, list) or not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise InputError(f"audio_config.vq_config.codebook_sizes must list a number for each level, not {sizes}")
    return {"sizes": sizes, "residual": "activation"}


def _decoder(c: Mapping[str, Any], v: Mapping[str, Any]) -> dict[str, Any]:
    where = "vocoder_config"
    names = {"width": "d_model", "layers": "decoder_layers", "heads": "decoder_attention_heads", "ff": "decoder_ffn_dim",
             "kernel": "decoder_kernel_size", "stride": "decoder_stride_size"}  # fmt: skip
    found = {ours: number(c, theirs, "audio_config") for ours, theirs in names.items()}
    channels = v.get("channels")
    if not isinstance(channels, list) or not channels:
        raise InputError(f"{where}.channels must list the post-net's layers, not {channels!r}")
    found |= {"statistics": "padded", "post_channels": channels, "activation": c.get("activation_function", "gelu")}
    mel = {ours: number(v, theirs, where) for ours, theirs in (("rate", "sampling_rate"), ("hop", "hop_length"), ("mels", "num_mel_bins"))}
    return {"decoder": found, "recon": mel | PLAIN}


def _flow(c: Mapping[str, Any]) -> dict[str, Any]:
    where = "flow_matching_config"
    refuse(c, REQUIRED[where], where)
    cfm = section(c, "cfm_params", where)
    refuse(cfm, REQUIRED["cfm_params"], f"{where}.cfm_params")
    names = {"width": "prenet_d_model", "layers": "prenet_nlayers", "heads": "prenet_attention_heads", "ff": "prenet_ffn_dim",
             "ratio": "prenet_target_mel_length_scale_ratio"}  # fmt: skip
    prenet = {ours: number(c, theirs, where) for ours, theirs in names.items()} | {"activation": c.get("prenet_activation_function", "gelu")}
    names = {"middle": "num_mid_blocks", "blocks": "n_blocks", "heads": "num_heads", "head_dim": "attention_head_dim"}
    estimator = {ours: number(c, theirs, where) for ours, theirs in names.items()} | {"chunk": flow.RELEASED_CHUNK, "act": c.get("act_fn", "gelu")}
    channels = c.get("channels")
    if not isinstance(channels, list) or not channels:
        raise InputError(f"{where}.channels must list the channels of each level, not {channels!r}")
    for what, value, known in (("prenet_activation_function", prenet["activation"], encoder.ACTIVATIONS), ("act_fn", estimator["act"], flow.ACTS)):
        if value not in known:
            raise InputError(f"{where}.{what} is {value!r}; this code computes {', '.join(known)}")
    mels = number(c, "in_channels", where)
    if c.get("prenet_out_dim", mels) != mels:
        raise InputError(f"{where}.prenet_out_dim is {c['prenet_out_dim']}, in_channels {mels}; they are the same mel")
    solver = {"sigma_min": number(cfm, "sigma_min", where, 1e-4), "drop_condition": number(cfm, "training_cfg_rate", where, 0.2),
              "guidance": max(0.0, number(cfm, "inference_cfg_rate", where)), "steps": number(c, "diffusion_steps", where), "grid": "bfloat16",
              "spacing": "cosine" if cfm.get("t_scheduler") == "cosine" else "linear", "prediction": "velocity"}  # fmt: skip
    return {"flow": {"prenet": prenet, "estimator": estimator | {"channels": channels}} | solver, "target": {"mels": mels} | PLAIN}


def as_config(found: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """`config.audio` with these settings in it; what they do not name is the default."""
    config = audio_config.default_config()
    update(config, found)
    return config


def update(config: ml_collections.ConfigDict, found: Mapping[str, Any]) -> None:
    """Puts settings into a `config.audio`."""
    with config.unlocked(), config.ignore_type():
        for name, values in found.items():
            if name != "positions":
                config[name].update(_plain(values))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def tables(found: Mapping[str, Any]) -> list[tuple]:
    """(rules, counts, sizes) of everything that the settings name."""
    config, places, listed = as_config(found), found["positions"], []
    width = config.decoder.width
    if "audio_encoder" in places:
        module, name = encoder.make_encoder(config), f"{audio.TOKENIZER}audio_model.positional_embedding"
        rules = [*audio.encoder(), *audio.positions("audio_encoder", name, "d")]
        listed.append((rules, *audio.encoder_sizes(module, config.features.mels, places["audio_encoder"])))
        cfg = tokenizer.quantizer_config(config)
        listed.append(([*audio.codebooks(), *audio.averages(), *audio.projection()], *audio.quantizer_sizes(cfg, width)))
    if "audio_decoder" in places:
        module, name = mel_decoder.make_decoder(config), f"{audio.TOKENIZER}audio_decoder.positional_embedding"
        listed.append(([*audio.decoder(module), *audio.positions("audio_decoder", name, "d")], *audio.decoder_sizes(module, places["audio_decoder"])))
    if "flow" in places:
        module, name = flow.make_flow(config), f"{audio.TOKENIZER}audio_flow_matching_decoder.prenet.positional_embedding"
        listed.append(([*audio.flow(module), *audio.positions("flow", name, "w")], *audio.flow_sizes(module, width, places["flow"])))
    return listed


def differs(found: Mapping[str, Any], config: ml_collections.ConfigDict, part: str) -> str:
    """How `config.audio` would read the weights of `part` otherwise than the settings say; '' if it does not."""
    mine = config.to_dict()
    for key, theirs in ((leaf, value) for key in MEANING[part] for leaf, value in _leaves(found, key).items()):
        ours = _leaves(mine, key).get(key, DEFAULTS.get(key.rpartition(".")[2]))
        if _listed(ours) != _listed(theirs):
            return f"config.audio.{key} is {ours!r}, the imported weights have {theirs!r}"
    return ""


def _leaves(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Dotted name -> value of what stands at a dotted key; {} if nothing does."""
    value: Any = tree
    for name in key.split("."):
        if name not in value:
            return {}
        value = value[name]
    if isinstance(value, Mapping):
        return {leaf: inner for name in value for leaf, inner in _leaves(tree, f"{key}.{name}").items()}
    return {key: value}


def _listed(value: Any) -> Any:
    """Tuples are lists in a stage's record, and one level's channels may be a number."""
    value = list(value) if isinstance(value, tuple) else value
    return value[0] if isinstance(value, list) and len(value) == 1 else value
