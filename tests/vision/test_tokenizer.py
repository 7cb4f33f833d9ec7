"""Tokenizer: packs do not mix, padding has no code, features follow codes; the released reference's numbers (case 05)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.quantize import rvq
from dina.vision import bridge, tokenizer
from tests.golden_io import read_case, relative_error
from tests.vision import packs


@pytest.fixture(scope="module")
def setup():
    vision = packs.tiny_config().vision
    params, stats = tokenizer.init_quantizer(vision, jax.random.key(0))
    encoder = bridge.init_encoder(vision, jax.random.key(1))
    variables = {"params": {"vision_encoder": encoder, tokenizer.PART: params}, "stats": {tokenizer.PART: stats}}
    return vision, variables, packs.batch(vision, [[(1, 2), (2, 2)], [(2, 1)]])


def test_an_image_has_the_same_codes_in_any_company(setup):
    vision, variables, batch = setup
    codes = tokenizer.tokenize(vision, variables, batch)
    assert codes.shape == (2, 6, 3)
    np.testing.assert_array_equal(codes < 0, np.repeat(batch["cell_segment"][..., None] == 0, 3, -1))
    changed = dict(batch, patches=batch["patches"].copy())
    changed["patches"][0, 8:24] += 1.0  # the second image of the first row
    again = tokenizer.tokenize(vision, variables, changed)
    np.testing.assert_array_equal(codes[0, :2], again[0, :2])
    assert (codes[0, 2:] != again[0, 2:]).any()


def test_features_are_sums_of_codes(setup):
    vision, variables, batch = setup
    codes = tokenizer.tokenize(vision, variables, batch)
    q, predicted = tokenizer.features(vision, variables, codes, 2)
    books = variables["stats"][tokenizer.PART]["codebook"]
    expected = np.asarray(books["0"])[codes[0, 0, 0]] + np.asarray(books["1"])[codes[0, 0, 1]]
    np.testing.assert_allclose(q[0, 0], expected, rtol=1e-6)
    assert predicted.shape == (2, 6, 12)
    assert (np.asarray(q)[batch["cell_segment"] == 0] == 0).all()


def test_matches_the_released_quantizer():
    case, weights, data = read_case("05_bridge_rvq")
    prefix = "visual_bridge_model.quantizer."
    dense = lambda i: {"kernel": weights[f"{prefix}quant_conv.{i}.weight"].T, "bias": weights[f"{prefix}quant_conv.{i}.bias"]}
    norm = {"scale": weights[f"{prefix}quant_conv.0.weight"], "bias": weights[f"{prefix}quant_conv.0.bias"]}
    params = {"norm": norm, "fc1": dense(1), "fc2": dense(3)}
    with jax.default_matmul_precision("highest"):
        x = tokenizer.QuantConv(case["codebook_dim"]).apply({"params": params}, jnp.asarray(data["features"]))
    assert relative_error(x, data["quant_conv_out"]) < 1e-4
    # the last row of each released table is padding and is not part of the book
    books = [jnp.asarray(weights[f"{prefix}quantize.codebooks.{i}.embed"][:-1]) for i in range(case["depth"])]
    cfg = rvq.RVQConfig(sizes=(case["codebook_size"],) * case["depth"], dim=case["codebook_dim"])
    stats = rvq.from_codebooks(books)
    assert data["argmin_margin"].min() > 1e-5
    out = rvq.quantize(cfg, stats, x, jnp.ones(len(x)))
    np.testing.assert_array_equal(out.codes_NL, data["codes"])
    assert relative_error(rvq.decode(cfg, stats, out.codes_NL), data["decoded_features"]) < 1e-5
    for level in range(8):
        partial = rvq.decode(cfg, stats, out.codes_NL, level + 1)
        assert relative_error(partial, data["quant_cumulative"][level]) < 1e-5
    assert relative_error(out.q_ND.T[None, :, None], data["quants_NdhL"]) < 1e-4
    assert relative_error(0.25 * out.commit[0] / out.commit[1], data["commit_loss"][0]) < 1e-4
