"""Every part of a protocol is in its id, and scores of different ids are not compared."""

import dataclasses

import numpy as np
import pytest

from dina.config import InputError
from dina.eval.protocol import Protocol, compare, reference_hash

BASE = Protocol("kid/1", "abc", "native", "net", 0)
OTHER = {"metric": "kid/2", "reference": "abd", "geometry": "crop 224", "network": "", "seed": 1}


@pytest.mark.parametrize("field", OTHER)
def test_every_field_separates_scores_and_is_named(field):
    other = dataclasses.replace(BASE, **{field: OTHER[field]})
    assert other.id != BASE.id
    with pytest.raises(InputError, match=f"differ in {field} \\("):
        compare(BASE.stamp({"value": 1.0}), other.stamp({"value": 2.0}))


def test_equal_protocols_are_subtracted_and_a_bare_score_is_refused():
    assert compare(BASE.stamp({"value": 3.0}), dataclasses.replace(BASE).stamp({"value": 1.0})) == 2.0
    with pytest.raises(InputError, match="second score carries no protocol"):
        compare(BASE.stamp({"value": 3.0}), {"value": 1.0})


def test_reference_hash_knows_pixels_shapes_and_order():
    a, b = np.zeros((2, 6, 3), np.uint8), np.ones((2, 6, 3), np.uint8)
    last = b.copy()
    last[-1, -1, -1] = 2
    sets = [[a, b], [b, a], [a], [a, b.reshape(6, 2, 3)], [a, last]]
    assert len({reference_hash(x) for x in sets}) == len(sets) and reference_hash([a, b]) == reference_hash([a.copy(), b.copy()])
