"""Long recordings cut where nobody speaks.

A frame is silent if it is `below_db` under the recording's loudest frames, so that a quiet recording is cut as a loud one is, or
under the noise of 16-bit samples. A pause is `pause` seconds of such frames. Pieces longer than `longest` with no pause in them are
cut at the quietest frame of their last third. Legend: N samples, F frames.
"""

from __future__ import annotations

import ml_collections
import numpy as np
from jaxtyping import Bool, Float

FRAME = 0.02  # seconds
_LOUD = 99.9  # percentile of the levels: an hour with some seconds of speech has those, and a click is not enough
_FLOOR_DB = -80.0


def default_config() -> ml_collections.ConfigDict:
    """Seconds, and decibels below the loud frames. `edge` of the pause stays at both ends of a piece."""
    return ml_collections.ConfigDict({"below_db": 40.0, "pause": 0.3, "edge": 0.1, "shortest": 0.4, "longest": 30.0})


def silent_frames(wave_N: Float[np.ndarray, "N"], rate: int, below_db: float) -> tuple[Bool[np.ndarray, "F"], np.ndarray]:
    """(which frames are silent, level of each in dB); a last part of a frame is left out."""
    size = round(FRAME * rate)
    frames = wave_N[: len(wave_N) // size * size].reshape(-1, size)
    level_F = 10 * np.log10(np.mean(frames.astype(np.float64) ** 2, axis=1) + 1e-20)
    return level_F < max(_FLOOR_DB, np.percentile(level_F, _LOUD) - below_db), level_F


def cut(wave_N: Float[np.ndarray, "N"], rate: int, options: ml_collections.ConfigDict) -> list[tuple[int, int]]:
    """(first, end) samples of the pieces of a recording, in order; pauses are left out, and so is what is too short.

    A recording no longer than `longest` is one piece, untouched.
    """
    if len(wave_N) <= options.longest * rate:
        return [(0, len(wave_N))]
    silent_F, level_F = silent_frames(wave_N, rate, options.below_db)
    size, count = round(FRAME * rate), len(silent_F)
    pause, edge = max(1, round(options.pause / FRAME)), round(options.edge / FRAME)
    most = max(3, int(options.longest / FRAME))
    pieces = []
    for first, end in _spoken(silent_F, pause):
        first, end = max(0, first - edge), min(count, end + edge)
        while end - first > most:
            # The last third, so that pieces are not cut far shorter than they may be.
            stop = first + most - most // 3 + int(np.argmin(level_F[first + most - most // 3 : first + most]))
            pieces.append((first, stop))
            first = stop
        pieces.append((first, end))
    return [(first * size, end * size) for first, end in pieces if (end - first) * FRAME >= options.shortest]


def _spoken(silent_F: Bool[np.ndarray, "F"], pause: int) -> list[tuple[int, int]]:
    """Runs of frames between pauses; shorter silences belong to the speech around them."""
    loud = np.flatnonzero(~silent_F)
    if not len(loud):
        return []
    breaks = np.flatnonzero(np.diff(loud) > pause)
    starts, ends = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(loud) - 1]])
    return [(int(loud[a]), int(loud[b]) + 1) for a, b in zip(starts, ends, strict=True)]
