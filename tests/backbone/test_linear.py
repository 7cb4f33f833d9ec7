"""The flat product equals einsum for free leading and trailing dimensions, and casts both sides."""

import jax.numpy as jnp
import numpy as np
import pytest

from dina.backbone.linear import product


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_equals_einsum(dtype, tolerance):
    random = np.random.default_rng(0)
    x, w = random.normal(size=(2, 3, 5)).astype(np.float32), random.normal(size=(5, 4, 6)).astype(np.float32)
    y = product(jnp.asarray(x), jnp.asarray(w), dtype)
    assert y.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(y, np.float32), np.einsum("bsd,dhk->bshk", x, w), atol=tolerance)
