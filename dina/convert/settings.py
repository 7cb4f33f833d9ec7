"""An experiment that goes on from an imported checkpoint: its settings from the import, and whether they still agree.

Shapes do not tell a rotary base, an expert scale, or 4 n-gram orders in 4 splits from 5 in 3; a model with another one
loads and is wrong. So the import's record decides, and a stage that takes its weights is refused where a setting differs.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from dina import checkpoint, grammar
from dina.config import InputError, name_import
from dina.convert import hf_audio, hf_visual, hift
from dina.convert.stream import Stored
from dina.text import released

# What weights mean besides their shapes, by the part that they belong to: dotted keys of config.model.
MEANING = {
    "backbone": ("norm_eps", "attention.heads", "attention.theta", "attention.nope", "attention.rope", "attention.v", "experts.zero", "experts.top_k",
                 "experts.scale"),
    "embed": ("ngram.order", "ngram.splits", "ngram.ratio", "ngram.variant", "ngram.blank", "ngram.eos"),
    "visual_head": ("visual_head.heads",), "audio_head": ("audio_head.heads",),
}  # fmt: skip
# Our own of every part: how it is computed, balanced or started.
OWN = {"experts": ("dispatch", "capacity_factor", "balance", "balance_rate", "balance_half_life", "balance_floor"),
       "attention": ("block", "decode"), "ngram": ("lookup", "init_std"), "visual_head": ("loss_chunk", "dtype"), "audio_head": ("loss_chunk", "dtype"),
       "": ("dtype", "remat", "unroll", "losses", "code_start")}  # fmt: skip
SPEAKS = ("embed", "lm_head")  # parts whose rows are ids
FILES = "files"  # folder of what a checkpoint holds besides tensors


def apply(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Gives an experiment the model, the vocabulary and the text tokenizer of an import.

    Args:
        config: gets model, text, the quantizers' sizes and imports; everything that is no property of the weights (dispatch,
            balance, remat, losses, ...) stays.
        folder: `<workdir>/released`, as tools.convert made it.

    Raises:
        InputError: no import, none of the language side, or one without tokenizer.json.
    """
    record = checkpoint.finished(folder)
    if record is None or not record["model"]:
        raise InputError(f"{folder} holds no imported language side; `python -m tools.convert import` makes it")
    found = ml_collections.ConfigDict(record["model"])
    for section, keys in OWN.items():
        ours, target = _section(config.model, section), _section(found, section)
        with target.ignore_type():  # a weight of levels is one number or one each
            for key in keys:
                target[key] = ours[key]
    vocabulary = record["vocabulary"]
    if tuple(vocabulary["specials"]) != grammar.RELEASED_SPECIALS:
        raise InputError(f"{folder}: its {len(vocabulary['specials'])} special tokens are not the released model's {len(grammar.RELEASED_SPECIALS)}")
    config.model = found
    config.text = released.text_config(folder / FILES / "tokenizer.json", vocabulary["text"], vocabulary["multiple"])
    config.vision.quantizer.sizes, config.audio.quantizer.sizes = tuple(vocabulary["visual"]), tuple(vocabulary["audio"])
    name_import(config, folder.name, record["identity"])


def apply_vision(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Gives an experiment the visual side of an import.

    Args:
        config: gets, in `vision`, the sections of the imported parts and the sizes at which the release reads images, and the
            import's identity in `imports`. `vision.pack` and what is no property of the weights stay.
        folder: `<workdir>/released` or `<workdir>/qwen_vision`, as tools.convert made it.

    Raises:
        InputError: no import, or one without a visual part.
    """
    record = checkpoint.finished(folder)
    if record is None or not _at(record, "vision"):
        raise InputError(f"{folder} holds no imported visual part; `python -m tools.convert import` or `qwen-vision` makes it")
    hf_visual.update(config.vision, record["vision"])
    name_import(config, folder.name, record["identity"])


def apply_audio(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """Gives an experiment the audio side of an import.

    Args:
        config: gets, in `audio`, the settings of the imported parts, and the import's identity in `imports`. What is no property
            of the weights (augmentation, how codebooks are trained, the vocoder) stays.
        folder: `<workdir>/released` or `<workdir>/whisper`, as tools.convert made it.

    Raises:
        InputError: no import, or one without an audio part.
    """
    record = checkpoint.finished(folder)
    if record is None or not record.get("audio"):
        raise InputError(f"{folder} holds no imported audio part; `python -m tools.convert import` or `whisper` makes it")
    hf_audio.update(config.audio, record["audio"])
    name_import(config, folder.name, record["identity"])


def _section(config, name: str):
    return config[name] if name else config


def load(config: ml_collections.ConfigDict, folder: pathlib.Path, parts: Collection[str]) -> dict[str, dict]:
    """Those of `parts` that an import holds, as host arrays: {'params': {part: tree}, 'stats': {part: tree}}.

    Args:
        config: the experiment; names the import in `imports`.
        folder: of the import.
        parts: part names; nothing else is read, however large the import is.

    Raises:
        InputError: no import, another one than the experiment names, or weights that mean something else in this experiment.
    """
    record = checkpoint.finished(folder, config.imports[folder.name])
    if record is None:
        raise InputError(f"{folder} holds no import; `python -m tools.convert import` makes it")
    there = {tuple(path.split("/")[:2]) for path in Stored(folder / "result").shapes}
    held = {kind: [part for part in parts if (kind, part) in there] for kind in ("params", "stats")}
    check(record, config, held["params"], str(folder))
    return checkpoint.result(folder, held)


def check(record: Mapping[str, Any], config: ml_collections.ConfigDict, parts: Collection[str], where: str) -> None:
    """Raises InputError if `parts` of an import mean something else in this experiment.

    Args:
        record: the import's.
        config: the experiment.
        parts: what is taken over.
        where: names the import in errors.
    """
    vision = _at(record, "vision")
    for part in parts:
        if part == "refiner" and "refiner" in vision:
            raise InputError(f"{where}/{part}: it works in a latent space that no stage trains in; dina.vision.refine samples with it")
        differs = _differs(record, config, part)
        if differs:
            raise InputError(f"{where}/{part}: {differs}")
    if not record["model"]:
        return
    for part in parts:
        for key in MEANING.get(part, ()):
            theirs, ours = _at(record["model"], key), _at(config.model, key)
            if theirs != ours:
                raise InputError(f"{where}/{part}: config.model.{key} is {ours!r}, the imported weights have {theirs!r}")
    if set(parts) & set(SPEAKS):
        ours, theirs = dataclasses.asdict(grammar.from_config(config)), record["vocabulary"]
        for name in ("text", "specials", "audio", "visual"):
            if _plain(ours[name]) != _plain(theirs[name]):
                raise InputError(
                    f"{where}: the experiment's vocabulary has other {name} than the imported one; dina.convert.settings.apply takes it over"
                )


def _differs(record: Mapping[str, Any], config: ml_collections.ConfigDict, part: str) -> str:
    """How the experiment would read a part of the tokenizers otherwise than the import; '' if it does not."""
    if part in hf_visual.SECTIONS:
        return hf_visual.differs(record["vision"], config.vision, part)
    if part in hf_audio.MEANING:
        return hf_audio.differs(_at(record, "audio"), config.audio, part)
    return hift.differs(_at(record, "vocoder"), config.audio) if part == hift.PART else ""


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        if name not in tree:
            raise InputError(f"the import's record lacks {key}; import the checkpoint again")
        tree = tree[name]
    return tree


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
