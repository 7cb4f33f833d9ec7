"""Which scores are shown, under which name, judged by whom, against which bar: shared by the page and the README."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

REAL_DIGITS = "classifier trained on real MNIST digits"
REAL_VOICES = "recogniser trained on other real voices"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the score table.

    Attributes:
        key: in report.json.
        title: what a reader sees.
        judge: who decides.
        bar: the value to reach, or None.
        ceiling: key of the judge's own accuracy on real data, or ''.
    """

    key: str
    title: str
    judge: str
    bar: float | None = None
    ceiling: str = ""


MAIN = (
    Row("image_to_text_accuracy", "Sees: picture → text", "the exact digit is named", 0.94),
    Row("speech_to_text_accuracy", "Hears: speech → text", "the exact digit is named, unseen voices", 0.97),
    Row("text_to_image_accuracy", "Paints: text → picture", REAL_DIGITS, 0.90, "digit_judge_canvas_accuracy"),
    Row("text_to_speech_accuracy", "Talks: text → speech", REAL_VOICES, 0.90, "speech_judge_accuracy"),
    Row("image_to_speech_accuracy", "Picture → speech", REAL_VOICES, 0.80, "speech_judge_accuracy"),
    Row("speech_to_image_accuracy", "Speech → picture", REAL_DIGITS, 0.80, "digit_judge_canvas_accuracy"),
)
SECOND = (
    Row("text_to_speech_pocketsphinx_accuracy", "Talks, second opinion", "pocketsphinx, digits grammar", None, "pocketsphinx_accuracy"),
    Row("image_to_speech_pocketsphinx_accuracy", "Picture → speech, second opinion", "pocketsphinx, digits grammar", None, "pocketsphinx_accuracy"),
    Row("image_to_text_accuracy_any_offset", "Sees, any pixel offset", "the exact digit is named"),
    Row("image_to_speech_accuracy_any_offset", "Picture → speech, any pixel offset", REAL_VOICES, None, "speech_judge_accuracy"),
    Row("image_to_text_accuracy_new_size", "Sees, digit never seen on this canvas", "the exact digit is named"),
    Row("text_to_image_accuracy_new_size", "Paints, digit never seen on this canvas", REAL_DIGITS, None, "digit_judge_canvas_accuracy"),
    Row("image_to_text_caption_accuracy", "Describes: digit, size and place", "all words right"),
    Row("speech_to_text_accuracy_noisy", "Hears in noise and a room", "the exact digit is named, unseen voices"),
    Row("speech_to_text_words_accuracy", "Hears other words", "the exact word, unseen voices"),
    Row("text_to_speech_words_accuracy", "Says other words", REAL_VOICES + ", all words", None, "speech_judge_words_accuracy"),
)
JUDGES = (
    ("digit_judge_accuracy", "digit classifier on 28×28 real held-out digits"),
    ("digit_judge_canvas_accuracy", "digit classifier on real held-out canvases, same crop"),
    ("speech_judge_accuracy", "word recogniser on real clips of the test voices"),
    ("speech_judge_accuracy_valid_voices", "word recogniser on real clips of the validation voices (the accents of training)"),
    ("speech_judge_resynthesized_accuracy", "word recogniser on real clips after mel and Griffin-Lim"),
    ("speech_judge_words_accuracy", "word recogniser on all words, test voices"),
    ("pocketsphinx_accuracy", "pocketsphinx on real clips of the test voices"),
)
OTHER = (
    Row("codebook_usage", "Codebook usage, lowest level of both tokenizers", "share of codes used on held-out data", 0.9),
    Row("image_psnr_db", "Reconstruction, all levels", "PSNR in dB over whole canvases"),
    Row("image_psnr_db_canvas_28x28", "Reconstruction, 28×28 canvases", "PSNR in dB"),
    Row("image_ssim", "Reconstruction, all levels", "SSIM"),
    Row("mel_l1", "Speech reconstruction, all levels", "mean mel distance in nepers"),
    Row("demo_minutes", "Wall clock after installation", "minutes, 2 cores", 15.0),
)
LOWER_IS_BETTER = frozenset({"demo_minutes", "mel_l1"})


def number(score: Any) -> float:
    """The value of a score, which is a number or {value, low, high, n}."""
    return float(score["value"] if isinstance(score, Mapping) else score)


def reached(row: Row, score: Any) -> bool | None:
    """Whether the bar is reached; None if there is none."""
    if row.bar is None or math.isnan(number(score)):
        return None
    return number(score) <= row.bar if row.key in LOWER_IS_BETTER else number(score) >= row.bar


def show(row_key: str, value: float) -> str:
    """A value with the digits and unit that its key calls for."""
    if math.isnan(value):
        return "–"
    if "psnr" in row_key:
        return f"{value:.1f} dB"
    if row_key == "demo_minutes":
        return f"{value:.1f} min"
    return f"{value:.3f}"
