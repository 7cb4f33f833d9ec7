"""Decoding in chunks as codes come in, and joining the waves of segments (tokenizers.md B.5, B.6, B.8).

`MelStream` makes the mel of one block of the estimator (100 frames, 25 codes, 2 s) after the other, equal to the whole
clip's: causal layers keep their keys and values, causal convolutions their last frames, and the estimator does so for each
step of the solver. A group norm over the whole clip waits for its last code, so a stream from codes on needs
`audio.decoder.statistics = 'frame'`; with other statistics the hidden frames of a whole clip can still be spoken block by block.

Letters: B clips, U codes, L levels, T frames, D width, M mel bands, S solver steps, N samples.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dina.audio.detokenizer import finish_mel, flow_noise, hidden_frames
from dina.audio.encoder import STREAM
from dina.audio.flow import make_flow, solve_keeping, time_grid
from dina.audio.mel_decoder import KERNEL, make_decoder
from dina.audio.tokenizer import decoder_input
from dina.config import InputError, check_name

JOINS = ("crossfade", "insert")


class MelStream:
    """Compiled once for a number of clips side by side; any number of streams, one after the other or interleaved.

    Args:
        audio: `config.audio`.
        longest: codes of the longest clip; noise is that of `make_detokenize` for as many codes.
        levels: how many levels to use, None for all.

    Raises:
        InputError: settings whose modules see beyond a block.
    """

    def __init__(self, audio: ConfigDict, longest: int, levels: int | None = None):
        self.audio, self.levels, pool = audio, levels, audio.bridge.pool
        self.frames = audio.flow.estimator.chunk
        if self.frames % pool or audio.flow.prenet.ratio != 1.0 or audio.decoder.get("kernel", KERNEL) > pool:
            raise InputError(f"a stream needs audio.flow.estimator.chunk, which is {self.frames}, in whole codes of {pool} frames,"
                             f" audio.flow.prenet.ratio 1, and audio.decoder.kernel at most {pool}")  # fmt: skip
        self.codes = self.frames // pool
        self.longest, self.room = longest, -(-longest // self.codes) * self.frames
        self.decoder, self.flow = make_decoder(audio), make_flow(audio)
        self.grid_S = time_grid(audio.flow.steps, audio.flow.grid, audio.flow.get("spacing", "cosine"))
        self._hear, self._speak = jax.jit(self._hidden), jax.jit(self._mel)

    def start(self, params: Mapping[str, Any], rows: int, key: Array, example_B: Int[Array, "B"]) -> dict[str, Any]:
        """The state of a stream of `rows` clips; noise is drawn from (key, example_B) as in `make_detokenize`."""
        x_BUD = jnp.zeros((rows, self.codes, self.audio.decoder.width))
        hidden_BTD = jnp.zeros((rows, self.frames, self.audio.decoder.width))
        mel_BTM, sides = jnp.zeros((rows, self.frames, self.audio.target.mels)), 1 if self.audio.flow.guidance == 0 else 2
        wide_BTM, one_B = jnp.zeros((sides * rows, self.frames, self.audio.target.mels)), jnp.ones(rows, jnp.int32)
        point = wide_BTM, wide_BTM, jnp.zeros(sides * rows), jnp.ones(wide_BTM.shape[:2], bool)
        first = {
            "decoder": lambda: self._apply(self.decoder, params["audio_decoder"], None, "hidden", x_BUD, one_B, 0)[1],
            "prenet": lambda: self._apply(self.flow, params["flow"], None, "mean", hidden_BTD, one_B, 0)[1],
            "estimator": lambda: self._apply(self.flow, params["flow"], None, "velocity", *point, 0)[1],
        }
        if self.audio.decoder.statistics != "frame":
            del first["decoder"]
        kept = {name: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make)) for name, make in first.items()}
        kept["estimator"] = jax.tree.map(lambda x: jnp.zeros((len(self.grid_S) - 1, *x.shape), x.dtype), kept["estimator"])
        noise_BTM = flow_noise(key, example_B, (hidden_frames(self.longest, self.audio), mel_BTM.shape[-1]))
        noise_BTM = jnp.pad(noise_BTM, ((0, 0), (0, self.room - noise_BTM.shape[1]), (0, 0)))
        return {"kept": kept, "noise": noise_BTM, "heard": jnp.int32(0), "spoken": jnp.int32(0)}

    def hear(
        self, params: Mapping[str, Any], stats: Mapping[str, Any], state: dict[str, Any], codes_BUL: Int[Array, "B U L"], length_B: Int[Array, "B"]
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Hidden frames of the next `self.codes` codes, and the state.

        Args:
            params, stats: as for `make_detokenize`.
            state: of the stream.
            codes_BUL: the next codes; beyond a clip's end anything.
            length_B: codes of a clip that has ended, -1 of one that goes on.

        Raises:
            InputError: the mel decoder's statistics are of the whole clip.
        """
        if self.audio.decoder.statistics != "frame":
            wrong = f"audio.decoder.statistics is {self.audio.decoder.statistics!r}"
            raise InputError(f"{wrong}; a stream of codes needs 'frame', or the whole clip's codes")
        self._check_room(state["heard"])
        return self._hear(params, stats, state, codes_BUL, length_B)

    def speak(
        self, params: Mapping[str, Any], state: dict[str, Any], hidden_BTD: Float[Array, "B T D"], length_B: Int[Array, "B"]
    ) -> tuple[Float[Array, "B T M"], dict[str, Any]]:
        """ln mel of the next `self.frames` hidden frames, silence beyond a clip's end, and the state; see `hear`."""
        self._check_room(state["spoken"])
        return self._speak(params, state, hidden_BTD, length_B)

    def whole(
        self, params: Mapping[str, Any], stats: Mapping[str, Any], codes_BUL: Int[Array, "B U L"], length_B: Int[Array, "B"], key: Array,
        example_B: Int[Array, "B"],
    ) -> Iterator[Float[Array, "B T M"]]:  # fmt: skip
        """The mel of whole clips block by block, for any statistics: the first is there before the others are computed."""
        state, blocks = self.start(params, len(codes_BUL), key, example_B), -(-int(np.max(length_B)) // self.codes)
        if self.audio.decoder.statistics != "frame":
            hidden_BTD = self._whole_hidden(params, stats, codes_BUL, length_B)
            hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, self.frames), (0, 0)))
        codes_BUL = np.pad(codes_BUL, ((0, 0), (0, max(0, blocks * self.codes - codes_BUL.shape[1])), (0, 0)), constant_values=-1)
        for block in range(blocks):
            if self.audio.decoder.statistics == "frame":
                part_BTD, state = self.hear(params, stats, state, codes_BUL[:, block * self.codes : (block + 1) * self.codes], length_B)
            else:
                part_BTD = hidden_BTD[:, block * self.frames : (block + 1) * self.frames]
            mel_BTM, state = self.speak(params, state, part_BTD, length_B)
            yield mel_BTM

    @functools.partial(jax.jit, static_argnums=0)
    def _whole_hidden(self, params, stats, codes_BUL, length_B):
        x_BUD = decoder_input(self.audio, params["audio_quantizer"], stats["audio_quantizer"], codes_BUL, self.levels)
        return self.decoder.apply({"params": params["audio_decoder"]}, x_BUD, length_B, method="hidden")

    def _check_room(self, start: Array) -> None:
        if int(start) >= self.room:
            raise InputError(f"a stream of {self.longest} codes has no room for more; begin another segment")

    def _apply(self, module, params, kept, method: str, *inputs):
        """(output, what the module keeps)."""
        variables = {"params": params} | ({} if kept is None else {STREAM: kept})
        out, changed = module.apply(variables, *inputs, self.room, method=method, mutable=[STREAM])
        return out, changed[STREAM]

    def _open(self, length_B):
        """Codes of each clip, more than there is room for where it goes on."""
        return jnp.where(length_B < 0, self.room // self.audio.bridge.pool + 1, length_B)

    def _hidden(self, params, stats, state, codes_BUL, length_B):
        x_BUD = decoder_input(self.audio, params["audio_quantizer"], stats["audio_quantizer"], codes_BUL, self.levels)
        inputs = x_BUD, self._open(length_B), state["heard"]
        hidden_BTD, kept = self._apply(self.decoder, params["audio_decoder"], state["kept"]["decoder"], "hidden", *inputs)
        return hidden_BTD, state | {"kept": state["kept"] | {"decoder": kept}, "heard": state["heard"] + self.frames}

    def _mel(self, params, state, hidden_BTD, length_B):
        start, kept = state["spoken"], state["kept"]
        frames_B = hidden_frames(self._open(length_B), self.audio)
        mu_BTM, prenet = self._apply(self.flow, params["flow"], kept["prenet"], "mean", hidden_BTD, frames_B, start)
        valid_BT = start + jnp.arange(self.frames) < frames_B[:, None]
        noise_BTM = jax.lax.dynamic_slice_in_dim(state["noise"], start, self.frames, axis=1)
        velocity = lambda kept, *point: self._apply(self.flow, params["flow"], kept, "velocity", *point, start)
        solved = solve_keeping(velocity, mu_BTM, noise_BTM, valid_BT, self.grid_S, self.audio.flow.guidance, kept["estimator"])
        mel_BTM = finish_mel(solved[0], valid_BT, self.audio.target)
        return mel_BTM, state | {"kept": kept | {"prenet": prenet, "estimator": solved[1]}, "spoken": start + self.frames}


def segments(codes_UL: Int[np.ndarray, "U L"], end: int, longest: int) -> list[Int[np.ndarray, "u L"]]:
    """Cuts a stream of generated codes at rows whose first code is the end class, and longer pieces at `longest` codes.

    Args:
        codes_UL: codes, with or without a last row of the end class.
        end: the end class of level 0, the number of its codes.
        longest: codes of one chunk: 375 of 30 s.
    """
    pieces = np.split(codes_UL, np.flatnonzero(codes_UL[:, 0] == end))
    pieces = [piece[1:] if len(piece) and piece[0, 0] == end else piece for piece in pieces]
    return [piece[start : start + longest] for piece in pieces for start in range(0, len(piece), longest)]


def join(waves: Sequence[Float[np.ndarray, "n"]], overlap: int, method: str = "crossfade") -> Float[np.ndarray, "N"]:
    """One wave of the waves of segments.

    Args:
        waves: in order; two of which one is not longer than `overlap` follow each other as they are.
        overlap: samples that two neighbours share; the release has 1200 at 24 kHz.
        method: 'crossfade' blends the end of one into the beginning of the next, once; 'insert' is the released rule, which
            puts the blend between the two whole waves, so that it is heard three times (quirk Q21).
    """
    check_name(method, JOINS, "way to join segments")
    parts: list[np.ndarray] = []
    rise_n = np.linspace(0.0, 1.0, overlap, dtype=np.float32)
    for wave in waves:
        if parts and overlap and min(len(parts[-1]), len(wave)) > overlap:
            blend = parts[-1][-overlap:] * (1 - rise_n) + wave[:overlap] * rise_n
            if method == "crossfade":
                parts[-1], wave = parts[-1][:-overlap], np.concatenate([blend, wave[overlap:]])
            else:
                parts.append(blend)
        parts.append(wave)
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
