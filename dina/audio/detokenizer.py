"""Codes to sound: codebooks, mel decoder, flow matching, vocoder, in one compiled function (tokenizers.md B.3 to B.8).

Letters: B clips, U codes, L levels, T mel frames at 50 Hz, M mel bands, N samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dina.audio.encoder import length_mask
from dina.audio.features import denormalise
from dina.audio.flow import flow_length, make_flow, solve, time_grid
from dina.audio.mel_decoder import KERNEL, hidden_length, make_decoder
from dina.audio.tokenizer import decoder_input
from dina.audio import vocoder


@dataclasses.dataclass(frozen=True)
class Sound:
    """What comes out of codes.

    Attributes:
        wave: [B, N] at `target.rate`, zero beyond `samples`.
        samples: [B].
        mel: [B, T, M] ln mel of the flow, silence (ln 1e-5) beyond its frames.
        mean: [B, T, M] the prenet's first guess, likewise.
        refined: [B, T', M] ln mel of the mel decoder at the rate of `config.audio.recon`.
    """

    wave: Array
    samples: Array
    mel: Array
    mean: Array
    refined: Array


jax.tree_util.register_dataclass(Sound, ["wave", "samples", "mel", "mean", "refined"], [])

Detokenize = Callable[..., Sound]
SILENT = float(np.log(1e-5))


def parts(audio: ConfigDict) -> tuple[str, ...]:
    """The trained parts that turn codes into waves."""
    return "audio_quantizer", "audio_decoder", "flow", *vocoder.parts(audio)


def hidden_frames(codes, audio: ConfigDict):
    """Hidden frames of `codes` codes."""
    return hidden_length(codes, audio.bridge.pool, audio.decoder.get("kernel", KERNEL))


def mel_samples(codes, audio: ConfigDict):
    """Samples that `codes` codes give: (4 codes - 1) frames of one hop."""
    return flow_length(hidden_frames(codes, audio), audio.flow.prenet.ratio) * audio.target.hop


def flow_noise(key: Array, example_B: Int[Array, "B"], shape: tuple[int, ...]) -> Array:
    """Where the flow of each clip begins, [B, *shape]."""
    return jax.vmap(lambda example: jax.random.normal(jax.random.fold_in(key, example), shape))(example_B)


def finish_mel(x_BTM: Float[Array, "B T M"], valid_BT: Array, target: ConfigDict) -> Float[Array, "B T M"]:
    """The network's mel as ln mel, silence where it is not valid."""
    return jnp.where(valid_BT[..., None], jnp.maximum(denormalise(x_BTM, target), SILENT), SILENT)


def make_detokenize(audio: ConfigDict, levels: int | None = None) -> Detokenize:
    """The compiled detokenizer: `detokenize(params, stats, codes_BUL, length_B, key, example_B) -> Sound`.

    `params` holds `parts(audio)`, `stats` `audio_quantizer`. The flow's noise is drawn from (key, example_B), so a clip sounds
    the same in any batch of the same U. `levels` limits the codes used.
    """
    decoder, flow = make_decoder(audio), make_flow(audio)
    grid_S = time_grid(audio.flow.steps, audio.flow.grid, audio.flow.get("spacing", "cosine"))

    @jax.jit
    def detokenize(params, stats, codes_BUL, length_B, key, example_B):
        x_BUD = decoder_input(audio, params["audio_quantizer"], stats["audio_quantizer"], codes_BUL, levels)
        hidden_BTD, _, refined = decoder.apply({"params": params["audio_decoder"]}, x_BUD, length_B)
        variables = {"params": params["flow"]}
        frames_B = hidden_frames(length_B, audio)
        mu_BTM = flow.apply(variables, hidden_BTD, frames_B, method="mean")
        valid_BT = length_mask(flow_length(frames_B, audio.flow.prenet.ratio), mu_BTM.shape[1])
        noise_BTM = flow_noise(key, example_B, mu_BTM.shape[1:])
        velocity = lambda *inputs: flow.apply(variables, *inputs, method="velocity")
        mel_BTM = solve(velocity, mu_BTM, noise_BTM, valid_BT, grid_S, audio.flow.guidance)
        finished = lambda x_BTM: finish_mel(x_BTM, valid_BT, audio.target)
        mel_BTM = finished(mel_BTM)
        wave_BN = vocoder.make_vocoder(audio, params)(mel_BTM.swapaxes(1, 2), valid_BT.sum(1))
        samples_B = mel_samples(length_B, audio)
        wave_BN = jnp.where(length_mask(samples_B, wave_BN.shape[1]), wave_BN, 0.0)
        return Sound(wave_BN, samples_B, mel_BTM, finished(mu_BTM), denormalise(refined, audio.recon))

    return detokenize


def detokenize_codes(
    detokenize: Detokenize,
    audio: ConfigDict,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    codes: Sequence[Int[np.ndarray, "U L"]],
    seed: int = 0,
    batch: int = 16,
) -> list[Float[np.ndarray, "n"]]:
    """Waves at `target.rate` of code arrays, each at most one chunk long; empty codes give an empty wave.

    `detokenize` is always called with `batch` rows of one chunk, so it compiles once.

    Raises:
        ValueError: a code array is longer than one chunk.
    """
    longest = audio.features.max_frames // (2 * audio.bridge.pool)
    waves = []
    for start in range(0, len(codes), batch):
        part = codes[start : start + batch]
        codes_BUL = np.full((batch, longest, len(audio.quantizer.sizes)), -1, np.int32)
        length_B = np.zeros(batch, np.int32)
        for row, clip in enumerate(part):
            if len(clip) > longest:
                raise ValueError(f"codes {start + row}: {len(clip)} frames, one chunk holds {longest}")
            codes_BUL[row, : len(clip)] = clip
            length_B[row] = len(clip)
        example_B = np.arange(start, start + batch, dtype=np.int32)
        sound = jax.device_get(detokenize(params, stats, codes_BUL, length_B, jax.random.key(seed), example_B))
        waves += [sound.wave[row, : sound.samples[row]] for row in range(len(part))]
    return waves
