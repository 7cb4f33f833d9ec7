"""The page of a speech tokenizer, from what the evaluation wrote; which page an experiment gets."""

import json

import numpy as np
import pytest
import soundfile

from dina.config import InputError
from tools import tokenizer
from tools.report import inputs, page, speech


@pytest.fixture
def run(tmp_path):
    folder, rows, scores = tmp_path / "eval", [], {}
    (folder / "sounds").mkdir(parents=True)
    for codec, levels, kbps, stoi in (("original", 0, 256.0, 1.0), ("dina", 1, 0.125, 0.5), ("dina", 8, 0.93, 0.75), ("opus_6000", 0, 6.0, 0.9)):
        name = f"sounds/0003_{codec}_{levels}.wav"
        soundfile.write(folder / name, np.sin(np.arange(8000) / 20), 16000)
        rows.append({"index": 3, "source": "p/x", "language": "en", "text": "a < b", "codec": codec, "levels": levels, "kbps": kbps, "file": name})
        scores |= {f"kbps_{codec}_{levels}": kbps, f"stoi_{codec}_{levels}": {"value": stoi, "low": stoi - 0.1, "high": stoi, "n": 1}}
    scores["wer_whisper_dina_8"] = {"value": 0.321, "low": 0.2, "high": 0.4, "n": 1}
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "codebooks.json").write_text(json.dumps({"audio": {"usage": [0.9], "perplexity": [60.0], "sizes": [1024], "window": 2000}}))
    (tmp_path / "processor.json").write_text(json.dumps({"train": 180.0}))
    return inputs.read_run(tmp_path)


def test_page_has_every_codec_score_and_sound(run):
    text = page.build(run, speech.SECTIONS, speech.header, speech.tiles)
    for piece in ("dina, 1 level<", "dina, 8 levels<", "opus 6000<", "original<", "0.93 kbit/s", "<b>0.321</b>", "0.650 to 0.750", "a &lt; b", "3 min", "PESQ, same speaker"):
        assert piece in text, piece
    assert text.count("data:audio/wav") == 4 and text.count('alt="STOI against rate"') == text.count('alt="words wrong, Whisper against rate"') == 1
    assert "http" not in text.replace("http://www.w3.org", "")


def test_without_scores_the_page_is_built_all_the_same(run):
    (run.workdir / "eval" / "scores.json").write_text("{}")
    (run.workdir / "eval" / "clips.jsonl").unlink()
    text = page.build(inputs.read_run(run.workdir), speech.SECTIONS, speech.header, speech.tiles)
    assert "Codebooks" in text and "Sounds</h2>" not in text


def test_an_experiment_with_both_tokenizers_is_refused(tmp_path):
    with pytest.raises(InputError, match="one of vision, audio"):
        tokenizer.main(["--config=experiments/digits.py", f"--workdir={tmp_path}"])
