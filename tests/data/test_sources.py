"""Reading records and user's audio files."""

import grain
import numpy as np
import pytest
import soundfile

from dina.config import InputError
from dina.data import canvases, mnist, phrases, sources, spoken

TONE = (0.5 * np.sin(np.arange(8000) * 0.1)).astype(np.float32)


def test_image_records_survive_storage(config, data_dir):
    source = sources.open_source(config, "images", "test", data_dir)
    made = list(canvases.records(config.data, "test"))
    assert len(source) == len(made) == 80
    for i in (0, 7, 79):
        row = source[i]
        assert row["image"].dtype == np.uint8 and row["image"].shape[2] == 3
        canvas = tuple(side // 28 for side in row["image"].shape[:2])
        assert canvas in phrases.CANVASES and row["split"] == "test"
        assert {k: row[k] for k in ("digit", "source", "size", "top", "left", "aligned")} == {
            k: made[i][k] for k in ("digit", "source", "size", "top", "left", "aligned")}
        assert row["digit"] == mnist.load()[1][row["source"]]


def test_speech_records_survive_storage(config, data_dir):
    source = sources.open_source(config, "speech", "judge", data_dir)
    for row, made in zip((source[i] for i in range(len(source))), spoken.records(config.data, "judge"), strict=True):
        np.testing.assert_array_equal(row["audio16"], made["audio16"])
        np.testing.assert_array_equal(row["audio24"], made["audio24"])
        assert (row["word"], row["voice"], row["digit"]) == (made["word"], made["voice"], made["digit"])


def test_stored_splits_are_disjoint_in_source_and_speaker(config, data_dir):
    images = {s: set(sources.load_all(config, "images", s, data_dir)["source"].tolist()) for s in mnist.SPLITS}
    voices = {s: set(sources.load_all(config, "speech", s, data_dir)["voice"]) for s in spoken.SPLITS}
    for parts in (images, voices):
        assert sum(len(part) for part in parts.values()) == len(set.union(*parts.values()))


def test_grain_reads_the_source(config, data_dir):
    source = sources.open_source(config, "text", "test", data_dir)
    dataset = grain.MapDataset.source(source).seed(0).shuffle().map(lambda row: len(row["text"]))
    assert sorted(dataset[i] for i in range(len(source))) == sorted(len(source[i]["text"]) for i in range(len(source)))


def test_load_all_is_shared_and_read_only(config, data_dir):
    columns = sources.load_all(config, "images", "valid", data_dir)
    assert columns is sources.load_all(config, "images", "valid", data_dir)
    assert columns["digit"].shape == (20,) and len(columns["image"]) == 20
    with pytest.raises(ValueError):
        columns["image"][0][0, 0, 0] = 1


def test_unknown_kind_and_split_are_named(config, data_dir):
    with pytest.raises(InputError, match="smell"):
        sources.open_source(config, "smell", "train", data_dir)
    with pytest.raises(InputError, match="judge"):
        sources.open_source(config, "images", "judge", data_dir)


def test_read_audio(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([TONE, 0 * TONE], 1), 22_050, subtype="FLOAT")
    wave, rate = sources.read_audio(path)
    assert rate == 22_050 and wave.dtype == np.float32
    np.testing.assert_allclose(wave, TONE / 2, atol=1e-6)


def _write(tmp_path, name, samples, subtype="PCM_16"):
    path = tmp_path / name
    soundfile.write(path, samples, 16_000, subtype=subtype)
    return path


def _cut(tmp_path, name, keep):
    path = _write(tmp_path, name, TONE)
    path.write_bytes(path.read_bytes()[:keep])
    return path


@pytest.mark.parametrize("make, message", [
    (lambda t: t / "none.wav", "no such file"),
    (lambda t: (t / "empty.wav", (t / "empty.wav").write_bytes(b""))[0], "empty"),
    (lambda t: (t / "text.wav", (t / "text.wav").write_text("hello" * 99))[0], "decoded"),
    (lambda t: _cut(t, "cut.wav", 9000), "truncated"),
    (lambda t: _cut(t, "header.wav", 20), "truncated|decoded"),
    (lambda t: _cut(t, "cut.flac", 3000), "truncated|decoded"),
    (lambda t: _write(t, "short.wav", TONE[:3]), "3 samples"),
    (lambda t: _write(t, "silent.wav", 0 * TONE), "silent"),
    (lambda t: _write(t, "nan.wav", np.where(np.arange(8000) == 70, np.nan, TONE), "FLOAT"), "sample 70"),
])
def test_bad_audio_is_refused_by_name(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        sources.read_audio(path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
