"""Distillation of the first level of speech codes: what makes it say what was said, not how (tokenizers.md C.2, I).

A frozen feature of the sound, at the rate of codes, is predicted by a linear head from the first level's vectors alone; the
loss is one minus their cosine. 'cepstra' needs no trained model: the shape of the spectrum without its fine structure, and
how it changes, which tells phones apart and hardly voices' pitch. Each code's feature is centred and scaled over the clip,
so that loudness, channel and a voice's mean spectrum are gone as well.

Letters: B clips, T mel frames, M mel bands, U codes, F features, Z vector of a code, N codes of all clips.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dina.config import check_name

PART = "audio_semantic"
FEATURES = ("none", "cepstra")
CEPSTRA = 12  # after the first, which is loudness


class SemanticHead(nn.Module):
    """The throw-away part `audio_semantic`: the first level's vectors to the feature."""

    features: int

    @nn.compact
    def __call__(self, q_BUZ: Float[Array, "B U Z"]) -> Float[Array, "B U F"]:
        return nn.Dense(self.features, name="out")(q_BUZ)


def width(feature: str) -> int:
    """F of a feature; 0 of 'none'. Raises InputError for another name."""
    check_name(feature, FEATURES, "options.distill")
    return 0 if feature == "none" else 2 * CEPSTRA


def cepstra(mel_BTM: Float[Array, "B T M"], valid_BU: Bool[Array, "B U"]) -> Float[Array, "B U F"]:
    """Mean cepstra of each code's frames and their differences to the code before; mean 0, deviation 1 over a clip's codes.

    Args:
        mel_BTM: log-mel features without SpecAugment; T is U times whole frames, or that and a part, which is left out.
        valid_BU: codes that count; others come out zero.
    """
    codes, bands = valid_BU.shape[1], mel_BTM.shape[2]
    each = mel_BTM.shape[1] // codes
    mel_BUM = mel_BTM[:, : codes * each].reshape(len(mel_BTM), codes, each, bands).mean(2)
    angle = np.pi / bands * (np.arange(bands)[:, None] + 0.5) * np.arange(1, CEPSTRA + 1)
    now_BUF = mel_BUM @ np.cos(angle).astype(np.float32)
    change_BUF = jnp.diff(now_BUF, axis=1, prepend=now_BUF[:, :1])
    both_BUF, keep = jnp.concatenate([now_BUF, change_BUF], -1), valid_BU[..., None].astype(jnp.float32)
    count = jnp.maximum(keep.sum(1, keepdims=True), 1.0)
    centred = (both_BUF - (both_BUF * keep).sum(1, keepdims=True) / count) * keep
    return centred / jnp.sqrt((centred**2).sum(1, keepdims=True) / count + 1e-4)


def distance(found_BUF: Float[Array, "B U F"], wanted_BUF: Float[Array, "B U F"], valid_BU: Bool[Array, "B U"]) -> tuple[Array, Array]:
    """(sum over valid codes of one minus the cosine, valid codes)."""
    lengths = jnp.sqrt((found_BUF**2).sum(-1) + 1e-6) * jnp.sqrt((wanted_BUF**2).sum(-1) + 1e-6)
    off_BU = 1.0 - (found_BUF * wanted_BUF).sum(-1) / lengths
    keep_BU = valid_BU.astype(jnp.float32)
    return jnp.sum(off_BU * keep_BU), jnp.sum(keep_BU)
