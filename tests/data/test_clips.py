"""Prepared clips: what is written is read, at both rates; a folder that does not fit together is refused."""

import pickle

import numpy as np
import pytest

from dina.config import InputError
from dina.data import audio_files, clips
from tests.data.sounds import peak_hz, tone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    with clips.Writer(path) as writer:
        for number in range(5):
            about = clips.About(f"s{number}", f"said {number} é", ("en", "fr")[number % 2], "me", "p" * (number == 3))
            writer.add("train" if number else "test", about, clips.pack(tone(0.3 + 0.1 * number, 22050, 200 + 50 * number), 22050))
        counts = writer.counts()
    return path, counts


def test_clips_come_back_at_both_rates(folder):
    found = clips.Clips(folder[0], "train")
    assert len(found) == 4
    for number, record in enumerate((found[i] for i in range(4)), 1):
        assert record["source"] == f"s{number}" and record["text"] == f"said {number} é" and record["split"] == "train"
        assert record["picture"] == "p" * (number == 3)
        for name, rate in (("audio16", 16000), ("audio24", 24000)):
            wave = record[name]
            assert wave.dtype == np.int16 and len(wave) == found.notes[number - 1][f"samples{name[5:]}"]
            assert abs(len(wave) / rate - (0.3 + 0.1 * number)) < 1e-3
            assert abs(peak_hz(wave, rate) - (200 + 50 * number)) < 3
    again = pickle.loads(pickle.dumps(found))  # data loaders send sources to other processes
    np.testing.assert_array_equal(again[2]["audio24"], found[2]["audio24"])


def test_twenty_four_kilohertz_are_kept_exactly(tmp_path):
    wave = np.random.default_rng(0).uniform(-1.2, 1.2, 24000).astype(np.float32)
    with clips.Writer(tmp_path, ("train",)) as writer:
        writer.add("train", clips.About("x"), clips.pack(wave, 24000))
    np.testing.assert_array_equal(clips.Clips(tmp_path, "train")[0]["audio24"], audio_files.to_int16(wave))


def test_counts_are_by_split_and_language(folder):
    assert folder[1]["counts"] == {"train": 4, "valid": 0, "test": 1}
    assert folder[1]["clips"] == {"test": {"en": 1}, "train": {"en": 2, "fr": 2}}
    np.testing.assert_allclose(folder[1]["minutes"]["train"]["fr"], (0.4 + 0.6) / 60, atol=0.01)


def test_skipped_rates_are_not_made(folder):
    assert "audio16" not in clips.Clips(folder[0], "train", ("audio16",))[0]
    assert "audio24" not in clips.Clips(folder[0], "train", ("audio24",))[0]


def test_what_does_not_fit_together_is_refused(folder, tmp_path):
    for split, message in (("valid", "has no clips"), ("judge", "must be one of test, train, valid")):
        with pytest.raises(InputError, match=message):
            clips.Clips(folder[0], split)
    (tmp_path / "train.array_record").write_bytes((folder[0] / "train.array_record").read_bytes())
    notes = (folder[0] / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(notes[:3]))
    with pytest.raises(InputError, match="has 4 clips, its .jsonl 3"):
        clips.Clips(tmp_path, "train")
