"""The synthesiser: a pure function of its arguments, trimmed and normalised, clear about its errors."""

import builtins

import numpy as np
import pytest

from dina.config import InputError
from dina.data import espeak


def test_wave_does_not_depend_on_history():
    first, rate = espeak.synthesize("seven", "en-us", "m1")
    espeak.synthesize("elephant", "en", "f2", rate=140, pitch=70)
    again, _ = espeak.synthesize("seven", "en-us", "m1")
    assert rate == 22_050
    np.testing.assert_array_equal(first, again)


def test_speaker_repeats_its_whole_script():
    def script():
        with espeak.Speaker("en-gb-scotland", "f1") as speaker:
            return [speaker.say(word) for word in ("one", "two", "one")]

    first, again = script(), script()
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_arguments_change_the_wave():
    base, _ = espeak.synthesize("seven", "en-us", "m1", 160, 50)
    slow, _ = espeak.synthesize("seven", "en-us", "m1", 100, 50)
    high, _ = espeak.synthesize("seven", "en-us", "m1", 160, 90)
    other, _ = espeak.synthesize("seven", "en-029", "m1", 160, 50)
    assert len(slow) > 1.2 * len(base)
    assert not np.array_equal(base, high) and not np.array_equal(base, other)


def test_trimmed_and_normalised():
    wave, _ = espeak.synthesize("three", "en", "f3")
    assert wave.dtype == np.float32 and abs(np.abs(wave).max() - 0.9) < 1e-6
    assert abs(wave[0]) > 0.009 * 0.9 and abs(wave[-1]) > 0.009 * 0.9


@pytest.mark.parametrize("target", [16_000, 24_000])
def test_resampled_length(target):
    wave, rate = espeak.synthesize("five", "en-us", "m3")
    assert abs(len(espeak.resample(wave, rate, target)) - len(wave) * target / rate) <= 2


def test_every_listed_speaker_exists():
    assert len(espeak.VOICES) >= 6
    for voice in espeak.VOICES:
        espeak.synthesize("two", voice, "m1")
    for variant in espeak.VARIANTS:
        espeak.synthesize("two", "en-us", variant)


def test_unknown_voice_is_named_and_releases_the_library():
    with pytest.raises(InputError, match="en-mars"):
        espeak.synthesize("one", "en-mars")
    assert espeak.synthesize("one", "en-us")[0].size


def test_missing_wheel_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def fail(name, *rest):
        if name == "espeakng_loader":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(InputError, match="uv pip install espeakng-loader"):
        espeak.synthesize("one", "en-us")
