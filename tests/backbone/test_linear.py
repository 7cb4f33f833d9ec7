"""The flat product equals einsum for free leading and trailing dimensions, and casts both sides; turned weights and single rows in parts likewise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dina.backbone.linear import Turned, in_parts, product, turn, weight


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 0.1)])
@pytest.mark.parametrize("kept", [lambda w: w, turn], ids=["plain", "turned"])
def test_equals_einsum(dtype, tolerance, kept):
    random = np.random.default_rng(0)
    x, w = random.normal(size=(2, 3, 5)).astype(np.float32), random.normal(size=(5, 4, 6)).astype(np.float32)
    y = jax.jit(lambda x, w: product(x, w, dtype))(jnp.asarray(x), kept(jnp.asarray(w)))
    assert y.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(y, np.float32), np.einsum("bsd,dhk->bshk", x, w), atol=tolerance)


def test_a_turned_weight_stands_in_for_a_parameter():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return product(x, weight(self, "w", nn.initializers.normal(), (5, 2, 3)))

    x = jnp.ones((4, 5))
    variables = Layer().init(jax.random.key(0), x)
    turned = {"params": {"w": turn(variables["params"]["w"])}}
    assert isinstance(turned["params"]["w"], Turned) and turned["params"]["w"].w_ND.shape == (6, 5)
    np.testing.assert_allclose(Layer().apply(turned, x), Layer().apply(variables, x), rtol=1e-5)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_a_row_in_parts_equals_the_product(dtype, tolerance):
    random = np.random.default_rng(0)
    x, w = (jnp.asarray(random.normal(size=size), dtype) for size in ((1, 24), (24, 5)))
    y = jax.jit(in_parts)(x, w)
    assert y.dtype == jnp.dtype(dtype) and y.shape == (1, 5)
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(x, np.float32) @ np.asarray(w, np.float32), atol=tolerance)


def test_a_row_by_a_large_narrow_weight_goes_in_parts():
    x, w = jnp.ones((1, 1, 1024)), jnp.ones((1024, 2, 256))
    taken = str(jax.make_jaxpr(product)(x, w))
    assert ("dot_general" in taken) == (jax.default_backend() != "cpu")
    assert "dot_general" in str(jax.make_jaxpr(product)(jnp.ones((2, 1024)), w))
    np.testing.assert_allclose(product(x, w), np.full((1, 1, 2, 256), 1024.0))
