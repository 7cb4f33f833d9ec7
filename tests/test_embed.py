"""The joint table's rows that start from codebooks."""

import jax
import jax.numpy as jnp
import numpy as np

from dina import embed


def test_rows_know_the_geometry_of_the_codebooks():
    keys = jax.random.split(jax.random.key(0), 5)
    # The second level is ten times smaller, and all vectors share a large constant.
    books = [5 + jax.random.normal(keys[0], (64, 8)), 0.1 * jax.random.normal(keys[1], (32, 8))]
    counts = [jnp.ones(64), jnp.ones(32)]
    rows = embed.rows_from_codebooks(keys[2], books, counts, 128)
    assert rows.shape == (96, 128)
    codes = [jax.random.randint(keys[3], (400,), 0, 64), jax.random.randint(keys[4], (400,), 0, 32)]
    total = rows[codes[0]] + rows[64 + codes[1]]
    np.testing.assert_allclose(jnp.var(total), 1.0, atol=0.15)  # as an input cell should have
    # Cells that are near in code space are near in the table.
    feature = books[0][codes[0]] + books[1][codes[1]]
    far = lambda x: np.asarray(jnp.linalg.norm(x[:200] - x[200:], axis=-1))
    assert np.corrcoef(far(feature), far(total))[0, 1] > 0.7
    # The small level's rows stay apart all the same.
    assert float(jnp.linalg.norm(rows[64] - rows[65])) > 0.5 * (2 * 128 * 0.25) ** 0.5
