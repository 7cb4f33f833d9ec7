"""N-gram embedding: 64-bit integers as the truth of the hash, packs and decoding. Golden case: tests/tools/test_parity.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from dina.backbone import ngram
from dina.backbone.config import NgramConfig
from tests.golden_io import GOLDEN
from tools.parity import ngram as parity
from tools.parity.case import Case


def golden(variant):
    tables = parity.Tables(Case(GOLDEN / "02_ngram_embedding"), variant)
    module, params, word = ngram.NgramEmbedding(tables.cfg, tables.vocab, tables.specials), tables.params, tables.word
    data = {"input_ids": Case(GOLDEN / "02_ngram_embedding").input("input_ids")}

    def embed(ids, segment=None, history=None):
        segment = np.ones_like(ids) if segment is None else segment
        return module.apply(params, jnp.asarray(ids), jnp.asarray(segment), word[jnp.maximum(ids, 0)], history)

    return module, embed, data


def hf_by_hand(ids, cfg, vocab, specials):
    """backbone.md §2 in 64-bit Python integers, one position at a time."""
    clean = [0 if i in specials else int(i) for i in ids]
    table = []
    for t, current in enumerate(clean):
        context = [current]
        for d in range(1, cfg.order):
            inside = current != 0 and d <= t and all(clean[t - e] not in (0, cfg.eos) for e in range(1, d + 1))
            context.append(clean[t - d] if inside else 0)
        table.append([sum(c * pow(vocab, d) for d, c in enumerate(context[: 2 + i // cfg.splits])) % size
                      for i, size in enumerate(ngram.table_sizes(cfg, vocab))])  # fmt: skip
    return np.array(table)


@pytest.mark.parametrize("vocab,ratio", [(131072, 78), (83, 3.5), (512, 5)])
def test_hash_is_exact_at_released_size(vocab, ratio):
    cfg = NgramConfig(order=4, splits=4, ratio=ratio)
    specials = tuple(range(vocab, vocab + 53))
    random = np.random.default_rng(0)
    ids = random.integers(0, vocab + 53, 400)
    ids[random.random(400) < 0.05] = 2
    ids[::37] = vocab - 1
    row, live, divided = ngram.rows(cfg, vocab, specials, jnp.asarray(ids[None], jnp.int32), jnp.ones((1, 400), jnp.int32))
    expected = hf_by_hand(ids, cfg, vocab, specials)
    np.testing.assert_array_equal(np.asarray(row[0]), expected)
    np.testing.assert_array_equal(np.asarray(live[0]), expected > 0)
    np.testing.assert_array_equal(np.asarray(divided[0]), ids < vocab)


@pytest.mark.parametrize("variant", ["hf", "oe", "serving"])
def test_decoding_one_id_at_a_time_equals_the_whole(variant):
    module, embed, data = golden(variant)
    ids = data["input_ids"].astype(np.int32)
    history, parts = ngram.init_history(module.cfg, len(ids)), []
    for step in range(ids.shape[1]):
        now = ids[:, step : step + 1]
        parts.append(embed(now, None, history))
        history = ngram.next_history(history, now, np.ones_like(now))
    np.testing.assert_allclose(np.concatenate(parts, 1), embed(ids), atol=1e-6)


@pytest.mark.parametrize("variant", ["hf", "oe", "serving"])
def test_documents_of_a_pack_do_not_see_each_other(variant):
    _, embed, data = golden(variant)
    a, b = data["input_ids"][:2].astype(np.int32)
    packed = np.concatenate([a, b])[None]
    segment = np.repeat([1, 2], len(a))[None].astype(np.int32)
    alone = np.concatenate([embed(a[None])[0], embed(b[None])[0]])
    np.testing.assert_allclose(embed(packed, segment)[0], alone, atol=1e-6)
    assert np.abs(np.asarray(embed(packed)[0]) - alone).max() > 1e-3


def test_absent_text_is_zero_and_cuts_history():
    _, embed, _ = golden("hf")
    out = np.asarray(embed(np.array([[5, 6, -1, 7]], np.int32)))
    assert np.all(out[0, 2] == 0)
    np.testing.assert_allclose(out[0, 3], np.asarray(embed(np.array([[7]], np.int32)))[0, 0], atol=1e-6)


@pytest.mark.parametrize("variant", ["hf", "oe", "serving"])
@pytest.mark.parametrize("pads", [1, 4])
def test_history_reaches_over_left_padding(variant, pads):
    module, embed, data = golden(variant)
    ids = data["input_ids"].astype(np.int32)
    first, rest = ids[:, :8], ids[:, 8:]
    history = ngram.next_history(ngram.init_history(module.cfg, len(ids)), first, np.ones_like(first))
    padded = np.pad(rest, ((0, 0), (pads, 0)), constant_values=-1)
    segment = (np.arange(padded.shape[1]) >= pads) * np.ones_like(padded)
    np.testing.assert_allclose(embed(padded, segment, history)[:, pads:], embed(ids)[:, 8:], atol=1e-6)
    after = ngram.next_history(history, padded[:, : pads + 1], segment[:, : pads + 1])
    np.testing.assert_array_equal(after, ids[:, 9 - module.cfg.order + 1 : 9])
    np.testing.assert_array_equal(ngram.next_history(history, padded[:, :pads], segment[:, :pads]), history)
