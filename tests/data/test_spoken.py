"""Speech records: splits share no speaker, test has accents and speaker types of its own."""

import itertools

import numpy as np
import pytest

from dina.config import InputError
from dina.data import digits, espeak, phrases, spoken


def test_splits_are_disjoint_by_speaker():
    speech = spoken.default_config()
    every = {split: set(spoken.speakers(speech, split)) for split in spoken.SPLITS}
    for a, b in itertools.combinations(spoken.SPLITS, 2):
        assert not every[a] & every[b]
    seen = every["train"] | every["valid"]
    assert not {voice for voice, _ in every["test"]} & {voice for voice, _ in seen}
    assert not {variant for _, variant in every["test"]} & {variant for _, variant in seen | every["judge"]}
    assert len({voice for voice, _ in every["train"]}) >= 5


def test_held_out_accents_sound_different():
    """Same speaker type, so that only the accent differs; accents may agree on a word ('eight'), not on the digits."""
    speech = spoken.default_config()

    def digits_of(voice):
        return [espeak.synthesize(word, voice, "m1")[0] for word in phrases.DIGIT_WORDS]

    train = {voice: digits_of(voice) for voice in speech.train.voices}
    for unseen in speech.test.voices:
        words = digits_of(unseen)
        for voice, waves in train.items():
            assert sum(np.array_equal(a, b) for a, b in zip(words, waves, strict=True)) <= 1, (unseen, voice)


def test_every_speaker_is_listed():
    speech = spoken.default_config()
    for split in spoken.SPLITS:
        assert set(speech[split].voices) <= set(espeak.VOICES) and set(speech[split].variants) <= set(espeak.VARIANTS)


def test_shared_speaker_is_refused():
    speech = spoken.default_config()
    speech.test.voices, speech.test.variants = ("en-us",), ("m1",)
    with pytest.raises(InputError, match="en-us\\+m1"):
        spoken.speakers(speech, "test")


@pytest.fixture(scope="module")
def rows():
    return list(spoken.records(digits.smoke_config(), "judge"))


def test_records(rows):
    assert len(rows) == 2 * (2 * 10 + 5)
    for row in rows:
        assert row["audio16"].dtype == row["audio24"].dtype == np.int16
        assert 0.08 < len(row["audio16"]) / 16_000 <= 1.25
        assert abs(len(row["audio24"]) - 1.5 * len(row["audio16"])) <= 2
        assert (phrases.DIGIT_WORDS[row["digit"]] == row["word"]) if row["digit"] >= 0 else (
            row["word"] in phrases.OTHER_WORDS)
        assert 130 <= row["rate"] <= 210 and 30 <= row["pitch"] <= 70
    assert sorted({row["digit"] for row in rows}) == list(range(-1, 10))


def test_records_repeat(rows):
    for a, b in zip(rows, spoken.records(digits.smoke_config(), "judge"), strict=True):
        np.testing.assert_array_equal(a["audio24"], b["audio24"])


def test_long_clips_are_left_out_and_counted():
    config, dropped = digits.smoke_config(), []
    config.speech.max_seconds = 0.25
    kept = list(spoken.records(config, "judge", dropped))
    assert dropped and len(kept) + len(dropped) == 50
    assert all(len(row["audio16"]) <= 0.25 * 16_000 + 1 for row in kept)
