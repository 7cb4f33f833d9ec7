"""The grammar: words and pixels are each other's inverse, on a 14-pixel grid, for every placement."""

import re

import numpy as np
import pytest

from dina.config import InputError
from dina.data import phrases

EVERY = [(canvas, *placement) for canvas in phrases.CANVASES for placement in phrases.placements(canvas)]


@pytest.mark.parametrize("canvas", phrases.CANVASES)
def test_box_inverts_words(canvas):
    for size, top, left in phrases.placements(canvas):
        assert phrases.box(canvas, *phrases.words(canvas, size, top, left)) == (top, left, size)


def test_positions_are_on_the_grid_and_inside():
    for (rows, cols), size, top, left in EVERY:
        assert top % 14 == 0 and left % 14 == 0
        assert top + size <= 28 * rows and left + size <= 28 * cols


def test_words_name_a_placement_uniquely_and_only_axes_with_room():
    for canvas in phrases.CANVASES:
        named = [phrases.words(canvas, *placement) for placement in phrases.placements(canvas)]
        assert len(set(named)) == len(named)
        for size_word, vertical, horizontal in named:
            size = phrases.SIZES[size_word]
            assert (vertical is None) == (28 * canvas[0] == size)
            assert (horizontal is None) == (28 * canvas[1] == size)


def test_a_judge_can_read_the_box_from_every_wording():
    for canvas, size, top, left in EVERY:
        for variant in range(4):
            text = phrases.caption(canvas, 7, size, top, left, variant)
            assert text == text.lower() and re.search(r"\bseven\b", text) and 2 <= len(text.split()) <= 10

            def find(words, text=text):
                return next((word for word in words if re.search(rf"\b{word}\b", text)), None)

            assert phrases.box(canvas, find(phrases.SIZES), find(phrases.VERTICAL), find(phrases.HORIZONTAL)) == (
                top, left, size)


def test_arbitrary_offsets_have_no_position_words():
    assert phrases.words((2, 2), 28, 3, 14) is None
    assert phrases.caption((2, 2), 4, 28, 3, 14) == "a small four"
    assert all(question != "where is it" for question, _ in phrases.questions((2, 2), 4, 28, 3, 14))


def test_questions_are_answered_rightly():
    for variant in range(20):
        answers = dict(phrases.questions((2, 3), 3, 56, 0, 14, variant))
        assert answers["is it a three"] == "yes" and answers["what size is it"] == "large"
        assert answers["where is it"] == "center"
        (wrong,) = [question for question, answer in answers.items() if answer == "no"]
        assert "three" not in wrong


@pytest.mark.parametrize("arguments", [
    ((1, 1), "large"), ((2, 2), "small", "top", None), ((1, 2), "small", "top", "left"),
    ((2, 2), "huge", "top", "left"),
    ((2, 2), "small", "center", "left")])
def test_box_refuses_impossible_words(arguments):
    with pytest.raises(InputError):
        phrases.box(*arguments)


def test_every_kind_has_an_instruction():
    rng = np.random.default_rng(0)
    slots = {"caption": "a small two", "word": "cat", "request": "small at the top"}
    assert len(phrases.KINDS) == 8
    for kind in phrases.KINDS:
        for _ in range(10):
            text = phrases.instruction(kind, rng, **slots)
            assert "{" not in text and len(text.split()) <= 12
    assert "cat" in phrases.instruction("text_to_speech", rng, word="cat")
    with pytest.raises(InputError, match="telepathy"):
        phrases.instruction("telepathy", rng)
    with pytest.raises(InputError, match="caption"):
        phrases.instruction("text_to_image", rng)


def test_conversation_mixes_three_modalities():
    turns = phrases.conversation((2, 2), 5, 28, 0, 28, np.random.default_rng(1))
    assert [turn["reply"] for turn in turns] == ["text", "speech", "image"]
    assert turns[2]["user"].endswith("small at the top right")


def test_held_out_pairs():
    pairs = phrases.held_out()
    share = len(pairs) / (10 * len(phrases.CANVASES))
    assert 0.08 < share < 0.12 and {digit for digit, _ in pairs} == set(range(10))
    assert not any(canvas == (1, 1) for _, canvas in pairs)
    assert all(phrases.is_held_out(*pair) for pair in pairs) and not phrases.is_held_out(0, (1, 1))


def test_word_list_is_wide_and_without_digits():
    assert len(set(phrases.OTHER_WORDS)) == len(phrases.OTHER_WORDS) >= 60
    assert not set(phrases.OTHER_WORDS) & {*phrases.DIGIT_WORDS, "won", "to", "too", "for", "ate"}
