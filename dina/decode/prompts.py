"""Prompts for every kind of request, in the layout of training: shown media, text, then what opens the reply.

`<user>` media text `<assistant>`, and for an image its size tag and img_start, for speech audiogen_start
(reference/backbone.md §5.2). Earlier turns stand before, closed by eos.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from dina.config import InputError
from dina.grammar import Document, Image, Span, Speech, Text, Vocabulary, encode

REPLIES = ("text", "image", "speech")


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """What the model reads before it replies.

    Attributes:
        vocabulary: ids.
        document: spans, the opening of the reply included.
        opening: how many last positions open the reply's span; 0 for a text reply.
        reply: what the prompt opens, one of `REPLIES`.
        grid: (h, w) in cells of the image that it opens.
    """

    vocabulary: Vocabulary
    document: Document
    opening: int = 0
    reply: str = "text"
    grid: tuple[int, int] | None = None

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """tokens, transcript [S] and codes [S, L]."""
        return encode(self.document, self.vocabulary)

    def __len__(self) -> int:
        return len(self.arrays["tokens"])


def user_turn(vocabulary: Vocabulary, text: Sequence[int] = (), media: Sequence[Span] = ()) -> list[Span]:
    """What a user shows, says and writes, and the mark that an answer follows."""
    return [Text((vocabulary.user,)), *media, Text(tuple(text)), Text((vocabulary.assistant,))]


def voice(text: Sequence[int], clip: Speech, vocabulary: Vocabulary) -> tuple[Span, ...]:
    """The system turn that plays the voice in which to speak; it stands before everything (backbone.md §5.2).

    Args:
        text: ids of the words that say so.
        clip: somebody's speech.
    """
    return Text((vocabulary.system, *text)), Speech(clip.codes)


def build(
    vocabulary: Vocabulary,
    text: Sequence[int] = (),
    media: Sequence[Span] = (),
    reply: str = "text",
    grid: tuple[int, int] | None = None,
    before: Sequence[Span] = (),
) -> Prompt:
    """A prompt of any task kind.

    Args:
        vocabulary: ids; must know a size tag of `grid`.
        text: ids of what the user writes; it may hold special tokens.
        media: images and speech that the user shows, as spans that are no targets.
        reply: 'text', 'image' or 'speech'.
        grid: (h, w) in cells of the image to paint.
        before: spans of earlier turns.

    Raises:
        InputError: unknown reply, no grid for an image, or a grid without size tag.
    """
    if reply not in REPLIES:
        raise InputError(f"reply {reply!r} is not one of {', '.join(REPLIES)}")
    if reply == "image" and grid is None:
        raise InputError("an image reply needs its size: height x width in cells")
    opening: tuple[int, ...] = ()
    if reply == "image":
        opening = (*vocabulary.size_tag(*grid), vocabulary.img_start)
    elif reply == "speech":
        opening = (vocabulary.audiogen_start,)
    document = (*before, *user_turn(vocabulary, text, media), Text(opening))
    return Prompt(vocabulary, document, len(opening), reply, grid if reply == "image" else None)


def plain(vocabulary: Vocabulary, text: Sequence[int]) -> Prompt:
    """Plain text to be continued, without roles, as it stands in training; empty text begins after an end mark."""
    return Prompt(vocabulary, (Text(tuple(text) or (vocabulary.eos,)),))


def shown(codes: np.ndarray, grid: tuple[int, int]) -> Image:
    """An image of the user's as a span."""
    return Image(np.asarray(codes, np.int32), *grid, target=False)
