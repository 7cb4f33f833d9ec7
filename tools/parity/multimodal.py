"""From ids and codes of all modalities to logits (case 03): the joint table, n-gram rows, pre-buffer, audio sum, trunk.

The case comes from the research class: the 'oe' n-gram variant, tables of codes apart from the word table.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from dina import embed as embed_lib
from dina.backbone import ngram
from dina.convert import language
from dina.convert.rules import Rule
from dina.grammar.vocabulary import SPECIALS, Vocabulary
from tools.parity import load, trunk
from tools.parity.case import Case
from tools.parity.ngram import read_tables, settings

# What the case calls our specials.
NAMES = {"image_start": "<img_start>", "image_end": "<img_end>", "image_pad": "<img_pad>", "image_newline": "<img_newline>",
         "audio_pad": "<audio_pad>", "audiotext_start": "<audiotext_start>", "audiotext_pad": "<audiotext_pad>",
         "audiogen_start": "<audiogen_start>", "audiogen_end": "<audiogen_end>"}  # fmt: skip


def is_case(case: Case) -> bool:
    """Whether the arrays are those of this component."""
    return "mm_ids" in case


def vocabulary(c) -> Vocabulary:
    """Specials where the case has them; those that it does not name stand on its unnamed ids."""
    names = {c["special_ids"][theirs]: ours for theirs, ours in NAMES.items()}
    others = iter([name for name in SPECIALS[3:] if name not in names.values()])
    ids = range(c["vocab_size_text"], c["vocab_size_special"])
    specials = tuple(names.get(i) or next(others, f"<reserved_{i}>") for i in ids)
    return Vocabulary(c["vocab_size_text"], specials, tuple(c["aq_sizes"]), tuple(c["vq_sizes"]), named=tuple((name, 0) for name in others))


class Path:
    """Our modules with the case's weights."""

    def __init__(self, case: Case):
        c = case.config
        self.voc, self.case = vocabulary(c), case
        self.ngram = settings(c["n"], c["k"], c["ratio"], c["embP"], "oe")
        width = c["lm"]["hidden_size"]
        self.embed = embed_lib.Embed(self.voc, width, self.ngram, c["inter"])
        self.trunk, _ = trunk.read(case, c["lm"], "lm.")
        case.require_equal("lm.model.embed_tokens.weight", "oe_model.embed_tokens.weight")
        self.params = self._read(width)
        self._embed = jax.jit(self.embed.apply)
        self._text = jax.jit(ngram.NgramEmbedding(self.ngram, self.voc.text, self.voc.special_ids).apply)

    def _read(self, width: int) -> dict:
        c, voc, bridge = self.case.config, self.voc, "oe_model.visual_bridge_model"
        code_tables = (
            ("oe_model.audio_embed_layers.{level}.weight", voc.audio, voc.audio_base),
            (f"{bridge}.embedding_layers.{{level}}.weight", voc.visual, voc.visual_base),
        )
        tables = [([Rule("params/embed/table", name, "K d -> K d", by="level", start=base)], {"level": len(sizes)}, {"K": sizes, "d": width})
                  for name, sizes, base in code_tables]
        tables.append(([Rule("params/embed/table", "oe_model.embed_tokens.weight", "R d -> R d")], {}, {"R": c["vocab_size_special"], "d": width}))
        block = (language.pre_buffer(f"{bridge}.transformer_block"), {}, {"d": width, "b": c["inter"]})
        params = load.variables(self.case, *tables, block, shapes={"params/embed/table": (voc.padded_rows, width)})["params"]["embed"]
        prefix = "oe_model.oe_embeddings"
        return params | {"ngram": read_tables(self.case, self.ngram, voc.text, width, c["embP"], f"{prefix}.oe_embedders.{{table}}", f"{prefix}.oe_projs.{{table}}")}

    def text(self, ids) -> np.ndarray:
        """The n-gram embedding of plain ids, specials as their raw row."""
        word = np.asarray(self.params["table"])[ids]
        return np.asarray(self._text({"params": self.params["ngram"]}, ids, np.ones_like(ids), word))

    def all(self, ids, codes=None, transcript=None) -> np.ndarray:
        """The whole input embedding."""
        blank = np.full(ids.shape, -1, np.int32)
        codes = np.full((*ids.shape, self.voc.levels), -1, np.int32) if codes is None else codes
        transcript = blank if transcript is None else transcript
        return np.asarray(self._embed({"params": self.params}, ids, transcript, codes, np.ones_like(ids)))

    def logits(self, x) -> np.ndarray:
        """Text logits behind the trunk."""
        shape = x.shape[:2]
        position = np.broadcast_to(np.arange(shape[1]), shape)
        out = trunk.apply(trunk.settings(self.case.config["lm"]), self.trunk, x, position, np.ones(shape, np.int32))
        return trunk.logits(self.trunk, out.h_BSD)


def run(case: Case) -> None:
    """Compares all arrays of the case."""
    path = Path(case)
    voc = path.voc
    x = path.all(case.input("text_ids"))
    case.compare("text_embeds", x)
    case.compare("text_logits", path.logits(x))
    ids, vision, audio, words = (case.input(f"mm_{name}") for name in ("ids", "vision_tokens", "audio_tokens", "audiotext_ids"))
    codes = np.full((*ids.shape, voc.levels), -1, np.int32)
    transcript = np.full(ids.shape, -1, np.int32)
    codes[ids == voc.img_pad, : vision.shape[1]] = vision
    codes[ids == voc.audio_pad, : audio.shape[1]] = audio
    spoken = np.asarray(jax.jit(functools.partial(embed_lib.in_speech, voc))(ids))
    transcript[spoken] = words
    x = path.all(ids, codes, transcript)
    case.compare("mm_embeds", x)
    case.compare("mm_logits", path.logits(x))
    case.compare("mm_visual_embed", x[ids == voc.img_pad])
    # Intermediates of the reference that ours has no place for, from the same modules: pads count as id 0 there.
    holes = (ids == voc.img_pad) | (ids == voc.audio_pad)
    outer = path.text(np.where(holes, 0, ids))
    case.compare("mm_text_pad_embeds", outer)
    case.compare("mm_audiotext_embeds", path.text(words[None]))
    case.compare("mm_embeds_no_audiotext_no_audio", np.where((ids == voc.img_pad)[..., None], x, outer))
