"""What the evaluation asks: held-out material only, truths that fit, the same every time."""

import numpy as np
import pytest

from dina.data import canvases, phrases
from dina.eval import prompts, scores


@pytest.fixture(scope="module")
def asked():
    """Columns as `load_all` gives them: every digit on every canvas, aligned and not, and three words."""
    rng = np.random.default_rng(0)
    images = {name: [] for name in ("image", "digit", "size", "top", "left", "aligned")}
    for digit in range(10):
        for canvas in phrases.CANVASES:
            for aligned in (1, 0):
                size, top, left = phrases.placements(canvas)[-1]
                if not aligned and canvas == (1, 1):
                    continue
                top, left = (top, left) if aligned else (max(0, top - 3), max(0, left - 5))
                pixels = canvases.paste(rng.integers(0, 255, (28, 28)).astype(np.uint8), canvas, size, top, left)
                for name, value in (("image", np.repeat(pixels[..., None], 3, -1)), ("digit", digit), ("size", size), ("top", top),
                                    ("left", left), ("aligned", aligned)):
                    images[name].append(value)
    words = [*phrases.DIGIT_WORDS, "garden", "moon"]
    speech = {"audio16": [rng.integers(-9000, 9000, 8000).astype(np.int16) for _ in words], "word": words,
              "digit": np.array([*range(10), -1, -1])}
    config = prompts.default_config()
    return lambda: prompts.Prompts(config, images, speech)


@pytest.mark.parametrize("task", scores.TASKS)
def test_questions_are_the_same_every_time_and_complete(asked, task):
    first, again = asked().questions(task), asked().questions(task)
    assert [(q.prompt, q.group, q.truth) for q in first] == [(q.prompt, q.group, q.truth) for q in again]
    assert {q.group for q in first} == set(prompts.default_config()[task])
    source, _, target = task.split("_")
    for q in first:
        assert q.reply == target and (q.image is not None) == (source == "image") and (q.wave is not None) == (source == "speech")
        assert (q.canvas is not None) == (q.box is not None) == (target == "image")
        assert q.word == (phrases.DIGIT_WORDS[q.truth] if q.truth >= 0 else q.word) and (q.truth < 0) == (q.group == "words")


def test_painting_prompts_name_digit_and_box(asked):
    for q in asked().questions("text_to_image"):
        assert scores.digit_named(q.prompt) == q.truth
        named = scores.caption_meaning(q.prompt)[1]
        top, left, size = q.box
        words = phrases.words(q.canvas, size, top, left)
        assert named == {word for word in words if word}
        assert phrases.is_held_out(q.truth, q.canvas) == (q.group == "new_size")


def test_spoken_requests_never_write_the_digit(asked):
    for q in asked().questions("speech_to_image"):
        assert scores.digit_named(q.prompt) is None and q.truth >= 0


def test_caption_truths_are_captions_of_the_picture(asked):
    questions = [q for q in asked().questions("image_to_text") if q.group == "caption"]
    assert questions and all(scores.caption_meaning(q.caption)[0] == q.truth for q in questions)


def test_noisy_clips_are_really_noisy(asked):
    groups = {}
    for q in asked().questions("speech_to_text"):
        groups.setdefault(q.group, {})[q.truth] = q.wave
    for truth, wave in groups["noisy"].items():
        assert np.abs(wave - groups["main"][truth]).mean() > 0.01 and np.abs(wave).max() <= 1
