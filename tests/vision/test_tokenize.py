"""Images of any sizes to codes: each its own, whatever lies beside it and however large the row."""

import jax
import numpy as np
import pytest

from dina.vision import bridge, preprocess, tokenize, tokenizer
from tests.vision import packs

GRIDS = [(1, 2), (2, 2), (1, 1), (2, 3)]


@pytest.fixture(scope="module")
def setup():
    vision = packs.tiny_config().vision
    params, stats = tokenizer.init_quantizer(vision, jax.random.key(0))
    variables = {"params": {"vision_encoder": bridge.init_encoder(vision, jax.random.key(1)), tokenizer.PART: params},
                 "stats": {tokenizer.PART: stats}}
    rng = np.random.default_rng(0)
    return vision, variables, [rng.integers(0, 256, (28 * h, 28 * w, 3), np.uint8) for h, w in GRIDS]


def test_codes_of_an_image_do_not_depend_on_its_company(setup):
    vision, variables, images = setup
    together = tokenize.tokenize_images(vision, variables, images, rows=2)
    assert [code.shape for code in together] == [(h * w, 3) for h, w in GRIDS]
    assert all(code.min() >= 0 and code.max() < 8 for code in together)
    for image, code in zip(images, together, strict=True):
        np.testing.assert_array_equal(tokenize.tokenize_images(vision, variables, [image], rows=2)[0], code)
    assert tokenize.tokenize_images(vision, variables, []) == []


def test_an_image_larger_than_a_row_is_not_cut_and_makes_fewer_rows(setup, monkeypatch):
    vision, variables, images = setup
    shapes, run = [], tokenizer.tokenize
    monkeypatch.setattr(tokenizer, "tokenize", lambda config, of, batch: shapes.append(batch["patches"].shape[:2]) or run(config, of, batch))
    large = np.concatenate([images[3]] * 2)  # 4 x 3 cells, a row has 6
    codes = tokenize.tokenize_images(vision, variables, [images[0], large], rows=2)
    wide = vision.copy_and_resolve_references()
    wide.pack.cells = 12
    np.testing.assert_array_equal(codes[1], tokenize.tokenize_images(wide, variables, [large], rows=2)[0])
    np.testing.assert_array_equal(codes[0], tokenize.tokenize_images(vision, variables, images[:1], rows=2)[0])
    assert shapes == [(1, 4 * 16), (1, 4 * 12), (1, 4 * 6)]


def test_pairs_of_frames_are_images_of_their_own_and_both_frames_count(setup):
    vision, variables, images = setup
    rng = np.random.default_rng(1)
    video = [rng.integers(0, 256, images[1].shape, np.uint8) for _ in range(3)]
    run = lambda images: tokenize.tokenize_images(vision, variables, images, rows=2)
    first, last = preprocess.frame_pairs(video)
    pairs = run([first, last, first[::-1], np.stack([first[0], last[0]])])
    assert [code.shape for code in pairs] == [(4, 3)] * 4
    for other in pairs[2:]:  # the order of the frames, and the second frame, change the codes
        assert (pairs[0] != other).any()
    alone, still = run([first]), run([last[0]])
    np.testing.assert_array_equal(pairs[0], alone[0])
    np.testing.assert_array_equal(pairs[1], still[0])
