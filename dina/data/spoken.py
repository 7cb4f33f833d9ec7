"""Spoken words: the speech records of the embedded default.

A speaker is a (voice, variant) of espeak-ng. Splits share no speaker: `test` has accents and speaker types that no
other split has, `judge` (which trains only the judge's recogniser) has speaker types of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from dina.config import InputError
from dina.data import espeak, phrases

SPLITS = ("train", "valid", "test", "judge")
RATE_16, RATE_24 = 16_000, 24_000
# en-us-nyc is not used: seven of its digit words are sample for sample those of en-us, so it would be no unseen accent.
# en-029 is in training: it says 'three' as 'tree', which nobody could name right without having heard the accent.
_TRAIN_VOICES = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029")


def default_config() -> ml_collections.ConfigDict:
    """Speakers of each split, how often each says every digit word, and how many of the other words it says.

    Rate is in words per minute and pitch in espeak units (50 = the speaker's own), both drawn uniformly.
    """
    return ml_collections.ConfigDict({
        "seed": 3, "rate": (130, 210), "pitch": (30, 70), "max_seconds": 1.25,
        "train": {"voices": _TRAIN_VOICES, "digits": 4, "others": len(phrases.OTHER_WORDS),
                  "variants": ("m1", "m3", "m4", "m5", "m8", "f1", "f2", "f3", "adam", "linda", "michel")},
        "valid": {"voices": _TRAIN_VOICES, "digits": 2, "others": 20, "variants": ("m2", "f4")},
        "test": {"voices": ("en-gb-x-gbclan", "en-gb-x-gbcwmd"), "digits": 5, "others": len(phrases.OTHER_WORDS),
                 "variants": ("m6", "f5", "edward", "anika")},
        "judge": {"voices": _TRAIN_VOICES, "digits": 4, "others": 40,
                  "variants": ("m7", "john", "Denis", "belinda", "pablo")},
    })


def speakers(config: ml_collections.ConfigDict, split: str) -> list[tuple[str, str]]:
    """(voice, variant) of every speaker of `split`, in a fixed order.

    Raises:
        InputError: a speaker belongs to another split too.
    """
    every = {name: [(voice, variant) for voice in config[name].voices for variant in config[name].variants]
             for name in SPLITS}
    for name in SPLITS:
        shared = set(every[split]) & set(every[name])
        if name != split and shared:
            raise InputError(f"config key data.speech: splits {split!r} and {name!r} share the speaker"
                             f" {'+'.join(min(shared))}; splits must be disjoint by (voice, variant)")
    return every[split]


def script(config: ml_collections.ConfigDict, split: str, speaker: tuple[str, str]) -> list[tuple[str, int, int, int]]:
    """What one speaker says: (word, digit or -1, rate, pitch) in order, by a seed of the speaker's own."""
    rng = np.random.default_rng((config.seed, zlib.crc32("+".join(speaker).encode())))
    others = [phrases.OTHER_WORDS[i] for i in rng.permutation(len(phrases.OTHER_WORDS))[:config[split].others]]
    lines = [(word, digit) for _ in range(config[split].digits) for digit, word in enumerate(phrases.DIGIT_WORDS)]
    lines += [(word, -1) for word in others]
    return [(word, digit, int(rng.integers(config.rate[0], config.rate[1] + 1)),
             int(rng.integers(config.pitch[0], config.pitch[1] + 1))) for word, digit in lines]


def records(config: ml_collections.ConfigDict, split: str,
            dropped: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the speech records of a split.

    A clip over `max_seconds` is spoken again half as fast again; one that is still too long is left out.

    Args:
        config: the data config (`speech`).
        split: one of SPLITS.
        dropped: receives the words left out.
    """
    speech = config.speech
    for speaker in speakers(speech, split):
        with espeak.Speaker(*speaker) as voice:
            for word, digit, rate, pitch in script(speech, split, speaker):
                wave = voice.say(word, rate, pitch)
                if len(wave) > speech.max_seconds * voice.rate:
                    rate = round(1.5 * rate)
                    wave = voice.say(word, rate, pitch)
                if len(wave) > speech.max_seconds * voice.rate:
                    if dropped is not None:
                        dropped.append(f"{word} ({voice.name})")
                    continue
                yield {"audio16": espeak.to_int16(espeak.resample(wave, voice.rate, RATE_16)),
                       "audio24": espeak.to_int16(espeak.resample(wave, voice.rate, RATE_24)),
                       "word": word, "digit": digit, "voice": voice.name, "pitch": pitch, "rate": rate}
