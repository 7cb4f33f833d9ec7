"""Numbers of a stream: functions of (seed, n), in any order and from any thread, and even where they should be."""

import concurrent.futures

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dina.data.draws import Draws


def test_a_generator_depends_on_seed_and_number_alone():
    draws, again = Draws((3, 0)), Draws((3, 0))
    ours = {n: draws.at(n).random(5).tolist() for n in (0, 7, 2**40)}
    assert {n: again.at(n).random(5).tolist() for n in (2**40, 0, 7)} == ours
    assert draws.at(7).integers(9, size=3).tolist() == again.at(7).integers(9, size=3).tolist()
    other = [Draws((3, 1)).at(7).random(), Draws((4, 0)).at(7).random(), draws.at(8).random()]
    assert len({ours[7][0], *other}) == 4
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        many = list(pool.map(lambda n: draws.at(n).random(50).sum(), list(range(40)) * 4))
    assert many == [draws.at(n).random(50).sum() for n in range(40)] * 4


def test_half_drawn_words_do_not_leak_into_the_next_number():
    draws = Draws((1,))
    alone = draws.at(5).integers(2**31, dtype=np.uint32)
    draws.at(4).integers(2**31, dtype=np.uint32)  # uses half of a 64-bit word
    assert draws.at(5).integers(2**31, dtype=np.uint32) == alone


@given(st.integers(0, 2**32), st.floats(0.01, 0.99), st.integers(0, 10**9))
def test_an_interval_has_its_share_of_any_run_of_numbers(seed, share, first):
    draws, count = Draws((seed,)), 2000
    inside = sum(draws.even(n) < share for n in range(first, first + count))
    assert abs(inside - share * count) < 6
