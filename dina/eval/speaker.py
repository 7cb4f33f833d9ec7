"""Whether two clips are of one speaker: the voice encoder of Resemblyzer (GE2E, Wan et al. 2018), run without PyTorch.

Mel frames of a clip, in windows of 1.6 s that overlap by half, go through three LSTM layers; the last state of each window is
projected, made positive and of unit length, and the mean over windows is the speaker's vector. Cosines of vectors of one
speaker are near 0.8, of two speakers near 0.5 (`reference/data.md` section 5); the pauses that Resemblyzer cuts out stay in.

Letters: N samples, W windows, T frames, K mel bands, H state.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dina.audio.features import mel_filters
from dina.config import InputError
from dina.data import packages, torch_weights

RATE = 16_000
PACKAGE = packages.Package("pypi", "Resemblyzer", "0.1.4", "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f",
                           "Apache-2.0")
_FILE = "resemblyzer/pretrained.pt"
_WINDOW, _HOP, _MELS, _FRAMES = 400, 160, 40, 160
_LAYERS, _STATE = 3, 256
_LOUDNESS = 10 ** (-30 / 20)  # root mean square that quieter clips are raised to
_LEAST = 0.75  # share of a window that must be there for it to count, but for the first


def load(data_dir: pathlib.Path) -> dict[str, np.ndarray]:
    """The encoder's weights by their PyTorch names; 16 MB are fetched at the first use.

    Raises:
        InputError: the package cannot be fetched, is damaged or is another one.
    """
    path = packages.fetch(PACKAGE, data_dir) / _FILE
    saved = torch_weights.read(path)
    weights = saved.get("model_state", {}) if isinstance(saved, dict) else {}
    for name, shape in shapes().items():
        if np.shape(weights.get(name)) != shape:
            raise InputError(f"{path} is not the expected voice encoder: {name} is {np.shape(weights.get(name))}, not {shape};"
                             f" remove {path.parents[2]} to fetch it again")
    return {name: weights[name] for name in shapes()}


def shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight."""
    found: dict[str, tuple[int, ...]] = {"linear.weight": (_STATE, _STATE), "linear.bias": (_STATE,)}
    for layer in range(_LAYERS):
        found[f"lstm.weight_ih_l{layer}"] = (4 * _STATE, _STATE if layer else _MELS)
        found[f"lstm.weight_hh_l{layer}"] = (4 * _STATE, _STATE)
        found |= {f"lstm.bias_{kind}_l{layer}": (4 * _STATE,) for kind in ("ih", "hh")}
    return found


def windows(wave_N: Float[np.ndarray, "N"]) -> Float[np.ndarray, "W T K"]:
    """Mel power of a 16 kHz wave in overlapping windows; a short clip is completed with silence."""
    wave = np.asarray(wave_N, np.float32)
    loudness = np.sqrt(np.mean(wave**2))
    wave = wave * max(1.0, _LOUDNESS / max(loudness, 1e-9))
    span, step = _FRAMES * _HOP, _FRAMES * _HOP // 2
    starts = [0] + [start for start in range(step, len(wave), step) if len(wave) - start >= _LEAST * span]
    wave = np.pad(wave, (_WINDOW // 2, span + _WINDOW))
    hann = np.sin(np.pi * np.arange(_WINDOW) / _WINDOW) ** 2
    every = np.lib.stride_tricks.sliding_window_view(wave, _WINDOW)
    filters_FK = mel_filters(RATE, _WINDOW, _MELS, 0.0, RATE / 2)
    frames_WTN = np.stack([every[start : start + span : _HOP] for start in starts])
    return (np.abs(np.fft.rfft(frames_WTN * hann, axis=-1)) ** 2 @ filters_FK).astype(np.float32)


@jax.jit
def encode(weights: Mapping[str, Array], mel_WTK: Float[Array, "W T K"]) -> Float[Array, "W H"]:
    """Unit vector of every window."""
    x_TWD = mel_WTK.swapaxes(0, 1)
    for layer in range(_LAYERS):
        into, back = weights[f"lstm.weight_ih_l{layer}"], weights[f"lstm.weight_hh_l{layer}"]
        driven_TWH = x_TWD @ into.T + weights[f"lstm.bias_ih_l{layer}"] + weights[f"lstm.bias_hh_l{layer}"]

        def step(carry, driven):
            h, c = carry
            into_gate, forget, new, out = jnp.split(driven + h @ back.T, 4, axis=-1)
            c = jax.nn.sigmoid(forget) * c + jax.nn.sigmoid(into_gate) * jnp.tanh(new)
            h = jax.nn.sigmoid(out) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((x_TWD.shape[1], _STATE))
        (last, _), x_TWD = jax.lax.scan(step, (zero, zero), driven_TWH)
    raw = jax.nn.relu(last @ weights["linear.weight"].T + weights["linear.bias"])
    return raw / jnp.maximum(jnp.linalg.norm(raw, axis=-1, keepdims=True), 1e-9)


def embed(weights: Mapping[str, Array], wave_N: Float[np.ndarray, "N"]) -> Float[np.ndarray, "H"]:
    """The speaker's unit vector of a wave at 16 kHz in [-1, 1]."""
    mel_WTK = windows(wave_N)
    # Powers of two, so that clips of all lengths are few compilations.
    count = 1 << (len(mel_WTK) - 1).bit_length()
    padded = np.pad(mel_WTK, ((0, count - len(mel_WTK)), (0, 0), (0, 0)))
    mean = np.asarray(encode(weights, padded))[: len(mel_WTK)].mean(0)
    return mean / max(np.linalg.norm(mean), 1e-9)


def similarity(weights: Mapping[str, Array], one_N: Float[np.ndarray, "N"], other_M: Float[np.ndarray, "M"]) -> float:
    """Cosine of the speakers of two waves at 16 kHz."""
    return float(embed(weights, one_N) @ embed(weights, other_M))
