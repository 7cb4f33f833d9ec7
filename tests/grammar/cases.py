"""A small vocabulary and random documents, shared by the grammar's tests."""

import numpy as np

from dina import grammar
from dina.grammar import Image, Speech, Text

LETTERS = range(4, 60)


def spell(text: str) -> list[int]:
    """Stands for the text tokenizer: one id per character, digits from 60 on."""
    return [70 if c == " " else 60 + int(c) for c in text]


def vocabulary(**options) -> grammar.Vocabulary:
    sizes = {"audio": (9, 7, 5), "visual": (8, 6, 6, 6)} | options
    return grammar.Vocabulary(80, **sizes).with_sizes(spell, grammar.grids(12))


def codes(rng, v, sizes, count):
    return np.stack([rng.integers(0, size, count) for size in sizes], 1).astype(np.int32)


def text(rng, loss=None):
    ids = tuple(int(i) for i in rng.choice(LETTERS, rng.integers(1, 6)))
    return Text(ids, bool(rng.integers(2)) if loss is None else loss)


def image(rng, v, target=None):
    h, w = grammar.grids(12)[rng.integers(len(grammar.grids(12)))]
    return Image(codes(rng, v, v.visual, h * w), h, w, bool(rng.integers(2)) if target is None else target)


def speech(rng, v, target=None):
    frames = codes(rng, v, v.audio, int(rng.integers(1, 9)))
    target = bool(rng.integers(2)) if target is None else target
    if not target or rng.random() < 0.2:
        return Speech(frames, None, target)
    letters = tuple(int(i) for i in rng.choice(LETTERS, rng.integers(0, 7)))
    low, high = max(0, len(letters) - len(frames)), len(letters)
    delay = [low, high, grammar.draw_delay(len(letters), len(frames), rng)][rng.integers(3)]
    return Speech(frames, letters, True, delay)


def document(rng, v, spans=5):
    """Any order of spans; starts with a text, because nothing predicts the first position."""
    kinds = [lambda: text(rng), lambda: image(rng, v), lambda: speech(rng, v)]
    return (text(rng), *(kinds[rng.integers(3)]() for _ in range(rng.integers(0, spans))))


def same(a, b) -> bool:
    """Whether two documents are equal, arrays included."""
    def flat(span):
        out = []
        for value in vars(span).values():
            out.append(value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, tuple) else value)
        return type(span).__name__, out
    return [flat(x) for x in a] == [flat(x) for x in b]
