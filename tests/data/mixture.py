"""Small code tables and a stand-in text tokenizer, shared by the tests of documents and packs."""

import numpy as np

from dina import grammar
from dina.data import codes, phrases
from dina.data import documents as docs

LEVELS = {"audio": (9, 7, 5), "visual": (8, 6, 6, 6)}


class Speller:
    """One id per word; single digits are words too."""

    def __init__(self):
        self.words: dict[str, int] = {}

    def __call__(self, text):
        return [4 + self.words.setdefault(word, len(self.words)) for word in text.split()]


def vocabulary(speller=None):
    return grammar.Vocabulary(400, **LEVELS).with_sizes(speller or Speller(), grammar.grids(16))


def images():
    """Every placement of a few digits on every canvas, and some at arbitrary offsets; codes tell records apart."""
    rng, records = np.random.default_rng(0), []
    for canvas in phrases.CANVASES:
        for digit in range(10):
            size, top, left = phrases.placements(canvas)[rng.integers(len(phrases.placements(canvas)))]
            aligned = int(canvas == (1, 1) or rng.random() < 0.8)
            top = top if aligned else 3
            records.append({"h": canvas[0], "w": canvas[1], "digit": digit, "source": len(records), "size": size,
                            "top": top, "left": left, "aligned": aligned, "record": len(records),
                            "codes": _numbered(len(records), canvas[0] * canvas[1], LEVELS["visual"])})
    return codes.table("images", records)


def speech():
    """Two clean and one noisy clip of every word."""
    records = []
    for word in (*phrases.DIGIT_WORDS, *phrases.OTHER_WORDS[:10]):
        for noisy in (0, 0, 1):
            digit = phrases.DIGIT_WORDS.index(word) if word in phrases.DIGIT_WORDS else -1
            records.append({"word": word, "voice": "v", "digit": digit, "noisy": noisy, "record": len(records),
                            "codes": _numbered(len(records), 3 + len(records) % 5, LEVELS["audio"])})
    return codes.table("speech", records)


def _numbered(number, count, sizes):
    """Codes whose first row spells the record's number."""
    out = np.zeros((count, len(sizes)), np.int32)
    for level, size in enumerate(sizes):
        out[0, level], number = number % size, number // size
    return out


def find(table, found):
    """The record of a table that has exactly these codes."""
    hits = [r for r in range(len(table)) if table.codes(r).shape == found.shape and (table.codes(r) == found).all()]
    assert len(hits) == 1
    return hits[0]


def documents(options, seed=(0, 1)):
    speller = Speller()
    texts = ["one two three four five six seven", "a b c", " ".join(f"w{i}" for i in range(60))]
    return docs.Documents(options, seed, vocabulary(speller), speller, images(), speech(), texts)


def spell_back(made, ids):
    names = {number + 4: word for word, number in made._encode.words.items()}
    return [names[int(i)] for i in ids if int(i) in names and int(i) < made.v.text]
