"""Word error rate, with one fixed normaliser: what a recogniser heard and what was said are written the same way first.

The normaliser is part of every number made with it (`NORMALISER`): change it, and raise the version. English only: numbers
are spelled out because recognisers write some of them as digits.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from dina.eval.metrics import Score

NORMALISER = "english/2"
_ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
         " nineteen").split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_SCALES = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
_SIGNS = {"&": " and ", "%": " percent ", "$": " dollars ", "+": " plus ", "@": " at ", "#": " number "}
_ORDINAL = re.compile(r"\b(\d{1,12})(?:st|nd|rd|th)\b")
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
             "twelve": "twelfth"}


def spell(number: int) -> str:
    """English words of a number from 0 to 10**12."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f" {_ONES[number % 10]}" if number % 10 else "")
    size, name = next((size, name) for size, name in _SCALES if number >= size)
    return f"{spell(number // size)} {name}" + (f" {spell(number % size)}" if number % size else "")


def spell_ordinal(number: int) -> str:
    """'twenty first' for 21."""
    before, _, last = spell(number).rpartition(" ")
    last = _ORDINALS.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
    return f"{before} {last}".strip()


def normal(text: str) -> list[str]:
    """Lower-case words without punctuation; apostrophes go (`don't` is `dont`), hyphens part words, digits are spelled.

    Of a number with a decimal point the parts are words of their own; one of more than 12 digits, or with a leading 0,
    is read digit by digit.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>", " ", text)  # what a recogniser or a script says about sounds
    text = re.sub(r"\$(\d[\d,.]*)", r"\1 dollars ", text)
    for sign, word in _SIGNS.items():
        text = text.replace(sign, word)
    text = re.sub(r"(\d),(?=\d{3}(?!\d))", r"\1", text)
    text = _ORDINAL.sub(lambda match: spell_ordinal(int(match[1])), text)
    text = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    words = re.findall(r"\d+|[^\W\d_]+", text)
    return [part for word in words for part in (_number(word) if word.isdecimal() else [word])]


def _number(digits: str) -> list[str]:
    if len(digits) > 12 or (digits[0] == "0" and len(digits) > 1):
        return [spell(int(digit)) for digit in digits]
    return spell(int(digits)).split()


def errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """Fewest words to replace, drop and insert that turn one list into the other."""
    row = np.arange(len(heard) + 1)
    for number, word in enumerate(said, 1):
        diagonal = row[:-1] + np.array([word != other for other in heard], int)
        best = np.concatenate([[number], np.minimum(row[1:] + 1, diagonal)])
        # Insertions run along the row: the smallest of what lies before, plus its distance.
        row = np.minimum.accumulate(best - np.arange(len(best))) + np.arange(len(best))
    return int(row[-1])


def error_rate(said: Sequence[str], heard: Sequence[str], seed: int = 0, resamples: int = 1000) -> Score:
    """Errors of all clips over words of all clips, with a 95 % bootstrap interval over clips.

    Args:
        said: transcripts; at least one has a word.
        heard: what was recognised of each, in order.
        seed, resamples: of the interval.

    Returns:
        {value, low, high, n}: n clips; a rate can be above 1.
    """
    pairs = [(normal(one), normal(other)) for one, other in zip(said, heard, strict=True)]
    table_N2 = np.array([(errors(one, other), len(one)) for one, other in pairs], float).reshape(-1, 2)
    if not table_N2[:, 1].sum():
        raise ValueError("the transcripts have no words")
    rng = np.random.default_rng(seed)
    sums = [table_N2[rng.integers(0, len(table_N2), len(table_N2))].sum(0) for _ in range(resamples)]
    low, high = np.percentile([wrong / max(words, 1) for wrong, words in sums], [2.5, 97.5])
    wrong, words = table_N2.sum(0)
    return {"value": float(wrong / words), "low": float(low), "high": float(high), "n": len(table_N2)}
