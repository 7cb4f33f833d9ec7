"""Word error rate: the normaliser writes equal things equally, and the distance is the smallest there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dina.eval import words

WORDS = st.lists(st.sampled_from("abcd"), max_size=7)


@pytest.mark.parametrize("one,other", [
    ("Please press 1, or say \"agent\".", "please press one or say agent"), ("Don’t wait", "don't wait"), ("e-mail", "E mail"),
    ("The 21st of 1,250,000", "the twenty-first of one million two hundred fifty thousand"), ("5th 12th 40th", "fifth twelfth fortieth"), ("50% & more", "fifty percent and more"), ("$5 and $1,000.50", "five dollars and one thousand fifty dollars"),
    ("the 1,000th", "the one thousandth"),
    ("extension 007", "extension zero zero seven"), ("3.5", "three five"), ("  A   b\n", "a B"), ("[music] hello (laughs)", "hello"),
    ("ﬁne café", "fine café"), ("", "..."),
])  # fmt: skip
def test_equal_things_are_written_equally(one, other):
    assert words.normal(one) == words.normal(other)
    assert words.normal(" ".join(words.normal(one))) == words.normal(one)


def test_numbers_are_spelled_and_all_differ():
    assert words.spell(0) == "zero" and words.spell(100) == "one hundred"
    assert words.spell(999_017_040) == "nine hundred ninety nine million seventeen thousand forty"
    assert len({spell(n) for n in range(2000) for spell in (words.spell, words.spell_ordinal)}) == 4000
    assert words.normal("1000000000000000") == ["one"] + ["zero"] * 15


def slow(said, heard):
    if not said or not heard:
        return len(said) + len(heard)
    return min(slow(said[1:], heard) + 1, slow(said, heard[1:]) + 1, slow(said[1:], heard[1:]) + (said[0] != heard[0]))


@settings(max_examples=60, deadline=None)
@given(WORDS, WORDS)
def test_the_distance_is_the_smallest(said, heard):
    assert words.errors(said, heard) == slow(said, heard)


def test_the_rate_counts_words_of_all_clips_together():
    score = words.error_rate(["one two three", "four"], ["one two", "five six"])
    assert score["value"] == 3 / 4 and score["n"] == 2 and score["low"] <= 3 / 4 <= score["high"]
    assert words.error_rate(["a b"], ["A, b!"])["value"] == 0.0
    assert words.error_rate(["a"], ["b c d"])["value"] == 3.0
    with pytest.raises(ValueError, match="no words"):
        words.error_rate(["..."], ["a"])


def test_the_interval_has_the_truth_inside_about_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for seed in range(60):
        heard = [" ".join("ab"[int(x)] for x in rng.random(10) < 0.3) for _ in range(30)]
        score = words.error_rate(["a " * 10] * 30, heard, seed, 200)
        inside += score["low"] <= 0.3 <= score["high"]
    assert 50 <= inside <= 60


def test_errors_are_a_distance():
    lists = [list(x) for n in range(4) for x in itertools.product("ab", repeat=n)]
    for a, b in itertools.product(lists, repeat=2):
        assert words.errors(a, b) == words.errors(b, a) and (words.errors(a, b) == 0) == (a == b)
