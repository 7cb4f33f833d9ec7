"""The codec page's numbers on a tiny untrained tokenizer: what is chosen, aligned, scored, written, and left out."""

import json

import ml_collections
import numpy as np
import pytest

from dina import stages
from dina.data import clips, sources
from dina.eval import speech_codec, speech_coders, speech_scores
from tests.audio import toy

WORDS = ("one two", "drei", "four five six")


def voice(seconds, seed):
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 24000)) / 24000
    return (0.3 * np.sin(2 * np.pi * (150 + 20 * seed) * t) * (1 + np.sin(9 * t + seed)) / 2 + 0.01 * rng.normal(size=len(t))).astype(np.float32)


class Open:
    """A prepared data set of clips."""

    def __init__(self, folder):
        self.records = clips.Clips(folder, "test")
        self.notes = self.records.notes

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, folder of the evaluation) with judges that are simple functions."""
    root, config = tmp_path_factory.mktemp("codec"), toy.experiment()
    config.audio.features.max_frames = 128
    config.run = ml_collections.ConfigDict({"data_dir": str(root)})
    config.data = ml_collections.ConfigDict({"name": "recordings"})
    with clips.Writer(root) as writer:
        for i in range(9):
            about = clips.About(f"s{i}", WORDS[i % 3], ("en", "de", "en")[i % 3])
            writer.add("test", about, clips.pack(voice((0.8, 1.1, 0.5)[i // 3], i), 24000))
    variables = toy.variables(config)

    class Parrot:
        name = "parrot"

        def transcribe(self, waves):
            return ["one two" for _ in waves]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "open_source", lambda config, kind, split: Open(root))
        patch.setattr(stages, "load_parts", lambda config, workdir, parts: (variables["params"], variables["stats"]))
        patch.setattr(speech_codec, "LEVELS", (1, 3))
        patch.setattr(speech_codec, "_SHOWN", 2)
        patch.setattr(speech_scores, "version", lambda package: package)
        patch.setattr(speech_scores, "need", lambda package: {"pystoi": 1, "pesq": 1}[package] if package != "speechmos" else _missing())
        patch.setattr(speech_scores, "pesq", lambda one, other: float("nan"))
        patch.setattr(speech_scores, "stoi", lambda one, other: float(np.corrcoef(one, other)[0, 1]))
        patch.setattr(speech_scores, "speaker_judge", lambda data_dir: _missing())
        patch.setattr(speech_scores, "Whisper", Parrot)
        patch.setattr(speech_scores, "Sphinx", _missing)
        patch.setattr(speech_coders, "coders", lambda data_dir: {"halved": lambda wave: speech_coders.Coded(wave / 2, 100)})
        speech_codec.evaluate(config, root)
    return config, root / "eval"


def _missing():
    from dina.config import InputError

    raise InputError("not here")


def test_every_codec_has_its_numbers_and_their_protocol(made):
    scores = json.loads((made[1] / "scores.json").read_text())
    codecs = {"original_0", "dina_1", "dina_3", "halved_0"}
    assert {key.removeprefix("kbps_") for key in scores if key.startswith("kbps_")} == codecs
    assert {key.removeprefix("stoi_") for key in scores if key.startswith("stoi_")} == codecs
    assert not any(key.startswith(("pesq_", "speaker_", "ovrl_", "wer_sphinx")) for key in scores)  # NaN, or not there
    assert scores["stoi_original_0"]["value"] == scores["stoi_halved_0"]["value"] == 1.0
    assert scores["mel_l1_original_0"]["value"] == 0.0 and 0.5 < scores["mel_l1_halved_0"]["value"] <= np.log(2) + 0.01
    assert scores["wer_whisper_dina_1"]["value"] == pytest.approx(6 / 10)  # (0 + 3) of (2 + 3) words, twice
    assert len({scores[f"stoi_{codec}"]["protocol"] for codec in codecs}) == 1
    assert scores["kbps_original_0"] == pytest.approx(256) and scores["kbps_dina_3"] == pytest.approx(scores["kbps_dina_1"] * 10 / 4)
    assert 12.5 * 4 / 1000 <= scores["kbps_dina_1"] < 12.5 * 4 / 1000 * 1.2  # a last code may be half filled
    text = speech_codec.table(scores)
    assert len(text.splitlines()) == 5 and "halved_0" in text and "0.600" in text


def test_rows_name_their_clip_and_files_are_there(made):
    rows = [json.loads(line) for line in (made[1] / "clips.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 6 and {row["index"] for row in rows} == set(range(6))  # the others are too short
    for row in rows:
        assert ("heard_whisper" in row) == (row["language"] == "en") and row["text"] == WORDS[row["index"] % 3]
    kept = [row["file"] for row in rows if "file" in row]
    assert len(kept) == 8 and all((made[1] / name).is_file() for name in kept)
    assert len(json.loads((made[1] / "codebooks.json").read_text())["audio"]["usage"]) == 3


@pytest.mark.parametrize("late", [-700, -16, 0, 160, 900])
def test_waves_are_moved_to_where_their_loudness_fits(late):
    rng = np.random.default_rng(0)
    one = (np.sin(np.arange(24000) / 9) * np.repeat(rng.uniform(0, 1, 24), 1000)).astype(np.float32)
    moved = np.concatenate([np.zeros(late, np.float32), one]) if late >= 0 else one[-late:]
    found = speech_codec.align(one, moved)
    shift = np.arange(-20, 21)
    fit = [float(one[100:20000] @ found[100 + s : 20000 + s]) for s in shift]
    assert abs(shift[int(np.argmax(fit))]) <= 16  # a millisecond
    loud = np.abs(found[:20000] - one[:20000]).mean() / np.abs(one).mean()
    assert late % 16 or loud < 0.2
