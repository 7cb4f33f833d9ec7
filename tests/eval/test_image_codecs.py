"""Codecs keep the budget wherever a smaller file exists, waste little of it, and get better with it."""

import numpy as np
import PIL.Image
import pytest

from dina.config import InputError
from dina.eval import image_codecs
from dina.eval.metrics import psnr_db

SMALL = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
IMAGE = np.asarray(PIL.Image.fromarray(SMALL).resize((96, 72), PIL.Image.Resampling.BICUBIC))


@pytest.mark.parametrize("codec", image_codecs.QUALITIES)
@pytest.mark.parametrize("count", ["payload", "file"])
def test_budget_is_kept_and_used(codec, count):
    errors = []
    for budget in (700, 1500, 3000):
        found = image_codecs.at_bytes(IMAGE, codec, budget, count)
        used = found.payload_bytes if count == "payload" else found.file_bytes
        assert found.fits and used <= budget and found.image.shape == IMAGE.shape
        data, decoded = image_codecs.encode(IMAGE, codec, found.quality, found.scale)
        assert len(data) == found.file_bytes and (decoded == found.image).all()
        errors.append(psnr_db(found.image, IMAGE))
    assert errors[0] < errors[1] <= errors[2]


@pytest.mark.parametrize("codec", image_codecs.QUALITIES)
def test_the_smallest_file_stands_in_for_an_impossible_budget(codec):
    found = image_codecs.at_bytes(IMAGE, codec, 0)
    assert not found.fits and found.scale == min(image_codecs.SCALES) and found.payload_bytes < 60
    smaller = image_codecs.at_bytes(IMAGE, codec, 200)
    assert smaller.fits and smaller.scale < 1


def test_payload_leaves_out_headers_only():
    grey = np.full((64, 64, 3), 128, np.uint8)
    for codec in image_codecs.QUALITIES:
        plain, busy = (image_codecs.encode(x, codec, 50, 1.0)[0] for x in (grey, IMAGE))
        assert 0 < image_codecs.payload_bytes(plain, codec) <= 40 < image_codecs.payload_bytes(busy, codec) < len(busy)
    tables = len(plain) - image_codecs.payload_bytes(plain, "webp")
    assert tables == 30


def test_unknown_codecs_are_named():
    with pytest.raises(InputError, match="image codec 'jpg' does not exist; did you mean 'jpeg'"):
        image_codecs.at_bytes(IMAGE, "jpg", 100)
    with pytest.raises(InputError, match="bytes to count 'all'"):
        image_codecs.at_bytes(IMAGE, "jpeg", 100, "all")
