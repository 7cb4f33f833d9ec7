"""The page of a visual tokenizer: its tables and pictures from what the evaluation wrote."""

import json

import numpy as np
import PIL.Image
import pytest

from dina.config import InputError
from tools.report import inputs, page, tokenizer


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "eval"
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for split, native in (("test", 1), ("test", 0), ("photos", 1)):
        about = {"split": split, "index": native, "source": "p/x", "native": native, "height": 56, "width": 28}
        for codec, levels, psnr in (("dina", 1, 20.0), ("dina", 2, 24.0 + native), ("refined", 2, 23.0), ("jpeg", 2, 18.5)):
            rows.append(about | {"codec": codec, "levels": levels, "bytes": 10 * levels, "psnr_db": psnr, "ssim": 0.5, "lpips_like": 0.25})
        name = f"pictures/{split}_{native}.png"
        PIL.Image.fromarray(np.zeros((56, 28, 3), np.uint8)).save(folder / name)
        rows += [about | {"codec": "original", "levels": 0, "file": name}, rows[-2] | {"file": name}]
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kid = {"value": 0.0123, "low": 0.01, "high": 0.02, "n": 2}
    (folder / "scores.json").write_text(json.dumps({"kid_test_dina_2": kid}))
    books = {"usage": [0.9] * 8, "perplexity": [600.0] * 8, "sizes": [1024] * 8, "window": 20000, "bound": [179.4] * 8}
    (folder / "codebooks.json").write_text(json.dumps({"visual": books}))
    (tmp_path / "processor.json").write_text(json.dumps({"train": 120.0}))
    return inputs.read_run(tmp_path)


def build(run):
    return page.build(run, tokenizer.SECTIONS, tokenizer.header, tokenizer.tiles)


def test_page_shows_every_set_codec_and_interval(run):
    text = build(run)
    for piece in ("Held-out pictures", "not enlarged", "Photographs", "dina, 1 level<", "dina, 2 levels<", "JPEG, 2 levels’ size", "0.0123", "dina, refined, 2 levels<", "at most 179 over all cells",
                  "24.5 dB", "2 min", "of one processor", "0.900 of 1024"):
        assert piece in text, piece
    assert "http" not in text.replace("http://www.w3.org", "") and text.count("data:image/png") == 6


def test_bars_of_codebooks_fall_with_the_level(run, monkeypatch):
    bars = []
    monkeypatch.setattr(tokenizer.sections, "codebooks", lambda run, bar_of: bars.extend(bar_of(level) for level in range(1, 17)) or "")
    tokenizer.health(run)
    assert bars == [0.8] * 4 + [0.6] * 12


def test_without_scores_it_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match="scores.json"):
        inputs.read_run(tmp_path)
