"""A tokenizer scored as a codec: bytes of codes, which pictures, and what is written down, with a stand-in tokenizer."""

import json
import math
import types

import ml_collections
import numpy as np
import PIL.Image
import pytest

from dina.eval import codec
from dina.vision import perceptual


def test_bytes_of_codes():
    assert codec.code_bytes(256, (1024,) * 8, 8) == 2560
    assert codec.code_bytes(3, (1024, 300), 2) == math.ceil(3 * (10 + 9) / 8)
    assert codec.code_bytes(3, (1024, 300), 1) == 4


def test_busy_cells_have_more_than_one_colour():
    image = np.full((56, 84, 3), 200, np.uint8)
    image[30, 60] = 199, 200, 200  # second row, third column
    image[0, 27, 2] = 0
    np.testing.assert_array_equal(codec.busy_cells(image), [True, False, False, False, False, True])


def test_perplexity_is_bounded_by_what_is_alike():
    assert codec.perplexity_bound([5] * 8, 8) == pytest.approx(8)
    assert codec.perplexity_bound([1] * 100, 8) == pytest.approx(8)
    assert codec.perplexity_bound([7, 7], 8) == pytest.approx(2)
    assert codec.perplexity_bound([9], 8) == codec.perplexity_bound([4, 1], 1) == pytest.approx(1)
    counts = np.array([60, 25, 5, 5, 5])  # three codes: the two frequent things alone, the others together
    best = max(_perplexity(np.bincount(codes, counts, 3)) for codes in np.ndindex(*(3,) * 5))
    assert codec.perplexity_bound(counts, 3) == pytest.approx(best)


def _perplexity(counts):
    shares = counts[counts > 0] / counts.sum()
    return math.exp(-(shares * np.log(shares)).sum())


def test_a_spread_is_even_and_complete():
    assert codec.spread(5, 9) == [0, 1, 2, 3, 4]
    assert codec.spread(101, 3) == [0, 50, 100]
    assert codec.spread(0, 3) == []


@pytest.fixture
def written(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pictures = {split: {"image": [rng.integers(0, 256, (28 * h, 56, 3), np.uint8) for h in (1, 2, 2, 3)],
                        "source": [f"{split}/{i}" for i in range(4)], "native": [1, 0, 0, 1]} for split in codec.SPLITS}
    class Records:
        def __init__(self, split):
            self.columns = pictures[split]

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {name: column[index] for name, column in self.columns.items()}

    config = ml_collections.ConfigDict({"vision": {"min_pixels": 784, "max_pixels": 16 * 784, "quantizer": {"sizes": (16, 16)}},
                                        "stages": {"V2": {"task": "pixels"}, "V4": {"task": "refiner"}}})
    monkeypatch.setattr(codec.sources, "open_source", lambda config, kind, split: Records(split))
    monkeypatch.setattr(codec.stages, "load_parts", lambda config, workdir, parts: (dict.fromkeys(parts), {}))
    monkeypatch.setattr(codec.feature_weights, "load", lambda *_: perceptual.random_weights())
    monkeypatch.setattr(codec, "NETWORK", "random")
    monkeypatch.setattr(codec, "COMPARED", (2,))
    monkeypatch.setattr(codec, "tokenize_images", lambda vision, variables, images: [
        np.full((i.shape[0] * i.shape[1] // 784, 2), n % 16) for n, i in enumerate(images)])
    # One level is off by 40, two by 4, two refined by 2.
    calls = iter(["test"] * 5 + ["photos"] * 5)  # two depths, the refiner, and twice to take the time

    def fake(vision, variables, codes, grids, refine, levels=2):
        images = pictures[next(calls)]["image"]
        return [np.clip(image.astype(int) + (2 if refine == "flow" else (40, 4)[levels - 1]), 0, 255).astype(np.uint8) for image in images]

    monkeypatch.setattr(codec, "detokenize", types.SimpleNamespace(detokenize=fake))
    codec.evaluate(config, tmp_path)
    return tmp_path / "eval", pictures


def test_every_picture_codec_and_depth_is_a_line(written):
    folder, pictures = written
    rows = [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]
    scored = [row for row in rows if row["codec"] != "original"]
    assert sorted({(row["codec"], row["levels"]) for row in scored}) == [("dina", 1), ("dina", 2), ("jpeg", 2), ("refined", 2), ("webp", 2)]
    assert len(scored) == 2 * 4 * 5
    for row in scored:
        height, width = pictures[row["split"]]["image"][row["index"]].shape[:2]
        assert (row["height"], row["width"], row["source"]) == (height, width, f"{row['split']}/{row['index']}")
        if row["codec"] == "dina":
            assert row["bytes"] == codec.code_bytes(height * width // 784, (16, 16), row["levels"])
            assert (14 < row["psnr_db"] < 18) if row["levels"] == 1 else 35 < row["psnr_db"] < 38
        if row["codec"] == "refined":
            assert row["bytes"] == codec.code_bytes(height * width // 784, (16, 16), 2) and row["psnr_db"] > 40
    for row in rows:
        assert PIL.Image.open(folder / row["file"]).size == (row["width"], row["height"])


def test_scores_say_how_they_were_measured(written):
    folder, _ = written
    scores, books = (json.loads((folder / name).read_text()) for name in ("scores.json", "codebooks.json"))
    for name in ("psnr_db_test_dina_2", "kid_photos_dina_1", "lpips_like_test_jpeg_2"):
        assert scores[name]["n"] == 4 and scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"]
        assert scores[name]["protocol"]
    assert {"encode_ms_test", "decode_ms_photos"} <= set(scores)
    assert books["visual"]["window"] == 16 and books["visual"]["usage"] == [0.25, 0.25]  # 2 + 4 + 4 + 6 cells, four codes
    assert books["visual"]["bound"] == books["visual_busy"]["bound"] == pytest.approx([16, 16])  # no two cells are equal
