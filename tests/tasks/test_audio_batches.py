"""Speech batches: pure in the step, every clip once an epoch, clean and heard waves belong together."""

import numpy as np
import pytest

from dina.config import InputError
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
