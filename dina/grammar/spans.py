"""Spans of text, images and speech, and the flat arrays that they become: the same names everywhere.

Arrays over S positions, int32 but for the weights:
  tokens        outer stream; img_pad on image cells, audio_pad on audio frames
  transcript    guiding text of spoken replies, audiotext_pad after its end; -1 outside of them
  codes [S, L]  codes of a cell or frame, -1 where none; the end of speech is labelled codes[0] = size of level 0
  text_weight   weight of the text loss of predicting this position; its label is `text_label`
  code_weight   weight of the code loss of predicting this position
  position      0, 1, ... in the document
Weights sit on the predicted position: the hidden state before it in the same document predicts it. Codes are input
only where the token is img_pad or audio_pad. Layouts: reference/backbone.md §5.2 to §5.4, losses §7.1.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dina.config import InputError
from dina.grammar.vocabulary import Vocabulary

ABSENT = -1
DTYPES = {"tokens": np.int32, "transcript": np.int32, "codes": np.int32, "text_weight": np.float32,
          "code_weight": np.float32, "position": np.int32}
# What an unused position holds; tokens get the vocabulary's padding id.
FILL = {"transcript": ABSENT, "codes": ABSENT, "text_weight": 0, "code_weight": 0, "position": 0}


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids (role tags and eos included); `loss`: whether they are learnt."""

    ids: Sequence[int] | np.ndarray
    loss: bool = False


@dataclasses.dataclass(frozen=True)
class Image:
    """An h x w image as codes of its cells in raster order; `target`: painted by the model, not shown to it."""

    codes: Int[np.ndarray, "N L"]
    h: int
    w: int
    target: bool = False


@dataclasses.dataclass(frozen=True)
class Speech:
    """Speech as codes of its frames.

    Attributes:
        codes: [N, L].
        transcript: text ids that guide a spoken reply; None for pure audio. Ignored unless `target`.
        target: spoken by the model, not heard by it.
        delay: positions by which the frames lag the transcript: 0 is parallel, len(transcript) is serial.
    """

    codes: Int[np.ndarray, "N L"]
    transcript: Sequence[int] | None = None
    target: bool = False
    delay: int = 0


Span = Text | Image | Speech
Document = tuple[Span, ...]


class Cost(typing.NamedTuple):
    """What a document needs of a pack: positions, image cells and audio frames (end included) to predict, and all
    image cells."""

    positions: int
    visual: int
    audio: int
    cells: int


def delay_limits(letters: int, frames: int) -> tuple[int, int]:
    """Smallest and largest delay: the transcript and its end mark must fit beside the frames."""
    return max(0, letters - frames), letters


def draw_delay(letters: int, frames: int, rng: np.random.Generator) -> int:
    """A delay by the released rule (0 with probability 1/2, else uniform 1..letters), kept within its limits.

    The released builder drops speech with more text ids than frames; here the delay is raised until it fits.
    """
    drawn = int(rng.integers(2 * letters)) - letters + 1 if letters else 0
    return max(drawn, delay_limits(letters, frames)[0])


def cost(document: Document, vocabulary: Vocabulary) -> Cost:
    """Counts a document without building it."""
    positions = visual = audio = cells = 0
    for span in document:
        if isinstance(span, Text):
            positions += len(span.ids)
            continue
        count = len(span.codes)
        if isinstance(span, Image):
            cells += count
            visual += count if span.target else 0
            positions += len(vocabulary.image_layout(span.h, span.w)[0]) if span.target else count + 2
        else:
            audio += count + 1 if span.target else 0
            positions += count + 2 + (span.delay + 1 if span.target and span.transcript is not None else 0)
    return Cost(positions, visual, audio, cells)


def empty(shape: tuple[int, ...], vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Arrays of unused positions: `shape` is (S,) or (B, S)."""
    out = {}
    for name, dtype in DTYPES.items():
        full = (*shape, vocabulary.levels) if name == "codes" else shape
        out[name] = np.full(full, FILL.get(name, vocabulary.pad), dtype)
    return out


def encode(document: Document, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """The arrays of one document, without padding. Raises as `write`."""
    out = empty((cost(document, vocabulary).positions,), vocabulary)
    write(document, vocabulary, out, 0)
    return out


def write(document: Document, vocabulary: Vocabulary, out: dict[str, np.ndarray], start: int) -> int:
    """Writes a document's arrays into `out` (arrays of `empty`) from position `start` on.

    Returns:
        The position after its end.

    Raises:
        InputError: a span that the vocabulary cannot hold: codes of a wrong depth or value, an image whose codes are
            not h*w or whose grid has no size tag, a delay outside its limits.
    """
    at = start
    for span in document:
        at = _WRITERS[type(span)](span, vocabulary, out, at)
    out["position"][start:at] = np.arange(at - start, dtype=np.int32)
    out["text_weight"][start : start + 1] = 0  # nothing before it predicts it
    return at


def _write_text(span: Text, vocabulary: Vocabulary, out, at: int) -> int:
    end = at + len(span.ids)
    out["tokens"][at:end] = span.ids
    if span.loss:
        out["text_weight"][at:end] = 1
    return end


def _checked(codes: np.ndarray, sizes: tuple[int, ...], what: str) -> np.ndarray:
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or not len(codes):
        raise InputError(f"{what} codes of shape {codes.shape}: must be [at least 1, {len(sizes)}]")
    if (codes.astype(np.uint64) >= np.array(sizes, np.uint64)).any():  # below 0 is far above as an unsigned number
        raise InputError(f"{what} codes reach {codes.max(0).tolist()}: levels have {list(sizes)} codes, from 0")
    return codes


def _write_image(span: Image, vocabulary: Vocabulary, out, at: int) -> int:
    codes, v = _checked(span.codes, vocabulary.visual, "image"), vocabulary
    if len(codes) != span.h * span.w:
        raise InputError(f"image of {span.h} x {span.w} cells has {len(codes)} rows of codes")
    depth = codes.shape[1]
    if span.target:
        layout, cells = v.image_layout(span.h, span.w)
        end = at + len(layout)
        out["tokens"][at:end] = layout
        out["codes"][at + cells, :depth] = codes
        out["code_weight"][at + cells] = 1
        return end
    return _write_input(codes, v.img_start, v.img_pad, v.img_end, out, at)


def _write_input(codes, opening: int, pad: int, closing: int, out, at: int) -> int:
    """Something shown or heard: no newlines, no size tag, no loss."""
    end = at + len(codes) + 2
    tokens = out["tokens"]
    tokens[at], tokens[at + 1 : end - 1], tokens[end - 1] = opening, pad, closing
    out["codes"][at + 1 : end - 1, : codes.shape[1]] = codes
    return end


def _write_speech(span: Speech, vocabulary: Vocabulary, out, at: int) -> int:
    codes, v = _checked(span.codes, vocabulary.audio, "speech"), vocabulary
    if not span.target:
        return _write_input(codes, v.audio_start, v.audio_pad, v.audio_end, out, at)
    tokens, first = out["tokens"], at + 1
    tokens[at] = v.audiogen_start
    # A prompt opens the first segment of a reply; that another one follows is for the model to say.
    if at and tokens[at - 1] == v.audiogen_end:
        out["text_weight"][at] = 1
    if span.transcript is not None:
        letters, (low, high) = len(span.transcript), delay_limits(len(span.transcript), len(codes))
        if not low <= span.delay <= high:
            raise InputError(f"speech delay {span.delay}: {letters} text ids and {len(codes)} frames allow {low} to {high}")
        first = at + 2 + span.delay
        tokens[at + 1 : first - 1], tokens[first - 1] = v.audiotext_pad, v.audiotext_start
    end = first + len(codes)
    if span.transcript is not None:
        mark = at + 1 + letters
        out["transcript"][at + 1 : mark] = span.transcript
        out["transcript"][mark:end] = v.audiotext_pad
        out["text_weight"][at + 1 : mark + 1] = 1  # the first padding id is the text's end mark
    tokens[first:end], tokens[end] = v.audio_pad, v.audiogen_end
    out["codes"][first:end, : codes.shape[1]] = codes
    out["codes"][end, 0] = v.audio[0]
    out["code_weight"][first : end + 1] = 1
    return end + 1


_WRITERS = {Text: _write_text, Image: _write_image, Speech: _write_speech}


def text_label(tokens, transcript):
    """What the text head should say at each position: the transcript where there is one, else the token."""
    xp = np if isinstance(tokens, np.ndarray) else _jnp()
    return xp.where(transcript >= 0, transcript, tokens)


def _jnp():
    import jax.numpy as jnp

    return jnp


def canonical(document: Document) -> Document:
    """The form that `decode` gives back: neighbouring texts of equal loss joined, the first position without loss,
    and of what was shown or heard only the codes."""
    flat: list[tuple[int, bool] | Span] = []
    for span in document:
        if isinstance(span, Text):
            flat += [(int(i), span.loss) for i in span.ids]
        elif isinstance(span, Image):
            flat.append(span if span.target else Image(span.codes, 1, len(span.codes)))
        else:
            flat.append(span if span.target else Speech(span.codes))
    if flat and isinstance(flat[0], tuple):
        flat[0] = (flat[0][0], False)
    out: list[Span] = []
    for item in flat:
        if not isinstance(item, tuple):
            out.append(item)
        elif out and isinstance(out[-1], Text) and out[-1].loss == item[1]:
            out[-1] = Text((*out[-1].ids, item[0]), item[1])
        else:
            out.append(Text((item[0],), item[1]))
    return tuple(out)
