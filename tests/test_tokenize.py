import json

import ml_collections
import numpy as np
import pytest

from dina import checkpoint, stages, tokenize
from dina.audio import config as audio
from dina.config import InputError
from dina.data import codes, digits, packing, sources
from dina.grammar import decode
from dina.text import tokenizer as text
from dina.vision import config as vision


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A prepared data set of few records, cut into small shards."""
    c = ml_collections.ConfigDict({"seed": 3, "data": digits.smoke_config(), "text": text.default_config()})
    c.data.mnist.update({"train": 60, "valid": 10, "test": 10})
    c.data.speech.train.others = 3
    c.vision, c.audio = vision.default_config(), audio.default_config()
    c.tokenize = tokenize.default_config()
    c.tokenize.update({"shard_records": 50, "image_rows": 4, "speech_rows": 8,
                       "splits": ("train", "valid", "test")})
    c.run = ml_collections.ConfigDict({"data_dir": str(tmp_path_factory.mktemp("raw"))})
    tokenize.prepare_data(c)
    return c


def fake(config, identity="one", stop_after=None):
    """Codes that depend on what is in a cell or frame and on nothing else."""
    calls = {"images": 0, "speech": 0}

    def images(pack):
        calls["images"] += 1
        if stop_after is not None and calls["images"] > stop_after:
            raise KeyboardInterrupt
        cells = pack["patches"].reshape(*pack["cell_segment"].shape, -1)
        level = np.abs(cells).sum(-1).astype(np.int64)[..., None] + np.arange(8)
        return np.where(pack["cell_segment"][..., None] > 0, level % 256, -1)

    def speech(wave_BN, samples_B):
        calls["speech"] += 1
        frames = np.abs(wave_BN.reshape(len(wave_BN), -1, 1280)).sum(-1)
        value = (1000 * frames).astype(np.int64)[..., None] + np.arange(8)
        return value % 256, samples_B // 1280

    made = {"images": images, "speech": speech}
    return {kind: tokenize.Encoder(encode, identity) for kind, encode in made.items()}, calls


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("work")
    return workdir, tokenize.run(config, workdir, fake(config)[0])


def files(workdir):
    return {p.name: p.read_bytes() for p in (workdir / "codes").rglob("*") if p.is_file()}


def test_every_record_has_its_codes(config, done):
    workdir, report = done
    for split in ("train", "test"):
        raw, table = sources.open_source(config, "images", split), codes.load_codes(workdir, "images", split)
        assert report["images"]["counts"][split] == len(table) == len(raw)
        for i in (0, 1, len(raw) - 1):
            h, w = (side // 28 for side in raw[i]["image"].shape[:2])
            assert (table.fields["h"][i], table.fields["w"][i]) == (h, w) and table.codes(i).shape == (h * w, 8)
            assert all(table.fields[name][i] == raw[i][name] for name in ("digit", "source", "size", "top", "left", "aligned"))
            alone = tokenize._Images(config, config.tokenize, fake(config)[0]["images"].encode)(raw, split, range(i, i + 1))[0][0]
            assert (alone["codes"] == table.codes(i)).all()  # its neighbours in the row do not matter


def test_a_clip_has_a_clean_and_a_noisy_view(config, done):
    workdir, report = done
    raw, table = sources.open_source(config, "speech", "train"), codes.load_codes(workdir, "speech", "train")
    assert len(table) == 2 * len(raw) and table.fields["noisy"].tolist() == [0, 1] * len(raw)
    assert table.fields["record"].tolist() == np.repeat(np.arange(len(raw)), 2).tolist()
    assert table.fields["word"][0] == raw[0]["word"] and table.fields["voice"][1] == raw[0]["voice"]
    frames = -(-len(raw[0]["audio16"]) // 1280)
    assert len(table.codes(0)) == frames and min(len(table.codes(i)) for i in range(len(table))) > 0
    assert any(table.codes(2 * i).tolist() != table.codes(2 * i + 1).tolist() for i in range(len(raw)))


def test_a_second_run_keeps_everything_and_calls_nobody(config, done):
    workdir, first = done
    before = files(workdir)
    encoders, calls = fake(config)
    report = tokenize.run(config, workdir, encoders)
    assert calls == {"images": 0, "speech": 0} and report["images"]["made"] == 0
    assert report["images"]["kept"] == first["images"]["made"] > 3 and files(workdir) == before


def test_another_tokenizer_or_a_damaged_shard_is_made_again(config, done, tmp_path):
    tokenize.run(config, tmp_path, fake(config)[0])
    path = codes.shard_path(tmp_path, "images", "train", 1, 3)
    path.write_bytes(path.read_bytes()[:-9])
    report = tokenize.run(config, tmp_path, fake(config)[0])
    assert report["images"]["made"] == 1 and report["speech"]["made"] == 0
    report = tokenize.run(config, tmp_path, fake(config, "two")[0])
    assert report["images"]["kept"] == report["speech"]["kept"] == 0


def test_a_kind_depends_on_its_own_tokenizer_alone(config, done, tmp_path):
    images = {"images": fake(config)[0]["images"]}
    report = tokenize.run(config, tmp_path, images)
    assert report.keys() == {"images"} and not codes.folder(tmp_path, "speech").exists()
    report = tokenize.run(config, tmp_path, images | {"speech": fake(config, "two")[0]["speech"]})
    assert report["images"]["made"] == 0 and report["images"]["kept"] > 0 and report["speech"]["made"] > 0


def trained(config, workdir, *parts):
    """A finished stage 'tokenizer' with some parts, each of its name's length."""
    values = {part: {"w": np.full(3, len(part), np.float32)} for part in parts}
    config.order, config.stages = ("tokenizer",), ml_collections.ConfigDict({"tokenizer": stages.default_stage()})
    config.stages.tokenizer.task = "align"
    record = {"identity": stages.stage_identity(config, "tokenizer")}
    checkpoint.finish(workdir / "tokenizer", {"params": values, "stats": {}}, record)


def test_an_encoder_needs_the_parts_of_its_kind_alone(config, tmp_path):
    c = config.copy_and_resolve_references()
    trained(c, tmp_path / "one", "audio_encoder", "audio_quantizer")
    one = tokenize.load_encoder(c, tmp_path / "one", "speech")
    with pytest.raises(InputError, match="no trained vision_encoder, vision_quantizer"):
        tokenize.tokenize(c, tmp_path / "one", ["images"])
    trained(c, tmp_path / "two", "audio_encoder", "audio_quantizer", "vision_encoder", "vision_quantizer")
    assert tokenize.load_encoder(c, tmp_path / "two", "speech").identity == one.identity
    assert tokenize.load_encoder(c, tmp_path / "two", "images").identity != one.identity
    with pytest.raises(InputError, match="codes of kind 'video'"):
        tokenize.tokenize(c, tmp_path / "two", ["video"])


def test_a_run_that_was_killed_ends_with_the_same_files(config, done, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tokenize.run(config, tmp_path, fake(config, stop_after=9)[0])
    with pytest.raises(InputError, match="no images codes"):
        codes.load_codes(tmp_path, "images", "train")
    report = tokenize.run(config, tmp_path, fake(config)[0])
    assert report["images"]["kept"] > 0 and files(tmp_path) == files(done[0])


class Damaged:
    """A source some of whose records are bad."""

    def __init__(self, source, bad):
        self.source, self.bad = source, bad

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index not in self.bad:
            return self.source[index]
        bad = self.bad[index]
        if isinstance(bad, Exception):
            raise bad
        return self.source[index] | bad


def test_bad_records_are_counted_and_named(config, tmp_path, monkeypatch):
    open_source = sources.open_source
    bad = {
        ("images", "train"): {1: OSError("image file is truncated"), 70: {"image": np.zeros((1, 5000, 3), np.uint8)}},
        ("speech", "train"): {0: {"audio16": np.zeros(9000, np.int16)}, 2: {"audio16": np.ones(3, np.int16)},
                              3: {"audio16": np.full(30_000, 900, np.int16)}},
    }
    monkeypatch.setattr(sources, "open_source", lambda c, kind, split: Damaged(open_source(c, kind, split), bad.get((kind, split), {})))
    report = tokenize.run(config, tmp_path, fake(config)[0])
    assert [line.split(":")[0] for line in report["images"]["errors"]] == ["images/train record 1", "images/train record 70"]
    lines = report["speech"]["errors"]
    assert len(lines) == 3 and "silent" in lines[0] and "3 samples" in lines[1] and "longer than one chunk" in lines[2]
    table = codes.load_codes(tmp_path, "images", "train")
    assert len(table) == len(open_source(config, "images", "train")) - 2 and 70 not in table.fields["record"]


def test_a_split_without_good_records_is_an_error(config, tmp_path, monkeypatch):
    open_source = sources.open_source
    everything = {i: OSError("gone") for i in range(999)}
    monkeypatch.setattr(sources, "open_source", lambda c, kind, split: Damaged(open_source(c, kind, split), everything))
    with pytest.raises(InputError, match="images/train: no record could be tokenised.*gone"):
        tokenize.run(config, tmp_path, fake(config)[0])


def test_impossible_settings_are_refused(config, tmp_path):
    other = config.copy_and_resolve_references()
    other.tokenize.speech_views = ("clean", "loud")
    with pytest.raises(InputError, match="speech_views"):
        tokenize.run(other, tmp_path, fake(config)[0])


def test_language_batches_open_from_shards(config, done):
    """The whole way: records, codes, documents, packs; and the documents of a row read back."""
    c = config.copy_and_resolve_references()
    stage = stages.default_stage()
    stage.task, stage.batch = "language", 3
    stage.options = ml_collections.ConfigDict({"pack": {"window": 64}, "dropout": 0.5})
    c.stages = ml_collections.ConfigDict({"pretrain": stage})
    batches = packing.open_batches(c, c.stages.pretrain, done[0])
    batch = batches.batch(2)
    assert batch["tokens"].shape == (3, 256) and len(set(batch["kind"].ravel())) > 4
    _, tokenizer = packing.open_vocabulary(c)
    one = {name: batch[name][0][batch["segment"][0] == 1] for name in ("tokens", "transcript", "codes", "text_weight")}
    assert decode(one, batches.vocabulary) and tokenizer.specials == batches.vocabulary.ids
    other = packing.open_batches(c, c.stages.pretrain, done[0]).batch(2)
    assert all((batch[name] == other[name]).all() for name in batch)
    stage.options.mixtures = 1
    c.stages = ml_collections.ConfigDict({"pretrain": stage})
    with pytest.raises(InputError, match="'mixtures' does not exist.*'mixture'"):
        packing.open_batches(c, c.stages.pretrain, done[0])


def test_notes_say_what_was_made(done):
    note = json.loads((codes.folder(done[0], "images") / "images-valid.array_record-00000-of-00001.note.json").read_text())
    assert note["records"] == done[1]["images"]["counts"]["valid"] and note["errors"] == []
