"""Many requests of any kinds through few compiled programs: sorting, padding, pairing, and reading replies back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dina import model as model_lib
from dina.backbone import linear
from dina.config import InputError
from dina.decode import generate, guidance, sampling
from dina.decode.prompts import Prompt
from dina.grammar import Document, Image, Speech, Text, decode, encode
from dina.grammar import rules

HEADS = ("text", "visual", "audio")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to answer it.

    Attributes:
        prompt: from dina/decode/prompts.py.
        seed, number: random numbers are those of this pair.
        text, visual, audio: sampling settings of the heads: temperature, top_k, top_p, repetition.
        image_guidance, speech_guidance: guidance scale s; 1 is unguided and costs no second row.
        delay: of spoken replies: a number, `rules.SERIAL` or `rules.PURE`.
        max_text: text ids outside of speech; max_frames: frames, and transcript ids, of a spoken reply.
        segments: spoken segments that a spoken reply has room for; more than one needs stop 'eos'.
        stop: 'eos', or 'span' to stop at the end of the first image or speech.
        grid: (h, w) of images whose size no tag names.
    """

    prompt: Prompt
    seed: int = 0
    number: int = 0
    text: Mapping[str, float] = dataclasses.field(default_factory=dict)
    visual: Mapping[str, float] = dataclasses.field(default_factory=dict)
    audio: Mapping[str, float] = dataclasses.field(default_factory=dict)
    image_guidance: float = 1.0
    speech_guidance: float = 1.0
    delay: int = rules.SERIAL
    max_text: int = 32
    max_frames: int = 32
    segments: int = 1
    stop: str = "eos"
    grid: tuple[int, int] = (1, 1)

    @property
    def guided(self) -> bool:
        """Whether the request needs an unconditional row."""
        return self.image_guidance != 1 or self.speech_guidance != 1

    def longest(self) -> int:
        """Positions that the reply may need."""
        h, w = self.prompt.grid or self.grid
        need = {"text": self.max_text, "image": h * (w + 1), "speech": (2 * self.max_frames + 3) * self.segments - 1}[self.prompt.reply]
        if self.stop == "span" or self.prompt.reply == "text":
            return need
        return need + self.max_text


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a request got.

    Attributes:
        document: spans of the reply, the span that the prompt opened included; unfinished spans are left out.
        tokens_T, transcript_T, codes_TL: the reply's positions as made.
        finished: False where a budget ended it.
    """

    document: Document
    tokens_T: Int[np.ndarray, "T"]
    transcript_T: Int[np.ndarray, "T"]
    codes_TL: Int[np.ndarray, "T L"]
    finished: bool

    def text(self) -> list[int]:
        """Ids of all text outside of speech, without eos and special tokens."""
        return [i for span in self.document if isinstance(span, Text) for i in span.ids]

    def images(self) -> list[Image]:
        """Painted images."""
        return [span for span in self.document if isinstance(span, Image)]

    def speech(self) -> list[Speech]:
        """Spoken replies."""
        return [span for span in self.document if isinstance(span, Speech)]


class Generator:
    """Answers requests with one model.

    Args:
        model: the modules; their vocabulary must have size tags.
        params, stats: variables by part.
        rows: rows of every compiled batch, unconditional and unused ones included; at least 2.
        prompt_step, reply_step: prompt and reply lengths are rounded up to a multiple; few values, few programs.
        unconditional: variant of the silent prompt, see guidance.py.
        order: order of the sampling filters, see sampling.py.
        prefill_chunk: prompts are read in pieces of so many positions, see `generate.run`.
    """

    def __init__(
        self,
        model: model_lib.Model,
        params: Any,
        stats: Any,
        rows: int = 128,
        prompt_step: int = 32,
        reply_step: int = 32,
        unconditional: str = "suffix",
        order: str = "joint",
        prefill_chunk: int = 0,
    ):
        self.rows, self.prompt_step, self.reply_step = max(rows, 2), prompt_step, reply_step
        params, stats = jax.tree.map(jnp.asarray, (params, stats))  # host arrays would be copied at every call
        self.model, self.params, self.stats = model, _serve(model, params, self.rows) if linear.rearranges() else params, stats
        self.unconditional, self.order, self.chunk = unconditional, order, prefill_chunk

    def read(self, document: Document) -> generate.Prefix:
        """Reads what many prompts begin with, once; `__call__` takes the result."""
        arrays = encode(document, self.model.vocabulary)
        return generate.read_prefix(self.model, self.params, self.stats, {name: x[None] for name, x in arrays.items()}, self.chunk)

    def __call__(self, requests: Sequence[Request], prefix: generate.Prefix | None = None) -> list[Reply]:
        """Answers all requests, in their order; with `prefix`, as if every prompt began with it.

        Raises:
            InputError: a guided request that continues a prefix where the silent prompt is not 'suffix', which has not read it;
                a seed out of range; a sampling setting that does not exist or is out of range; a delay, budget or stop likewise.
        """
        for request in requests:
            check(request)
            if prefix is not None and request.guided and self.unconditional != "suffix":
                raise InputError(f"a prefix and unconditional prompt {self.unconditional!r} do not go together: only 'suffix' leaves the prefix out")
        # Neighbours of equal lengths waste the fewest positions; the number keeps the order fixed.
        order = sorted(range(len(requests)), key=lambda i: (requests[i].longest(), len(requests[i].prompt), i))
        replies: list[Reply | None] = [None] * len(requests)
        while order:
            batch, used = [], 0
            while order and used + 1 + requests[order[0]].guided <= self.rows:
                used += 1 + requests[order[0]].guided
                batch.append(order.pop(0))
            for number, reply in zip(batch, self._answer([requests[i] for i in batch], prefix), strict=True):
                replies[number] = reply
        return replies

    def _answer(self, requests: Sequence[Request], prefix: generate.Prefix | None) -> list[Reply]:
        """One compiled call."""
        voc = self.model.vocabulary
        length = _round_up(max(request.longest() for request in requests), self.reply_step)
        prompt, plan = self.batch(requests, self.rows)
        steps = np.int32(max(request.longest() for request in requests))
        made = generate.run(self.model, self.params, self.stats, prompt, plan, steps, length, self.order, prefix, self.chunk)
        out = jax.device_get(made)
        return [self._read(voc, request, out, row) for row, request in enumerate(requests)]

    def batch(self, requests: Sequence[Request], rows: int) -> tuple[dict[str, np.ndarray], generate.Plan]:
        """Left-padded prompts and the plan of a batch of `rows` rows: requests, unconditional rows, filling."""
        guided = [i for i, request in enumerate(requests) if request.guided]
        owner = [*range(len(requests)), *guided]
        owner += [0] * (rows - len(owner))
        prompts = [request.prompt.arrays for request in requests]
        for prompt in (requests[i].prompt for i in guided):
            prompts.append(guidance.unconditional(prompt.arrays, prompt.opening or 1, self.unconditional))
        arrays = self._pad(prompts, rows)
        cond = np.array([*range(len(requests)), *guided, *range(len(requests) + len(guided), rows)], np.int32)
        partner = {i: len(requests) + n for n, i in enumerate(guided)}
        take = lambda name: [getattr(requests[i], name) for i in owner]

        def pairs(name):
            scale = np.array(take(name), np.float32)
            uncond = [partner.get(int(c), int(c)) if scale[r] != 1 else int(c) for r, c in enumerate(cond)]
            return guidance.Pairs(cond, np.array(uncond, np.int32), scale)

        ints = lambda name: np.array(take(name), np.int32)
        plan = generate.Plan(
            seed_R=ints("seed"), number_R=ints("number"), **{head: sampling.settings(take(head)) for head in HEADS},
            image_pairs=pairs("image_guidance"), speech_pairs=pairs("speech_guidance"), delay_R=ints("delay"),
            grid_R2=np.array([requests[i].prompt.grid or requests[i].grid for i in owner], np.int32),
            limit_R=ints("max_frames"), max_text_R=ints("max_text"),
            span_R=np.array([stop == "span" for stop in take("stop")], np.int32),
            used_R=np.arange(rows) < len(requests) + len(guided),
        )  # fmt: skip
        return arrays, plan

    def _pad(self, prompts: Sequence[Mapping[str, np.ndarray]], rows: int) -> dict[str, np.ndarray]:
        """Prompts on the left-padded grid of a compiled shape."""
        voc = self.model.vocabulary
        length = _round_up(max(len(prompt["tokens"]) for prompt in prompts), self.prompt_step)
        out = {
            "tokens": np.full((rows, length), voc.pad, np.int32),
            "transcript": np.full((rows, length), -1, np.int32),
            "codes": np.full((rows, length, voc.levels), -1, np.int32),
            "segment": np.zeros((rows, length), np.int32),
        }
        for row, prompt in enumerate(prompts):
            at = length - len(prompt["tokens"])
            for name in ("tokens", "transcript", "codes"):
                out[name][row, at:] = prompt[name]
            out["segment"][row, at:] = 1
        return out

    def _read(self, voc, request: Request, out: Mapping[str, np.ndarray], row: int) -> Reply:
        """Cuts a reply out of a batch and parses it together with the span that its prompt opened."""
        made = {name: out[name][row, out["valid"][row]] for name in ("tokens", "transcript", "codes")}
        start = len(request.prompt) - request.prompt.opening
        whole = {name: np.concatenate([request.prompt.arrays[name][start:], x]) for name, x in made.items()}
        spans = []
        for span in decode(whole, voc, unfinished="drop"):
            if isinstance(span, Text):
                ids = tuple(int(i) for i in span.ids if i < voc.text and i != voc.eos)
                spans += [Text(ids)] if ids else []
            else:
                spans.append(span)
        tokens = made["tokens"]
        closing = (voc.img_end, voc.audiogen_end) if request.stop == "span" else ()
        finished = bool(len(tokens)) and int(tokens[-1]) in (voc.eos, *closing)
        return Reply(tuple(spans), tokens, made["transcript"], made["codes"], finished)


_serve = jax.jit(model_lib.serve, static_argnums=(0, 2))


def check(request: Request) -> None:
    """Raises InputError for what the compiled program cannot do: seed, settings, budgets, delay, stop."""
    check_seed(request.seed)
    for head in HEADS:
        try:
            sampling.settings([dict(getattr(request, head))])
        except ValueError as error:
            raise InputError(f"{head} head: {error}") from None
    if request.stop not in generate.STOPS:
        raise InputError(f"stop {request.stop!r} does not exist; known: {', '.join(generate.STOPS)}")
    if request.max_text < 1 or request.max_frames < 1 or request.segments < 1:
        raise InputError(f"budgets must be at least 1: max_text {request.max_text}, max_frames {request.max_frames}, segments {request.segments}")
    if request.delay < 0 and request.delay != rules.PURE:
        raise InputError(f"speech delay {request.delay}: must be 0 or more")


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that is no non-negative int32, the type that the compiled program takes."""
    if not 0 <= seed < 2**31:
        raise InputError(f"seed {seed}: must be 0 to {2**31 - 1}")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
