"""Perfect pictures score perfectly, worse ones worse; KID is the double sum, unbiased, and its interval covers."""

import sys

import numpy as np
import pytest

from dina.config import InputError
from dina.eval import fidelity
from dina.eval.protocol import compare
from dina.vision import perceptual

SIZES = ((56, 84), (230, 30), (28, 28), (7, 12), (224, 224))
RNG = np.random.default_rng(0)
TRUTH = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) // 2 + 64 for size in SIZES]


def _noisy(scale, seed=1):
    rng = np.random.default_rng(seed)
    return [np.clip(x + rng.normal(0, scale, x.shape), 0, 255).astype(np.uint8) for x in TRUTH]


@pytest.fixture(scope="module")
def judge(request):
    patch = pytest.MonkeyPatch()
    patch.setattr(fidelity, "TILE", 56)
    request.addfinalizer(patch.undo)
    return fidelity.Fidelity(TRUTH, "random", perceptual.random_weights())


def test_scores_order_reconstructions(judge):
    perfect, mild, bad = (judge.scores(made)[0] for made in (TRUTH, _noisy(8), _noisy(60)))
    assert perfect["psnr_db"]["value"] == 100 and perfect["ssim"]["value"] == pytest.approx(1)
    assert perfect["lpips_like"]["value"] == 0 and perfect["kid"]["value"] == pytest.approx(0, abs=1e-9)
    for name, better in (("psnr_db", 1), ("ssim", 1), ("lpips_like", -1), ("kid", -1)):
        assert better * compare(perfect[name], mild[name]) > 0 and better * compare(mild[name], bad[name]) > 0
        assert mild[name]["n"] == len(TRUTH) and mild[name]["low"] <= mild[name]["value"] <= mild[name]["high"]


def test_only_the_same_set_and_network_are_compared(judge):
    made, _ = judge.scores(TRUTH)
    other = fidelity.Fidelity(TRUTH[::-1], "random", judge.params).scores(TRUTH[::-1])[0]
    with pytest.raises(InputError, match="differ in reference"):
        compare(made["ssim"], other["ssim"])
    heavier = judge.params | {"head": {name: 2 * x for name, x in judge.params["head"].items()}}
    again = fidelity.Fidelity(TRUTH, "random", heavier)
    assert again.protocol("ssim").id == judge.protocol("ssim").id and again.protocol("kid").id != judge.protocol("kid").id


def test_tiles_hold_every_pixel_once_and_company_changes_nothing(judge):
    for image in TRUTH:
        tiles, mask = fidelity._tiles(image)
        assert mask.sum() == image[..., 0].size
        assert np.float64(tiles[mask > 0]).sum() * 255 == pytest.approx(image.sum(), rel=1e-5)
    made = _noisy(20)
    together = fidelity.distances(judge.network, judge.params, made, TRUTH)
    alone = [fidelity.distances(judge.network, judge.params, [a], [b])[0] for a, b in zip(made, TRUTH)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_bad_input_is_named(judge):
    with pytest.raises(InputError, match="4 reconstructions of 5"):
        judge.scores(TRUTH[:4])
    with pytest.raises(InputError, match="reconstruction 1 is uint8 .28, 28, 3., its original .230, 30, 3."):
        judge.scores([TRUTH[0], TRUTH[2], *TRUTH[2:]])
    with pytest.raises(InputError, match="original 0 is float64"):
        fidelity.Fidelity([np.zeros((9, 9, 3))], "random", judge.params)
    with pytest.raises(InputError, match="reference set is empty"):
        fidelity.Fidelity([], "random", judge.params)


@pytest.mark.parametrize("pairing", ["paired", "independent"])
def test_kid_and_its_jackknife_by_hand(pairing):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(7, 5)), rng.normal(0.3, 1, (7, 5))
    k = lambda a, b: (a @ b / 5 + 1) ** 3
    mean = lambda a, b, keep: np.mean([k(a[i], b[j]) for i in range(len(a)) for j in range(len(b)) if keep(i, j)])

    def value(x, y):
        other = lambda i, j: i != j
        return mean(x, x, other) + mean(y, y, other) - 2 * mean(x, y, other if pairing == "paired" else lambda i, j: True)

    left = lambda a, i: np.delete(a, i, 0)
    spread = lambda values: 6 / 7 * ((np.array(values) - np.mean(values)) ** 2).sum()
    if pairing == "paired":
        variance = spread([value(left(x, i), left(y, i)) for i in range(7)])
    else:
        variance = spread([value(left(x, i), y) for i in range(7)]) + spread([value(x, left(y, i)) for i in range(7)])
    found = fidelity.kid(x, y, pairing)
    assert found["value"] == pytest.approx(value(x, y)) and found["n"] == 7
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * variance**0.5)


def test_kid_is_unbiased_and_its_interval_covers():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2000, 4)), rng.normal(0.5, 1, (2000, 4))
    truth = fidelity.kid(x, y, "independent")["value"]
    found = [fidelity.kid(x[i : i + 20], y[i : i + 20], "independent") for i in range(0, 2000, 20)]
    values = np.array([score["value"] for score in found])
    assert abs(values.mean() - truth) < 3 * values.std() / len(values) ** 0.5
    assert 0.83 < np.mean([score["low"] < truth < score["high"] for score in found]) < 0.99
    with pytest.raises(InputError, match="3 and 5 pictures"):
        fidelity.kid(x[:3], y[:5], "independent")


def test_text_counts_where_something_is_read():
    words = {0: "one", 1: "two", 2: ""}
    pictures = [np.full((8, 8, 3), value, np.uint8) for value in (0, 1, 2)]
    score = fidelity.same_text([pictures[0], pictures[0], pictures[1]], pictures, lambda image: words[int(image[0, 0, 0])])
    assert (score["value"], score["n"]) == (0.5, 2)


def test_the_reader_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(InputError, match="uv pip install rapidocr-onnxruntime"):
        fidelity.text_reader()


def test_text_is_read_line_by_line():
    box = lambda x, y, height, text: (np.array([[x, y], [x + 30, y], [x + 30, y + height], [x, y + height]], float), text)
    boxes = [box(80, 100, 20, "right"), box(10, 98, 24, "le ft"), box(0, 60, 11, "above"), box(5, 130, 18, "below")]
    assert fidelity.in_reading_order(boxes) == "aboveleftrightbelow"
    assert fidelity.in_reading_order([]) == ""
