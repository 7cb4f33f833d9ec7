"""The released vocoder `hift.pt`, in and out: names, layouts and weight norm (tokenizers.md B.7, H).

Most convolutions are stored as a direction `weight_v` and a length `weight_g` per output channel (per input channel of a
transposed one); they are folded in float64 when they are read. Settings come from shapes; what shapes do not tell is what
the release has: a first stride of half its kernel, dilations 1, 3, 5, a hop of a quarter window.

Axes of released tensors: o output, i input channels, k kernel, c channels.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from dina import checkpoint
from dina.audio.config import default_config, hift_vocoder
from dina.audio.hift import PART, make_hift
from dina.config import InputError, name_import
from dina.convert import torch_file
from dina.convert.rules import Rule
from dina.data import torch_weights
from dina.optim import flatten, unflatten

STAGE, FILE = "hift", "hift.pt"
WHOLE = ("source_downs.", "m_source.", "f0_predictor.classifier.")  # without weight norm
# How frameworks name length and direction; the older one is the release's and what is written.
SPELLINGS = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
CONV, TRANSPOSED, LINE = "o i k -> k i o", "i o k -> k i o", "o i -> i o"
PITCH_CONVS = 5

Read = Callable[[str], np.ndarray]


def fold(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The weight g v / |v|, the norm over all but the first axis."""
    norm = np.sqrt(np.sum(v.astype(np.float64) ** 2, axis=tuple(range(1, v.ndim)), keepdims=True))
    # A length that is the norm itself, as `unfold` writes it, must not change last bits by its own rounding.
    scale = np.where(g == norm.astype(np.float32), 1.0, g / np.maximum(norm, np.finfo(np.float64).tiny))
    return (v * scale).astype(np.float32)


def unfold(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(g, v) of which `fold` makes the same weight, bit by bit; another reader's rounding may differ in the last bit."""
    norm = np.sqrt(np.sum(weight.astype(np.float64) ** 2, axis=tuple(range(1, weight.ndim)), keepdims=True))
    return norm.astype(np.float32), weight


def folding(read: Read, names: Collection[str]) -> Read:
    """`read` for names of whole weights, folded where `names` has length and direction in their place."""

    def whole(name: str) -> np.ndarray:
        stem = name.removesuffix(".weight")
        for length, direction in SPELLINGS if stem != name else ():
            if f"{stem}.{length}" in names and f"{stem}.{direction}" in names:
                g, v = read(f"{stem}.{length}"), read(f"{stem}.{direction}")
                if g.shape != (v.shape[0], *(1,) * (v.ndim - 1)):
                    raise InputError(f"vocoder weights: {stem}: length {list(g.shape)} does not fit direction {list(v.shape)}")
                return fold(g, v)
        if name not in names:
            raise InputError(f"vocoder weights: tensor {name} is missing")
        return read(name)

    return whole


def _affine(ours: str, theirs: str, axes: str) -> list[Rule]:
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", axes), Rule(f"{ours}/bias", f"{theirs}.bias", "o -> o")]


def _block(ours: str, theirs: str, depth: int) -> list[Rule]:
    rules = []
    for j in range(depth):
        for n in (1, 2):
            rules += _affine(f"{ours}/conv{n}_{j}", f"{theirs}.convs{n}.{j}", CONV)
            rules.append(Rule(f"{ours}/snake{n}_{j}/alpha", f"{theirs}.activations{n}.{j}.alpha", "c -> c"))
    return rules


def table(stages: int, kernels: int, depth: int) -> list[Rule]:
    """All tensors, under the names of whole weights: `kernels` blocks of `depth` dilations in each of `stages`. Paths begin in the part."""
    rules = [*_affine("source/merge", "m_source.l_linear", LINE), *_affine("f0/out", "f0_predictor.classifier", LINE)]
    for i in range(PITCH_CONVS):
        rules += _affine(f"f0/conv{i}", f"f0_predictor.condnet.{2 * i}", CONV)
    rules += [*_affine("filter/pre", "conv_pre", CONV), *_affine("filter/post", "conv_post", CONV)]
    for i in range(stages):
        rules += [*_affine(f"filter/up{i}", f"ups.{i}", TRANSPOSED), *_affine(f"filter/down{i}", f"source_downs.{i}", CONV)]
        rules += _block(f"filter/source_block{i}", f"source_resblocks.{i}", depth)
        for j in range(kernels):
            rules += _block(f"filter/block{i}_{j}", f"resblocks.{i * kernels + j}", depth)
    return rules


def settings(read: Read, names: Collection[str]) -> dict[str, Any]:
    """`config.audio.vocoder` of released tensors without its name and seed, and the number of `mels`.

    `read` as of `folding`. Raises InputError for tensors that are missing or are no vocoder's.
    """
    count = lambda start: len({name[len(start) :].split(".")[0] for name in names if name.startswith(start)})

    def shape(name: str) -> tuple[int, ...]:
        found = read(f"{name}.weight").shape
        if len(found) not in (2, 3):
            raise InputError(f"vocoder weights: tensor {name}.weight has shape {list(found)}")
        return (*found, 1)[:3]

    stages, blocks = count("ups."), count("resblocks.")
    if not stages or not blocks or blocks % stages:
        raise InputError(f"vocoder weights: {blocks} groups resblocks.N do not divide into {stages} stages ups.N; is this hift.pt?")
    up_kernels = tuple(shape(f"ups.{i}")[2] for i in range(stages))
    # A source convolution spans twice the frames that one of its outputs becomes later.
    later = [max(1, shape(f"source_downs.{i}")[2] // 2) for i in range(stages)]
    n_fft = shape("conv_post")[0] - 2
    return {
        "channels": shape("conv_pre")[0], "f0_channels": shape("f0_predictor.condnet.0")[0], "harmonics": shape("m_source.l_linear")[1] - 1,
        "rates": (up_kernels[0] // 2, *(a // b for a, b in zip(later, later[1:], strict=False))), "up_kernels": up_kernels,
        "source_kernels": tuple(shape(f"source_resblocks.{i}.convs1.0")[2] for i in range(stages)),
        "kernels": tuple(shape(f"resblocks.{j}.convs1.0")[2] for j in range(blocks // stages)),
        "dilations": tuple(1 + 2 * j for j in range(count("resblocks.0.convs1."))), "n_fft": n_fft, "hop": n_fft // 4,
        "mels": shape("conv_pre")[1],
    }  # fmt: skip


def audio_config(found: Mapping[str, Any]) -> ConfigDict:
    """`config.audio` with the vocoder of `settings` and a mel that it fits."""
    audio = default_config()
    audio.vocoder = hift_vocoder()
    update(audio, found)
    return audio


def update(audio: ConfigDict, found: Mapping[str, Any]) -> None:
    """Gives `config.audio` the vocoder of `settings`. Its mel is the released one, which is not normalised."""
    audio.vocoder = hift_vocoder()
    with audio.ignore_type():
        audio.vocoder.update({name: tuple(x) if isinstance(x, list | tuple) else x for name, x in found.items() if name != "mels"})
    audio.target.update({"mels": found["mels"], "hop": math.prod(found["rates"]) * found["hop"], "mean": 0.0, "scale": 1.0})


def parameters(read: Read, names: Collection[str], found: Mapping[str, Any]) -> dict[str, Any]:
    """Our tree of the part `vocoder`.

    Args:
        read: as of `folding`.
        names: all tensors.
        found: `settings` of them.

    Raises:
        InputError: tensors that are missing, unknown or of another shape.
    """
    rules = table(len(found["rates"]), len(found["kernels"]), len(found["dilations"]))
    known = {rule.theirs for rule in rules}
    for stem in [name.removesuffix("weight") for name in known if name.endswith(".weight")]:
        known |= {f"{stem}{part}" for spelling in SPELLINGS for part in spelling}
    strange = sorted(set(names) - known)
    if strange:
        raise InputError(f"vocoder weights: tensor {strange[0]} is no part of a vocoder of these sizes ({len(strange)} such)")
    tree = {}
    for rule in rules:
        array = read(rule.theirs)
        if array.ndim != len(rule.axes.split("->")[0].split()):
            raise InputError(f"vocoder weights: tensor {rule.theirs} has shape {list(array.shape)}")
        tree[rule.ours] = einops.rearrange(array, rule.axes)
    module, frames = make_hift(audio_config(found)), jnp.ones(1, jnp.int32)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 1, found["mels"])), frames, jnp.zeros((1, module.source.sines)),
        jnp.zeros((1, module.source.hop, module.source.sines)),
    )  # fmt: skip
    checkpoint.check_shapes(shapes["params"], unflatten(tree), "vocoder weights: ")
    return unflatten(tree)


def released(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Released tensors of our part `vocoder`, float32, length and direction apart."""
    own, count = params["filter"], lambda tree, start: sum(name.startswith(start) for name in tree)
    ours, found = flatten(params), {}
    for rule in table(count(own, "up"), count(own, "block0_"), count(own["block0_0"], "conv1_")):
        left, right = rule.axes.split("->")
        array = np.ascontiguousarray(einops.rearrange(np.asarray(ours[rule.ours]), f"{right} -> {left}"), np.float32)
        stem = rule.theirs.removesuffix(".weight")
        if stem != rule.theirs and not rule.theirs.startswith(WHOLE):
            found[f"{stem}.weight_g"], found[f"{stem}.weight_v"] = unfold(array)
        else:
            found[rule.theirs] = array
    return found


def read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors of a weight file of PyTorch or safetensors, as float32. Raises InputError for another or a damaged one."""
    if path.suffix != ".safetensors":
        found = torch_weights.read(path)
        if not isinstance(found, dict) or not all(isinstance(x, np.ndarray) for x in found.values()):
            raise InputError(f"{path}: holds more than tensors by name")
    elif not path.is_file():
        raise InputError(f"{path}: no such weight file")
    else:
        try:
            found = safetensors.numpy.load_file(path)
        except Exception as error:  # the reader's own error type
            raise InputError(f"{path} is truncated or no safetensors file ({error})") from None
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


def import_file(path: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Reads `hift.pt` (or safetensors of the same names) into `folder`, a finished stage with the part `vocoder`; returns its record.

    Raises:
        InputError: no such file, tensors that are not a vocoder's, or a folder that is there.
    """
    if folder.exists():
        raise InputError(f"{folder} exists; delete it, or choose another place")
    tensors = read_file(path)
    read = folding(tensors.__getitem__, tensors)
    found = settings(read, tensors)
    params = parameters(read, tensors, found)
    known = hashlib.sha256(repr(sorted(found.items())).encode())
    for name in sorted(tensors):
        known.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    record = {
        "identity": known.hexdigest()[:16], "stage": folder.name, "source": str(path), "jax": jax.__version__, "parts": PART, "files": [],
        "notes": [], "model": None, "vocabulary": None, "vision": {}, "vocoder": found,
    }  # fmt: skip
    folder.mkdir(parents=True)
    try:
        checkpoint.finish(folder, {"params": {PART: params}, "stats": {}}, record)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return record


def export_stage(folder: pathlib.Path, path: pathlib.Path) -> int:
    """Writes the part `vocoder` of a finished stage as the release has it; returns the number of tensors.

    Raises:
        InputError: no finished stage, one without a vocoder, or a file that is there.
    """
    if path.exists():
        raise InputError(f"{path} exists; delete it, or choose another place")
    tensors = released(checkpoint.result(folder, {"params": [PART]})["params"][PART])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch_file.write(part, tensors)
    part.replace(path)
    return len(tensors)


def apply(config: ConfigDict, folder: pathlib.Path) -> None:
    """Gives an experiment the vocoder of an import, and its identity in `imports`. Raises InputError if there is none at `folder`."""
    record = checkpoint.finished(folder)
    if record is None or "vocoder" not in record:
        raise InputError(f"{folder} holds no imported vocoder; `python -m tools.convert hift` makes it")
    with config.unlocked():
        update(config.audio, record["vocoder"])
    name_import(config, folder.name, record["identity"])


def differs(found: Mapping[str, Any], audio: ConfigDict) -> str:
    """How `config.audio` would read an imported vocoder otherwise than its `settings` say; '' if it does not."""
    wanted = ConfigDict({"vocoder": hift_vocoder(), "target": audio.target.to_dict()})
    update(wanted, found)
    for section in ("vocoder", "target"):
        for key, theirs in wanted[section].items():
            ours = audio[section].get(key)
            if key != "seed" and ours != theirs:
                return f"config.audio.{section}.{key} is {ours!r}, the imported weights have {theirs!r}"
    return ""
