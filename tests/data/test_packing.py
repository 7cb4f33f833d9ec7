import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dina import grammar
from dina.config import InputError
from dina.data import documents, packing

from tests.data import mixture


def packed(rows=4, made=None, **budget):
    options = packing.default_pack()
    options.update({"window": 64} | budget)
    made = made or mixture.documents(documents.default_options())
    return packing.PackedDocuments(made, made.v, options, rows, (0, 1))


def pieces(batch):
    """(row, segment number) -> arrays of that document."""
    out = {}
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segment"][row].max() + 1):
            at = np.flatnonzero(batch["segment"][row] == number)
            assert (np.diff(at) == 1).all()
            out[row, number] = {name: batch[name][row, at] for name in grammar.spans.DTYPES}
    return out


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_packs_keep_every_budget_and_every_document(seed):
    rng = np.random.default_rng(seed)
    costs, budget = rng.integers(0, 12, (40, 4)), rng.integers(6, 30, 4)
    rows, misfits = packing.pack(costs, budget)
    placed = sorted(d for row in rows for d in row)
    assert sorted(placed + misfits) == list(range(40)) and all(rows)
    assert all((costs[row].sum(0) <= budget).all() for row in rows)
    assert misfits == [d for d in range(40) if (costs[d] > budget).any()]


def test_documents_that_need_different_budgets_share_rows():
    pictures, texts = np.tile([4, 4, 0, 0], (16, 1)), np.tile([4, 0, 0, 0], (16, 1))
    rows, _ = packing.pack(np.concatenate([pictures, texts]), (8, 4, 9, 9))
    assert len(rows) == 16 and all(sorted(d // 16 for d in row) == [0, 1] for row in rows)
    assert packing.pack(np.zeros((3, 4), int), (1, 1, 1, 1))[0] == [[0, 1, 2]] and packing.pack(np.full((2, 4), 9), (1, 1, 1, 1)) == ([], [0, 1])


def test_every_document_once_and_unchanged_by_packing():
    p, step = packed(), -1
    seen = collections.Counter()
    while len(p._ends) < 4:  # until a row of the third window is read
        step += 1
        batch = p.batch(step)
        parts = pieces(batch)
        for row in range(p.rows):
            for place, (number, sample) in enumerate(p.samples(step * p.rows + row)):
                seen[number] += 1
                alone = grammar.encode(sample.document, p.vocabulary)
                got = parts[row, place + 1]
                assert all(got[name].tolist() == alone[name].tolist() for name in alone)
                kind = batch["kind"][row][batch["segment"][row] == place + 1]
                assert (kind == sample.kind).all()
    whole = [n for n in seen if n < 128]  # the first two windows are through
    assert sorted(whole) == list(range(128)) and set(seen.values()) == {1}


def test_a_batch_is_a_function_of_its_step():
    a, b = packed(), packed()
    for step in (9, 2):
        one = a.batch(step)
        assert one["example"].tolist() == list(range(step * 4, step * 4 + 4)) and one["example"].dtype == np.int32
    for step in (2, 9):
        two = b.batch(step)
    assert set(one) == set(two)
    for name, array in a.batch(9).items():
        assert (array == two[name]).all(), name


def test_shapes_do_not_depend_on_the_batch():
    p = packed()
    shapes = [{name: (a.shape, a.dtype) for name, a in p.batch(step).items()} for step in range(3)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0]["codes"] == ((4, 256, 4), np.dtype(np.int32)) and shapes[0]["visual_index"][0] == (4, 24)


def test_index_buffers_point_at_the_hidden_states_that_predict_codes():
    p = packed()
    for step in range(4):
        b = p.batch(step)
        for row in range(4):
            image = b["tokens"][row] == p.vocabulary.img_pad
            learnt = b["code_weight"][row] > 0
            for name, mask in (("visual_index", learnt & image), ("audio_index", learnt & ~image)):
                index = b[name][row]
                used = index[index >= 0]
                assert (used + 1).tolist() == np.flatnonzero(mask).tolist()
                assert (b["segment"][row][used] == b["segment"][row][used + 1]).all()
            cells = b["cell_index"][row]
            assert cells[cells >= 0].tolist() == np.flatnonzero(image).tolist()


def test_padding_is_inert():
    b = packed().batch(0)
    unused = b["segment"] == 0
    assert unused.any()
    assert not b["text_weight"][unused].any() and not b["code_weight"][unused].any()
    assert (b["codes"][unused] == -1).all() and (b["transcript"][unused] == -1).all() and (b["kind"][unused] == -1).all()


def test_a_document_over_budget_is_counted():
    p = packed(visual=8, cells=12)
    for step in range(6):
        p.batch(step)
    windows = len(p._ends) - 1
    left_out = sum(p.errors.values())
    placed = sum(len(p.samples(row)) for row in range(p._ends[-1]))
    assert left_out > 0 and placed + left_out == windows * 64
    assert set(p.errors) <= set(documents.KINDS) and "plain_text" not in p.errors


def test_rows_are_nearly_full():
    """In the budget that binds: here pictures of all canvases alike, larger on average than the default's."""
    p = packed(rows=8, window=256)
    used = lambda b: [(b["segment"] > 0).mean()] + [(b[f"{n}_index"] >= 0).mean() for n in ("visual", "audio", "cell")]
    assert max(np.mean([used(p.batch(step)) for step in range(4)], axis=0)) > 0.95


def test_impossible_budgets_are_refused():
    with pytest.raises(InputError, match="none of 64 documents fits"):
        packed(positions=3).batch(0)
    with pytest.raises(InputError, match="options.pack.audio is 0"):
        packed(audio=0)
