"""The pitch of speech by YIN (de Cheveigné & Kawahara 2002): what the vocoder's pitch predictor learns from.

A frame and its copy `lag` samples later differ least where the lag is a period. The difference is divided by its mean over
all shorter lags, the first valley below a threshold is taken, and its minimum is refined by a parabola. Frames without such
a valley, and quiet ones, are unvoiced.

Letters: B clips, N samples, T frames, W samples of a window, L lags.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dina.audio.features import frame

THRESHOLD = 0.15  # between the paper's 0.1 and what lets creaky and breathy frames count as voiced
QUIET = 1e-3  # root mean square below this is unvoiced: 60 dB below full scale


def yin(x_BN: Float[Array, "B N"], rate: int, hop: int, low: float = 60.0, high: float = 500.0) -> Float[Array, "B T"]:
    """Hz of the N // hop frames that begin every `hop` samples, 0 where unvoiced.

    Args:
        x_BN: waves, zero beyond their ends.
        rate: samples a second.
        hop: samples a frame; the window is centred on them, as the mel's is (features.magnitude).
        low, high: Hz between which pitch is looked for.
    """
    shortest, longest = int(rate / high), math.ceil(rate / low)
    window = 2 * longest
    size = -(-(window + longest + 1) // hop) * hop  # whole hops, so that frames are cut in large pieces
    edge = (window + longest - hop) // 2
    frames = frame(jnp.pad(x_BN, ((0, 0), (edge, size - hop - edge))), size, hop)
    energy = jnp.cumsum(jnp.pad(frames**2, ((0, 0), (0, 0), (1, 0))), axis=-1)
    lags = np.arange(longest + 2)
    later = energy[..., window : window + longest + 2] - energy[..., : longest + 2]
    n_fft = 1 << (size - 1).bit_length()
    head = jnp.fft.rfft(jnp.where(np.arange(size) < window, frames, 0.0), n_fft)
    product = jnp.fft.irfft(head.conj() * jnp.fft.rfft(frames, n_fft), n_fft)[..., : longest + 2]
    difference_BTL = jnp.maximum(later[..., :1] + later - 2 * product, 0.0)
    mean = jnp.cumsum(difference_BTL, axis=-1) / np.maximum(lags, 1)
    level_BTL = difference_BTL / jnp.maximum(mean, 1e-9)

    here, before, after = level_BTL[..., 1:-1], level_BTL[..., :-2], level_BTL[..., 2:]
    inside = (lags[1:-1] >= shortest) & (lags[1:-1] <= longest)
    valley = (here < THRESHOLD) & (here <= before) & (here < after) & inside
    at_BT1 = jnp.argmax(valley, axis=-1, keepdims=True)
    a, b, c = (jnp.take_along_axis(x, at_BT1, axis=-1)[..., 0] for x in (before, here, after))
    offset = 0.5 * (a - c) / jnp.maximum(a - 2 * b + c, 1e-9)
    period = at_BT1[..., 0] + 1 + jnp.clip(offset, -0.5, 0.5)
    loud = later[..., 0] > window * QUIET**2
    return jnp.where(jnp.any(valley, axis=-1) & loud, rate / period, 0.0)
