"""Audio files of users and packages to one channel: nothing that a file says is believed before its samples are there.

The container is told by its first bytes and handed to FFmpeg (PyAV) by name, from memory: its own guessing would also try
playlists, which open other files. Frames are decoded one by one up to a limit, so a header that promises ten hours
costs nothing. Damage is an InputError; who walks a data set counts it and goes on.

Legend: N samples, C channels.
"""

from __future__ import annotations

import io

import numpy as np
import soxr
from jaxtyping import Float, Int16

from dina.config import InputError

ENDINGS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".g722")
RATES = (4000, 192_000)  # outside, a header is damaged: resampling 1 Hz to 24 kHz would fill the memory
MAX_CHANNELS = 8
MIN_SECONDS = 0.025  # one analysis window
SILENCE = 1e-4  # peak below which a 16-bit file holds at most its last three units of noise
_MISSING = 0.05  # share of the promised samples that may be missing: durations in headers are often estimates
_MP3 = (b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xfa")


def decode(data: bytes, name: str, max_seconds: float) -> tuple[Float[np.ndarray, "N"], int]:
    """Samples of an audio file.

    Args:
        data: the file's content.
        name: of the file, for messages and for `.g722`, which has no header.
        max_seconds: a longer file is refused, after that much of it.

    Returns:
        float32 mean of the channels, about [-1, 1], and the rate in Hz.

    Raises:
        InputError: empty, unknown, damaged, truncated, too long, too short, silent or not finite.
    """
    rate, wave_N = _decode(data, name, container(data, name), max_seconds)
    return check(wave_N, rate, name, max_seconds)


def check(wave_N: Float[np.ndarray, "N"], rate: int, name: str, max_seconds: float) -> tuple[Float[np.ndarray, "N"], int]:
    """The wave and its rate; raises InputError if it is too long, too short, silent or not finite."""
    if len(wave_N) > max_seconds * rate:
        raise InputError(f"audio {name}: longer than {max_seconds:g} s")
    if len(wave_N) < MIN_SECONDS * rate:
        raise InputError(f"audio {name}: {len(wave_N)} samples at {rate} Hz, at least {MIN_SECONDS} s are needed")
    peak = float(np.abs(wave_N).max())
    if not np.isfinite(peak):
        raise InputError(f"audio {name}: sample {int(np.argmin(np.isfinite(wave_N)))} is not finite")
    if peak < SILENCE:
        raise InputError(f"audio {name}: silent (peak {peak:.1e})")
    return wave_N, rate


def container(data: bytes, name: str) -> str:
    """FFmpeg's name of the container; raises InputError if the first bytes are none of those that we read."""
    if not data:
        raise InputError(f"audio {name}: it is empty (0 bytes)")
    if name.lower().endswith(".g722"):
        return "g722"
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        promised = int.from_bytes(data[4:8], "little")
        # The decoder reads a cut WAV to its end without a word. 0xFFFFFFFF and 0 stand for 'unknown' in streamed files.
        if len(data) < promised + 8 and promised not in (0, 0xFFFFFFFF):
            raise InputError(f"audio {name}: truncated, {len(data)} of {promised + 8} bytes are there")
        return "wav"
    found = {b"OggS": "ogg", b"fLaC": "flac"}.get(data[:4])
    if found is None and data[4:8] == b"ftyp":
        found = "mov"
    if found is None and (data[:3] == b"ID3" or data[:2] in _MP3):
        found = "mp3"
    if found is None:
        raise InputError(f"audio {name}: it begins with {data[:8]!r}, which is no WAV, FLAC, Ogg, MP3, M4A or .g722")
    return found


def _decode(data: bytes, name: str, form: str, max_seconds: float) -> tuple[int, np.ndarray]:
    import av  # a large library, which few programs need

    parts, there = [], 0
    try:
        with av.open(io.BytesIO(data), format=form) as file:
            if not file.streams.audio:
                raise InputError(f"audio {name}: the {form} file has no sound")
            stream = file.streams.audio[0]
            rate = stream.rate or 0
            if not RATES[0] <= rate <= RATES[1] or not 1 <= stream.channels <= MAX_CHANNELS:
                raise InputError(f"audio {name}: {stream.channels} channels at {rate} Hz; {RATES[0]} to {RATES[1]} Hz and at most"
                                 f" {MAX_CHANNELS} channels are read")
            promised = float(stream.duration * stream.time_base) * rate if stream.duration and form != "g722" else 0.0
            for frame in file.decode(stream):
                parts.append(_mono(frame))
                there += len(parts[-1])
                if there > max_seconds * rate:
                    raise InputError(f"audio {name}: longer than {max_seconds:g} s")
    except (av.FFmpegError, ValueError, OverflowError) as error:
        raise InputError(f"audio {name}: cannot be decoded ({error})") from None
    if there < (1 - _MISSING) * promised - rate * MIN_SECONDS:
        raise InputError(f"audio {name}: truncated, {there} of {promised:.0f} samples are there")
    return rate, np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _mono(frame) -> Float[np.ndarray, "N"]:
    """Mean of the channels of a decoded frame; integers are scaled to [-1, 1)."""
    x = frame.to_ndarray()
    x_CN = x if frame.format.is_planar else x.reshape(-1, frame.layout.nb_channels).T
    if x_CN.dtype == np.uint8:
        return x_CN.mean(0, dtype=np.float32) / 128 - 1
    scale = 1.0 if x_CN.dtype.kind == "f" else float(np.iinfo(x_CN.dtype).max) + 1
    return (x_CN.mean(0, dtype=np.float64) / scale).astype(np.float32)


def resample(wave_N: Float[np.ndarray, "N"], rate: int, wanted: int) -> Float[np.ndarray, "M"]:
    """The wave at another rate, band-limited (soxr, high quality)."""
    return wave_N if rate == wanted else soxr.resample(wave_N, rate, wanted, quality="HQ")


def to_int16(wave_N: Float[np.ndarray, "N"]) -> Int16[np.ndarray, "N"]:
    """16-bit samples; what is outside [-1, 1] is clipped."""
    return np.round(np.clip(wave_N, -1, 1) * 32767).astype(np.int16)
