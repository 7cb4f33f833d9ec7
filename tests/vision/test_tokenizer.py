"""Tokenizer: packs do not mix, padding has no code, features follow codes (the reference's numbers: tools/parity, case 05)."""

import jax
import numpy as np
import pytest

from dina.vision import bridge, tokenizer
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
