"""Codes of all levels: the sequential search, absent levels, shared books, codes of fewer dimensions."""

import jax
import jax.numpy as jnp
import numpy as np

from dina.quantize import rvq


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


def test_projected_codes_are_searched_in_their_own_space():
    cfg = rvq.RVQConfig(sizes=(16, 8), dim=6, factor_dim=2, commitment="residual")
    stats, x = rvq.init_stats(cfg, jax.random.key(0)), jax.random.normal(jax.random.key(1), (50, 6))
    residual, expected = np.asarray(x), []
    for book, into, out in zip(*(stats[name].values() for name in ("codebook", "in", "out")), strict=True):
        code = ((residual @ into)[:, None] - book).__pow__(2).sum(-1).argmin(-1)
        expected.append(code)
        residual = residual - np.asarray(book)[code] @ out
    codes = rvq.encode(cfg, stats, x)
    np.testing.assert_array_equal(codes, np.stack(expected, -1))
    np.testing.assert_allclose(rvq.decode(cfg, stats, codes), np.asarray(x) - residual, atol=1e-5)
