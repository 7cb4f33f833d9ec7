"""Search in one book: first index on ties, tiles, the metric."""

import jax
import jax.numpy as jnp
import numpy as np

from dina.quantize import lookup


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


def test_cosine_is_the_smallest_angle_in_any_tile(monkeypatch):
    x, book = jax.random.normal(jax.random.key(0), (40, 4)), jax.random.normal(jax.random.key(1), (50, 4))
    book = book * jnp.arange(1, 51)[:, None]  # the longer a code, the later
    cosine = np.asarray(x @ book.T) / np.linalg.norm(book, axis=-1)
    code, distance = lookup.nearest(x, book, "cosine")
    np.testing.assert_array_equal(code, cosine.argmax(-1))
    np.testing.assert_allclose(distance, 2 - 2 * cosine.max(-1) / np.linalg.norm(x, axis=-1), atol=1e-5)
    assert (code != lookup.nearest(x, book)[0]).any()
    monkeypatch.setattr(lookup, "TILE", 16)
    np.testing.assert_array_equal(lookup.nearest(x, book, "cosine")[0], code)
    assert np.isfinite(lookup.nearest(x * 0, book * 0, "cosine")[1]).all()
