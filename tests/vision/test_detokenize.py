"""Detokenizer: any grids, independence of company, levels, clear errors."""

import jax
import numpy as np
import pytest

from dina.vision import detokenize, pixel_decoder, refiner, tokenizer
from tests.vision import packs


@pytest.fixture(scope="module")
def setup():
    vision = packs.tiny_config().vision
    vision.refiner.sampler.steps = 2
    params, stats = tokenizer.init_quantizer(vision, jax.random.key(0))
    variables = {
        "params": {
            tokenizer.PART: params,
            pixel_decoder.PART: pixel_decoder.init_pixel_decoder(vision, jax.random.key(1)),
            refiner.PART: refiner.init_refiner(vision, jax.random.key(2)),
        },
        "stats": {tokenizer.PART: stats},
    }
    rng = np.random.default_rng(0)
    grids = [(1, 2), (2, 2), (1, 1), (2, 3)]
    return vision, variables, [rng.integers(0, 8, (h * w, 3)) for h, w in grids], grids


def test_every_image_has_its_size_and_ignores_its_company(setup, monkeypatch):
    vision, variables, codes, grids = setup
    shapes, decode = [], detokenize._decode
    monkeypatch.setattr(detokenize, "_decode", lambda config, of, batch, *more: shapes.append(batch["codes"].shape[:2]) or decode(config, of, batch, *more))
    images = detokenize.detokenize(vision, variables, codes, grids, rows=2)
    assert [image.shape for image in images] == [(28 * h, 28 * w, 3) for h, w in grids]
    assert all(image.dtype == np.uint8 for image in images)
    other = [codes[0], (codes[1] + 1) % 8, *codes[2:]]
    again = detokenize.detokenize(vision, variables, other, grids, rows=2)
    assert np.abs(images[0].astype(int) - again[0]).max() <= 1
    assert np.abs(images[1].astype(int) - again[1]).max() > 1
    larger = detokenize.detokenize(vision, variables, [np.zeros((8, 3), int)], [(2, 4)], rows=2)  # more than a pack
    assert larger[0].shape == (56, 112, 3)
    assert shapes == [(2, 6)] * 4 + [(1, 8)]


def test_levels_and_seed_matter(setup):
    vision, variables, codes, grids = setup
    plain = detokenize.detokenize(vision, variables, codes, grids, refine="none", rows=2)
    coarse = detokenize.detokenize(vision, variables, codes, grids, refine="none", levels=1, rows=2)
    absent = [np.where(np.arange(3) < 1, c, -1) for c in codes]
    np.testing.assert_array_equal(coarse[3], detokenize.detokenize(vision, variables, absent, grids, refine="none", rows=2)[3])
    assert (plain[3] != coarse[3]).any()
    a, b = (detokenize.detokenize(vision, variables, codes, grids, seed=s, rows=2)[0] for s in (0, 1))
    assert (a != b).any()


def test_both_frames_of_a_pair_come_back(setup):
    vision, variables, codes, grids = setup
    stills = detokenize.detokenize(vision, variables, codes, grids, refine="none", rows=2)
    pairs = detokenize.detokenize(vision, variables, codes, grids, refine="none", rows=2, frames=2)
    assert [pair.shape for pair in pairs] == [(2, *still.shape) for still in stills]
    for still, pair in zip(stills, pairs, strict=True):
        np.testing.assert_array_equal(pair[0], still)
        assert (pair[1] != still).any()  # what the decoder says of the second frame is its own
    for frames, refine in ((2, "flow"), (3, "none"), (0, "none")):
        with pytest.raises(ValueError, match=f"frames={frames}"):
            detokenize.detokenize(vision, variables, codes, grids, refine=refine, frames=frames)


def test_first_fit_places_each_image_once_within_the_budgets():
    areas = [1, 4, 6, 2, 2, 1, 1, 1]
    rows = detokenize.first_fit(areas, 6, 3)
    assert sorted(n for row in rows for n in row) == list(range(8))
    assert all(sum(areas[n] for n in row) <= 6 and len(row) <= 3 for row in rows)


def test_a_call_has_no_more_rows_than_planned_and_no_more_cells_than_configured(setup):
    vision, *_ = setup  # 6 cells a row
    rows = lambda cells, planned, most: detokenize.row_count(vision, cells, planned, most)
    assert [rows(6, planned, 16) for planned in (1, 2, 3, 9, 99)] == [1, 2, 4, 16, 16]
    assert [rows(6, planned, 12) for planned in (1, 9, 99)] == [1, 12, 12]
    assert [rows(cells, 99, 16) for cells in (8, 16, 64, 128, 4096)] == [12, 6, 1, 1, 1]


def test_errors(setup):
    vision, variables, codes, grids = setup
    with pytest.raises(ValueError, match="image 0: 2 cells of codes for a grid of 2x2"):
        detokenize.detokenize(vision, variables, codes[:1], [(2, 2)])
    with pytest.raises(ValueError, match="flow or none"):
        detokenize.detokenize(vision, variables, codes, grids, refine="gan")
    assert detokenize.detokenize(vision, variables, [], []) == []
