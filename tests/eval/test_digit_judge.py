"""The judge of painted digits: accurate on real ones, strict about places."""

import numpy as np
import pytest

from dina.data import canvases, mnist
from dina.eval import digit_judge


@pytest.fixture(scope="module")
def data():
    pixels, labels = mnist.load()
    config = mnist.default_config()
    return pixels, labels, mnist.split(config, labels)


@pytest.fixture(scope="module")
def judge(data):
    """Trained on a quarter of the training digits, to be quick."""
    pixels, labels, split = data
    return digit_judge.DigitJudge(pixels[split["train"][:1000]], labels[split["train"][:1000]])


def test_a_quarter_of_the_digits_already_gives_a_good_judge(judge, data):
    pixels, labels, split = data
    score = judge.ceiling(pixels[split["test"]], labels[split["test"]])
    assert score["n"] == 700 and score["value"] > 0.94


def test_reads_digits_of_both_sizes_in_their_box_and_not_beside_it(judge, data):
    pixels, labels, split = data
    inside, beside, n = 0, 0, 100
    for i in split["test"][:n]:
        size = 56 if i % 2 else 28
        canvas = np.repeat(canvases.paste(pixels[i], (4, 4), size, 14, 28)[..., None], 3, -1)
        inside += judge.judge(canvas, (14, 28, size)) == labels[i]
        beside += judge.judge(canvas, (56, 0, size)) == labels[i]
    assert inside > 0.9 * n
    assert beside < 0.3 * n


def test_a_digit_half_a_box_off_is_not_found(judge, data):
    """No search over positions and no re-centring: a shift by half a digit must hurt much."""
    pixels, labels, split = data
    right = 0
    for i in split["test"][:100]:
        canvas = np.repeat(canvases.paste(pixels[i], (2, 2), 28, 14, 14)[..., None], 3, -1)
        right += judge.judge(canvas, (14, 28, 28)) == labels[i]
    assert right < 60


def test_box_outside_the_canvas_is_refused():
    with pytest.raises(ValueError, match="leaves a canvas of 28x28"):
        digit_judge.to_crop(np.zeros((28, 28, 3), np.uint8), (0, 14, 28))


def test_deskew_keeps_the_centre_of_mass_and_removes_slant():
    row, col = np.indices((28, 28))
    slanted = ((np.abs(col - 14 - 0.4 * (row - 14)) < 2) & (row > 4) & (row < 24)).astype(np.float32)
    upright = digit_judge.deskew(slanted)

    def moments(x):
        mass = x.sum()
        r, c = (x * row).sum() / mass, (x * col).sum() / mass
        return r, c, (x * (row - r) * (col - c)).sum() / mass

    assert moments(upright)[:2] == pytest.approx(moments(slanted)[:2], abs=0.2)
    assert abs(moments(slanted)[2]) > 5 and abs(moments(upright)[2]) < 1
    np.testing.assert_array_equal(digit_judge.deskew(np.zeros((28, 28), np.float32)), 0)


def test_nothing_to_judge_gives_nothing(judge):
    assert len(judge.predict(np.zeros((0, 28, 28), np.float32))) == 0
