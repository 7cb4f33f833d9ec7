"""A spoken reply that is heard while it is made: positions in slices, their codes to sound as soon as they settle it.

The loop is `generate.run`'s, stopped every few positions; ids, codes and, with HiFT, samples are those of the whole reply. How soon the
first sound comes follows from the delay: the transcript's head start, one block of codes, and what the vocoder waits for.

Shapes: T positions, U codes, L levels, N samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Float, Int

from dina.audio.sound_stream import SoundStream
from dina.decode import batching, generate

_begin = jax.jit(generate.begin, static_argnames=("model", "length", "chunk"))
_go_on = jax.jit(generate.go_on, static_argnames=("model", "order"), donate_argnames=("loop",))


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some more positions of a reply; with the last ones, the reply.

    Attributes:
        tokens_T, transcript_T, codes_TL: as of `batching.Reply`.
        reply: None until everything is made.
    """

    tokens_T: Int[np.ndarray, "T"]
    transcript_T: Int[np.ndarray, "T"]
    codes_TL: Int[np.ndarray, "T L"]
    reply: batching.Reply | None


@dataclasses.dataclass(frozen=True)
class Spoken:
    """Some more sound and text of a reply.

    Attributes:
        wave_N: samples, maybe none.
        text: transcript ids made meanwhile, without padding.
        codes: frames made so far.
        reply: None until everything is made.
    """

    wave_N: Float[np.ndarray, "N"]
    text: tuple[int, ...]
    codes: int
    reply: batching.Reply | None


class Generator(batching.Generator):
    """A `batching.Generator` that also answers one request slice by slice."""

    def stream(self, request: batching.Request, every: int = 2) -> Iterator[Slice]:
        """The reply to one request, `every` positions at a time; raises as `__call__`."""
        batching.check(request)
        prompt, plan = self.batch([request], self.rows)
        steps = request.longest()
        length = -(-steps // self.reply_step) * self.reply_step
        loop = _begin(self.model, self.params, self.stats, prompt, plan, length, None, self.chunk)
        done, seen, count = 0, 0, 0
        while done < steps and count == done:  # a row that is done makes no more valid positions
            done = min(done + every, steps)
            loop = _go_on(self.model, self.params, self.stats, plan, loop, np.int32(done), self.order)
            made = jax.device_get(loop.out)
            count = int(made["valid"][0].sum())
            over = done == steps or count < done
            reply = self._read(self.model.vocabulary, request, made, 0) if over else None
            yield Slice(*(made[name][0, seen:count] for name in ("tokens", "transcript", "codes")), reply)
            seen = count


def speak(generator: Generator, request: batching.Request, sound: SoundStream, every: int = 2) -> Iterator[Spoken]:
    """The reply to one request as sound; all `wave_N` together are the reply's segments, joined.

    Args:
        generator: the language model.
        request: whose reply may hold any number of spoken segments.
        sound: of the experiment's speech tokenizer.
        every: positions between two looks.
    """
    v, codes = generator.model.vocabulary, 0
    sound.begin()
    for part in generator.stream(request, every):
        waves = []
        for token, code_L in zip(part.tokens_T, part.codes_TL, strict=True):
            if token == v.audio_pad:
                waves.append(sound.push(code_L[None, : len(v.audio)]))
                codes += 1
            elif token == v.audiogen_end:
                waves.append(sound.close())
        waves += [sound.end()] if part.reply is not None else []
        text = tuple(int(i) for i in part.transcript_T if i >= 0 and i != v.audiotext_pad)
        yield Spoken(np.concatenate(waves) if waves else np.zeros(0, np.float32), text, codes, part.reply)
