"""From judged answers to the flat keys of report.json: a pure function of what the evaluation wrote down.

Answers are plain dicts, one per prompt (the lines of `<workdir>/eval/<task>.jsonl`):
  truth       the digit 0..9, or -1 for a word that is no digit
  predicted   what the answer says in the judge's ears or eyes, a digit or None
  group       'main' (positions on the 14-px grid, clean speech), 'any_offset' (arbitrary pixel positions), 'new_size'
              (a canvas that training never shows with this digit), 'noisy' (speech in noise and a room), 'words' (no digits),
              'caption' (the picture must be described)
  extra       further verdicts: `right` for the groups words and caption; `pocketsphinx`, the digit it hears;
              `transcript_right`, whether the text beside spoken words names them
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dina.data.phrases import DIGIT_WORDS, HORIZONTAL, SIZES, VERTICAL
from dina.eval.metrics import Score, bootstrap, wilson

TASKS = ("image_to_text", "speech_to_text", "text_to_image", "text_to_speech", "image_to_speech", "speech_to_image")
# Suffix of each group's key; 'main' is the score with a bar.
SUFFIX = {"main": "", "any_offset": "_any_offset", "new_size": "_new_size", "noisy": "_noisy", "words": "_words",
          "caption": "_caption"}
LEVELS = (1, 2, 4, 8)


def digit_named(text: str) -> int | None:
    """The one digit that a text names, or None if it names none or several.

    The article of 'one small seven' names nothing.
    """
    words = re.findall(r"[a-z]+", text.lower())
    article = lambda a, b, c: a == "one" and b in SIZES and c in DIGIT_WORDS
    after = zip(words, [*words[1:], ""], [*words[2:], "", ""], strict=False)
    named = {word for word, second, third in after if word in DIGIT_WORDS and not article(word, second, third)}
    return DIGIT_WORDS.index(named.pop()) if len(named) == 1 else None


def caption_meaning(text: str) -> tuple[int | None, frozenset[str]]:
    """(digit, size and place words) of a caption: two captions agree if these are equal."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return digit_named(text), frozenset(words & {*SIZES, *VERTICAL, *HORIZONTAL})


def accuracy(records: Iterable[Mapping[str, Any]]) -> Score:
    """Share of records whose `predicted` is their `truth`."""
    right = [record["predicted"] == record["truth"] for record in records]
    return wilson(sum(right), len(right))


def task_scores(task: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """All accuracies of one task, keyed as in report.json; groups without records give no key."""
    scores = {}
    for group, suffix in SUFFIX.items():
        part = [record for record in records if record["group"] == group]
        if not part:
            continue
        if group in ("words", "caption"):
            scores[f"{task}{suffix}_accuracy"] = _verdicts([record["extra"]["right"] for record in part])
            continue
        scores[f"{task}_accuracy{suffix}"] = accuracy(part)
        second = [record for record in part if "pocketsphinx" in record.get("extra", {})]
        if second:
            verdicts = [record["extra"]["pocketsphinx"] == record["truth"] for record in second]
            scores[f"{task}_pocketsphinx_accuracy{suffix}"] = _verdicts(verdicts)
    texts = [r["extra"]["transcript_right"] for r in records if "transcript_right" in r.get("extra", {})]
    return scores | ({f"{task}_transcript_accuracy": _verdicts(texts)} if texts else {})


def _verdicts(verdicts: Sequence[bool]) -> Score:
    return wilson(sum(map(bool, verdicts)), len(verdicts))


def image_reconstruction_scores(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Score]:
    """PSNR and SSIM by levels, after the refiner, and by canvas size at all levels.

    Args:
        rows: per picture and setting: `levels` (int), `refined` (bool), `size` ('56x28', height x width in pixels),
            `psnr_db`, `ssim`.
        seed: of the bootstrap.

    Returns:
        `image_psnr_db`, `image_ssim` (all levels, pixel decoder alone), the same with `_level_n`, `_refined`,
        `_canvas_HxW`.
    """
    if not rows:
        return {}
    top = max(row["levels"] for row in rows)
    plain = [row for row in rows if not row["refined"]]
    groups = {"": [row for row in plain if row["levels"] == top]}
    groups |= {f"_level_{n}": [row for row in plain if row["levels"] == n] for n in sorted({r["levels"] for r in plain})}
    groups["_refined"] = [row for row in rows if row["refined"]]
    for size in sorted({row["size"] for row in rows}, key=lambda s: [int(v) for v in s.split("x")]):
        groups[f"_canvas_{size}"] = [row for row in groups[""] if row["size"] == size]
    return {f"image_{name}{suffix}": bootstrap([row[name] for row in part], seed)
            for suffix, part in groups.items() if part for name in ("psnr_db", "ssim")}


def audio_reconstruction_scores(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Score]:
    """Mel distances in nepers from rows of `levels`, `refined` and `mel_l1`.

    Returns:
        `mel_l1` (mel decoder, all levels), `mel_l1_level_n`, `mel_l1_refined` (after flow matching, all levels).
    """
    if not rows:
        return {}
    top = max(row["levels"] for row in rows)
    plain = [row for row in rows if not row["refined"]]
    groups = {"": [row for row in plain if row["levels"] == top]}
    groups |= {f"_level_{n}": [row for row in plain if row["levels"] == n] for n in sorted({r["levels"] for r in plain})}
    groups["_refined"] = [row for row in rows if row["refined"] and row["levels"] == top]
    return {f"mel_l1{suffix}": bootstrap([row["mel_l1"] for row in part], seed) for suffix, part in groups.items() if part}


def codebook_scores(statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Usage and perplexity per level of both tokenizers, and `codebook_usage`, the smallest usage of all levels.

    Args:
        statistics: {'visual': ..., 'audio': ...} of `metrics.codebook_statistics`.
    """
    scores = {}
    for name, found in statistics.items():
        for kind in ("usage", "perplexity"):
            for level, value in enumerate(found[kind], 1):
                scores[f"codebook_{kind}_{name}_level_{level}"] = value
        scores[f"codebook_window_{name}"] = found["window"]
    every = [value for found in statistics.values() for value in found["usage"]]
    return ({"codebook_usage": min(every)} if every else {}) | scores


def all_scores(answers: Mapping[str, Sequence[Mapping]], images: Sequence[Mapping], audio: Sequence[Mapping],
               codebooks: Mapping[str, Mapping], judges: Mapping[str, Score], seed: int) -> dict[str, Any]:
    """Every score of an evaluation, flat.

    Args:
        answers: task -> judged answers.
        images, audio: reconstruction rows.
        codebooks: as for `codebook_scores`.
        judges: name -> the judge's own accuracy on real data, passed through as it is.
        seed: of the bootstrap intervals.
    """
    scores: dict[str, Any] = {}
    for task in TASKS:
        scores |= task_scores(task, answers.get(task, ()))
    scores |= image_reconstruction_scores(images, seed) | audio_reconstruction_scores(audio, seed)
    return scores | codebook_scores(codebooks) | dict(judges)
