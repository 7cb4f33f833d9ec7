"""Rotary pairs: norm kept, relative, and equal to complex multiplication of adjacent values."""

import jax.numpy as jnp
import numpy as np

from dina.backbone import rope


def test_equals_complex_rotation_of_adjacent_pairs():
    x = np.random.default_rng(0).normal(size=(1, 7, 8)).astype(np.float32)
    position = jnp.arange(7)[None] * 3
    turned = np.asarray(rope.rotate(jnp.asarray(x), *rope.table(position, 8, 1e4)))
    angle = np.asarray(position)[..., None] * 1e4 ** (-np.arange(4) / 4)
    expected = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    np.testing.assert_allclose(turned[..., ::2], expected.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 1::2], expected.imag, atol=1e-5)
