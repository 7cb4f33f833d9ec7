import numpy as np
import pytest

from dina import grammar
from dina.grammar import Text

from tests.grammar import cases

V = cases.vocabulary()


@pytest.mark.parametrize("make", [cases.image, cases.speech])
@pytest.mark.parametrize("target", [True, False])
def test_an_unfinished_span_is_an_error_or_dropped(make, target):
    span = make(np.random.default_rng(4), V, target)
    arrays = {name: array[:-1] for name, array in grammar.encode((Text((5, 6)), span), V).items()}
    with pytest.raises(ValueError, match="position 2"):
        grammar.decode(arrays, V)
    assert cases.same(grammar.decode(arrays, V, unfinished="drop"), (Text((5, 6)),))


def test_a_size_tag_without_image_is_text():
    ids = V.size_tag(1, 2)
    assert cases.same(grammar.decode(grammar.encode((Text(ids),), V), V), (Text(ids),))


def test_losses_are_optional():
    arrays = grammar.encode((Text((5,)), Text((6,), True)), V)
    del arrays["text_weight"], arrays["code_weight"]
    assert cases.same(grammar.decode(arrays, V), (Text((5, 6)),))
