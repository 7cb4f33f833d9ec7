"""Training batches of speech, shared by the stages A1 and A2.

A batch is waves, not features: the mel spectrograms are computed inside the compiled step, where they cost less than in
the loader's thread. Clips are taken epoch by epoch in a shuffled order; a batch is a pure function of (config, stage, step).
A row is one clip, or a window that several clips fill (`config.audio.batches`, all of it optional): recordings of people are
of all lengths, and a row as long as the longest would mostly be silence.

Letters: B rows, N samples at 16 kHz, M samples at 24 kHz, T mel frames, K mel bands, C bytes, P pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32
from ml_collections import ConfigDict

from dina.audio import features
from dina.audio.augment import Draw, change_speed, clip_rng, draw, overlay
from dina.config import InputError, check_name
from dina.data import phrases, sources
from dina.tasks.base import Batches
from dina.tasks.vision_batches import pack_rows

WORDS = phrases.DIGIT_WORDS + phrases.OTHER_WORDS
_PLAN, _SPEC, _CLIP = 1, 2, 3  # random streams; numpy pads seeds with zeros, so none may end in one
_PIECES = 64  # most clips of a window


def default_config() -> ConfigDict:
    """What `config.audio.batches` may hold.

    `pack`: a row is a 'clip' (longer ones than a chunk are skipped), or a 'window' of one chunk filled with clips (longer ones
    are cut in equal parts), with `gap` seconds of silence between. `read`: clips are held in 'memory', or read from 'disk'
    when they are needed. `spec` (SpecAugment, Park et al. 2019): in a row, `times` runs of at most `time_frames` mel frames and
    `bands` runs of at most `band_width` bands are hidden from the encoder. `text_bytes`: C, 0 for no texts.
    """
    return ConfigDict({"pack": "clip", "gap": 0.16, "read": "memory", "text_bytes": 0,
                       "spec": {"times": 0, "time_frames": 20, "bands": 0, "band_width": 8}})


def options_of(audio: ConfigDict) -> ConfigDict:
    """`audio.batches` over the defaults.

    Raises:
        InputError: an unknown key or choice.
    """
    options, given = default_config(), audio.get("batches", ConfigDict())
    for key in given:
        check_name(key, options, "config section audio.batches: key")
    for key in given.get("spec", ()):
        check_name(key, options.spec, "config section audio.batches.spec: key")
    options.update(given)
    check_name(options.pack, ("clip", "window"), "config key audio.batches.pack: choice")
    check_name(options.read, ("memory", "disk"), "config key audio.batches.read: choice")
    return options


@dataclasses.dataclass(frozen=True)
class SpeechTable:
    """The clips of a split, or pieces of them.

    Attributes:
        waves16, waves24: int16 waves of the same clips at 16 and 24 kHz.
        word_R: index into `WORDS`, -1 for other words.
        skipped: clips left out because they are longer than a chunk.
        texts: transcripts, '' where unknown.
        piece_P3: clip, first sample and samples (at 16 kHz) of what is taken as one.
    """

    waves16: Sequence[np.ndarray]
    waves24: Sequence[np.ndarray]
    word_R: np.ndarray
    skipped: int
    texts: Sequence[str]
    piece_P3: Int32[np.ndarray, "P 3"]

    def piece(self, number: int, rate: int) -> np.ndarray:
        """int16 samples of a piece at 16 or 24 kHz."""
        clip, first, count = (int(x) for x in self.piece_P3[number])
        waves = {16_000: self.waves16, 24_000: self.waves24}[rate]
        return waves[clip][first * rate // 16_000 : (first + count) * rate // 16_000 + (rate > 16_000)]

    def text(self, number: int) -> str:
        """What is said in a piece; '' for a part of a clip."""
        clip, first, _ = self.piece_P3[number]
        alone = first == 0 and (number + 1 == len(self.piece_P3) or self.piece_P3[number + 1, 0] != clip)
        return self.texts[clip] if alone else ""


class _OnDisk(Sequence):
    """One rate of a source's clips, decoded when asked for."""

    def __init__(self, source: sources.Source, field: str):
        self._source, self._field = source, field

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._source[index][self._field]


def make_table(columns: Mapping[str, Sequence], max_samples: int, pack: str = "clip") -> SpeechTable:
    """Picks the clips that fit, or cuts those that do not.

    Args:
        columns: audio16, audio24, and if there are `word` and `text`: one entry per record.
        max_samples: a chunk at 16 kHz.
        pack: as of `default_config`.

    Raises:
        InputError: no clip fits, or one is too short or silent; the message gives its number.
    """
    lengths = [len(wave) for wave in columns["audio16"]]
    kept = [i for i, length in enumerate(lengths) if length <= max_samples or pack == "window"]
    if not kept:
        raise InputError(f"speech data: none of {len(lengths)} clips fits audio.features.max_frames")
    for i in kept:
        features.check_wave(columns["audio16"][i].astype(np.float32) / 32768, f"speech record {i}")
    waves16, waves24 = ([columns[name][i] for i in kept] for name in ("audio16", "audio24"))
    words, texts = ([columns[name][i] for i in kept] if name in columns else [""] * len(kept) for name in ("word", "text"))
    pieces = cut([lengths[i] for i in kept], max_samples)
    return SpeechTable(waves16, waves24, word_numbers(words), len(lengths) - len(kept), texts, pieces)


def word_numbers(words: Sequence[str]) -> Int32[np.ndarray, "R"]:
    """Index of each word in `WORDS`, -1 for others."""
    known = {word: number for number, word in enumerate(WORDS)}
    return np.array([known.get(word, -1) for word in words], np.int32)


def cut(lengths: Sequence[int], max_samples: int) -> Int32[np.ndarray, "P 3"]:
    """Clips in as few equal parts of at most `max_samples` as possible: (clip, first sample, samples)."""
    pieces = []
    for clip, length in enumerate(lengths):
        parts = -(-length // max_samples)
        edges = np.linspace(0, length, parts + 1).astype(int)
        pieces += [(clip, first, end - first) for first, end in zip(edges, edges[1:])]
    return np.array(pieces, np.int32).reshape(-1, 3)


def open_table(config, split: str) -> SpeechTable:
    """The table of a prepared split ('train', 'valid', 'test').

    Raises:
        InputError: as `make_table`, or the data set does not know the lengths of clips that stay on disk.
    """
    f, options = config.audio.features, options_of(config.audio)
    if options.read == "memory":
        return make_table(sources.load_all(config, "speech", split), f.max_frames * f.hop, options.pack)
    source = sources.open_source(config, "speech", split)
    if source.notes is None or options.pack != "window":
        raise InputError("config key audio.batches.read: 'disk' goes with pack='window' and a data set of clips (dina/data/clips.py)")
    words, texts = ([note.get(name, "") for note in source.notes] for name in ("word", "text"))
    pieces = cut([note["samples16"] for note in source.notes], f.max_frames * f.hop)
    return SpeechTable(_OnDisk(source, "audio16"), _OnDisk(source, "audio24"), word_numbers(words), 0, texts, pieces)


def vary(wave: np.ndarray, speed: float, gain: float) -> np.ndarray:
    """int16 wave -> float32 at another speed and gain."""
    x = wave.astype(np.float32) * np.float32(gain / 32768)
    return x if speed == 1.0 else change_speed(x, speed)


def hide(mel_BTM: Float[Array, "B T K"], batch: Mapping[str, Array]) -> Float[Array, "B T K"]:
    """What SpecAugment leaves of the encoder's mel: hidden frames and bands have the mean of the row's own frames, and what is beyond
    them stays zero. Without masks, the mel."""
    if "keep_time" not in batch:
        return mel_BTM
    keep_BTM = batch["keep_time"][:, : mel_BTM.shape[1], None] & batch["keep_band"][:, None, :]
    own_BT1 = jnp.any(mel_BTM != 0, -1, keepdims=True)
    count_B11 = jnp.maximum(jnp.sum(own_BT1, (1, 2), keepdims=True) * mel_BTM.shape[2], 1)
    return jnp.where(keep_BTM | ~own_BT1, mel_BTM, jnp.sum(mel_BTM, (1, 2), keepdims=True) / count_B11)


def draw_runs(rng: np.random.Generator, size: int, runs: int, longest: int) -> Bool[np.ndarray, "size"]:
    """False in `runs` runs of 0 to `longest` places."""
    keep = np.ones(size, bool)
    for _ in range(runs):
        width = int(rng.integers(0, min(longest, size) + 1))
        first = int(rng.integers(0, size - width + 1))
        keep[first : first + width] = False
    return keep


class AudioBatches(Batches):
    """Clips with their augmented form.

    `batch(step)`: `wave16` [B, N] float32, what the encoder hears; `clean16` [B, N] (if asked for) and `clean24`
    [B, M] (if asked for), the same clips before noise and room, speed and gain included; `samples` [B] int32 at 16 kHz, tail
    rule applied; `word` [B] int32, -1 if there are several; `quantized` [B] float32, 0 where the step trains on continuous
    vectors; `example` [B] int32. With SpecAugment `keep_time` [B, T] and `keep_band` [B, K], for `hide`; with
    `text_bytes` `text` [B, C] int32, UTF-8 of what is said, -1 behind it, and nothing where a part of it is unknown or does not fit.

    Args:
        config: the experiment (uses seed and audio).
        stage: uses task (as the name of the random stream) and batch.
        table: the clips.
        clean: which clean waves to add, of 'clean16' and 'clean24'.
        augment: 'full' (see dina/audio/augment.py, and `spec`), or 'none'.
        continuous_steps: so many first steps have `quantized` 0.
    """

    def __init__(self, config, stage, table: SpeechTable, clean: Sequence[str], augment: str = "full", continuous_steps: int = 0):
        if augment not in ("full", "none"):
            raise ValueError(f"augment {augment!r} is not one of full, none")
        self.augment, self.options = augment, options_of(config.audio)
        self.audio, self.table, self.clean = config.audio, table, tuple(clean)
        self.rows = stage.batch
        self.continuous_steps = continuous_steps
        self.seed = config.seed + zlib.crc32(stage.task.encode())
        self.code = 2 * self.audio.bridge.pool * self.audio.features.hop  # samples
        # As long as the longest clip, in whole codes: a chunk of silence behind every word would double the work.
        longest = int(table.piece_P3[:, 2].max())
        if self.options.pack == "window":
            longest = self.audio.features.max_frames * self.audio.features.hop
        self.samples = -(-longest // self.code) * self.code
        self.gap = round(self.options.gap * self.audio.features.rate / self.code)  # codes
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)
        self._windows = functools.lru_cache(maxsize=2)(self._plan)
        self._ends = [0]  # rows of all epochs up to one

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.table.piece_P3))

    def _plan(self, epoch: int) -> list[list[tuple[int, float]]]:
        """(piece, speed) of every window of an epoch."""
        rng, order = np.random.default_rng([self.seed, epoch, _PLAN]), self._order(epoch)
        count, a = len(order), self.audio.augment
        speed_P = np.where(rng.random(count) < a.speed_share, rng.uniform(*a.speed, count), 1.0)
        lengths_P = self.table.piece_P3[:, 2]
        speed_P = np.maximum(speed_P if self.augment == "full" else 1.0, lengths_P / self.samples)  # a slower one must still fit
        codes_P = np.ceil(np.ceil(lengths_P / speed_P) / self.code).astype(np.int32)
        room = self.samples // self.code
        table = pack_rows(np.minimum(codes_P, room) + self.gap, order.astype(np.int32), room + self.gap, _PIECES)
        rows = [[(int(p), float(speed_P[p])) for p in row if p >= 0] for row in table]
        return [rows[i] for i in rng.permutation(len(rows))]

    def records(self, step: int) -> np.ndarray:
        """Piece numbers of the step's rows where a row is a clip."""
        size = len(self.table.piece_P3)
        return np.array([self._order(i // size)[i % size] for i in range(step * self.rows, (step + 1) * self.rows)])

    def windows(self, step: int) -> list[list[tuple[int, float]]]:
        """(piece, speed) of the step's rows where a row is a window."""
        first, last = step * self.rows, (step + 1) * self.rows
        while self._ends[-1] < last:
            self._ends.append(self._ends[-1] + len(self._windows(len(self._ends) - 1)))
        epochs = np.searchsorted(self._ends, np.arange(first, last), side="right") - 1
        return [self._windows(int(e))[number - self._ends[e]] for number, e in zip(range(first, last), epochs, strict=True)]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        out = {"wave16": np.zeros((self.rows, self.samples), np.float32), "samples": np.zeros(self.rows, np.int32)}
        for name in self.clean:
            size = self.samples * (self.audio.target.rate if name == "clean24" else self.audio.features.rate)
            out[name] = np.zeros((self.rows, size // self.audio.features.rate), np.float32)
        windows = self.options.pack == "window"
        rows = self.windows(step) if windows else [[(int(piece), None)] for piece in self.records(step)]
        for row, pieces in enumerate(rows):
            at = 0
            for slot, (piece, speed) in enumerate(pieces):
                rng = np.random.default_rng([self.seed, step, row, slot, _CLIP]) if windows else clip_rng(self.seed, step, row)
                end = self._fill(out, row, at, piece, speed, rng)
                out["samples"][row] = end
                at = (-(-end // self.code) + self.gap) * self.code
        example = step * self.rows + np.arange(self.rows)
        clips = [self.table.piece_P3[row[0][0], 0] if len(row) == 1 else -1 for row in rows]
        out["word"] = np.array([self.table.word_R[clip] if clip >= 0 else -1 for clip in clips], np.int32)
        out["quantized"] = np.full(self.rows, step >= self.continuous_steps, np.float32)
        return out | self._spec(step) | self._texts(rows) | {"example": (example % 2**31).astype(np.int32)}

    def _fill(self, out, row: int, at: int, piece: int, speed: float | None, rng: np.random.Generator) -> int:
        """Puts a piece into a row from sample `at` on; returns its end."""
        f, target = self.audio.features, self.audio.target
        drawn = draw(rng, self.audio.augment) if self.augment == "full" else Draw()
        wave16, left = self.table.piece(piece, 16_000), self.samples - at
        if speed is None:
            speed = max(drawn.speed, len(wave16) / self.samples)  # a slower clip must still fit
        clean = features.complete(vary(wave16, speed, drawn.gain)[:left], f)[:left]
        out["wave16"][row, at : at + len(clean)] = overlay(rng, clean, drawn, f.rate)
        if "clean16" in self.clean:
            out["clean16"][row, at : at + len(clean)] = clean
        if "clean24" in self.clean:
            first, size = at * target.rate // f.rate, len(clean) * target.rate // f.rate
            wave = vary(self.table.piece(piece, 24_000), speed, drawn.gain)[: size if self.options.pack == "window" else None]
            wave = wave[: out["clean24"].shape[1] - first]
            out["clean24"][row, first : first + len(wave)] = wave
        return at + len(clean)

    def _spec(self, step: int) -> dict[str, np.ndarray]:
        spec, f = self.options.spec, self.audio.features
        if self.augment == "none" or not spec.times + spec.bands:
            return {}
        rng = np.random.default_rng([self.seed, step, 0, 0, _SPEC])
        times = [draw_runs(rng, self.samples // f.hop, spec.times, spec.time_frames) for _ in range(self.rows)]
        bands = [draw_runs(rng, f.mels, spec.bands, spec.band_width) for _ in range(self.rows)]
        return {"keep_time": np.stack(times), "keep_band": np.stack(bands)}

    def _texts(self, rows: Sequence[Sequence[tuple]]) -> dict[str, np.ndarray]:
        size = self.options.text_bytes
        if not size:
            return {}
        text_BC = np.full((len(rows), size), -1, np.int32)
        for row, pieces in enumerate(rows):
            said = [self.table.text(piece) for piece, _ in pieces]
            data = " ".join(said).encode()
            if all(said) and len(data) <= size:
                text_BC[row, : len(data)] = np.frombuffer(data, np.uint8)
        return {"text": text_BC}
