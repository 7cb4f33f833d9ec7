"""Speech batches: pure in the step, every clip once an epoch, clean and heard waves belong together."""

import ml_collections
import numpy as np
import pytest

from dina.config import InputError
from dina.data import clips, sources
from dina.tasks import audio_batches
from dina.tasks.audio_batches import WORDS, AudioBatches, make_table
from tests.audio import toy


@pytest.fixture(scope="module")
def table():
    return make_table(toy.columns(), 10240)


def build(table, augment="full", continuous_steps=0):
    stage = toy.stage("audio_tokens")
    return AudioBatches(toy.experiment(), stage, table, ("clean16", "clean24"), augment, continuous_steps)


def test_batch_is_a_pure_function_of_the_step(table):
    a, b = build(table), build(table)
    b.batch(0), b.batch(5)
    for name, value in a.batch(3).items():
        assert np.array_equal(value, b.batch(3)[name]), name
    assert not np.array_equal(a.batch(3)["wave16"], a.batch(4)["wave16"])


def test_every_clip_once_an_epoch(table):
    batches = build(table)
    seen = np.concatenate([batches.records(step) for step in range(3)])
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert np.array_equal(batches.batch(2)["example"], np.arange(8, 12))


def test_plain_clips_are_the_records(table):
    batches = build(table, "none")
    batch, records = batches.batch(0), batches.records(0)
    for row, record in enumerate(records):
        for name, waves in (("wave16", table.waves16), ("clean24", table.waves24)):
            n = len(waves[record])
            assert np.allclose(batch[name][row, :n], waves[record] / 32768, atol=1e-6)
            assert not np.any(batch[name][row, n:])
        assert batch["samples"][row] % 1280 == 0 and 0 <= batch["samples"][row] - len(table.waves16[record]) < 1280
    assert np.array_equal(batch["wave16"], batch["clean16"])
    words = [WORDS[i] if i >= 0 else "xylophone" for i in batch["word"]]
    assert words == [toy.columns()["word"][r] for r in records]


def test_augmented_clips_keep_their_target(table):
    batch = build(table).batch(1)
    assert not np.array_equal(batch["wave16"], batch["clean16"])
    for row, n in enumerate(batch["samples"]):
        assert not np.any(batch["wave16"][row, n:]) and not np.any(batch["clean16"][row, n:])
        clean16, clean24 = (np.abs(np.fft.rfft(batch[name][row], 1 << 16)) for name in ("clean16", "clean24"))
        assert abs(clean16.argmax() * 16000 - clean24.argmax() * 24000) / (1 << 16) < 6  # same pitch in Hz


def test_warm_up_steps_are_marked(table):
    batches = build(table, continuous_steps=2)
    assert [float(batches.batch(step)["quantized"].mean()) for step in range(4)] == [0, 0, 1, 1]


def test_long_clips_are_counted_and_bad_ones_named():
    columns = toy.columns()
    columns["audio16"] = [*columns["audio16"][:5], np.ones(20000, np.int16)]
    assert make_table(columns, 10240).skipped == 1
    columns["audio16"][2] = np.zeros(4000, np.int16)
    with pytest.raises(InputError, match="speech record 2.*silent"):
        make_table(columns, 10240)
    with pytest.raises(InputError, match="none of 6"):
        make_table(toy.columns(), 100)


# Windows: several clips a row.


def recordings(count=12):
    """Tones of 0.1 to 1.4 s; a chunk of the toy is 0.64 s."""
    rng, columns = np.random.default_rng(1), {"audio16": [], "audio24": [], "text": []}
    for number in range(count):
        seconds, hz = (rng.uniform(0.1, 0.5), 0.9, 1.4)[max(0, number - count + 3)], rng.uniform(150, 900)
        for name, rate in (("audio16", 16000), ("audio24", 24000)):
            columns[name].append((8000 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.int16))
        columns["text"].append(f"clip {number} é")
    return columns


def windows(augment="none", **options):
    config = toy.experiment()
    config.audio.batches = ml_collections.ConfigDict({"pack": "window", "gap": 0.08} | options)
    table = make_table(recordings(), 10240, "window")
    return AudioBatches(config, toy.stage("audio_tokens"), table, ("clean16", "clean24"), augment)


@pytest.mark.parametrize("augment", ["none", "full"])
def test_windows_hold_every_piece_once_an_epoch(augment):
    batches = windows(augment)
    pieces = batches.table.piece_P3
    assert len(pieces) == 10 + 2 + 3 and pieces[:, 2].max() <= 10240
    for clip, wave in enumerate(batches.table.waves16):  # nothing of a clip is lost, nothing is twice
        own = pieces[pieces[:, 0] == clip]
        assert own[0, 1] == 0 and (own[:-1, 1] + own[:-1, 2] == own[1:, 1]).all() and own[-1, 1:].sum() == len(wave)
    steps = range(12)
    rows = [row for step in steps for row in batches.windows(step)]
    seen = [piece for row in rows for piece, _ in row]
    for epoch in range(2):
        assert sorted(seen[15 * epoch : 15 * epoch + 15]) == list(range(15))
    assert len(rows) < 0.8 * len(seen)  # rows do hold several
    again = windows(augment)
    again.batch(7)
    for name, value in batches.batch(2).items():
        assert np.array_equal(value, again.batch(2)[name]), name


def test_pieces_lie_one_after_the_other_with_a_gap():
    batches = windows()
    for step in range(3):
        batch = batches.batch(step)
        assert batch["wave16"].shape == (4, 10240) and batch["clean24"].shape == (4, 15360)
        for row, pieces in enumerate(batches.windows(step)):
            at = 0
            for piece, _ in pieces:
                for name, rate in (("wave16", 16000), ("clean24", 24000)):
                    wave, first = batches.table.piece(piece, rate) / np.float32(32768), at * rate // 16000
                    there = batch[name][row, first : first + len(wave)]
                    assert np.allclose(there, wave[: len(there)], atol=1e-6) and len(wave) - len(there) <= 1
                size = -(-len(batches.table.piece(piece, 16000)) // 1280) * 1280
                assert not batch["wave16"][row, at + size : at + size + 1280].any()
                at += size + 1280
            assert batch["samples"][row] == at - 1280 <= 10240
            assert not batch["wave16"][row, at - 1280 :].any()
            assert batch["word"][row] == -1


def test_augmented_windows_keep_both_rates_together():
    batches = windows("full")
    lone = [(step, row) for step in range(6) for row, pieces in enumerate(batches.windows(step)) if len(pieces) == 1]
    for step, row in lone[:5]:
        batch = batches.batch(step)
        tones = [np.abs(np.fft.rfft(batch[name][row], 1 << 16)).argmax() * rate for name, rate in (("clean16", 16000), ("clean24", 24000))]
        assert abs(tones[0] - tones[1]) / (1 << 16) < 6
        last = np.flatnonzero(batch["clean16"][row])[-1]
        assert abs(last * 1.5 - np.flatnonzero(batch["clean24"][row])[-1]) < 8 and last < batch["samples"][row]


def test_texts_come_as_bytes_where_all_of_the_row_is_known():
    batches = windows(text_bytes=24)
    found = 0
    for step in range(3):
        text_BC = batches.batch(step)["text"]
        assert text_BC.shape == (4, 24)
        for row, pieces in zip(text_BC, batches.windows(step), strict=True):
            whole = [batches.table.piece_P3[piece, 0] < 10 for piece, _ in pieces]
            said = " ".join(f"clip {piece} é" for piece, _ in pieces) if all(whole) else ""
            said = said if len(said.encode()) <= 24 else ""
            assert bytes(row[row >= 0].astype(np.uint8)).decode() == said
            assert (row[len(said.encode()) :] == -1).all()
            found += bool(said)
    assert found > 2


def test_spec_augment_hides_runs_and_leaves_the_rest():
    spec = {"times": 2, "time_frames": 10, "bands": 1, "band_width": 8}
    batch = windows("full", spec=spec).batch(1)
    time, band = batch["keep_time"], batch["keep_band"]
    assert time.shape == (4, 64) and band.shape == (4, 80)
    assert (~time).sum(1).max() <= 20 and (~band).sum(1).max() <= 8 and (~time).any() and (~band).any()
    mel = np.random.default_rng(0).normal(size=(4, 64, 80)).astype(np.float32)
    mel[:, 50:] = 0  # beyond the clip
    hidden = np.asarray(audio_batches.hide(mel, batch))
    keep = time[:, :, None] & band[:, None, :]
    assert np.array_equal(hidden[keep], mel[keep])
    for row in range(4):
        assert np.allclose(hidden[row, :50][~keep[row, :50]], mel[row, :50].mean(), atol=1e-5)
    assert (hidden[:, 50:] == 0).all()
    assert audio_batches.hide(mel, windows("none", spec=spec).batch(1)) is mel  # what is not trained on is whole
    assert "keep_time" not in windows("full").batch(1)


def test_clips_on_disk_give_the_same_batches(tmp_path, monkeypatch):
    columns = recordings()
    with clips.Writer(tmp_path) as writer:
        for number, wave in enumerate(columns["audio24"]):
            writer.add("train", clips.About(str(number), columns["text"][number]), clips.pack(wave / np.float32(32767), 24000))
    folder = type("Folder", (), {"KINDS": ("speech",), "cache_path": lambda self, config, data_dir=None: tmp_path,
                                 "open_records": lambda self, config, kind, split, data_dir=None, skip=(): clips.Clips(tmp_path, split)})()
    monkeypatch.setattr(sources, "data_set", lambda config: folder)
    made = []
    for read in ("memory", "disk"):
        config = toy.experiment()
        config.audio.batches = ml_collections.ConfigDict({"pack": "window", "read": read, "text_bytes": 40})
        table = audio_batches.open_table(config, "train")
        made.append(AudioBatches(config, toy.stage("audio_tokens"), table, ("clean24",)).batch(1))
    for name, value in made[0].items():
        assert np.array_equal(value, made[1][name]), name
    config.audio.batches.pack = "clip"
    with pytest.raises(InputError, match="audio.batches.read"):
        audio_batches.open_table(config, "train")


def test_unknown_options_are_named():
    for section, message in (
        ({"packs": "clip"}, "audio.batches"), ({"spec": {"time": 1}}, "audio.batches.spec"), ({"pack": "row"}, "audio.batches.pack"), ({"read": "net"}, "audio.batches.read"),
    ):  # fmt: skip
        config = toy.experiment()
        config.audio.batches = ml_collections.ConfigDict(section)
        with pytest.raises(InputError, match=message):
            audio_batches.options_of(config.audio)
