"""Mel to sound as it comes, and joints between what was vocoded apart (tokenizers.md B.7, B.8).

`WaveStream` turns blocks of mel into samples. HiFT's are those of the whole clip: a sample depends on a few frames around it
(`reach`), its noise on its frame's number alone, and the phase of the sines is carried on; so samples come `reach` frames
late. Griffin-Lim's phase search sees the whole clip; its blocks overlap and are blended, which sounds alike and is another wave.

`Seams` joins parts while they still come: the end of one is blended into the beginning of the next once, as by `stream.join`.

Letters: B clips (one), T mel frames, M mel bands, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from dina.audio import hift, hift_source, vocoder
from dina.audio.detokenizer import SILENT
from dina.audio.features import normalise

PITCH_REACH = 5  # frames: five convolutions of three
BLEND = 4  # frames that two blocks of Griffin-Lim share: all that its window spans
SEGMENTS = 0.05  # seconds that segments share; released: 1200 samples at 24 kHz

_NOTHING = np.zeros(0, np.float32)


def reach(v: ConfigDict) -> int:
    """Mel frames before and after a sample that HiFT's filter sees, from `audio.vocoder`."""
    frames, rate = 3.0, 1  # the first convolution, at the rate of the mel
    for step, up, source in zip(v.rates, v.up_kernels, v.source_kernels, strict=True):
        frames += math.ceil(up / step) / rate
        rate *= step
        block = max((k - 1) // 2 * (sum(v.dilations) + len(v.dilations)) for k in (*v.kernels, source))
        frames += (block + 2) / rate  # and the source's strided convolution
    return math.ceil(frames + (3 + 2 * v.n_fft / v.hop) / rate) + 1


class WaveStream:
    """Samples of one clip after the other; compiled once for a size of block.

    Args:
        audio: `config.audio`.
        params: {part: tree} that holds `vocoder.parts(audio)`.
        block: most frames of one call of `push`.

    Raises:
        InputError: as `vocoder.make_vocoder`.
    """

    def __init__(self, audio: ConfigDict, params: Mapping[str, Any], block: int):
        self.audio, self.block, self.hop = audio, block, audio.target.hop
        vocode = vocoder.make_vocoder(audio, params)
        self._form = _Hift(audio, params, block) if audio.vocoder.name == "hift" else _Blocks(audio, vocode, block)

    @property
    def late(self) -> int:
        """Frames by which samples follow their mel."""
        return self._form.late

    def start(self) -> None:
        """Begins a clip."""
        self._form.start()

    def push(self, mel_TM: Float[np.ndarray, "T M"], ended: bool = False) -> Float[np.ndarray, "N"]:
        """Samples that the next frames (ln mel) of the clip settle, all that are left if it has `ended`."""
        return self._form.push(np.asarray(mel_TM, np.float32), ended)


class _Hift:
    """Windows of the clip with `reach` frames on both sides of what is new."""

    def __init__(self, audio: ConfigDict, params: Mapping[str, Any], block: int):
        self.audio, self.module, self.hop = audio, hift.make_hift(audio), audio.target.hop
        self.params = jax.tree.map(jnp.asarray, params[hift.PART])
        self.near = reach(audio.vocoder)
        self.late = self.near + PITCH_REACH
        self.width = block + 2 * self.late + 1
        self._pitch, self._filter = jax.jit(self._pitch_of), jax.jit(self._wave_of)

    def start(self) -> None:
        self.mel_TM = np.zeros((0, self.audio.target.mels), np.float32)
        self.first, self.said = 0, 0  # frame of the clip that `mel_TM` begins with; frames whose samples are out
        self.pitch_T = _NOTHING  # of the frames from `first` on, as far as it is settled
        self.cycles = 0.0  # of the pitch before `first`, whole ones left out

    def push(self, mel_TM: np.ndarray, ended: bool) -> np.ndarray:
        self.mel_TM = np.concatenate([self.mel_TM, mel_TM])
        have = self.first + len(self.mel_TM)
        upto = have if ended else max(self.said, have - self.late)
        if upto <= self.said:
            return _NOTHING
        self._forget(max(0, self.said - self.late - 1))
        count = len(self.mel_TM)
        window_TM = np.pad(self.mel_TM, ((0, self.width - count), (0, 0)), constant_values=SILENT)
        pitch_T = np.asarray(self._pitch(self.params, window_TM, count))
        settled = len(self.pitch_T)
        self.pitch_T = np.concatenate([self.pitch_T, pitch_T[settled : count if ended else count - PITCH_REACH]])
        known_T = np.pad(self.pitch_T, (0, self.width - len(self.pitch_T)))
        if self.first:  # a frame that ends where the clip's phase is; its own samples are never heard
            known_T[0] = (self.cycles + self.hop * known_T[0] / self.audio.target.rate) % 1.0 * self.audio.target.rate / self.hop
        wave_N = np.asarray(self._filter(self.params, window_TM, known_T, count, self.first))
        made_N = wave_N[(self.said - self.first) * self.hop : (upto - self.first) * self.hop]
        self.said = upto
        return made_N

    def _forget(self, first: int) -> None:
        """Drops the frames before `first`, and counts the cycles of their pitch."""
        gone = first - self.first
        cycles = self.pitch_T[:gone].astype(np.float64) * self.hop / self.audio.target.rate
        self.cycles, self.first = (self.cycles + cycles.sum()) % 1.0, first
        self.mel_TM, self.pitch_T = self.mel_TM[gone:], self.pitch_T[gone:]

    def _pitch_of(self, params, mel_TM, count):
        x_BTM = normalise(mel_TM[None], self.audio.target)
        return self.module.apply({"params": params}, x_BTM, hift.keep_mask(count[None], self.width), method=lambda m, *inputs: m.f0(*inputs))[0]

    def _wave_of(self, params, mel_TM, pitch_T, count, first):
        key = jax.random.key(self.audio.vocoder.seed)
        drawn = hift_source.draw(key, jnp.zeros(1, jnp.int32), self.width, self.hop, self.module.source.sines, first)

        def both(module, mel_BTM):
            return module.filtered(mel_BTM, module.source(pitch_T[None], *drawn), count[None])

        return self.module.apply({"params": params}, normalise(mel_TM[None], self.audio.target), method=both)[0]


class _Blocks:
    """Blocks that share `BLEND` frames, each vocoded by itself, blended where they meet."""

    def __init__(self, audio: ConfigDict, vocode: vocoder.Vocoder, block: int):
        self.width, self.mels, self.hop, self.late = BLEND + block, audio.target.mels, audio.target.hop, BLEND
        self._vocode = jax.jit(lambda mel_TM, count: vocode(mel_TM.T[None], count[None])[0])

    def start(self) -> None:
        self.seams, self.before_TM = Seams(), np.zeros((0, self.mels), np.float32)

    def push(self, mel_TM: np.ndarray, ended: bool) -> np.ndarray:
        window_TM, made_N = np.concatenate([self.before_TM, mel_TM]), _NOTHING
        if len(mel_TM):
            padded_TM = np.pad(window_TM, ((0, self.width - len(window_TM)), (0, 0)), constant_values=SILENT)
            wave_N = np.asarray(self._vocode(padded_TM, len(window_TM)))[: len(window_TM) * self.hop]
            made_N = self.seams.push(wave_N, len(self.before_TM) * self.hop, BLEND * self.hop + 1)
            self.before_TM = window_TM[-BLEND:]
        return np.concatenate([made_N, self.seams.end()]) if ended else made_N


class Seams:
    """Joins waves that come in pieces; what a later one may still be blended into is held back."""

    def __init__(self):
        self.held_N, self.fresh_N, self.overlap, self.part = _NOTHING, _NOTHING, 0, 0

    def push(self, wave_N: Float[np.ndarray, "N"], overlap: int = 0, hold: int = 0) -> Float[np.ndarray, "n"]:
        """Samples that are settled.

        Args:
            wave_N: the next samples.
            overlap: how many of them sound together with the last ones so far; 0: they go on.
            hold: how many of the last ones are kept for what comes, more than `overlap` of the next call.
        """
        if overlap:
            self._settle()
            self.overlap = overlap
        self.fresh_N = np.concatenate([self.fresh_N, wave_N])
        if len(self.fresh_N) > self.overlap:
            self._settle()
        keep = max(0, len(self.held_N) - hold)
        made_N, self.held_N = self.held_N[:keep], self.held_N[keep:]
        return made_N

    def _settle(self) -> None:
        """Blends what has come since the last joint into what was before it; shorter ones follow each other as they are."""
        if min(self.part, len(self.fresh_N)) > self.overlap > 0:
            rise_n = np.linspace(0.0, 1.0, self.overlap, dtype=np.float32)
            blend_n = self.held_N[-self.overlap :] * (1 - rise_n) + self.fresh_N[: self.overlap] * rise_n
            self.held_N = np.concatenate([self.held_N[: -self.overlap], blend_n, self.fresh_N[self.overlap :]])
        else:
            self.held_N = np.concatenate([self.held_N, self.fresh_N])
        self.part = len(self.fresh_N) + (0 if self.overlap else self.part)
        self.fresh_N, self.overlap = _NOTHING, 0

    def end(self) -> Float[np.ndarray, "n"]:
        """All that is left."""
        self._settle()
        made_N, self.held_N = self.held_N, _NOTHING
        return made_N
