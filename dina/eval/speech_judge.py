"""Which word is spoken: a recogniser trained only on real clips of voices that nothing else is trained or tested on.

A clip is cut to its audible part, turned into log-mel frames, stretched to a fixed number of cepstral frames, half centred
(which takes much of the speaker and the channel away) and classified by a support vector machine. Copies with light
noise are trained on too, because the clips to judge are Griffin-Lim resyntheses.

Letters: N samples; F frames; M mel bands; C clips; D features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import soxr
from jaxtyping import Float
from scipy import fft, signal
from sklearn.svm import SVC

from dina.eval.metrics import Score, wilson

RATE = 16000
_WINDOW, _HOP, _MELS, _FRAMES = 400, 160, 40, 32
_COEFFICIENTS = 14  # cepstral order kept: finer spectral detail is the speaker's pitch
_SILENCE_DB = 35.0  # frames this far below the loudest one are outside the word
_SILENT = 1e-4  # peak below this: nothing is said
_NOISE_DB = (30.0, 20.0, 12.0)  # signal-to-noise ratios of the noisy training copies
Clip = tuple[Float[np.ndarray, "N"], int]  # wave in [-1, 1] and its rate in Hz


@functools.cache
def mel_filters(rate: int, bins: int, mels: int) -> Float[np.ndarray, "bins mels"]:
    """Triangular filters, evenly spaced on the HTK mel scale between 60 Hz and half the rate."""
    to_mel, to_hz = lambda f: 2595 * np.log10(1 + f / 700), lambda m: 700 * (10 ** (m / 2595) - 1)
    edges = to_hz(np.linspace(to_mel(60.0), to_mel(rate / 2), mels + 2))
    frequency = np.linspace(0, rate / 2, bins)[:, None]
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def log_mel(wave_N: Float[np.ndarray, "N"]) -> Float[np.ndarray, "F M"]:
    """Log-mel frames (25 ms every 10 ms) of a 16 kHz wave, of which at least one frame is made."""
    padded = np.pad(wave_N, (_WINDOW // 2, max(_WINDOW, _WINDOW // 2)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    power = np.abs(np.fft.rfft(frames * signal.windows.hann(_WINDOW, sym=False), axis=-1)) ** 2
    return np.log(power @ mel_filters(RATE, power.shape[1], _MELS) + 1e-8)


def to_rate(clip: Clip) -> Float[np.ndarray, "N"]:
    """The wave at the judge's 16 kHz."""
    wave = np.asarray(clip[0], np.float32)
    return wave if clip[1] == RATE else soxr.resample(wave, clip[1], RATE, quality="HQ")


def features(clip: Clip) -> Float[np.ndarray, "D"]:
    """Fixed-length description of a clip; see the module's first lines. A silent clip gives zeros."""
    wave = to_rate(clip)
    peak = np.abs(wave).max(initial=0)
    if peak < _SILENT:
        return np.zeros(_FRAMES * (_COEFFICIENTS + 1), np.float32)
    mel_FM = log_mel(wave / peak)
    loudness_F = np.log(np.exp(mel_FM).sum(1))
    loud = np.flatnonzero(loudness_F > loudness_F.max() - _SILENCE_DB * np.log(10) / 10)
    mel_FM = np.maximum(mel_FM[loud[0]:loud[-1] + 1], mel_FM.max() - 12.0)
    at = np.linspace(0, len(mel_FM) - 1, _FRAMES)
    low = np.floor(at).astype(int)
    share = (at - low)[:, None]
    mel_FM = mel_FM[low] * (1 - share) + mel_FM[np.minimum(low + 1, len(mel_FM) - 1)] * share
    cepstra = fft.dct(mel_FM, norm="ortho", axis=1)[:, :_COEFFICIENTS]
    # Half of the mean stays: all of it is the vowel of a short word as well as the speaker.
    cepstra = cepstra - 0.5 * cepstra.mean(0)
    duration = np.full((_FRAMES, 1), np.log((loud[-1] - loud[0] + 1) / 50))
    return np.concatenate([cepstra, duration / _FRAMES**0.5], axis=1).ravel().astype(np.float32)


def noisy(clip: Clip, ratio_db: float, rng: np.random.Generator) -> Clip:
    """The clip with white noise at a signal-to-noise ratio in dB."""
    wave, rate = clip
    level = np.sqrt(np.mean(np.square(wave)) * 10 ** (-ratio_db / 10))
    return wave + rng.normal(0, 1, len(wave)) * level, rate


class SpeechJudge:
    """A fitted recogniser of single words.

    Args:
        clips: real clips of the judge's own voices.
        words: what they say.
        seed: of the noise on the training copies.
    """

    def __init__(self, clips: Sequence[Clip], words: Sequence[str], seed: int = 0):
        rng = np.random.default_rng(seed)
        copies = [clips] + [[noisy(clip, ratio, rng) for clip in clips] for ratio in _NOISE_DB]
        self._rows = np.array([features(clip) for copy in copies for clip in copy])
        self._words = np.array(list(words) * len(copies))
        self.model = SVC(C=5.0, gamma="scale").fit(self._rows, self._words)

    def among(self, words: Sequence[str]) -> SpeechJudge:
        """The judge that must choose one of `words`, trained on its clips of them only."""
        keep = np.isin(self._words, list(words))
        if len(set(self._words[keep])) < 2:
            raise ValueError(f"the judge has no clips of at least two of {', '.join(words)}")
        other = object.__new__(SpeechJudge)
        other._rows, other._words = self._rows[keep], self._words[keep]
        other.model = SVC(C=5.0, gamma="scale").fit(other._rows, other._words)
        return other

    @property
    def words(self) -> list[str]:
        """The words that it knows."""
        return [str(word) for word in self.model.classes_]

    def predict(self, clips: Sequence[Clip]) -> list[str]:
        """The most likely word of each clip."""
        if not clips:
            return []
        return [str(word) for word in self.model.predict(np.array([features(clip) for clip in clips]))]

    def ceiling(self, clips: Sequence[Clip], words: Sequence[str], resynthesize: Callable[[Clip], Clip] | None = None) -> Score:
        """Its accuracy on real clips that it was not trained on.

        Args:
            clips: real clips.
            words: what they say.
            resynthesize: applied to every clip first, e.g. mel analysis and Griffin-Lim: what the judge can reach on
                audio that went the way of the model's own.
        """
        return accuracy(self.predict(clips if resynthesize is None else [resynthesize(clip) for clip in clips]), words)


def accuracy(heard: Sequence[str | None], said: Sequence[str]) -> Score:
    """Share of words heard right, with its interval."""
    return wilson(sum(h == s for h, s in zip(heard, said, strict=True)), len(said))


# ------------------------------------------------------------------------------------------------- second opinion
class PocketSphinx:
    """The pocketsphinx recogniser of the extra `judges`, with a grammar that allows one of the given words.

    Args:
        words: lower-case English words of its dictionary.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self, words: Sequence[str]):
        import pocketsphinx

        self.decoder = pocketsphinx.Decoder(samprate=float(RATE), loglevel="FATAL")
        self.decoder.add_jsgf_string("words", f"#JSGF V1.0; grammar words; public <word> = {' | '.join(words)};")
        self.decoder.activate_search("words")

    def predict(self, clips: Sequence[Clip]) -> list[str | None]:
        """The word of each clip; None where it hears none."""
        return [self._hear(clip) for clip in clips]

    def _hear(self, clip: Clip) -> str | None:
        wave = to_rate(clip)
        peak = np.abs(wave).max(initial=0)
        if peak < _SILENT:
            return None
        # Faint noise, because its models never heard digital silence: 0.92 of real clips right, 0.70 without.
        quiet = np.zeros(int(0.3 * RATE), np.float32)
        pcm = np.concatenate([quiet, wave / peak * 0.5, quiet])
        pcm += np.random.default_rng(0).normal(0, 1e-3, len(pcm)).astype(np.float32)
        self.decoder.reinit_feat()  # it estimates the channel as it goes: every clip starts from the same state
        self.decoder.start_utt()
        self.decoder.process_raw((pcm * 32767).astype(np.int16).tobytes(), no_search=False, full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return found.hypstr.strip() or None if found else None
