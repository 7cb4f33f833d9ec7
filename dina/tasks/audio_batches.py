"""Training batches of speech, shared by the stages A1 and A2.

Raw clips stay in memory as 16-bit waves; a batch is waves, not features: the mel spectrograms are computed inside the
compiled step, where they cost less than in the loader's thread. Clips are taken epoch by epoch in a shuffled order;
a batch is a pure function of (config, stage, step).

Letters: B clips, N samples at 16 kHz, M samples at 24 kHz, R records.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from dina.audio import features
from dina.audio.augment import Draw, change_speed, clip_rng, draw, overlay
from dina.config import InputError
from dina.data import phrases, sources
from dina.tasks.base import Batches

WORDS = phrases.DIGIT_WORDS + phrases.OTHER_WORDS


@dataclasses.dataclass(frozen=True)
class SpeechTable:
    """All clips of a split that fit one chunk.

    Attributes:
        waves16, waves24: int16 waves of the same clips at 16 and 24 kHz.
        word_R: index into `WORDS`, -1 for other words.
        skipped: clips left out because they are longer than a chunk.
    """

    waves16: Sequence[np.ndarray]
    waves24: Sequence[np.ndarray]
    word_R: np.ndarray
    skipped: int


def make_table(columns: Mapping[str, Sequence], max_samples: int) -> SpeechTable:
    """Picks the clips that fit.

    Args:
        columns: audio16, audio24, word: one entry per record.
        max_samples: a chunk at 16 kHz.

    Raises:
        InputError: no clip fits, or one is too short or silent; the message gives its number.
    """
    kept = [i for i, wave in enumerate(columns["audio16"]) if len(wave) <= max_samples]
    if not kept:
        raise InputError(f"speech data: none of {len(columns['audio16'])} clips fits audio.features.max_frames")
    for i in kept:
        features.check_wave(columns["audio16"][i].astype(np.float32) / 32768, f"speech record {i}")
    word_R = np.array([WORDS.index(columns["word"][i]) if columns["word"][i] in WORDS else -1 for i in kept], np.int32)
    waves16, waves24 = ([columns[name][i] for i in kept] for name in ("audio16", "audio24"))
    return SpeechTable(waves16, waves24, word_R, len(columns["audio16"]) - len(kept))


def open_table(config, split: str) -> SpeechTable:
    """The table of a prepared split ('train', 'valid', 'test')."""
    f = config.audio.features
    return make_table(sources.load_all(config, "speech", split), f.max_frames * f.hop)


def vary(wave: np.ndarray, speed: float, gain: float) -> np.ndarray:
    """int16 wave -> float32 at another speed and gain."""
    x = wave.astype(np.float32) * np.float32(gain / 32768)
    return x if speed == 1.0 else change_speed(x, speed)


class AudioBatches(Batches):
    """Clips with their augmented form.

    `batch(step)`: `wave16` [B, N] float32, what the encoder hears; `clean16` [B, N] (if asked for) and `clean24`
    [B, M] (if asked for), the same clips before noise and room, speed and gain included; `samples` [B] int32 at 16 kHz, tail
    rule applied; `word` [B] int32; `quantized` [B] float32, 0 where the step trains on continuous vectors; `example`
    [B] int32.

    Args:
        config: the experiment (uses seed and audio).
        stage: uses task (as the name of the random stream) and batch.
        table: the clips.
        clean: which clean waves to add, of 'clean16' and 'clean24'.
        augment: 'full' (see dina/audio/augment.py), or 'none'.
        continuous_steps: so many first steps have `quantized` 0.
    """

    def __init__(self, config, stage, table: SpeechTable, clean: Sequence[str], augment: str = "full", continuous_steps: int = 0):
        if augment not in ("full", "none"):
            raise ValueError(f"augment {augment!r} is not one of full, none")
        self.augment = augment
        self.audio, self.table, self.clean = config.audio, table, tuple(clean)
        self.rows = stage.batch
        self.continuous_steps = continuous_steps
        self.seed = config.seed + zlib.crc32(stage.task.encode())
        # As long as the longest clip, in whole codes: a chunk of silence behind every word would double the work.
        code = 2 * self.audio.bridge.pool * self.audio.features.hop
        self.samples = -(-max(len(wave) for wave in table.waves16) // code) * code
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.table.waves16))

    def records(self, step: int) -> np.ndarray:
        """Record numbers of the step's rows."""
        size = len(self.table.waves16)
        return np.array([self._order(i // size)[i % size] for i in range(step * self.rows, (step + 1) * self.rows)])

    def batch(self, step: int) -> dict[str, np.ndarray]:
        f, target = self.audio.features, self.audio.target
        samples24 = self.samples * target.rate // f.rate
        out = {"wave16": np.zeros((self.rows, self.samples), np.float32), "samples": np.zeros(self.rows, np.int32)}
        for name, size in (("clean16", self.samples), ("clean24", samples24)):
            if name in self.clean:
                out[name] = np.zeros((self.rows, size), np.float32)
        records = self.records(step)
        for row, record in enumerate(records):
            rng = clip_rng(self.seed, step, row)
            drawn = draw(rng, self.audio.augment) if self.augment == "full" else Draw()
            speed = max(drawn.speed, len(self.table.waves16[record]) / self.samples)  # a slower clip must still fit
            clean = features.complete(vary(self.table.waves16[record], speed, drawn.gain)[: self.samples], f)
            out["wave16"][row, : len(clean)] = overlay(rng, clean, drawn, f.rate)
            out["samples"][row] = len(clean)
            if "clean16" in self.clean:
                out["clean16"][row, : len(clean)] = clean
            if "clean24" in self.clean:
                wave = vary(self.table.waves24[record], speed, drawn.gain)[:samples24]
                out["clean24"][row, : len(wave)] = wave
        example = step * self.rows + np.arange(self.rows)
        out["word"] = self.table.word_R[records]
        out["quantized"] = np.full(self.rows, step >= self.continuous_steps, np.float32)
        return out | {"example": (example % 2**31).astype(np.int32)}
