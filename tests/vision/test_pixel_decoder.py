"""Pixel decoder: images of a pack do not see each other, position orders, the released reference's numbers (07a)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.vision import pixel_decoder, preprocess
from tests.golden_io import read_case, relative_error
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


def released_params(weights, depth):
    """Parameters of `PixelDecoder` from the released names."""
    root = "image_decoder."
    norm = lambda name: {"scale": weights[f"{root}{name}.weight"]}

    def dense(name):
        bias = weights.get(f"{root}{name}.bias")
        return {"kernel": weights[f"{root}{name}.weight"].T} | ({} if bias is None else {"bias": bias})

    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj"}
    names |= {name: f"mlp.{name}" for name in ("w1", "w2", "w3")}
    norms = {"norm1": "layer_norm1", "norm2": "layer_norm2", "norm_attn": "self_attn.inner_attn_ln", "norm_ff": "mlp.ffn_ln"}
    layers = []
    for i in range(depth):
        at = f"encoder.layers.{i}."
        layers.append({a: dense(at + b) for a, b in names.items()} | {a: norm(at + b) for a, b in norms.items()})
    return {
        "post_quant": dense("post_quant_conv"), "post_quant_norm": norm("post_quant_norm"),
        "unmerge_norm": norm("patch_unmerger.ln_q"), "unmerge1": dense("patch_unmerger.mlp.0"),
        "unmerge2": dense("patch_unmerger.mlp.2"), "norm_in": norm("norm_in"), "norm_out": norm("norm_out"),
        "head1": dense("decoder_head.0"), "head2": dense("decoder_head.2"),
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers),
    }


@pytest.mark.parametrize("scale", ["single", "double"])
def test_matches_the_released_decoder(scale):
    case, weights, data = read_case("07a_pixel_decoder")
    _, h, w = case["grids"][0]
    module = pixel_decoder.PixelDecoder(
        case["hidden_size"], case["num_hidden_layers"], case["num_attention_heads"], case["intermediate_size"], 1176,
        case["layer_norm_eps"], positions="raster", attn_scale=scale,
    )
    layout = preprocess.pack_layout([(h // 2, w // 2)], h * w // 4, 1, 4)
    pack = {name: value[None] for name, value in layout.items()}
    with jax.default_matmul_precision("highest"):
        params = released_params(weights, case["num_hidden_layers"])
        patches = module.apply({"params": params}, data["quant_features"][None], pack)[0]
    if scale == "single":
        assert relative_error(patches[:8], data["cpu_pixel_features_first8"]) < 1e-4
    x = np.asarray(patches).reshape(h // 2, w // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    x = x.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, h * 14, w * 14)
    golden = {"single": "image0_pixels_single_scale", "double": "gpu_image0_double_scale"}[scale]
    assert relative_error(x, data[golden]) < 1e-4
