import numpy as np
import pytest

from dina import grammar
from dina.config import InputError

from tests.grammar import cases


def test_released_numbers():
    v = grammar.released()
    assert len(v.specials) == 53 and v.classes == 131125
    assert v.audio_base == (131125, 139317, 143413, 145461, 146485, 147509, 148533, 149557)
    assert v.visual_base == (150581, 166965, 183349, 199733, 216117, 232501, 248885, 265269)
    assert v.rows == 281653 and v.padded_rows == 282624
    named = {
        "<img_token_size>": 131090, "</img_token_size>": 131091, "<audio_start>": 131103, "<audio_pad>": 131105,
        "<img_start>": 131106, "<img_end>": 131107, "<img_pad>": 131108, "<img_newline>": 131109,
        "<audio_delim>": 131116, "<audiotext_start>": 131120, "<audiotext_pad>": 131122, "<audiogen_start>": 131123,
        "<audiogen_end>": 131124,
    }
    assert {name: v.id(name) for name in named} == named
    assert (v.img_pad, v.audiogen_end, v.eos) == (131108, 131124, 2)


def test_levels_do_not_overlap_and_padding_is_a_multiple():
    v = cases.vocabulary()
    spans = [(v.classes - 1, v.classes)]
    spans += [(b, b + n) for b, n in zip(v.audio_base + v.visual_base, v.audio + v.visual, strict=True)]
    assert all(left[1] == right[0] for left, right in zip(spans, spans[1:]))
    assert spans[-1][1] == v.rows <= v.padded_rows and v.padded_rows % 128 == 0 and v.padded_classes % 128 == 0
    assert v.levels == 4


def test_unknown_special_is_named_with_the_known_ones():
    with pytest.raises(InputError, match=r"'<img_begin>'.*<img_start>"):
        cases.vocabulary().id("<img_begin>")


def test_a_vocabulary_without_a_needed_special_is_refused():
    with pytest.raises(InputError, match="missing.*<img_pad>"):
        grammar.Vocabulary(80, tuple(name for name in grammar.SPECIALS if name != "<img_pad>"))


def test_size_tag():
    v = cases.vocabulary()
    assert v.size_tag(2, 3) == (v.size_open, 62, 70, 63, v.size_close)
    with pytest.raises(InputError, match="5 x 5 cells"):
        v.size_tag(5, 5)
    with pytest.raises(InputError, match="ids of its own"):
        grammar.Vocabulary(80).with_sizes(lambda text: [1], [(1, 1), (1, 2)])


def test_image_layout_has_newlines_between_rows_only():
    v = cases.vocabulary()
    ids, cells = v.image_layout(2, 3)
    p, n = v.img_pad, v.img_newline
    assert ids[5:].tolist() == [v.img_start, p, p, p, n, p, p, p, v.img_end]
    assert (ids[cells] == p).all() and np.diff(cells).tolist() == [1, 1, 2, 1, 1]
