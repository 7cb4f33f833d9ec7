"""What a released checkpoint becomes: our model's settings from its config.json and shapes, and every tensor's place.

The language side (language.py), the visual tokenizer with its detokenizers (visual.py) and the audio tokenizer (audio.py) have
tables. Released tensors that no model uses are carried along as they are, under 'carried', so that nothing is lost on the way back.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from dina import model as model_lib
from dina.config import InputError, check_name
from dina.convert import hf, hf_audio, hf_visual, language
from dina.convert.hf_visual import shape_of
from dina.convert.released import DTYPES, FLOATS, Released, Tensor, apart, same_bits
from dina.convert.rules import Piece, by_name, by_path, check_fit, least_shape, pieces
from dina.grammar.vocabulary import RELEASED_SPECIALS, Vocabulary, released
from dina.optim import flatten
from dina.vision import tokenizer

# What is carried along whatever it is: how names begin -> part. The detokenizers' file repeats the vision transformer, which
# nobody reads; a refiner without a projection of its condition stores a placeholder.
CARRIED = {"visual_model.": "vision_copy", "image_refiner.cond_proj._dummy": "refiner"}
BESIDE = ("pixel_decoder", "refiner", "vision_copy")  # parts of the detokenizers' file, which a checkpoint may lack
HEADS = ("visual_head", "audio_head")
PROJECTIONS = ("hidden_proj", "hidden_in_proj")
# Tensors of the release by family (backbone.md §1.5), asserted where config.json has its numbers.
RELEASED_SIZES = {"hidden_size": 3072, "num_layers": 14, "n_routed_experts": 256, "vocab_size": 282624}
RELEASED_COUNTS = {"model.audio_tokenizer.": 1740, "model.visual_tokenizer.": 425, "visual_head.": 71, "audio_head.": 71,
                   "image_decoder.": 558, "image_refiner.": 828, "visual_model.": 385, "": 11143}  # fmt: skip
PARTS = (*model_lib.PARTS, *hf_visual.PARTS, *hf_audio.PARTS, "vision_copy")
FEATURE_DECODER = "params/vision_quantizer/feature_decoder/"  # ours alone
JOINT = "model.embed_tokens.weight"
HEAD_SIZE = 128  # of a depth head's attention (backbone.md §4)
CLASS_MULTIPLE = 128  # stored classes of a level, as DESIGN §4.12 pads everything that a mesh may cut


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our tensors: its shape, and the released tensors that fill it."""

    path: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a checkpoint becomes.

    Settings and vocabulary are None without any language part; `projections` is what the checkpoint calls the first matrix
    of each depth head. `vision` and `audio` are the settings of hf_visual.py and hf_audio.py, {} without any such part.
    """

    leaves: dict[str, Leaf]
    config: ml_collections.ConfigDict | None
    vocabulary: Vocabulary | None
    projections: dict[str, str]
    vision: dict[str, Any]
    audio: dict[str, Any]


def model_config(c: Mapping[str, Any], tensors: Mapping[str, Tensor], parts: Collection[str] = PARTS):
    """`config.model` and the vocabulary of a released checkpoint.

    Args:
        c: its config.json.
        tensors: for what only shapes tell: the depth heads and the number of codes.
        parts: a depth head that is not among them and not in the checkpoint has the released number of codes.

    Raises:
        InputError: a key, or a tensor whose shape is needed, is missing.
    """
    trunk, tables = hf.backbone(c), hf.ngram(c)
    config = model_lib.default_config()
    config.update(dataclasses.asdict(trunk))
    config.update({"ngram": dataclasses.asdict(tables)})
    config.pre_buffer.hidden = c.get("visual_embedding_layer_intermediate_size", 8192)
    sizes = {"visual_head": released().visual, "audio_head": released().audio}
    for name in HEADS:
        if name in parts or any(f"{name}.{projection}.weight" in tensors for projection in PROJECTIONS):
            head, sizes[name] = _head(name, tensors)
            config[name].update(head)
    text = c.get("text_vocab_size", 131072)
    classes = c.get("text_vocab_plus_multimodal_special_token_size", text + len(RELEASED_SPECIALS))
    specials = RELEASED_SPECIALS if classes - text == len(RELEASED_SPECIALS) else _some_specials(classes - text)
    rows = c.get("vocab_size", 0)
    vocabulary = Vocabulary(text, specials, sizes["audio_head"], sizes["visual_head"], multiple=1024)
    if vocabulary.rows > rows and "embed" in parts:
        raise InputError(f"released config: vocab_size is {rows}, but text, specials and codes need {vocabulary.rows} rows")
    if vocabulary.padded_rows < rows:
        vocabulary = dataclasses.replace(vocabulary, multiple=rows)
    return config, vocabulary


def _head(name: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], tuple[int, ...]]:
    width = shape_of(tensors, f"{name}.{_projection(name, tensors)}.weight")[0]
    layers, levels = (_count(name, tensors, rule) for rule in (r"transformer_layers\.(\d+)\..*", r"heads\.(\d+)\..*"))
    hidden = shape_of(tensors, f"{name}.transformer_layers.0.linear1.weight")[0]
    head = {"width": width, "layers": layers, "heads": width // HEAD_SIZE, "ffn_scale": hidden // width, "class_multiple": CLASS_MULTIPLE}
    return head, tuple(shape_of(tensors, f"{name}.heads.{i}.bias")[0] - 1 for i in range(levels))


def _count(name: str, tensors: Mapping[str, Tensor], rule: str) -> int:
    found = {int(match[1]) for n in tensors if (match := re.fullmatch(rf"{name}\.{rule}", n))}
    missing = sorted(set(range(max(found, default=0) + 1)) - found)
    if missing:
        raise InputError(f"released checkpoint: {name} lacks number {missing[0]} of {rule.split(chr(92))[0]}, it has {sorted(found)}")
    return len(found)


def _projection(name: str, tensors: Mapping[str, Tensor]) -> str:
    return next((p for p in PROJECTIONS if f"{name}.{p}.weight" in tensors), PROJECTIONS[0])


def _some_specials(count: int) -> tuple[str, ...]:
    """For checkpoints with another number of specials: the released names from the end, which hold all that is needed."""
    if not 35 <= count <= len(RELEASED_SPECIALS):
        raise InputError(f"released config: {count} special tokens; the released model has {len(RELEASED_SPECIALS)}")
    return RELEASED_SPECIALS[len(RELEASED_SPECIALS) - count :]


def tables(model: model_lib.Model, joint_rows: int, projections: Mapping[str, str]) -> list[tuple]:
    """(rules, counts, sizes) of the whole language side."""
    trunk, voc, width = model.trunk, model.vocabulary, model.trunk.width
    found = [
        (language.trunk(), *language.trunk_sizes(trunk)),
        (language.text_head(), {}, {"V": voc.classes, "d": width}),
        (language.joint_table(), {}, {"R": joint_rows, "d": width}),
        (language.ngram(), *language.ngram_sizes(model.ngram, voc.text, width)),
        (language.pre_buffer(), {}, {"d": width, "b": model.embed.pre_buffer}),
    ]
    for name, head in (("visual_head", model.visual_head), ("audio_head", model.audio_head)):
        found.append((language.depth_head(name, projections[name]), *language.depth_sizes(head.cfg, width, head.sizes)))
    return found


def make(checkpoint: Released, parts: Collection[str] = ()) -> Plan:
    """Every leaf of ours, the model's settings and vocabulary.

    Args:
        checkpoint: what is read.
        parts: of `PARTS`; the checkpoint may lack the others. None given: all, and every tensor is accounted for.

    Raises:
        InputError: a part that does not exist, or a list of what the checkpoint lacks, holds too much of, or holds in
            another shape or dtype.
    """
    for part in parts:
        check_name(part, PARTS, "part of a released checkpoint")
    kept = set(parts or PARTS) - set(() if parts or has_detokenizers(checkpoint) else BESIDE)
    leaves, config, vocabulary = {}, None, None
    projections = {name: _projection(name, checkpoint.tensors) for name in HEADS}
    if kept & set(model_lib.PARTS):
        config, vocabulary = model_config(checkpoint.config(), checkpoint.tensors, kept)
        leaves = _language(checkpoint.config()["vocab_size"], config, vocabulary, projections)
    vision, audio = hf_visual.settings(checkpoint, kept), hf_audio.settings(checkpoint, kept)
    leaves |= _tokenizers(vision, audio)
    named = {piece.name for leaf in leaves.values() for piece in leaf.pieces}
    unnamed = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name not in named}
    leaves |= {leaf.path: leaf for leaf in map(_verbatim, unnamed, unnamed.values()) if leaf}
    leaves = {path: leaf for path, leaf in leaves.items() if path.split("/")[1] in kept}
    account(checkpoint, leaves, () if parts else checkpoint.tensors, () if parts else _miscounted(checkpoint))
    return Plan(leaves, config, vocabulary, projections, vision, audio)


def has_detokenizers(checkpoint: Released) -> bool:
    """Whether the image detokenizers are there."""
    return any(apart(name) for name in checkpoint.tensors)


def remember(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Leaf]:
    """The leaves of an earlier import.

    Args:
        record: its stage.json.
        shapes: path -> shape of all its arrays.
    """
    leaves = {}
    if record["model"] is not None:
        fields = {name: _tuples(value) for name, value in record["vocabulary"].items()}
        leaves = _language(record["joint_rows"], ml_collections.ConfigDict(record["model"]), Vocabulary(**fields), record["projections"])
    for name in ("vision", "audio"):
        if name not in record:
            raise InputError(f"the import's record lacks {name!r}; import the checkpoint again")
    leaves |= _tokenizers(record["vision"], record["audio"])
    carried = {path.split("/", 2)[2]: shape for path, shape in shapes.items() if path not in leaves}
    leaves |= {leaf.path: leaf for leaf in map(_verbatim, carried, carried.values()) if leaf}
    return {path: leaf for path, leaf in leaves.items() if path in shapes}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _language(rows: int, config: ml_collections.ConfigDict, vocabulary: Vocabulary, projections: Mapping[str, str]) -> dict[str, Leaf]:
    model = model_lib.build(config, vocabulary)
    abstract = jax.eval_shape(functools.partial(model_lib.init, model), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items()}
    groups = by_path(piece for table in tables(model, rows, projections) for piece in pieces(*table))
    unfilled = sorted(set(shapes) - set(groups))
    if unfilled:
        raise ValueError(f"conversion tables name nothing for {unfilled}")
    leaves = {}
    for path, group in groups.items():
        shape = shapes.get(path) or group[0].region  # carried tensors have the released shape
        check_fit(group, shape)
        leaves[path] = Leaf(path, tuple(shape), tuple(group))
    return leaves


def _tokenizers(vision: Mapping[str, Any], audio: Mapping[str, Any]) -> dict[str, Leaf]:
    listed = [*(hf_visual.tables(vision) if vision else []), *(hf_audio.tables(audio) if audio else [])]
    groups = by_path(piece for table in listed for piece in pieces(*table))
    return {path: Leaf(path, least_shape(group), tuple(group)) for path, group in groups.items()}


def feature_decoder(vision: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The quantizer's light decoder by path, started as a stage would, for a release has none; {} without quantizer."""
    if "quantizer" not in vision:
        return {}
    sizes = vision["feature_decoder"]
    module = tokenizer.FeatureDecoder(sizes["width"], sizes["layers"], vision["bridge"]["out_dim"], parent=None)
    params = _start(module, np.zeros((1, vision["quantizer"]["dim"]), np.float32))
    return {FEATURE_DECODER + path: np.asarray(leaf) for path, leaf in flatten(params).items()}


@functools.partial(jax.jit, static_argnums=0)
def _start(module: tokenizer.FeatureDecoder, q_ND: np.ndarray):
    return module.init(jax.random.key(0), q_ND)["params"]


def _verbatim(name: str, shape: tuple[int, ...]) -> Leaf | None:
    """A tensor that is carried along as it is; None for any other."""
    part = next((part for start, part in CARRIED.items() if name.startswith(start)), None)
    if part is None:
        return None
    path, dims = f"carried/{part}/{name}", [f"a{i}" for i in range(len(shape))]
    axes = f"{' '.join(dims)} -> {' '.join(dims)}"
    return Leaf(path, shape, (Piece(name, shape, path, (), 0, shape, axes, dict(zip(dims, shape, strict=True)), False),))


def unequal_copies(checkpoint: Released, made: Plan) -> list[str]:
    """One line per tensor that is stored several times, with other values in one of the copies.

    A shared codebook is one module under the names of all levels (tokenizers.md A.4); a loader that assigns one after the
    other is left with the last.
    """
    lines: dict[str, str] = {}
    for leaf in made.leaves.values():
        copied = [piece.name for piece in leaf.pieces] if any(piece.copy for piece in leaf.pieces) else []
        if not copied or copied[-1] in lines:
            continue
        other = [name for name in copied[:-1] if not same_bits(checkpoint, name, checkpoint, copied[-1])]
        lines[copied[-1]] = other and (
            f"{len(copied)} copies of one tensor are stored, and {', '.join(other)} differ from {copied[-1]}: "
            "that one is kept, as by a loader that assigns one after the other; an export writes it under all these names"
        )
    return [line for line in lines.values() if line]


def check_codes(checkpoint: Released, made: Plan) -> None:
    """Raises InputError if some level's embeddings look never loaded: the model would run, and sample deeper levels blindly."""
    if not any(piece.name == JOINT for leaf in made.leaves.values() for piece in leaf.pieces):
        return
    shard, voc = checkpoint.tensors[JOINT].shard, made.vocabulary
    levels = [("visual", *level) for level in enumerate(zip(voc.visual_base, voc.visual, strict=True))]
    levels += [("audio", *level) for level in enumerate(zip(voc.audio_base, voc.audio, strict=True))]
    for kind, level, (base, size) in levels:
        if not any(np.any(checkpoint.read(JOINT, i, i + 1)) for i in range(base, base + size, max(1, size // 8))):
            where = f"rows {base} to {base + size - 1}, the codes of {kind} level {level}"
            raise InputError(f"{checkpoint.folder / shard}: {JOINT} has zeros in every row looked at of {where}: they were never loaded")


def account(checkpoint: Released, leaves: Mapping[str, Leaf], known: Collection[str], problems: Collection[str] = ()) -> None:
    """Raises InputError listing what is wrong, `problems` among it: a tensor that is missing, or has another shape or dtype.

    Each of `known` must have a place, else it is unknown.
    """
    wanted = {name: parts[0] for name, parts in by_name(leaf.pieces for leaf in leaves.values()).items()}
    missing = [f"missing {name} {list(wanted[name].shape)}" for name in sorted(set(wanted) - set(checkpoint.tensors))]
    problems = [*missing, *problems]
    problems += [f"unknown {name} in {checkpoint.tensors[name].shard}" for name in sorted(set(known) - set(wanted))]
    for name in sorted(set(wanted) & set(checkpoint.tensors)):
        tensor, piece = checkpoint.tensors[name], wanted[name]
        allowed = DTYPES if piece.path.startswith("carried/") and piece.part is None else FLOATS
        if tensor.dtype not in allowed:
            problems.append(f"{name} in {tensor.shard} has dtype {tensor.dtype}; known here: {', '.join(allowed)}")
        if tensor.shape != piece.shape:
            problems.append(f"{name} in {tensor.shard} has shape {list(tensor.shape)}, config.json asks for {list(piece.shape)}")
        if piece.exact and tensor.dtype != "F32":
            problems.append(f"{name} in {tensor.shard} has dtype {tensor.dtype}, it must be F32")
    usual = collections.Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    for leaf in leaves.values():
        found = [checkpoint.tensors[p.name] for p in leaf.pieces if p.name in checkpoint.tensors]
        kinds = {tensor.dtype for tensor in found}
        if len(kinds) > 1:
            odd = min(found, key=lambda tensor: usual[tensor.dtype])
            problems.append(f"{odd.name} in {odd.shard} has dtype {odd.dtype}, others of {leaf.path} have {', '.join(sorted(kinds - {odd.dtype}))}")
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InputError(f"{checkpoint.folder} does not fit its config.json:\n  " + "\n  ".join(problems[:20]) + more)


def _miscounted(checkpoint: Released) -> list[str]:
    """Families of a checkpoint of the released size that have another number of tensors than the release."""
    config = checkpoint.config()
    if any(config.get(name) != value for name, value in RELEASED_SIZES.items()):
        return []
    counts = collections.Counter(next(p for p in RELEASED_COUNTS if name.startswith(p)) for name in checkpoint.tensors)
    expected = RELEASED_COUNTS if has_detokenizers(checkpoint) else {p: count for p, count in RELEASED_COUNTS.items() if not apart(p)}
    return [f"{counts[prefix]} tensors of {prefix or 'trunk and embeddings'}, the release has {count}"
            for prefix, count in expected.items() if counts[prefix] != count]
