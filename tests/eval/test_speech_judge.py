"""The judge of spoken words: right on voices it never heard, robust to noise, deaf to silence."""

import sys

import numpy as np
import pytest

from dina.data import espeak
from dina.data.phrases import DIGIT_WORDS
from dina.eval import speech_judge

OTHERS = ("garden", "window")


def clips(speakers, repeats):
    rng = np.random.default_rng(len(speakers))
    found, words = [], []
    for voice, variant in speakers:
        with espeak.Speaker(voice, variant) as speaker:
            for word in (*DIGIT_WORDS, *OTHERS) * repeats:
                found.append((speaker.say(word, int(rng.integers(140, 210)), int(rng.integers(35, 65))), speaker.rate))
                words.append(word)
    return found, words


@pytest.fixture(scope="module")
def judge():
    accents = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp")
    return speech_judge.SpeechJudge(*clips([(a, v) for a in accents for v in ("m7", "john", "belinda")], 2))


@pytest.fixture(scope="module")
def unseen():
    return clips([("en-us-nyc", "m3"), ("en-gb-x-gbclan", "f2")], 2)


def test_hears_unseen_voices_and_survives_noise(judge, unseen):
    found, words = unseen
    rng = np.random.default_rng(0)
    assert judge.ceiling(found, words)["value"] > 0.85
    assert judge.ceiling(found, words, lambda clip: speech_judge.noisy(clip, 20.0, rng))["value"] > 0.75


def test_a_judge_among_few_words_knows_only_these(judge, unseen):
    found, words = unseen
    digits = judge.among(DIGIT_WORDS)
    assert sorted(digits.words) == sorted(DIGIT_WORDS) and len(judge.words) == 12
    assert set(digits.predict(found)) <= set(DIGIT_WORDS)
    keep = [i for i, word in enumerate(words) if word in DIGIT_WORDS]
    assert digits.ceiling([found[i] for i in keep], [words[i] for i in keep])["value"] > 0.85
    with pytest.raises(ValueError, match="no clips of at least two"):
        judge.among(("yesterday",))


def test_features_ignore_level_surrounding_silence_and_rate(unseen):
    wave, rate = unseen[0][0]
    base = speech_judge.features((wave, rate))
    louder = speech_judge.features((0.1 * wave, rate))
    padded = speech_judge.features((np.pad(wave, rate // 4), rate))
    other = speech_judge.features(unseen[0][3])
    far = np.linalg.norm(base - other)
    assert np.linalg.norm(base - louder) < 0.01 * far
    assert np.linalg.norm(base - padded) < 0.35 * far
    again = speech_judge.features((espeak.resample(wave, rate, 24000), 24000))
    assert np.linalg.norm(base - again) < 0.1 * far


def test_silent_and_empty_clips_do_not_crash(judge):
    assert len(judge.predict([(np.zeros(8000, np.float32), 16000), (np.zeros(3, np.float32), 16000)])) == 2
    assert judge.predict([]) == []


def test_noise_has_the_stated_level():
    wave = np.sin(np.arange(16000) / 5)
    loud, _ = speech_judge.noisy((wave, 16000), 20.0, np.random.default_rng(0))
    assert 10 * np.log10(np.mean(wave**2) / np.mean((loud - wave) ** 2)) == pytest.approx(20, abs=0.2)


def test_pocketsphinx_hears_most_digits_in_any_order_and_no_word_in_silence(unseen):
    pytest.importorskip("pocketsphinx")
    sphinx = speech_judge.PocketSphinx(DIGIT_WORDS)
    keep = [(clip, word) for clip, word in zip(*unseen, strict=True) if word in DIGIT_WORDS][:20]
    found = [clip for clip, _ in keep]
    heard = sphinx.predict(found)
    assert speech_judge.accuracy(heard, [word for _, word in keep])["value"] > 0.6
    assert sphinx.predict(found[::-1])[::-1] == heard
    assert sphinx.predict([(np.zeros(8000, np.float32), 16000)]) == [None]


def test_without_pocketsphinx_the_reason_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(ImportError):
        speech_judge.PocketSphinx(DIGIT_WORDS)
