"""Real synthesised speech from the espeak-ng library that the `espeakng_loader` wheel carries.

The library is one C program with one global speaker whose state (vibrato, wave phase) runs on from word to word. So
one `Speaker` at a time is open in a process, under a lock, and each loads the library afresh: what it says depends on
its voice and on what it said before, never on other speakers. Loading costs 4 ms, a word 0.7 ms (2-core CPU).
Legend: N, M samples.
"""

from __future__ import annotations

import _ctypes
import ctypes
import threading

import numpy as np
import soxr
from jaxtyping import Float

from dina.config import InputError

# English voices of espeak-ng 1.52, one per accent, as the library spells them (`en` is Great Britain).
VOICES = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
# Speaker types of the formant synthesiser that stay intelligible; whisper, croak and the robots are left out.
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "Mike", "adam", "anika",
            "belinda", "Denis", "edward", "john", "linda", "michel", "pablo")

_SYNCHRONOUS, _UTF8 = 2, 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_PEAK = 0.9
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_LOCK = threading.Lock()


def _package():
    try:
        import espeakng_loader
    except ImportError:
        raise InputError("speech data: the package espeakng_loader is missing; install it with"
                         " `uv pip install espeakng-loader==0.2.4`") from None
    return espeakng_loader


def library_path() -> str:
    """Path of the shared library (its hash is in the data manifest). Raises InputError if the wheel is missing."""
    return _package().get_library_path()


class Speaker:
    """One freshly loaded voice; a context manager that holds the process-wide lock.

    Args:
        voice: accent, one of VOICES.
        variant: speaker type, one of VARIANTS, or '' for the voice's own.

    Raises:
        InputError: the wheel is missing or broken, or the voice is unknown.
    """

    def __init__(self, voice: str, variant: str = "") -> None:
        self.name = f"{voice}+{variant}" if variant else voice
        self._chunks: list[np.ndarray] = []

    def __enter__(self) -> "Speaker":
        package = _package()
        _LOCK.acquire()
        try:
            self._lib = ctypes.CDLL(package.get_library_path())
            self.rate = self._lib.espeak_Initialize(_SYNCHRONOUS, 0, package.get_data_path().encode(), 0)
            if self.rate <= 0:
                raise InputError("speech data: espeak-ng found no voices in its wheel; reinstall espeakng-loader")
            self._callback = _CALLBACK(self._receive)  # kept alive here: the library holds only the address
            self._lib.espeak_SetSynthCallback(self._callback)
            if self._lib.espeak_SetVoiceByName(self.name.encode()) != 0:
                raise InputError(f"speech data: espeak-ng has no voice {self.name!r}")
            self._lib.espeak_ng_SetRandSeed(1)
        except OSError as error:
            self._close()
            raise InputError(f"speech data: the library of espeakng-loader does not load ({error});"
                             " reinstall it") from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def _close(self) -> None:
        lib = self.__dict__.pop("_lib", None)
        if lib is not None:
            lib.espeak_Terminate()
            unload = getattr(_ctypes, "dlclose", None) or _ctypes.FreeLibrary
            unload(lib._handle)
        _LOCK.release()

    def _receive(self, wave, count, _events) -> int:
        if wave and count > 0:
            self._chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    def say(self, text: str, rate: int = 175, pitch: int = 50) -> Float[np.ndarray, "N"]:
        """Speaks `text` at `self.rate` Hz; silence around it is cut and the peak scaled to 0.9.

        Args:
            text: English text.
            rate: words per minute, 80 to 450.
            pitch: 0 to 99; 50 is the speaker's own.

        Raises:
            InputError: nothing audible was spoken.
        """
        for parameter, value in ((_RATE, rate), (_VOLUME, 100), (_PITCH, pitch), (_RANGE, 50)):
            self._lib.espeak_SetParameter(parameter, value, 0)
        data = text.encode() + b"\0"
        self._lib.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, _UTF8, None, None)
        self._lib.espeak_Synchronize()
        chunks, self._chunks = self._chunks, []
        raw_N = np.concatenate(chunks) if chunks else np.zeros(0, np.int16)
        wave_N = trim(raw_N.astype(np.float32) / 32768)
        if not wave_N.size:
            raise InputError(f"speech data: espeak-ng said nothing for {text!r} with voice {self.name!r}")
        return wave_N * np.float32(_PEAK / np.abs(wave_N).max())


def synthesize(text: str, voice: str, variant: str = "", rate: int = 175,
               pitch: int = 50) -> tuple[Float[np.ndarray, "N"], int]:
    """One utterance by a fresh speaker: a pure function of its arguments. See `Speaker` for them and the errors.

    Returns:
        float32 wave in [-0.9, 0.9] and its rate in Hz (22,050).
    """
    with Speaker(voice, variant) as speaker:
        return speaker.say(text, rate, pitch), speaker.rate


def trim(wave_N: Float[np.ndarray, "N"], threshold: float = 0.01) -> Float[np.ndarray, "M"]:
    """Cuts what lies before the first and after the last sample above `threshold` of the peak."""
    level_N = np.abs(wave_N)
    loud = np.flatnonzero(level_N > threshold * level_N.max(initial=0))
    return wave_N[loud[0]:loud[-1] + 1] if loud.size else wave_N[:0]


def resample(wave_N: Float[np.ndarray, "N"], rate: int, target: int) -> Float[np.ndarray, "M"]:
    """Band-limited resampling (soxr, high quality), clipped to [-1, 1]."""
    return np.clip(soxr.resample(wave_N, rate, target, quality="HQ"), -1, 1).astype(np.float32)


def to_int16(wave_N: Float[np.ndarray, "N"]) -> np.ndarray:
    """Float wave in [-1, 1] as 16-bit PCM."""
    return np.round(wave_N * 32767).astype(np.int16)
