"""Prompts have the layout of training's documents."""

import numpy as np
import pytest

from dina.config import InputError
from dina.decode import prompts
from dina.grammar import Image, Speech, Text, encode
from tests import tiny_language as tiny

V = tiny.VOCABULARY


def _prefix(prompt, document):
    """Asserts that a prompt is the beginning of a document."""
    whole = encode(document, V)
    for name, array in prompt.arrays.items():
        if name in ("tokens", "transcript", "codes"):
            np.testing.assert_array_equal(array, whole[name][: len(prompt)])


def test_a_painting_prompt_is_what_stands_before_the_first_cell():
    codes = np.zeros((6, 3), np.int32)
    prompt = prompts.build(V, (5, 6), reply="image", grid=(2, 3))
    _prefix(prompt, (Text((V.user, 5, 6, V.assistant)), Image(codes, 2, 3, True)))
    assert prompt.arrays["tokens"][-1] == V.img_start
    assert prompt.arrays["tokens"][-prompt.opening] == V.size_open


def test_a_speaking_prompt_ends_where_the_transcript_begins():
    heard = Speech(np.ones((3, 2), np.int32))
    prompt = prompts.build(V, (5,), [heard], reply="speech")
    _prefix(prompt, (Text((V.user,)), heard, Text((5, V.assistant)), Speech(np.zeros((4, 2), np.int32), (7,), True, 1)))
    assert prompt.opening == 1


def test_a_reading_prompt_shows_the_picture_first():
    codes = np.ones((4, 3), np.int32)
    prompt = prompts.build(V, (5, 6), [prompts.shown(codes, (2, 2))])
    _prefix(prompt, (Text((V.user,)), Image(codes, 2, 2), Text((5, 6, V.assistant, 9, V.eos))))
    assert prompt.opening == 0 and prompt.grid is None


@pytest.mark.parametrize(
    "fields,match", [({"reply": "video"}, "video"), ({"reply": "image"}, "size"), ({"reply": "image", "grid": (9, 9)}, "9 x 9")]
)
def test_wrong_prompts_are_named(fields, match):
    with pytest.raises(InputError, match=match):
        prompts.build(V, (5,), **fields)


def test_plain_text_needs_a_first_id():
    assert prompts.plain(V, (5, 6)).arrays["tokens"].tolist() == [5, 6]
    assert prompts.plain(V, ()).arrays["tokens"].tolist() == [V.eos]
