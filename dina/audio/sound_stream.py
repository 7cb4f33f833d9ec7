"""Codes to sound while codes still come: pieces of a segment, blocks of a piece, samples of a block.

A segment (one spoken span) is decoded in pieces of one chunk, which share a code: what both say is blended. `Media.sound` decodes
whole pieces in the same way, with the same noise, and `SoundStream` gives the same samples (with HiFT; Griffin-Lim's differ, see
wave_stream.py). Where `audio.decoder.statistics` are not 'frame', a piece is heard when its last code is there.

Letters: U codes, L levels, T mel frames, M mel bands, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from dina.audio.detokenizer import hidden_frames, mel_samples
from dina.audio.stream import MelStream, join
from dina.audio.wave_stream import SEGMENTS, Seams, WaveStream

_NOTHING = np.zeros(0, np.float32)


def longest_piece(audio: ConfigDict) -> int:
    """Codes of one chunk."""
    return audio.features.max_frames // (2 * audio.bridge.pool)


def pieces(codes_UL: Int[np.ndarray, "U L"], longest: int) -> list[Int[np.ndarray, "u L"]]:
    """A segment's codes in pieces of at most `longest`; the last code of one is the first of the next."""
    last = max(len(codes_UL) - 1, min(len(codes_UL), 1))
    return [codes_UL[at : at + longest] for at in range(0, last, max(longest - 1, 1))]


def join_pieces(waves: Sequence[Float[np.ndarray, "n"]], audio: ConfigDict) -> Float[np.ndarray, "N"]:
    """One wave of the waves of `pieces`."""
    return join(waves, int(mel_samples(1, audio)))


def join_segments(waves: Sequence[Float[np.ndarray, "n"]], audio: ConfigDict) -> Float[np.ndarray, "N"]:
    """One wave of the waves of segments."""
    return join([wave for wave in waves if len(wave)], int(SEGMENTS * audio.target.rate))


class SoundStream:
    """One reply after the other; everything is compiled once.

    Args:
        audio: `config.audio`.
        params, stats: as for `detokenizer.make_detokenize`.
        seed: of the flow's noise, as for `detokenizer.detokenize_codes`.

    Raises:
        InputError: settings that cannot be streamed, see `MelStream`; a vocoder's part is missing.
    """

    def __init__(self, audio: ConfigDict, params: Mapping[str, Any], stats: Mapping[str, Any], seed: int = 0):
        self.audio, self.params, self.stats = audio, jax.tree.map(jnp.asarray, dict(params)), stats
        self.key, self.longest = jax.random.key(seed), longest_piece(audio)
        self.mel = MelStream(audio, self.longest)
        self.wave = WaveStream(audio, params, self.mel.frames)
        self.shared = {"piece": int(mel_samples(1, audio)), "segment": int(SEGMENTS * audio.target.rate)}
        self.begin()

    def begin(self, first: int = 0) -> None:
        """Begins a reply, whose pieces take the noise of examples `first`, `first` + 1, ..."""
        self.seams, self.joint, self.example, self.last = Seams(), 0, first, None
        self._open([])

    def _open(self, codes: list[np.ndarray]) -> None:
        """Begins a piece."""
        self.codes, self.blocks = codes, 0
        self.state = self.mel.start(self.params, 1, self.key, np.array([self.example], np.int32))
        self.wave.start()

    def push(self, codes_UL: Int[np.ndarray, "U L"]) -> Float[np.ndarray, "N"]:
        """Samples that the next codes of the segment settle."""
        made = []
        for code_L in np.asarray(codes_UL, np.int32):
            if self.last is not None:  # the piece before was full, and the segment goes on
                self._open([self.last])
                self.joint, self.last = self.shared["piece"], None
            self.codes.append(code_L)
            if len(self.codes) == self.longest:
                made.append(self._finish())
                self.last = code_L
            elif len(self.codes) > (self.blocks + 1) * self.mel.codes and self.audio.decoder.statistics == "frame":
                made.append(self._block(-1))
        return np.concatenate(made) if made else _NOTHING

    def close(self) -> Float[np.ndarray, "N"]:
        """The segment is over: its samples but for those that the next one may be blended into."""
        made_N = self._finish() if self.codes else _NOTHING
        if self.blocks or self.last is not None:
            self.joint = self.shared["segment"]
        self.last = None
        self._open([])
        return made_N

    def end(self) -> Float[np.ndarray, "N"]:
        """The reply is over: all samples that are left."""
        return np.concatenate([self.close(), self.seams.end()])

    def _finish(self) -> np.ndarray:
        """The rest of a piece; the next takes other noise."""
        count, made = len(self.codes), []
        if self.audio.decoder.statistics == "frame":
            while self.blocks * self.mel.codes < count:
                made.append(self._block(count))
        else:
            codes_1UL = np.stack(self.codes)[None]
            padded_1UL = np.pad(codes_1UL, ((0, 0), (0, self.longest - count), (0, 0)), constant_values=-1)
            example_1 = np.array([self.example], np.int32)
            for mel_1TM in self.mel.whole(self.params, self.stats, padded_1UL, np.array([count], np.int32), self.key, example_1):
                made.append(self._sound(mel_1TM[0], count))
        self.codes, self.example = [], self.example + 1
        return np.concatenate(made)

    def _block(self, count: int) -> np.ndarray:
        """The next block of a piece of `count` codes, -1 while it goes on."""
        at, size = self.blocks * self.mel.codes, self.mel.codes
        part_UL = np.stack(self.codes[at : at + size])
        part_1UL = np.pad(part_UL, ((0, size - len(part_UL)), (0, 0)), constant_values=-1)[None]
        length_1 = np.array([count], np.int32)
        hidden_1TD, self.state = self.mel.hear(self.params, self.stats, self.state, part_1UL, length_1)
        mel_1TM, self.state = self.mel.speak(self.params, self.state, hidden_1TD, length_1)
        return self._sound(mel_1TM[0], count)

    def _sound(self, mel_TM, count: int) -> np.ndarray:
        """Samples of the next block of mel."""
        left = int(hidden_frames(count, self.audio)) - self.blocks * self.mel.frames if count >= 0 else self.mel.frames
        ended, self.blocks = 0 <= count <= (self.blocks + 1) * self.mel.codes, self.blocks + 1
        wave_N = self.wave.push(np.asarray(mel_TM)[: max(left, 0)], ended)
        joint, self.joint = (self.joint, 0) if len(wave_N) else (0, self.joint)
        return self.seams.push(wave_N, joint, max(self.shared.values()) + 1)
