"""Usage and perplexity on hand-made windows."""

import jax.numpy as jnp
import numpy as np

from dina.quantize import rvq


def test_usage_and_perplexity_by_hand():
    codes = jnp.array([[0, 3], [1, 3], [0, 3], [1, 3], [7, -1], [2, 0]])
    mask = jnp.array([1, 1, 1, 1, 0, 0])
    out = rvq.usage(codes, mask, (8, 4))
    np.testing.assert_allclose(out["usage"], [2 / 8, 1 / 4])
    np.testing.assert_allclose(out["perplexity"], [2.0, 1.0], rtol=1e-6)


def test_counts_are_additive_over_a_window():
    codes = jnp.arange(12).reshape(6, 2) % 4
    ones = jnp.ones(6)
    parts = [rvq.code_counts(codes[i : i + 3], ones[:3], (4, 4)) for i in (0, 3)]
    total = tuple(a + b for a, b in zip(*parts))
    np.testing.assert_allclose(rvq.usage_from_counts(total)["perplexity"], rvq.usage(codes, ones, (4, 4))["perplexity"])
