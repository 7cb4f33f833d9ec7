"""The attention kernel, interpreted, against attention in blocks; and who gets it."""

import jax
import jax.numpy as jnp
import numpy as np

from dina.backbone import splash
from dina.backbone.attention import attend

LENGTH, BLOCK = 256, 128


def _inputs():
    random = np.random.default_rng(0)
    draw = lambda size: jnp.asarray(random.normal(size=(2, LENGTH, 2, size)), jnp.float32)
    segment = np.repeat([[1] * 100 + [2] * 120 + [0] * 36, [3] * 256], 1, 0)
    return draw(192) * 192**-0.5, draw(192), draw(128), jnp.asarray(segment, jnp.int32)


def test_the_kernel_is_attention_in_blocks_and_so_is_its_gradient():
    *heads, segment = _inputs()
    blocks = lambda q, k, v: attend(q, k, v, segment, segment, 0, BLOCK)
    kernel = lambda q, k, v: splash.kernel(BLOCK, q, k, v, segment, interpret=True)
    seen = (segment > 0)[:, :, None, None]

    def run(fn):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.where(seen, jnp.sin(3 * fn(*x)), 0)), (0, 1, 2)))(*heads)

    (value, grads), (want, wanted) = run(kernel), run(blocks)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    for found, expected in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_other_platforms_and_shapes_run_what_the_caller_gives():
    *heads, segment = _inputs()
    marked = lambda q, k, v, s: jnp.full(v.shape, 7.0)
    assert np.all(splash.attend(marked, *heads, segment, BLOCK) == 7)  # tests run on a CPU
    assert splash.takes(8192, (192, 128), 1024)
    refused = [(8192, (192, 128), 0), (8200, (192, 128), 1024), (8192, (48, 32), 1024), (8192, (192, 128), 100)]
    assert not any(splash.takes(*each) for each in refused)
