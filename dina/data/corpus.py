"""Real prose for plain text: the language reference inside the standard library (`pydoc_data.topics`, PSF licence).

It comes with every Python, so it needs no download; its text differs a little between Python versions, so the data
manifest records the version and the hash. Sentences are joined to records of bounded length and split by their hash.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Iterable

import ml_collections

from dina.config import InputError
from dina.data import phrases

SPLITS = ("train", "valid", "test")
_MIN_CHARACTERS = 20  # shorter ones are 'See also:' and the like
_ASCII = str.maketrans({
    "’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " "})
_NOT_PROSE = re.compile(r"::=|>>>|={3,}|-{3,}|\*{3,}|\+-|\||^\s*(def|class|import|from|print|return|for|while)\b")


def default_config() -> ml_collections.ConfigDict:
    """Longest record in characters, shares of valid and test, and the prose that the tokenizer is trained on."""
    return ml_collections.ConfigDict({"max_characters": 200, "valid": 0.05, "test": 0.05,
                                      "tokenizer_prose": 60_000, "tokenizer_grammar_weight": 2,
                                      "tokenizer_word_weight": 20})


def source_file() -> pathlib.Path:
    """The module's file (hashed in the data manifest). Raises InputError if this Python lacks it."""
    return pathlib.Path(_topics().__file__)


def _topics():
    try:
        from pydoc_data import topics
    except ImportError:
        raise InputError("text data: this Python lacks the standard module pydoc_data.topics;"
                         " use a full CPython, such as `uv python install 3.12` gives") from None
    return topics


def _sentences(text: str) -> Iterable[list[str]]:
    """Sentences of each prose paragraph of one topic; code, tables, headings and signatures are left out."""
    for paragraph in re.split(r"\n\s*\n", text):
        flat = " ".join(paragraph.split()).translate(_ASCII)
        if _NOT_PROSE.search(flat) or not flat.isascii() or not re.match(r"[A-Z].*[a-z]{2}.*[.:]$", flat):
            continue
        yield re.split(r"(?<=[.:;]) (?=[A-Z])", flat)


def paragraphs(max_characters: int) -> list[str]:
    """Distinct records of prose, each of whole sentences and at most `max_characters` long, in source order."""
    found: dict[str, None] = {}
    for text in _topics().topics.values():
        for sentences in _sentences(text):
            record = ""
            for sentence in sentences:
                joined = f"{record} {sentence}".strip()
                if len(joined) > max_characters and record:
                    found.setdefault(record)
                    joined = sentence
                record = joined if len(joined) <= max_characters else ""
            found.setdefault(record)
    return [record for record in found if len(record) >= _MIN_CHARACTERS]


def records(config: ml_collections.ConfigDict, split: str) -> list[dict[str, str]]:
    """Text records of a split ('train', 'valid' or 'test'); the hash of a record decides where it goes.

    Args:
        config: the data config (`text`).
    """
    text = config.text

    def place(record: str) -> str:
        share = int.from_bytes(hashlib.sha256(record.encode()).digest()[:8]) / 2 ** 64
        return "test" if share < text.test else "valid" if share < text.test + text.valid else "train"

    return [{"text": record} for record in paragraphs(text.max_characters) if place(record) == split]


def tokenizer_texts(config: ml_collections.ConfigDict) -> list[str]:
    """What the text tokenizer is trained on: the whole grammar, its words again, and a slice of the training prose.

    Every grammar sentence counts `tokenizer_grammar_weight` times and every word of it `tokenizer_word_weight` times
    more: with 2 and 20, digits, sizes, places and most words of the instructions become single pieces at 512 ids,
    and prose keeps 1.8 characters a token (1.5 with a word weight of 100).
    """
    prose, length = [], 0
    for record in records(config, "train"):
        if length >= config.text.tokenizer_prose:
            break
        prose.append(record["text"])
        length += len(record["text"])
    grammar = phrases.sentences()
    words = sorted({word for sentence in grammar for word in sentence.split()})
    return grammar * config.text.tokenizer_grammar_weight + words * config.text.tokenizer_word_weight + prose
