import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dina import grammar
from dina.config import InputError
from dina.grammar import Image, Speech, Text

from tests.grammar import cases

V = cases.vocabulary()


def test_target_speech_layout():
    frames = cases.codes(np.random.default_rng(0), V, V.audio, 4)
    a = grammar.encode((Speech(frames, (11, 12, 13), True, delay=1),), V)
    s, p, f = V.audiotext_start, V.audiotext_pad, V.audio_pad
    assert a["tokens"].tolist() == [V.audiogen_start, p, s, f, f, f, f, V.audiogen_end]
    assert a["transcript"].tolist() == [-1, 11, 12, 13, p, p, p, -1]
    assert a["text_weight"].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert a["code_weight"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert (a["codes"][3:7, :3] == frames).all() and a["codes"][7].tolist() == [V.audio[0], -1, -1, -1]
    assert grammar.text_label(a["tokens"], a["transcript"]).tolist()[1:5] == [11, 12, 13, p]


def test_parallel_serial_and_pure_speech():
    frames = cases.codes(np.random.default_rng(0), V, V.audio, 3)
    outer = lambda **form: grammar.encode((Speech(frames, target=True, **form),), V)["tokens"].tolist()
    g, s, p, f, e = V.audiogen_start, V.audiotext_start, V.audiotext_pad, V.audio_pad, V.audiogen_end
    assert outer(transcript=(11, 12)) == [g, s, f, f, f, e]
    assert outer(transcript=(11, 12), delay=2) == [g, p, p, s, f, f, f, e]
    assert outer() == [g, f, f, f, e]


def test_inputs_carry_no_loss():
    rng = np.random.default_rng(1)
    a = grammar.encode((Text((5,)), cases.image(rng, V, False), cases.speech(rng, V, False)), V)
    assert not a["text_weight"].any() and not a["code_weight"].any()
    assert V.img_newline not in a["tokens"] and V.size_open not in a["tokens"]


def test_target_image_learns_codes_only():
    image = cases.image(np.random.default_rng(2), V, True)
    a = grammar.encode((Text((5, 6), True), image, Text((V.eos,), True)), V)
    assert a["text_weight"].sum() == 2 and a["text_weight"][0] == 0 and a["text_weight"][-1] == 1
    assert ((a["code_weight"] > 0) == (a["tokens"] == V.img_pad)).all() and a["code_weight"].sum() == image.h * image.w


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_random_documents_come_back(seed):
    document = cases.document(np.random.default_rng(seed), V, 7)
    arrays = grammar.encode(document, V)
    assert {name: array.dtype for name, array in arrays.items()} == {k: np.dtype(d) for k, d in grammar.spans.DTYPES.items()}
    assert cases.same(grammar.decode(arrays, V), grammar.canonical(document))
    counted = grammar.cost(document, V)
    audio = np.isin(arrays["tokens"], [V.audio_pad, V.audiogen_end]) & (arrays["code_weight"] > 0)
    image = arrays["tokens"] == V.img_pad
    assert counted == (len(arrays["tokens"]), (image & (arrays["code_weight"] > 0)).sum(), audio.sum(), image.sum())
    assert (arrays["position"] == np.arange(len(arrays["tokens"]))).all()


def test_delays_follow_the_rule():
    rng = np.random.default_rng(3)
    drawn = np.array([grammar.draw_delay(4, 9, rng) for _ in range(4000)])
    shares = np.bincount(drawn, minlength=5) / len(drawn)
    np.testing.assert_allclose(shares, [0.5, 0.125, 0.125, 0.125, 0.125], atol=0.03)
    assert min(grammar.draw_delay(6, 2, rng) for _ in range(50)) == 4
    assert grammar.draw_delay(0, 2, rng) == 0


@pytest.mark.parametrize("span, message", [
    (Image(np.zeros((3, 4), np.int32), 2, 2, True), "2 x 2 cells has 3 rows"),
    (Image(np.zeros((1, 3), np.int32), 1, 1), r"shape \(1, 3\)"),
    (Image(np.full((1, 4), 8, np.int32), 1, 1), "codes reach"),
    (Image(np.full((1, 4), -1, np.int32), 1, 1), "codes reach"),
    (Speech(np.zeros((0, 3), np.int32)), "at least 1"),
    (Speech(np.zeros((2, 3), np.int32), (5,), True, 2), "delay 2"),
    (Speech(np.zeros((2, 3), np.int32), (5,) * 5, True, 2), "delay 2"),
])
def test_impossible_spans_are_refused(span, message):
    with pytest.raises(InputError, match=message):
        grammar.encode((span,), V)
