"""Stage A3: the HiFT vocoder on real speech, alone or against judges (tokenizers.md C.1, I).

The mel of a crop of a clip goes through the vocoder and comes back as a wave. Terms: mel (L1 of ln mels at several
resolutions), f0 (L1 in Hz to YIN's pitch, which alone trains the pitch predictor), and, where one of their weights is above
0, adversarial (the vocoder's side), features (inner maps of the judges) and discriminator (theirs). Both sides move in one
step: the vocoder's terms hold the judges still, the judges' term sees the wave without gradient. The reference's weights
are mel 45, features 2, the others 1.

Letters: B crops, N samples, T mel frames, M mel bands.
"""

from __future__ import annotations

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dina.audio import discriminator, hift, spectral
from dina.audio.augment import clip_rng
from dina.audio.encoder import length_mask
from dina.audio.f0 import yin
from dina.audio.features import ln_mel, normalise
from dina.audio.hift_source import draw
from dina.config import InputError
from dina.tasks.audio_batches import SpeechTable, open_table
from dina.tasks.base import Batches, LossOut, Task, Variables, merge_options

AGAINST = ("adversarial", "features", "discriminator")  # terms that need judges


def default_options() -> ConfigDict:
    """`stage.options` of this task: seconds of a crop; windows of the mel term; periods, resolutions and width of the judges."""
    return ConfigDict({
        "seconds": 1.0, "mel_windows": (256, 512, 1024, 2048), "periods": (2, 3, 5, 7, 11), "resolutions": (512, 1024, 2048), "width": 32,
    })  # fmt: skip


class Crops(Batches):
    """Random parts of the table's pieces.

    `batch(step)`: `wave` [B, N] float32 at `target.rate`, zero beyond `samples` [B] int32 where a clip is shorter; `example` [B] int32.

    Args:
        config: the experiment (uses seed and audio).
        stage: uses task (as the name of the random stream) and batch.
        table: the clips, at 16 or 24 kHz.
        seconds: of a crop, rounded up to whole mel frames.
    """

    def __init__(self, config, stage, table: SpeechTable, seconds: float):
        target = config.audio.target
        self.table, self.rate, self.rows = table, target.rate, stage.batch
        self.samples = -(-int(seconds * target.rate) // target.hop) * target.hop
        self.seed = config.seed + zlib.crc32(stage.task.encode())
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([self.seed, epoch]).permutation(len(table.piece_P3)))

    def batch(self, step: int) -> dict[str, np.ndarray]:
        out = {"wave": np.zeros((self.rows, self.samples), np.float32), "samples": np.zeros(self.rows, np.int32)}
        pieces = len(self.table.piece_P3)
        for row, number in enumerate(range(step * self.rows, (step + 1) * self.rows)):
            wave = self.table.piece(self._order(number // pieces)[number % pieces], self.rate)
            start = clip_rng(self.seed, step, row).integers(max(1, len(wave) - self.samples + 1))
            piece = wave[start : start + self.samples].astype(np.float32) / 32768
            out["wave"][row, : len(piece)], out["samples"][row] = piece, len(piece)
        return out | {"example": ((step * self.rows + np.arange(self.rows)) % 2**31).astype(np.int32)}


class VocoderTask(Task):
    """Trains `vocoder` and, if any of their terms has weight, `wave_discriminator`."""

    def __init__(self, config, stage):
        super().__init__(config, stage)
        self.audio, self.options = config.audio, merge_options(default_options(), stage)
        if self.audio.vocoder.name != "hift":
            raise InputError(f"a stage of task vocoder trains audio.vocoder.name 'hift', this config has {self.audio.vocoder.name!r}")
        self.hift = hift.make_hift(self.audio)
        self.weights = {name: weight for name, weight in stage.loss_weights.items() if weight > 0}
        self.judges = None
        if any(name in self.weights for name in AGAINST):
            o = self.options
            self.judges = discriminator.Judges(tuple(o.periods), tuple(o.resolutions), o.width, parent=None)

    def batches(self) -> Crops:
        return Crops(self.config, self.stage, open_table(self.config, "train"), self.options.seconds)

    def init(self, key: jax.Array) -> Variables:
        hop, sines, one = self.audio.target.hop, self.hift.source.sines, jnp.ones(1, jnp.int32)
        mel = jnp.zeros((1, 1, self.audio.target.mels))
        params = {hift.PART: self.hift.init(key, mel, one, jnp.zeros((1, sines)), jnp.zeros((1, hop, sines)))["params"]}
        if self.judges:
            params[discriminator.PART] = self.judges.init(jax.random.fold_in(key, 1), jnp.zeros((1, hop)), one)["params"]
        return {"params": params, "stats": {}}

    def loss(self, params, stats, batch, key: jax.Array, axes: tuple[str, ...]) -> LossOut:
        del stats, axes
        target, wave_BN, samples_B = self.audio.target, batch["wave"], batch["samples"]
        mel_BTM = normalise(ln_mel(wave_BN, target), target)
        frames_B = -(-samples_B // target.hop)
        drawn = draw(key, batch["example"], mel_BTM.shape[1], target.hop, self.hift.source.sines)
        made_BN, f0_BT = self.hift.apply({"params": params[hift.PART]}, mel_BTM, frames_B, *drawn)
        # A crop counts as long as it is, so that many short clips are not worth more than the same speech in one.
        total = lambda value_B: (jnp.sum(value_B * frames_B), jnp.sum(frames_B).astype(jnp.float32))
        distance_B = spectral.mel_distance(made_BN, wave_BN, samples_B, target.rate, self.options.mel_windows)
        pitch_BT = yin(wave_BN, target.rate, target.hop)
        keep_BT = length_mask(frames_B, f0_BT.shape[1]).astype(jnp.float32)
        off = jnp.sum(jnp.abs(f0_BT - pitch_BT) * keep_BT), jnp.sum(keep_BT)
        terms = {"mel": total(distance_B), "f0": off}
        if self.judges:
            terms |= {name: total(value_B) for name, value_B in self._against(params[discriminator.PART], wave_BN, made_BN, samples_B).items()}
        terms = {name: term for name, term in terms.items() if name in self.weights}
        voiced = jnp.sum((pitch_BT > 0) * keep_BT), jnp.sum(keep_BT)
        return LossOut(terms, {"mel_l1": total(distance_B), "f0_hz_off": off, "voiced": voiced})

    def _against(self, params, wave_BN, made_BN, samples_B) -> dict[str, jax.Array]:
        """The three terms of both sides, [B] each."""
        judge = lambda params, x_BN: self.judges.apply({"params": params}, x_BN, samples_B)
        real = judge(params, wave_BN)
        fooled = judge(jax.lax.stop_gradient(params), made_BN)
        seen = judge(params, jax.lax.stop_gradient(made_BN))
        return {
            "adversarial": discriminator.adversarial_loss(fooled),
            "features": discriminator.feature_loss(real, fooled),
            "discriminator": discriminator.discriminator_loss(real, seen),
        }
