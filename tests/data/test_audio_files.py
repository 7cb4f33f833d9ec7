"""Audio files: every format gives the same sound, and hostile ones are refused at the price of what is in them."""

import struct
import tracemalloc

import numpy as np
import pytest

from dina.config import InputError
from dina.data import audio_files
from tests.data.sounds import encode, peak_hz, tone


def read(data, name="a.wav", max_seconds=10.0):
    return audio_files.decode(data, name, max_seconds)


@pytest.mark.parametrize("form,subtype,rate", [("WAV", "PCM_16", 16000), ("WAV", "PCM_24", 48000), ("WAV", "PCM_U8", 8000),
                                               ("WAV", "FLOAT", 22050), ("FLAC", "PCM_16", 24000), ("OGG", "VORBIS", 44100),
                                               ("OGG", "OPUS", 48000), ("MP3", "MPEG_LAYER_III", 16000)])
def test_every_format_gives_the_tone(form, subtype, rate):
    wave = tone(0.5, rate)
    found, found_rate = read(encode(wave, rate, form, subtype), "tone.any")
    assert found_rate == rate and found.dtype == np.float32
    assert abs(len(found) - len(wave)) <= rate * {"MP3": 0.1, "OGG": 0.01}.get(form, 0)  # encoders pad, decoders trim
    assert abs(peak_hz(found, rate) - 300) < 5 and 0.35 < np.abs(found).max() < 0.46
    if subtype.startswith("PCM_") and subtype != "PCM_U8":
        np.testing.assert_allclose(found, wave, atol=2**-15)


def test_channels_are_averaged():
    wave = tone()
    both = np.stack([wave, np.zeros_like(wave)], 1)
    for form, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16")):
        np.testing.assert_allclose(read(encode(both, form=form, subtype=subtype))[0], wave / 2, atol=2**-15)


def test_g722_has_no_header_and_goes_by_its_name():
    data = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()  # 4 bits a sample
    wave, rate = read(data, "prompt.G722")
    assert rate == 16000 and len(wave) == 8000
    with pytest.raises(InputError, match="no WAV"):
        read(data, "prompt.bin")


@pytest.mark.parametrize("data,message", [
    (b"", "empty"),
    (b"#EXTM3U\nfile:///etc/passwd\n", "begins with"),
    (b"ffconcat version 1.0\nfile /etc/passwd\n", "begins with"),
    (b"RIFF\x08\x00\x00\x00WAVEfmt ", "cannot be decoded|at least"),
    (b"OggS" + bytes(100), "cannot be decoded"),
    (b"fLaC" + bytes(100), "cannot be decoded|channels at"),
    (b"ID3" + bytes(100), "cannot be decoded|at least"),
])  # fmt: skip
def test_wrong_magic_and_rubbish_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        read(data)


@pytest.mark.parametrize("wave,message", [
    (np.where(np.arange(8000) == 4000, np.nan, tone()).astype(np.float32), "sample 4000 is not finite"),
    (np.where(np.arange(8000) == 4000, np.inf, tone()).astype(np.float32), "not finite"),
    (np.zeros(8000, np.float32), "silent"), (tone(0.01), "at least 0.025 s"), (tone(10.5), "longer than 10 s"),
])
def test_sound_that_is_no_use_is_refused(wave, message):
    with pytest.raises(InputError, match=message):
        read(encode(wave, subtype="FLOAT"))


def wav_header(rate=16000, seconds=36000):
    """Ten hours promised, one second there."""
    size = rate * 2 * seconds
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", size + 36, b"WAVE", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16, b"data", size)


def test_a_header_that_promises_ten_hours_costs_nothing():
    data = wav_header() + (tone(1.0) * 32767).astype("<i2").tobytes()
    read(encode(tone()))  # the library is loaded
    tracemalloc.start()
    with pytest.raises(InputError, match="truncated, 32044 of 1152000044 bytes"):
        read(data)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_cut_files_are_refused():
    for form, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16")):
        data = encode(tone(2.0) + 0.1 * np.random.default_rng(0).normal(size=32000).astype(np.float32), form=form, subtype=subtype)
        with pytest.raises(InputError, match="truncated|cannot be decoded"):
            read(data[: len(data) // 2])


def test_absurd_rates_are_refused_before_anything_is_resampled():
    for rate in (1, 1000, 4_000_000):
        with pytest.raises(InputError, match=f"at {rate} Hz"):
            read(wav_header(rate, 1) + bytes(2 * rate))


def test_resampling_keeps_the_tone_and_the_time():
    wave = audio_files.resample(tone(1.0, 22050), 22050, 24000)
    assert abs(len(wave) - 24000) <= 1 and abs(peak_hz(wave, 24000) - 300) < 2
    assert audio_files.resample(wave, 24000, 24000) is wave


def test_sixteen_bits_clip_instead_of_wrapping():
    assert audio_files.to_int16(np.array([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])).tolist() == [-32767, -32767, 0, 16384, 32767, 32767]
