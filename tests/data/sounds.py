"""Audio files for tests: tones in the formats that users have."""

import io

import numpy as np
import soundfile


def tone(seconds=0.5, rate=16000, hz=300.0, level=0.4):
    """float32 sine."""
    return (level * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encode(wave, rate=16000, form="WAV", subtype=None):
    """Bytes of a file of [N] or [N, C] samples."""
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=form, subtype=subtype)
    return out.getvalue()


def peak_hz(wave, rate):
    """The loudest frequency."""
    return np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)
