"""Lookup: exact ids, first index on ties, tiles, absent levels, the released reference's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.quantize import lookup, rvq


def _random(n=50, d=6, sizes=(16, 8, 8), codebook="separate", seed=0):
    cfg = rvq.RVQConfig(sizes=sizes, dim=d, codebook=codebook)
    return cfg, rvq.init_stats(cfg, jax.random.key(seed)), jax.random.normal(jax.random.key(seed + 1), (n, d))


def test_encode_is_the_sequential_nearest_neighbour():
    cfg, stats, x = _random()
    residual, expected = np.asarray(x, np.float64), []
    for book in stats["codebook"].values():
        code = ((residual[:, None] - np.asarray(book, np.float64)) ** 2).sum(-1).argmin(-1)
        expected.append(code)
        residual = residual - np.asarray(book)[code]
    codes = rvq.encode(cfg, stats, x)
    np.testing.assert_array_equal(codes, np.stack(expected, -1))
    np.testing.assert_allclose(rvq.decode(cfg, stats, codes), np.asarray(x) - residual, atol=1e-5)


def test_tiles_and_ties_give_the_first_index(monkeypatch):
    x, book = jax.random.normal(jax.random.key(0), (40, 4)), jax.random.normal(jax.random.key(1), (50, 4))
    book = book.at[37].set(book[3]).at[20].set(book[3])  # equal codes in three tiles
    x = x.at[0].set(book[3])
    whole = lookup.nearest(x, book)
    monkeypatch.setattr(lookup, "TILE", 16)  # 50 is no multiple: the last tile has padding
    tiled = lookup.nearest(x, book)
    np.testing.assert_array_equal(whole[0], tiled[0])
    np.testing.assert_allclose(whole[1], tiled[1], atol=1e-5)
    assert tiled[0][0] == 3
    assert len(set(np.asarray(tiled[0]) // 16)) >= 3


def test_search_never_holds_all_scores():
    n, k = 8, 4 * lookup.TILE
    text = str(jax.make_jaxpr(lookup.nearest)(jnp.zeros((n, 4)), jnp.zeros((k, 4))))
    assert f"f32[{n},{lookup.TILE}]" in text and f"f32[{n},{k}]" not in text


def test_decode_skips_absent_levels_and_cuts_at_depth():
    cfg, stats, x = _random()
    codes = rvq.encode(cfg, stats, x)
    np.testing.assert_array_equal(rvq.decode(cfg, stats, codes.at[:, 1:].set(-1)), rvq.decode(cfg, stats, codes, 1))
    depth = jnp.arange(x.shape[0]) % 4
    each = rvq.decode(cfg, stats, codes, depth)
    for level in range(4):
        np.testing.assert_array_equal(each[depth == level], rvq.decode(cfg, stats, codes, level)[depth == level])


def test_shared_book_is_one_array_and_needs_equal_sizes():
    cfg, stats, x = _random(sizes=(16, 16), codebook="shared")
    assert [book.shape for book in stats["codebook"].values()] == [(16, 6)]
    separate = rvq.RVQConfig(sizes=(16, 16), dim=6)
    twice = rvq.from_codebooks([stats["codebook"]["0"]] * 2)
    np.testing.assert_array_equal(rvq.encode(cfg, stats, x), rvq.encode(separate, twice, x))
    with pytest.raises(ValueError, match="equal sizes"):
        rvq.RVQConfig(sizes=(16, 8), dim=6, codebook="shared")
    with pytest.raises(ValueError, match="separate, shared"):
        rvq.RVQConfig(sizes=(16,), dim=6, codebook="both")
