"""The speech tokenizer as everyone else uses it: waves to codes, codes to the mel decoder's input (tokenizers.md B.3, B.5).

Parts of a trained tokenizer: `audio_encoder` (encoder, bridge), `audio_quantizer` (parameters: the projection on the
decode side; statistics: one codebook per level, sizes falling), `audio_decoder`, `flow`. The way from codes to sound
is in detokenizer.py.

Letters: B clips, N samples, U codes (80 ms each), L levels, Z vector of a code, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dina.audio import features
from dina.audio.encoder import length_mask, make_encoder
from dina.config import InputError
from dina.quantize import rvq

# (params, stats, wave_BN, samples_B) -> (codes_BUL with -1 beyond each length, length_B)
Tokenize = Callable[[Mapping, Mapping, Array, Array], tuple[Array, Array]]


def quantizer_config(audio: ConfigDict) -> rvq.RVQConfig:
    """The quantizer of a config's `audio` section; its dimension is that of `pool` joined frames."""
    q = audio.quantizer
    return rvq.RVQConfig(
        sizes=tuple(q.sizes),
        dim=audio.bridge.pool * audio.encoder.width,
        codebook="separate",
        decay=q.decay,
        eps=q.eps,
        restart_fraction=q.restart_fraction,
        restart_cap=q.restart_cap,
        commitment=q.commitment,
    )


class CodeProjection(nn.Module):
    """Parameters of the part `audio_quantizer`: summed code vectors to the decoder's width."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, q_BUZ: Float[Array, "B U Z"]) -> Float[Array, "B U D"]:
        return nn.Dense(self.width, dtype=self.dtype, name="proj_decoder")(q_BUZ)


def code_lengths(samples_B: Int[Array, "B"], audio: ConfigDict) -> Int[Array, "B"]:
    """Codes of clips of `samples_B` samples at the encoder's rate."""
    frames_B = features.encoder_length(features.valid_frames(samples_B, audio.features), audio.encoder.get("stride", 2))
    return features.code_length(frames_B, audio.bridge.pool)


def search(audio: ConfigDict, stats: Mapping[str, Any], z_BUZ: Float[Array, "B U Z"]) -> Int[Array, "B U L"]:
    """Codes of continuous vectors by the rule `quantizer.residual`.

    'float32': residuals stay exact. 'activation': as released, the residual is rounded to the type of `z_BUZ` after
    each level and the nearest code is chosen on square roots of clamped distances (quirks Q2, Q3).
    """
    config = quantizer_config(audio)
    z_NZ = z_BUZ.reshape(-1, z_BUZ.shape[-1])
    if audio.quantizer.residual == "float32":
        codes_NL = rvq.encode(config, stats, z_NZ)
    elif audio.quantizer.residual == "activation":
        codes = []
        for level in range(config.levels):
            book_KZ = jnp.asarray(stats["codebook"][config.book(level)])
            codes.append(jnp.argmin(distances(z_NZ.astype(jnp.float32), book_KZ), -1).astype(jnp.int32))  # of ties the lowest id
            z_NZ = (z_NZ.astype(jnp.float32) - book_KZ[codes[-1]]).astype(z_BUZ.dtype)
        codes_NL = jnp.stack(codes, -1)
    else:
        raise InputError(f"audio.quantizer.residual {audio.quantizer.residual!r} is not one of float32, activation")
    return codes_NL.reshape(*z_BUZ.shape[:2], -1)


def distances(x_NZ: Float[Array, "N Z"], book_KZ: Float[Array, "K Z"]) -> Float[Array, "N K"]:
    """Euclidean distances to all codes of a level. The root decides which near-equal ones tie in float32."""
    dot_NK = jnp.matmul(x_NZ, book_KZ.T, precision=jax.lax.Precision.HIGHEST)
    squared_NK = (x_NZ**2).sum(-1, keepdims=True) + (book_KZ**2).sum(-1) - 2 * dot_NK
    return jnp.sqrt(jnp.maximum(squared_NK, 0.0))


def decoder_input(
    audio: ConfigDict, params: Mapping[str, Any], stats: Mapping[str, Any], codes_BUL: Int[Array, "B U L"], levels=None
) -> Float[Array, "B U D"]:
    """What the mel decoder reads for `codes_BUL`.

    Args:
        params, stats: of the part `audio_quantizer`.
        codes_BUL: codes; -1 = level absent; larger ids than a level has are clamped, as released.
        levels: how many levels to use, None for all.
    """
    limit_L = jnp.asarray(audio.quantizer.sizes, jnp.int32) - 1
    codes_NL = jnp.minimum(codes_BUL, limit_L).reshape(-1, codes_BUL.shape[-1])
    q_NZ = rvq.decode(quantizer_config(audio), stats, codes_NL, levels)
    q_BUZ = q_NZ.reshape(*codes_BUL.shape[:2], -1)
    return CodeProjection(audio.decoder.width).apply({"params": params}, q_BUZ)


def make_tokenize(audio: ConfigDict) -> Tokenize:
    """The compiled tokenizer: `tokenize(params, stats, wave_BN, samples_B)` with N = max_frames * hop.

    `params` and `stats` are {part: tree} with `audio_encoder` and `audio_quantizer`.
    """
    encoder = make_encoder(audio)

    @jax.jit
    def tokenize(params, stats, wave_BN, samples_B):
        mel_BTM = features.log_mel(wave_BN, samples_B, audio.features)
        frames_B = features.valid_frames(samples_B, audio.features)
        z_BUZ = encoder.apply({"params": params["audio_encoder"]}, mel_BTM, frames_B)
        codes_BUL = search(audio, stats["audio_quantizer"], z_BUZ)
        length_B = code_lengths(samples_B, audio)
        valid_BU = length_mask(length_B, codes_BUL.shape[1])
        return jnp.where(valid_BU[..., None], codes_BUL, -1), length_B

    return tokenize


def tokenize_waves(
    tokenize: Tokenize,
    audio: ConfigDict,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    waves: Sequence[Float[np.ndarray, "n"]],
    batch: int = 32,
) -> list[Int[np.ndarray, "U L"]]:
    """Codes of mono waves of any length at `features.rate`; long ones are cut into chunks and joined again.

    Args:
        tokenize: from `make_tokenize`; always called with `batch` rows, so it compiles once.
        waves: float in [-1, 1], or int16.

    Raises:
        InputError: a wave is too short, silent or not finite; the message gives its place in the list.
    """
    pieces, owner = [], []
    for index, wave in enumerate(waves):
        wave = wave.astype(np.float32) / 32768 if wave.dtype == np.int16 else np.asarray(wave, np.float32)
        features.check_wave(wave, f"wave {index}")
        chunks = features.split_chunks(wave, audio.features)
        if not chunks:
            raise InputError(f"wave {index}: {len(wave)} samples make no code with audio.features.tail = 'drop'")
        pieces += chunks
        owner += [index] * len(chunks)
    parts: list[list[np.ndarray]] = [[] for _ in waves]
    for start in range(0, len(pieces), batch):
        wave_BN, samples_B = pad_waves(pieces[start : start + batch], audio, batch)
        codes_BUL, length_B = jax.device_get(tokenize(params, stats, wave_BN, samples_B))
        for row, index in enumerate(owner[start : start + batch]):
            parts[index].append(codes_BUL[row, : length_B[row]])
    return [np.concatenate(part) for part in parts]


def pad_waves(waves: Sequence[np.ndarray], audio: ConfigDict, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Stacks float waves of at most one chunk to ([rows, N], samples [rows]); missing rows are one window of silence."""
    wave_BN = np.zeros((rows, audio.features.max_frames * audio.features.hop), np.float32)
    samples_B = np.full(rows, features.MIN_SAMPLES, np.int32)
    for row, wave in enumerate(waves):
        wave_BN[row, : len(wave)] = wave
        samples_B[row] = len(wave)
    return wave_BN, samples_B
