"""The norm's definition, its epsilon, and that half precision is normalised in float32."""

import jax
import jax.numpy as jnp
import numpy as np

from dina.backbone.norm import RMSNorm


def test_definition_and_epsilon():
    x = jnp.asarray([[3.0, -4.0], [0.0, 1e-4]])
    y = RMSNorm(1e-6).apply({"params": {"scale": jnp.array([2.0, 1.0])}}, x)
    expected = np.asarray(x) / np.sqrt(np.mean(np.asarray(x, np.float64) ** 2, 1, keepdims=True) + 1e-6) * [2, 1]
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_half_precision_keeps_its_type():
    x = jnp.full((1, 4), 300.0, jnp.bfloat16)  # the mean of its squares is no bfloat16 number
    y, _ = RMSNorm().init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16 and np.allclose(np.asarray(y, np.float32), 1.0)
