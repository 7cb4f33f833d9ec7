"""The small written grammar: what is said about a digit on a canvas, and what a user may ask for.

A canvas is (rows, cols) in 28-pixel cells. A digit is 28 ('small') or 56 ('large') pixels and stands at the start,
middle or end of the space that an axis leaves free, so on a 14-pixel grid. A word names an axis only where it has free
space; `box` turns the words back into the pixels, which is how a judge finds the digit that a prompt asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from dina.config import InputError

CELL = 28
CANVASES = ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3), (3, 4), (4, 3), (4, 4))
SIZES = {"small": 28, "large": 56}
VERTICAL = ("top", "middle", "bottom")
HORIZONTAL = ("left", "center", "right")
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# None sounds like a digit word in any accent ('ate', 'won', 'to', 'for' are left out).
OTHER_WORDS = (
    "red", "green", "blue", "yellow", "black", "white", "brown", "purple", "orange", "silver",
    "cat", "dog", "horse", "cow", "sheep", "bird", "lion", "tiger", "rabbit", "elephant", "monkey", "snake",
    "house", "tree", "car", "book", "chair", "table", "door", "window", "clock", "bottle", "paper", "pencil",
    "eleven", "twelve", "thirteen", "twenty", "thirty", "fifty", "hundred", "thousand", "million",
    "run", "walk", "jump", "sing", "open", "close", "stop", "start", "sleep", "follow", "listen",
    "up", "down", "left", "right", "yes", "hello", "water", "fire", "moon", "river", "mountain", "flower", "garden",
    "apple", "bread", "sugar", "music", "summer", "winter", "morning", "doctor", "teacher", "family", "city",
)
CAPTIONS = ("a {size} {digit} at the {place}", "the digit {digit} {size} at the {place}", "{size} {digit} {place}",
            "at the {place} a {size} {digit}")
UNPLACED_CAPTIONS = ("a {size} {digit}", "the digit {digit} {size}", "{size} {digit}", "one {size} {digit}")
KINDS = ("image_to_text", "text_to_image", "speech_to_text", "text_to_speech", "image_to_speech", "speech_to_image",
         "plain_text", "conversation")
ASK_DIGIT = ("which digit is it", "what digit do you see", "name the digit")
ASK_CAPTION = ("describe the image", "what do you see")
# {caption}: a caption; {word}: the word to say; {request}: size and place without the digit, from `request`.
INSTRUCTIONS = {
    "image_to_text": ASK_DIGIT + ASK_CAPTION,
    "text_to_image": ("paint {caption}", "draw {caption}", "show {caption}"),
    "speech_to_text": ("what did you hear", "write the word", "which word is it"),
    "text_to_speech": ("say {word}", "say the word {word}", "speak {word}"),
    "image_to_speech": ("say the digit", "say what you see", "which digit is it say it"),
    "speech_to_image": ("paint it {request}", "paint the digit {request}", "draw it {request}"),
    "plain_text": ("",),
    "conversation": ("which digit is it", "say it", "paint it {request}"),
}


def sizes(canvas: tuple[int, int]) -> tuple[int, ...]:
    """Digit sizes in pixels that fit on `canvas`."""
    return tuple(px for px in SIZES.values() if px <= CELL * min(canvas))


def _size_word(size: int) -> str:
    for word, px in SIZES.items():
        if px == size:
            return word
    raise InputError(f"digit size {size}: must be one of {sorted(SIZES.values())} pixels")


def positions(cells: int, size: int) -> tuple[int, ...]:
    """Pixel offsets of an axis of `cells` cells that have a word: start, middle, end, or (0,) without free space."""
    free = CELL * cells - size
    if free < 0:
        raise InputError(f"a digit of {size} pixels does not fit on an axis of {cells} cells")
    return (0, free // 2, free) if free else (0,)


def placements(canvas: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Every (size, top, left) of `canvas` that the grammar can name, in a fixed order."""
    return [(size, top, left) for size in sizes(canvas) for top in positions(canvas[0], size)
            for left in positions(canvas[1], size)]


def words(canvas: tuple[int, int], size: int, top: int, left: int) -> tuple[str, str | None, str | None] | None:
    """(size, vertical, horizontal) words of a placement; None for an axis without free space.

    Returns:
        None altogether if the offset is not one that the grammar can name.
    """
    ys, xs = positions(canvas[0], size), positions(canvas[1], size)
    if top not in ys or left not in xs:
        return None
    return (_size_word(size), VERTICAL[ys.index(top)] if len(ys) > 1 else None,
            HORIZONTAL[xs.index(left)] if len(xs) > 1 else None)


def box(canvas: tuple[int, int], size_word: str, vertical_word: str | None = None,
        horizontal_word: str | None = None) -> tuple[int, int, int]:
    """The inverse of `words`: (top, left, size) in pixels of the digit that the words ask for.

    Raises:
        InputError: an unknown word, a word for an axis without free space, none for one with it, or no room.
    """
    if size_word not in SIZES:
        raise InputError(f"size word {size_word!r}: must be one of {', '.join(SIZES)}")
    size = SIZES[size_word]
    offsets = []
    for cells, word, known in ((canvas[0], vertical_word, VERTICAL), (canvas[1], horizontal_word, HORIZONTAL)):
        choices = positions(cells, size)
        expected = known if len(choices) > 1 else (None,)
        if word not in expected:
            raise InputError(f"position word {word!r} on canvas {canvas} for a {size_word} digit:"
                             f" must be one of {', '.join(map(str, expected))}")
        offsets.append(choices[expected.index(word)])
    return offsets[0], offsets[1], size


def _place(named: tuple[str, str | None, str | None] | None) -> str:
    return " ".join(word for word in named[1:] if word) if named else ""


def caption(canvas: tuple[int, int], digit: int, size: int, top: int, left: int, variant: int = 0) -> str:
    """One of the wordings of a caption, in lower case: 'a small seven at the top left'.

    Args:
        canvas: (rows, cols) in cells.
        digit: 0 to 9.
        size, top, left: pixels; the place is left out where the grammar has no word for it.
        variant: any integer, taken modulo the number of wordings (4).
    """
    place = _place(words(canvas, size, top, left))
    form = (CAPTIONS if place else UNPLACED_CAPTIONS)[variant % len(CAPTIONS)]
    return form.format(size=_size_word(size), digit=DIGIT_WORDS[digit], place=place)


def request(canvas: tuple[int, int], size: int, top: int, left: int) -> str:
    """Size and place without the digit, for speech to image: 'small at the top left'."""
    place = _place(words(canvas, size, top, left))
    return f"{_size_word(size)} at the {place}" if place else _size_word(size)


def questions(canvas: tuple[int, int], digit: int, size: int, top: int, left: int,
              variant: int = 0) -> list[tuple[str, str]]:
    """(question, answer) pairs about one image; 'where is it' only where a place has a word.

    Args:
        canvas, digit, size, top, left: as for `caption`.
        variant: chooses wordings and the wrong digit of the question answered 'no'.
    """
    size_word, place = _size_word(size), _place(words(canvas, size, top, left))
    wrong = (digit + 1 + variant % 9) % 10
    pairs = [(ASK_DIGIT[variant % len(ASK_DIGIT)], DIGIT_WORDS[digit]),
             ("what size is it", size_word),
             (f"is it a {DIGIT_WORDS[digit]}", "yes"),
             (f"is it a {DIGIT_WORDS[wrong]}", "no")]
    if place:
        pairs.append(("where is it", place))
    return pairs


def instruction(kind: str, rng: np.random.Generator, **slots: str) -> str:
    """A user's text for one of the task kinds of KINDS.

    Args:
        kind: task kind; 'plain_text' has no instruction and gives ''.
        rng: chooses the wording among those whose slots are all given.
        slots: `caption` (text_to_image), `word` (text_to_speech), `request` (speech_to_image).

    Raises:
        InputError: the kind is unknown or its slot is missing.
    """
    if kind not in INSTRUCTIONS:
        raise InputError(f"task kind {kind!r}: must be one of {', '.join(KINDS)}")
    forms = [form for form in INSTRUCTIONS[kind] if all(name in slots for name in _slots(form))]
    if not forms:
        raise InputError(f"task kind {kind!r} needs {', '.join(_slots(INSTRUCTIONS[kind][0]))}")
    return forms[rng.integers(len(forms))].format(**slots)


def _slots(form: str) -> list[str]:
    return [part.split("}")[0] for part in form.split("{")[1:]]


def conversation(canvas: tuple[int, int], digit: int, size: int, top: int, left: int,
                 rng: np.random.Generator) -> list[dict[str, str]]:
    """A mixed conversation about one image: three turns, of image to text, text to speech and text to image.

    Args:
        canvas, size, top, left: of the picture that the last turn asks for.
        digit: of the image that the user shows, and so of everything after it.
        rng: chooses wordings.

    Returns:
        One dict a turn: `show` (what comes before the user's text: 'image' or ''), `user` (text), `reply` ('text',
        'speech' or 'image') and `text` (the answer's words; the transcript of a spoken answer).
    """
    word = DIGIT_WORDS[digit]
    return [
        {"show": "image", "user": ASK_DIGIT[rng.integers(len(ASK_DIGIT))], "reply": "text", "text": word},
        {"show": "", "user": "say it", "reply": "speech", "text": word},
        {"show": "", "user": f"paint it {request(canvas, size, top, left)}", "reply": "image", "text": word},
    ]


@functools.cache
def held_out(seed: int = 7) -> frozenset[tuple[int, tuple[int, int]]]:
    """The (digit, canvas) pairs that no training image has: one digit for each canvas but the single cell (9 %)."""
    canvases: Sequence[tuple[int, int]] = CANVASES[1:]
    rng = np.random.default_rng(seed)
    digits = np.concatenate([rng.permutation(10), rng.permutation(10)])[:len(canvases)]
    return frozenset((int(digit), canvas) for digit, canvas in zip(digits, canvases, strict=True))


def is_held_out(digit: int, canvas: tuple[int, int]) -> bool:
    """Whether training images never show `digit` on `canvas`."""
    return (int(digit), tuple(canvas)) in held_out()


def sentences() -> list[str]:
    """Every sentence of the grammar once, sorted: captions, questions, answers, requests, instructions and words."""
    texts = set(DIGIT_WORDS) | set(OTHER_WORDS)
    for canvas in CANVASES:
        for size, top, left in placements(canvas):
            texts.add(request(canvas, size, top, left))
            for digit in range(10):
                texts.update(caption(canvas, digit, size, top, left, variant) for variant in range(len(CAPTIONS)))
                texts.update(text for pair in questions(canvas, digit, size, top, left, digit) for text in pair)
    forms = [form for kind in KINDS for form in INSTRUCTIONS[kind] if form]
    for form in forms:
        for word in DIGIT_WORDS if _slots(form) else ("",):
            texts.add(form.format(caption=f"a small {word}", word=word, request="small"))
    return sorted(texts)
