"""What happens to a training clip before the encoder hears it: speed, gain, a synthetic room, noise. Numpy, on waves.

Each clip's draw depends on (seed, step, example) only. The noisy row of the evaluation calls `add_noise` and
`add_room` directly, with fixed strengths.

Letters: N, M samples.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.fft
import soxr
from jaxtyping import Float
from ml_collections import ConfigDict

DECAY_60_DB = 6.9078  # ln(1000)


def clip_rng(seed: int, step: int, example: int) -> np.random.Generator:
    """The random stream of one clip at one step."""
    return np.random.default_rng([seed, step, example])


def coloured_noise(rng: np.random.Generator, n: int, slope: float) -> Float[np.ndarray, "N"]:
    """Noise of unit power whose power falls as f^-slope (0 white, 1 pink, 2 brown), made at one FFT."""
    size = scipy.fft.next_fast_len(n, real=True)
    bins = size // 2 + 1
    spectrum = rng.standard_normal((2, bins), dtype=np.float32)
    shape = np.maximum(np.arange(bins, dtype=np.float32), 4.0) ** np.float32(-slope / 2)
    noise = scipy.fft.irfft((spectrum[0] + 1j * spectrum[1]) * shape, size)[:n]
    return noise / (np.sqrt(np.mean(noise**2)) + 1e-9)


def add_noise(rng: np.random.Generator, x_N: Float[np.ndarray, "N"], snr_db: float, slope: float) -> Float[np.ndarray, "N"]:
    """Adds coloured noise at `snr_db` below the clip's own power."""
    power = np.sqrt(np.mean(x_N**2))
    return (x_N + coloured_noise(rng, len(x_N), slope) * power * 10 ** (-snr_db / 20)).astype(np.float32)


def room(rng: np.random.Generator, seconds: float, rate: int, wet: float) -> Float[np.ndarray, "N"]:
    """Impulse response: the direct sound, then noise that falls by 60 dB in `seconds`; `wet` is its energy share."""
    n = max(2, int(seconds * rate))
    tail = rng.standard_normal(n, dtype=np.float32) * np.exp(-DECAY_60_DB * np.arange(n, dtype=np.float32) / n)
    tail[: rate // 500] = 0.0  # nothing arrives in the first 2 ms
    tail *= np.sqrt(wet / (np.sum(tail**2) + 1e-9))
    tail[0] = np.sqrt(1.0 - wet)
    return tail


def add_room(
    rng: np.random.Generator, x_N: Float[np.ndarray, "N"], seconds: float, rate: int, wet: float
) -> Float[np.ndarray, "N"]:
    """Convolves with a random room; the clip keeps its length and power."""
    response = room(rng, seconds, rate, wet)
    size = scipy.fft.next_fast_len(len(x_N) + len(response) - 1, real=True)
    y = scipy.fft.irfft(scipy.fft.rfft(x_N, size) * scipy.fft.rfft(response, size), size)[: len(x_N)]
    return (y * np.sqrt(np.mean(x_N**2) / (np.mean(y**2) + 1e-12))).astype(np.float32)


def change_speed(x_N: Float[np.ndarray, "N"], ratio: float) -> Float[np.ndarray, "M"]:
    """Plays the wave `ratio` times as fast: pitch and resonances move with it, as if another body spoke."""
    return soxr.resample(np.asarray(x_N, np.float32), ratio, 1.0, quality="LQ")


@dataclasses.dataclass(frozen=True)
class Draw:
    """One training draw: how the clip itself changes, and what is laid over it for the encoder alone.

    Attributes:
        speed, gain: of the clip, for the target too.
        room: (seconds, wet) or None.
        noise: (snr_db, slope) or None.
    """

    speed: float = 1.0
    gain: float = 1.0
    room: tuple[float, float] | None = None
    noise: tuple[float, float] | None = None


def draw(rng: np.random.Generator, config: ConfigDict) -> Draw:
    """Draws from the ranges of `config.audio.augment`; always consumes the same amount of `rng`."""
    use = rng.uniform(size=3)
    speed, gain = rng.uniform(*config.speed), 10 ** (rng.uniform(*config.gain_db) / 20)
    room = (rng.uniform(*config.reverb_seconds), rng.uniform(*config.reverb_wet))
    noise = (rng.uniform(*config.snr_db), rng.uniform(*config.noise_slope))
    return Draw(
        speed=speed if use[0] < config.speed_share else 1.0,
        gain=gain,
        room=room if use[1] < config.reverb_share else None,
        noise=noise if use[2] < config.noise_share else None,
    )


def overlay(rng: np.random.Generator, x_N: Float[np.ndarray, "N"], drawn: Draw, rate: int) -> Float[np.ndarray, "N"]:
    """What the encoder hears of a clip (speed and gain already applied): the room, then noise, clipped to [-1, 1]."""
    if drawn.room is not None:
        x_N = add_room(rng, x_N, drawn.room[0], rate, drawn.room[1])
    if drawn.noise is not None:
        x_N = add_noise(rng, x_N, *drawn.noise)
    return np.clip(x_N, -1.0, 1.0)
