"""Pixel decoder: images of a pack do not see each other, position orders (the reference's numbers: tools/parity, case 07a)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.vision import pixel_decoder
from tests.vision import packs


def test_images_of_a_pack_do_not_see_each_other():
    vision = packs.tiny_config().vision
    params = pixel_decoder.init_pixel_decoder(vision, jax.random.key(0))
    module = pixel_decoder.make_pixel_decoder(vision)
    grids = [(1, 2), (2, 2)]
    batch = packs.batch(vision, [grids, grids[::-1]])
    q = np.random.default_rng(0).normal(size=(2, 6, 6)).astype(np.float32)
    q[1] = np.concatenate([q[0, 2:], q[0, :2]])  # the same two images in the other order
    out = module.apply({"params": params}, q, batch)
    first, second = packs.patch_slices(vision, grids)
    np.testing.assert_allclose(out[0, first], out[1, 16:], atol=1e-5)
    np.testing.assert_allclose(out[0, second], out[1, :16], atol=1e-5)
    assert float(jnp.abs(out[0, second] - out[1, 8:]).max()) > 1e-3


def test_raster_positions_count_patches_of_each_image():
    vision = packs.tiny_config().vision
    batch = packs.batch(vision, [[(1, 2), (2, 1)]])
    row, col = pixel_decoder.positions(batch, "raster")
    np.testing.assert_array_equal(row[0, :8], np.arange(8) // 4)
    np.testing.assert_array_equal(col[0, :8], np.arange(8) % 4)
    np.testing.assert_array_equal(row[0, 8:16], np.arange(8) // 2)
    np.testing.assert_array_equal(pixel_decoder.positions(batch, "block")[0], batch["row"])
    with pytest.raises(ValueError, match="block or raster"):
        pixel_decoder.positions(batch, "snake")


def test_a_plain_block_equals_one_in_numpy():
    """GELU feed-forward, no sub-layer norms, biases on all three: the golden case has the other form."""
    w, heads, p = 16, 2, 6
    block = pixel_decoder.Block(heads, 12, 1e-6, 0.3, norms="pre", ffn="gelu", qkv_bias="qkv")
    x, row = jax.random.normal(jax.random.key(0), (1, p, w)), jnp.arange(p)[None] % 3
    cos, sin = pixel_decoder.rotary_tables(row, row + 1, w // heads)
    ids = (jnp.arange(p)[None] // 3,)
    params = jax.tree.map(lambda a: a + 0.1, block.init(jax.random.key(1), x, ids, (cos, sin))["params"])
    assert {"w2", "norm_attn", "norm_ff"}.isdisjoint(params) and "bias" in params["k"]
    dense = lambda y, name: y @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"])
    norm = lambda y, name: y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(params[name]["scale"])
    own = np.asarray(x[0], np.float64)
    q, k, v = (dense(norm(own, "norm1"), name).reshape(p, heads, -1) for name in "qkv")
    turn = np.asarray(cos[0, :, :, ::2]) + 1j * np.asarray(sin[0, :, :, ::2])
    q, k = ((y[..., ::2] + 1j * y[..., 1::2]) * turn for y in (q, k))
    scores = np.where(ids[0].T == ids[0], 0.3 * np.einsum("phk,qhk->hpq", q, k.conj()).real, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    own = own + dense(np.einsum("hpq,qhk->phk", weights, v).reshape(p, w), "out")
    hidden = dense(norm(own, "norm2"), "w1")
    gelu = np.vectorize(lambda y: y * (1 + math.erf(y / 2**0.5)) / 2)
    out, _ = block.apply({"params": params}, x, ids, (cos, sin))
    np.testing.assert_allclose(out[0], own + dense(gelu(hidden), "w3"), atol=1e-5)


def test_unknown_blocks_are_refused():
    vision = packs.tiny_config().vision
    batch = packs.batch(vision, [[(1, 1)]])
    for options in ({"norms": "post"}, {"ffn": "relu"}):
        module = pixel_decoder.make_pixel_decoder(vision).clone(**options)
        with pytest.raises(ValueError, match="is sub or pre"):
            jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 6, 6)), batch)
