"""Ids: text pieces, then special tokens, then the codes of audio and of images, all rows of one joint table.

Level l of a modality starts at its base; a code's global row is base + code. Everything that must be a multiple of a
fixed number is padded here (DESIGN §4.12), so that no other file knows how. Source: reference/backbone.md §3.1, §5.1.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dina.config import InputError

# Names of the released model without their prefix, in its order; role tags come first.
SPECIALS = (
    "<system>", "<user>", "<assistant>", "<img_token_size>", "</img_token_size>",
    "<audio_start>", "<audio_end>", "<audio_pad>", "<img_start>", "<img_end>", "<img_pad>", "<img_newline>",
    "<audiotext_start>", "<audiotext_pad>", "<audiogen_start>", "<audiogen_end>",
)
# The 53 of the released model; its role tags are text ids. Names that no source states are reserved_N.
RELEASED_SPECIALS = (
    *(f"<mask_{i}>" for i in range(18)), "<img_token_size>", "</img_token_size>", *(f"<reserved_{i}>" for i in range(4)),
    "<point_start>", "<point_end>", "<point_delim>", "<polygon_start>", "<polygon_end>", "<reserved_4>", "<reserved_5>",
    "<audio_start>", "<audio_end>", "<audio_pad>", "<img_start>", "<img_end>", "<img_pad>", "<img_newline>",
    "<box_start>", "<box_end>", "<box_delim>", "<ref_start>", "<ref_end>", "<img_delim>", "<audio_delim>",
    "<video_place>", "<video_start>", "<video_end>", "<audiotext_start>", "<audiotext_end>", "<audiotext_pad>",
    "<audiogen_start>", "<audiogen_end>",
)


class _Id:
    """Attribute that is the id of a special token."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, vocabulary, owner=None):
        return self if vocabulary is None else vocabulary.id(self.name)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Sizes and names of all ids; hashable, so that it can be static in compiled functions.

    Attributes:
        text: number of text pieces.
        specials: names in id order, from id `text` on.
        audio, visual: codes per level (without the end class).
        multiple: table rows are padded to a multiple of this,
        class_multiple: and text-head classes to a multiple of this.
        bos, eos, pad: text ids.
        named: (name, id) of special tokens whose ids are text pieces (role tags of the released model).
        sizes: (h, w, ids of "h w") of the image grids that a size tag can name; see `with_sizes`.
    """

    text: int
    specials: tuple[str, ...] = SPECIALS
    audio: tuple[int, ...] = ()
    visual: tuple[int, ...] = ()
    multiple: int = 128
    class_multiple: int = 128
    bos: int = 1
    eos: int = 2
    pad: int = 3
    named: tuple[tuple[str, int], ...] = ()
    sizes: tuple[tuple[int, int, tuple[int, ...]], ...] = ()

    system, user, assistant = _Id("<system>"), _Id("<user>"), _Id("<assistant>")
    size_open, size_close = _Id("<img_token_size>"), _Id("</img_token_size>")
    img_start, img_end, img_pad, img_newline = (_Id(f"<img_{x}>") for x in ("start", "end", "pad", "newline"))
    audio_start, audio_end, audio_pad = _Id("<audio_start>"), _Id("<audio_end>"), _Id("<audio_pad>")
    audiotext_start, audiotext_pad = _Id("<audiotext_start>"), _Id("<audiotext_pad>")
    audiogen_start, audiogen_end = _Id("<audiogen_start>"), _Id("<audiogen_end>")

    def __post_init__(self):
        names = [*self.specials, *(name for name, _ in self.named)]
        twice = sorted({name for name in names if names.count(name) > 1})
        missing = [name for name in SPECIALS[3:] if name not in names]
        if twice or missing:
            raise InputError(f"vocabulary: special tokens named twice: {twice}; missing: {missing}")

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Name -> id of every special token, as `TextTokenizer` takes it."""
        return {name: self.text + i for i, name in enumerate(self.specials)} | dict(self.named)

    @functools.cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that are no text: n-gram history never crosses them."""
        return tuple(range(self.text, self.text + len(self.specials)))

    def id(self, name: str) -> int:
        """Id of a special token. Raises InputError, with all names, for an unknown one."""
        if name not in self.ids:
            raise InputError(f"unknown special token {name!r}; known: {', '.join(self.ids)}")
        return self.ids[name]

    @property
    def classes(self) -> int:
        """Classes of the text head that exist: pieces and specials."""
        return self.text + len(self.specials)

    @property
    def padded_classes(self) -> int:
        """Stored classes of the text head."""
        return _round_up(self.classes, self.class_multiple)

    @functools.cached_property
    def audio_base(self) -> tuple[int, ...]:
        """First joint row of each audio level."""
        return tuple(itertools.accumulate(self.audio[:-1], initial=self.classes)) if self.audio else ()

    @functools.cached_property
    def visual_base(self) -> tuple[int, ...]:
        """First joint row of each visual level."""
        start = self.classes + sum(self.audio)
        return tuple(itertools.accumulate(self.visual[:-1], initial=start)) if self.visual else ()

    @property
    def rows(self) -> int:
        """Rows of the joint table that exist."""
        return self.classes + sum(self.audio) + sum(self.visual)

    @property
    def padded_rows(self) -> int:
        """Stored rows of the joint table."""
        return _round_up(self.rows, self.multiple)

    @property
    def levels(self) -> int:
        """L: the largest depth in use; code arrays have this many columns."""
        return max(len(self.audio), len(self.visual))

    def with_sizes(self, encode: Callable[[str], Sequence[int]], grids: Iterable[tuple[int, int]]) -> "Vocabulary":
        """The same vocabulary with size tags of `grids`; `encode` gives the text ids of "h w"."""
        sizes = tuple((h, w, tuple(int(i) for i in encode(f"{h} {w}"))) for h, w in sorted(set(grids)))
        texts = [ids for _, _, ids in sizes]
        if len(set(texts)) < len(texts) or any(not 0 <= i < self.text for ids in texts for i in ids):
            raise InputError("vocabulary: the text tokenizer does not give every image size ids of its own")
        return dataclasses.replace(self, sizes=sizes)

    @functools.cached_property
    def size_ids(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """(h, w) -> ids of the whole size tag, brackets included."""
        return {(h, w): (self.size_open, *ids, self.size_close) for h, w, ids in self.sizes}

    def size_tag(self, h: int, w: int) -> tuple[int, ...]:
        """Ids of the size tag of an h x w image. Raises InputError for a grid that has none."""
        if (h, w) not in self.size_ids:
            raise InputError(f"image of {h} x {w} cells: the size tags know {len(self.sizes)} grids, up to"
                             f" {max((h * w for h, w, _ in self.sizes), default=0)} cells")
        return self.size_ids[h, w]

    @functools.cached_property
    def _layouts(self) -> dict:
        return {}

    def image_layout(self, h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, offsets of the cells in them) of a target image, from size tag to img_end (backbone.md §5.3)."""
        if (h, w) not in self._layouts:
            grid = np.full((h, w + 1), self.img_pad, np.int32)
            grid[:, w] = self.img_newline
            grid[-1, w] = self.img_end  # no newline after the last row
            opening = np.array([*self.size_tag(h, w), self.img_start], np.int32)
            cells = np.arange(h)[:, None] * (w + 1) + np.arange(w) + len(opening)
            self._layouts[h, w] = np.concatenate([opening, grid.ravel()]), cells.ravel()
        return self._layouts[h, w]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def released() -> Vocabulary:
    """The released model's numbers (backbone.md §3.1); its table has 971 unused rows."""
    audio = (8192, 4096, 2048, *(1024,) * 5)
    return Vocabulary(131072, RELEASED_SPECIALS, audio, (16384,) * 8, multiple=1024)


def grids(max_cells: int) -> list[tuple[int, int]]:
    """Every (h, w) of at most `max_cells` cells."""
    return [(h, w) for h in range(1, max_cells + 1) for w in range(1, max_cells // h + 1)]


def from_config(config, encode: Callable[[str], Sequence[int]] | None = None) -> Vocabulary:
    """The vocabulary of an experiment.

    Args:
        config: the experiment: text.vocab_size, audio.quantizer.sizes, vision.quantizer.sizes, vision.max_pixels; and, of a
            released text tokenizer, text.roles and text.row_multiple.
        encode: text to ids, for size tags; without it the vocabulary has the same ids but no size tags.
    """
    text, codes = config.text, {"audio": tuple(config.audio.quantizer.sizes), "visual": tuple(config.vision.quantizer.sizes)}
    if "roles" in text:
        roles = tuple(zip(SPECIALS[:3], text.roles, strict=True))
        vocabulary = Vocabulary(text.vocab_size, RELEASED_SPECIALS, **codes, multiple=text.row_multiple, named=roles)
    else:
        vocabulary = Vocabulary(text.vocab_size, **codes)
    side = config.vision.patch * config.vision.merge
    return vocabulary.with_sizes(encode, grids(config.vision.max_pixels // side**2)) if encode else vocabulary
