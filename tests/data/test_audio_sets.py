"""Users' speech in folders, tar shards and tfds data sets: the same clips whatever the layout; damage is counted and named."""

import json

import ml_collections
import numpy as np
import pytest

from dina.config import InputError
from dina.data import audio_files, audio_sets, clips, collected, sources
from tests.data.layouts import tar
from tests.data.sounds import encode, peak_hz, tone
from tests.data.test_audio_files import wav_header

LAYOUTS = ["audio_folder-txt", "audio_folder-jsonl", "audio_webdataset-txt", "audio_webdataset-json"]
FORMS = (("wav", "WAV"), ("flac", "FLAC"), ("ogg", "OGG"))
TONES = [tone(0.3 + 0.02 * i, 22050, 200 + 40 * i) for i in range(12)]


def file(i):
    """(ending, bytes) of a recording."""
    ending, form = FORMS[i % 3]
    return ending, encode(TONES[i], 22050, form)


def note(i):
    return {"text": f"said {i}", "language": "en", "speaker": f"me{i % 2}", "url": "x"}


def make(root, layout, folder="", numbers=range(12)):
    """The recordings in a layout; returns the config to read them."""
    name, transcripts = layout.split("-")
    top = root / folder
    top.mkdir(parents=True, exist_ok=True)
    if name == "audio_webdataset":
        for shard in range(2):
            tar(top / f"{shard:03d}.tar", [member for i in numbers if i % 2 == shard for member in (
                (f"{i:03d}.{file(i)[0]}", file(i)[1]), (f"{i:03d}.txt", f" said {i}\n".encode()),
                (f"{i:03d}.json", json.dumps(note(i)).encode()))])  # fmt: skip
    else:
        for i in numbers:
            (top / f"{i:03d}.{file(i)[0]}").write_bytes(file(i)[1])
            (top / f"{i:03d}.txt").write_text(f"said {i}\n")
        lines = [json.dumps({"file_name": f"{i:03d}.{file(i)[0]}"} | note(i)) for i in numbers]
        (top / "metadata.jsonl").write_text("\n".join(lines))
    return config(root, name, transcripts=transcripts, shares={"valid": 0.2, "test": 0.3})


def config(root, name, **changes):
    data = audio_sets.default_config(name)
    data.update({"path": str(root)} | changes)
    return ml_collections.ConfigDict({"data": data})


def read(made, data_dir):
    """Source -> (split, record)."""
    found = {}
    for split in clips.SPLITS:
        try:
            source = sources.open_source(made, "speech", split, data_dir)
        except InputError:
            continue
        found |= {source[i]["source"]: (split, source[i]) for i in range(len(source))}
    return found


def quarantine(made, data_dir):
    lines = (sources.cache_path(made, data_dir) / "quarantine.jsonl").read_text().splitlines()
    return {line["source"]: f"{line['reason']}: {line['detail']}" for line in map(json.loads, lines)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_clips(tmp_path, layout):
    made = make(tmp_path / "set", layout)
    sources.prepare(made, tmp_path)
    found = read(made, tmp_path)
    assert len(found) == 12 and quarantine(made, tmp_path) == {}
    for _, record in found.values():
        i = int(record["text"].removeprefix("said "))
        assert abs(peak_hz(record["audio16"], 16000) - (200 + 40 * i)) < 4
        assert abs(len(record["audio24"]) / 24000 - len(TONES[i]) / 22050) < 0.02  # Vorbis has whole blocks
        assert record["speaker"] == (f"me{i % 2}" if layout.endswith(("json", "jsonl")) else "") and record["picture"] == ""


@pytest.mark.parametrize("split,same", [("name", None), ("text", "text"), ("speaker", "speaker")])
def test_splits_keep_together_what_they_are_drawn_by(tmp_path, split, same):
    made = make(tmp_path / "set", "audio_folder-jsonl")
    made.data.update({"split": split, "shares": {"valid": 0.0, "test": 0.5}})
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(
        json.dumps({"file_name": f"{i:03d}.{file(i)[0]}", "text": f"No. {i // 3}", "speaker": f"s{i // 2}"}) for i in range(12)))
    sources.prepare(made, tmp_path)
    found = read(made, tmp_path)
    assert {one for one, _ in found.values()} == {"train", "test"}
    if same:
        split_of = {}
        for one, record in found.values():
            assert split_of.setdefault(record[same], one) == one


def test_folders_are_splits_if_the_config_says_so(tmp_path):
    for folder, numbers in {"train": range(6), "dev": range(6, 9), "test": range(9, 11), "extra": range(11, 12)}.items():
        made = make(tmp_path / "set", "audio_webdataset-txt", folder, numbers)
    made.data.update({"split": "folder", "max_corrupt": 0.2})
    sources.prepare(made, tmp_path)
    found = read(made, tmp_path)
    numbers = {split: sorted(int(r["text"].split()[1]) for own, r in found.values() if own == split) for split in clips.SPLITS}
    assert numbers == {"train": list(range(6)), "valid": [6, 7, 8], "test": [9, 10]}
    assert list(quarantine(made, tmp_path).values()) == ["no split: folder 'extra' is none of " + ", ".join(collected.FOLDERS)]


BAD = {  # name -> (content, what is said of it)
    "torn.wav": (file(0)[1][:3000], "truncated"), "empty.wav": (b"", "empty"), "text.mp3": (b"hello, I am no sound", "begins with"),
    "list.ogg": (b"#EXTM3U\n/etc/passwd", "begins with"), "hours.wav": (wav_header() + bytes(32000), "truncated"),
    "nan.wav": (encode(np.full(8000, np.nan, np.float32), subtype="FLOAT"), "not finite"),
    "mute.flac": (encode(np.zeros(8000, np.float32), form="FLAC"), "silent"), "short.wav": (encode(tone(0.01)), "at least"),
    "long.wav": (encode(tone(4.0)), "longer than 3 s"), "large.wav": (encode(np.zeros((400_000, 3), np.float32)), "bytes are more than"),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["audio_folder-txt", "audio_webdataset-txt"])
def test_hostile_files_are_counted_and_named_and_the_rest_is_read(tmp_path, layout):
    made, root = make(tmp_path / "set", layout), tmp_path / "set"
    if layout.startswith("audio_folder"):
        for name, (content, _) in BAD.items():
            (root / name).write_bytes(content)
    else:
        tar(root / "bad.tar", [(name, content) for name, (content, _) in BAD.items()])
    made.data.update({"max_seconds": 3.0, "max_corrupt": 0.5})
    sources.prepare(made, tmp_path)
    assert len(read(made, tmp_path)) == 12
    found = {name.removeprefix("bad.tar/").split(".")[0]: why for name, why in quarantine(made, tmp_path).items()}
    assert set(found) == {name.split(".")[0] for name in BAD}
    for name, (_, why) in BAD.items():
        assert why in found[name.split(".")[0]]
    made.data.max_corrupt = 0.4
    with pytest.raises(InputError, match="10 of 22 recordings cannot be used, more than data.max_corrupt = 0.4"):
        sources.prepare(made, tmp_path)


def test_what_is_there_twice_is_taken_once_and_said(tmp_path):
    made, root = make(tmp_path / "set", "audio_folder-jsonl"), tmp_path / "set"
    notes = root / "metadata.jsonl"
    notes.write_text(notes.read_text().replace('"language": "en"', '"language": ""') + "\n" + json.dumps({"file_name": f"000.{file(0)[0]}", "text": "something else"}))
    made.data.max_corrupt = 0.5
    made.data.language = "de"
    sources.prepare(made, tmp_path)
    found = {record["source"]: record for _, record in read(made, tmp_path).values()}
    assert len(found) == 12 and found[f"000.{file(0)[0]}"]["text"] == "said 0"
    assert [why.split(":")[0] for why in quarantine(made, tmp_path).values()] == ["duplicate key"]
    assert {record["language"] for record in found.values()} == {"de"}


def test_another_set_s_section_is_refused_by_name(tmp_path):
    made = make(tmp_path / "set", "audio_folder-jsonl")
    with made.data.unlocked():
        del made.data.path
    with pytest.raises(InputError, match="default_config"):
        sources.prepare(made, tmp_path)


def test_a_broken_shard_loses_what_is_behind_the_damage(tmp_path):
    made = make(tmp_path / "set", "audio_webdataset-txt")
    whole = (tmp_path / "set" / "001.tar").read_bytes()
    (tmp_path / "set" / "001.tar").write_bytes(whole[: len(whole) // 2])
    made.data.max_corrupt = 0.3
    sources.prepare(made, tmp_path)
    assert 6 < len(read(made, tmp_path)) < 12
    assert any("broken shard" in why for why in quarantine(made, tmp_path).values())


@pytest.mark.parametrize("content,why", [
    ("{", "corrupt"), ("[1]", "corrupt"), ('{"text": "a"}', "corrupt"), ('{"file_name": "../out.wav"}', "no recording"), ('{"file_name": "/out.wav"}', "corrupt"),
    ('{"file_name": "gone.wav"}', "no recording"), ('{"file_name": 3}', "corrupt"),
])  # fmt: skip
def test_bad_lines_are_named(tmp_path, content, why):
    made = make(tmp_path / "set", "audio_folder-jsonl")
    with (tmp_path / "set" / "metadata.jsonl").open("a") as out:
        out.write(f"\n{content}\n")
    made.data.max_corrupt = 0.1
    sources.prepare(made, tmp_path)
    assert len(read(made, tmp_path)) == 12
    assert [line.split(":")[0] for line in quarantine(made, tmp_path).values()] == [why]


def test_long_recordings_are_cut_where_nobody_speaks(tmp_path):
    rng, quiet = np.random.default_rng(0), np.zeros(8000, np.float32)
    parts = [0.1 * rng.normal(size=16000).astype(np.float32) for _ in range(4)]
    wave = np.concatenate([part for speech in parts for part in (speech, quiet)])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "talk.wav").write_bytes(encode(wave))
    (tmp_path / "set" / "talk.txt").write_text("All of it.")
    (tmp_path / "set" / "hush.wav").write_bytes(encode(np.where(np.arange(64000) == 9000, 2e-4, 0).astype(np.float32), subtype="FLOAT"))
    made = config(tmp_path / "set", "audio_folder", max_corrupt=0.5, shares={"test": 0.0})
    made.data.cut.longest = 1.5
    sources.prepare(made, tmp_path)
    found = read(made, tmp_path)
    assert sorted(found) == [f"talk.wav#{i}" for i in range(4)] and {r["text"] for _, r in found.values()} == {""}
    for _, record in found.values():
        assert 16000 <= len(record["audio16"]) <= 16000 * 1.21
    assert list(quarantine(made, tmp_path)) == ["hush.wav"]


def test_tfds_data_sets_are_read_by_the_names_of_their_features(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({
        "sound": tfds.features.Tensor(shape=(None,), dtype=np.int16), "words": tfds.features.Text(), "who": tfds.features.Text()})

    class Tones(tfds.core.GeneratorBasedBuilder):
        VERSION, url_infos = tfds.core.Version("1.0.0"), {}

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(4)), "validation": self._generate_examples(range(4, 7))}

        def _generate_examples(self, numbers):
            for i in numbers:
                wave = np.zeros(9000, np.int16) if i == 3 else audio_files.to_int16(TONES[i])
                yield i, {"sound": wave, "words": f"said {i}", "who": "me"}

    tfds.disable_progress_bar()
    Tones(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    (folder,) = [info.parent for info in (tmp_path / "tfds").rglob("dataset_info.json")]
    made = config(folder, "audio_tfds", audio="sound", rate=22050, max_corrupt=0.2,
                  fields={"text": "words", "speaker": "who", "language": ""})
    sources.prepare(made, tmp_path)
    found = read(made, tmp_path)
    assert sorted((split, r["text"], r["speaker"]) for split, r in found.values()) == sorted(
        [("train", f"said {i}", "me") for i in range(3)] + [("valid", f"said {i}", "me") for i in range(4, 7)])
    for _, record in found.values():
        assert abs(peak_hz(record["audio24"], 24000) - (200 + 40 * int(record["text"].split()[1]))) < 4
    assert "silent" in quarantine(made, tmp_path)["train/3"]
    made.data.audio = "nothing"
    with pytest.raises(InputError, match="data.audio.*nothing"):
        sources.prepare(made, tmp_path)


def test_bad_options_are_named(tmp_path):
    made = make(tmp_path / "set", "audio_folder-txt")
    for key, value in {"transcripts": "json", "split": "hash"}.items():
        other = made.copy_and_resolve_references()
        other.data[key] = value
        with pytest.raises(InputError, match=f"data.{key}"):
            sources.prepare(other, tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no usable recording"):
        sources.prepare(config(tmp_path / "none", "audio_folder"), tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        sources.prepare(config(tmp_path / "gone", "audio_folder"), tmp_path)
    with pytest.raises(InputError, match="dataset_info.json"):
        sources.prepare(config(tmp_path / "set", "audio_tfds"), tmp_path)
