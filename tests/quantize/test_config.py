"""What a quantizer may be: unknown or contradictory choices are named with what to do."""

import pytest

from dina.config import InputError
from dina.quantize import rvq


@pytest.mark.parametrize("fields,words", [
    ({"codebook": "both"}, "quantizer.codebook='both': choose one of separate, shared"),
    ({"kind": "lfq"}, "rvq, fsq, simvq"),
    ({"update": "adam"}, "ema, sgd"),
    ({"metric": "dot"}, "euclidean, cosine"),
    ({"gradient": "none"}, "straight_through, rotation"),
    ({"sizes": ()}, "one positive size"),
    ({"sizes": (16, 8), "codebook": "shared"}, "equal sizes"),
    ({"beam": 0}, "quantizer.beam=0"),
    ({"factor_dim": 7}, "factor_dim=7.*dim=6"),
    ({"factor_dim": 2}, "commitment='residual'"),
    ({"factor_dim": 2, "commitment": "residual", "codebook": "shared"}, "codebook='separate'"),
    ({"kind": "simvq", "codebook": "shared"}, "kind='simvq'.*codebook='separate'"),
    ({"kind": "simvq", "update": "sgd"}, "kind='simvq'.*'sgd'"),
    ({"kind": "fsq", "metric": "cosine"}, "kind='fsq'.*metric='euclidean'"),
    ({"kind": "fsq", "sizes": (22,)}, "no grid of 22 points.*21 or 24"),
    ({"kind": "fsq", "dim": 2, "sizes": (256,)}, "grid of 256 points has 3 dimensions"),
])  # fmt: skip
def test_what_makes_no_quantizer_is_named(fields, words):
    with pytest.raises(InputError, match=words):
        rvq.RVQConfig(**({"sizes": (16, 16), "dim": 6} | fields))


def test_books_and_their_widths():
    shared = rvq.RVQConfig(sizes=[8, 8], dim=6, codebook="shared")
    assert shared.books == {"0": 8} and [shared.book(level) for level in (0, 1)] == ["0", "0"] and shared.width("0") == 6
    grid = rvq.RVQConfig(sizes=(64, 60), dim=6, kind="fsq")
    assert grid.books == {"0": 64, "1": 60} and [grid.width(book) for book in grid.books] == [2, 3]
    assert rvq.RVQConfig(sizes=(8,), dim=6, factor_dim=2, commitment="residual").width("0") == 2
