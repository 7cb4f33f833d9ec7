"""Groups are closed under likeness, and no group is in two splits."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dina.data import splits

SHARES = {"valid": 0.1, "test": 0.2}


def _prints(values):
    return np.array(values, ">u2").view(np.uint8).reshape(-1, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 65535)), min_size=1, max_size=40), st.integers(0, 3))
def test_groups_are_the_connected_components(rows, near):
    groups = splits.group([(key,) for key, _ in rows], _prints([value for _, value in rows]), near)
    alike = lambda a, b: a[0] == b[0] or (a[1] ^ b[1]).bit_count() <= near
    reached = {i: {j for j, other in enumerate(rows) if alike(row, other)} for i, row in enumerate(rows)}
    for _ in rows:
        reached = {i: set.union(*(reached[j] for j in own)) for i, own in reached.items()}
    assert groups == [min(own) for own in reached.values()]


def _assign(sizes, seed=0, strata=1):
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    names = [f"{g}/{i}" for i, g in enumerate(groups)]
    return groups, names, splits.assign(groups, names, [str(g % strata) for g in groups], SHARES, seed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(0, 5), st.integers(1, 3))
def test_no_group_is_divided_and_no_share_exceeded(sizes, seed, strata):
    groups, _, assigned = _assign(sizes, seed, strata)
    assert all(len({s for g, s in zip(groups, assigned) if g == one}) == 1 for one in set(groups))
    for stratum in range(strata):
        own = [s for g, s in zip(groups, assigned) if g % strata == stratum]
        counts = collections.Counter(own)
        assert all(counts[split] <= share * len(own) for split, share in SHARES.items())


def test_single_pictures_fill_the_shares_exactly_in_every_stratum():
    groups, _, assigned = _assign([1] * 300, strata=3)
    for stratum in range(3):
        counts = collections.Counter(s for g, s in zip(groups, assigned) if g % 3 == stratum)
        assert counts == {"train": 70, "valid": 10, "test": 20}


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_pictures_does_not_matter_and_the_seed_does(seed):
    groups, names, assigned = _assign([1, 2, 3] * 30, seed)
    order = np.random.default_rng(0).permutation(len(groups))
    again = splits.assign([groups[i] for i in order], [names[i] for i in order], ["0"] * len(groups), SHARES, seed)
    assert again == [assigned[i] for i in order]
    assert assigned != _assign([1, 2, 3] * 30, seed + 1)[2]


def test_a_group_too_large_for_a_share_is_trained_on():
    groups, _, assigned = _assign([50] + [1] * 50)
    assert {s for g, s in zip(groups, assigned) if g == 0} == {"train"}
    assert collections.Counter(assigned)["test"] == 20
