"""The inverse of spans.py: flat arrays of one document back to spans. Training's inputs and a sampler's output alike."""

from __future__ import annotations

import numpy as np

from dina.grammar.spans import ABSENT, Document, Image, Span, Speech, Text
from dina.grammar.vocabulary import Vocabulary


class _Reader:
    """One pass over the positions of a document."""

    def __init__(self, arrays: dict[str, np.ndarray], vocabulary: Vocabulary):
        self.v = vocabulary
        self.tokens = np.asarray(arrays["tokens"])
        self.transcript = np.asarray(arrays["transcript"])
        self.codes = np.asarray(arrays["codes"])
        self.weight = np.asarray(arrays["text_weight"]) if "text_weight" in arrays else np.zeros(len(self.tokens))

    def find(self, token: int, at: int) -> int:
        """First position >= `at` that holds `token`; the length of the document if none does."""
        found = np.flatnonzero(self.tokens[at:] == token)
        return at + int(found[0]) if len(found) else len(self.tokens)

    def image(self, at: int, target: bool) -> tuple[Span | None, int]:
        """A span whose img_start is at `at`."""
        v, end = self.v, self.find(self.v.img_end, at)
        inside = self.tokens[at + 1 : end]
        cells = np.flatnonzero(inside == v.img_pad)
        breaks = np.flatnonzero(inside == v.img_newline)
        rows = len(breaks) + 1
        width = int(breaks[0]) if len(breaks) else len(inside)
        if not target:
            rows, width = 1, len(cells)  # a shown image does not say its shape
        whole = end < len(self.tokens) and len(cells) == rows * width > 0 and len(inside) == len(cells) + len(breaks)
        codes = self.codes[at + 1 + cells, : len(v.visual)]
        return (Image(codes, rows, width, target) if whole else None), end + 1

    def heard(self, at: int) -> tuple[Span | None, int]:
        """A span whose audio_start is at `at`."""
        end = self.find(self.v.audio_end, at)
        codes = self.codes[at + 1 : end, : len(self.v.audio)]
        return (Speech(codes) if at + 1 < end < len(self.tokens) else None), end + 1

    def spoken(self, at: int) -> tuple[Span | None, int]:
        """A span whose audiogen_start is at `at`."""
        v, end = self.v, self.find(self.v.audiogen_end, at)
        frames = at + 1 + np.flatnonzero(self.tokens[at + 1 : end] == v.audio_pad)
        begin = self.find(v.audiotext_start, at)
        if not len(frames) or end >= len(self.tokens):
            return None, end + 1
        codes = self.codes[frames, : len(v.audio)]
        if begin >= end:
            return Speech(codes, None, True), end + 1
        said = self.transcript[at + 1 : end]
        letters = tuple(int(i) for i in said[(said != v.audiotext_pad) & (said != ABSENT)])
        return Speech(codes, letters, True, begin - at - 1), end + 1


def decode(arrays: dict[str, np.ndarray], vocabulary: Vocabulary, unfinished: str = "error") -> Document:
    """Spans of one document.

    Args:
        arrays: `tokens`, `transcript`, `codes` and, if the loss of texts matters, `text_weight`; without padding.
        vocabulary: with the size tags in use.
        unfinished: what becomes of an image or speech without its end or of a broken shape: 'error' or 'drop'.

    Returns:
        The document in canonical form. An image that was shown (not painted) is 1 x N: its shape is not in the stream.

    Raises:
        ValueError: an unfinished span, and `unfinished` is 'error'.
    """
    if unfinished not in ("error", "drop"):
        raise ValueError(f"unfinished={unfinished!r} is not one of error, drop")
    reader, v = _Reader(arrays, vocabulary), vocabulary
    tags = {ids: grid for grid, ids in v.size_ids.items()}
    spans: list[Span] = []
    at = 0
    while at < len(reader.tokens):
        token, begin = int(reader.tokens[at]), at
        tag_end = reader.find(v.img_start, at) if token == v.size_open else len(reader.tokens)
        if tag_end < len(reader.tokens) and tuple(reader.tokens[at:tag_end].tolist()) in tags:
            span, at = reader.image(tag_end, True)
        elif token == v.img_start:
            span, at = reader.image(at, False)
        elif token == v.audio_start:
            span, at = reader.heard(at)
        elif token == v.audiogen_start:
            span, at = reader.spoken(at)
        else:
            _append(spans, token, bool(reader.weight[at] > 0))
            at += 1
            continue
        if span is not None:
            spans.append(span)
        elif unfinished == "error":
            raise ValueError(f"the span that starts at position {begin} has no end, or a shape that no image has")
    return tuple(spans)


def _append(spans: list[Span], token: int, loss: bool) -> None:
    if spans and isinstance(spans[-1], Text) and spans[-1].loss == loss:
        spans[-1] = Text((*spans[-1].ids, token), loss)
    else:
        spans.append(Text((token,), loss))
