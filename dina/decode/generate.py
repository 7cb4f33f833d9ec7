"""Replies to a batch of mixed requests: prompts are read once, then one compiled step makes a position for every row.

A step takes the last hidden states, runs the heads that some row needs (text head, visual depth head, audio depth
head), lets the grammar turn the samples into the next outer id, transcript id and codes, and feeds those to the
trunk's cache. Rows paint, speak and write side by side and stop on their own; one reply may hold all of them.

A guided request owns a second, unconditional row that carries the same positions (dina/decode/guidance.py). When a
reply opens an image or speech of its own, that row forgets all it has read: it continues as a new document.

Prompts are padded on the left to one of a few lengths and replies get one of a few cache lengths, so that a whole
evaluation compiles a handful of programs; `Generator` sorts requests so that neighbours are alike. A row's random
numbers depend on its request's seed and number only, never on its neighbours.

Shapes: R rows (conditional, then unconditional), P prompt positions, T reply positions, L levels, V classes, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dina import model as model_lib
from dina.backbone import ngram
from dina.backbone.block import Cache, init_cache
from dina.decode import codes as code_sampling
from dina.decode import guidance, sampling
from dina.embed import text_ids
from dina.grammar import rules

TEXT_STREAM, CODE_STREAM = 0, 1  # random streams of one step; levels follow CODE_STREAM
STOPS = ("eos", "span")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a batch's rows ask for; arrays over rows.

    Attributes:
        seed_R, number_R: a row's random numbers are those of (seed, number); equal in both rows of a pair.
        text, visual, audio: sampling settings of the heads.
        image_pairs, speech_pairs: guided rows of images and of speech.
        delay_R, grid_R2, limit_R: see `rules.start`.
        max_text_R: text ids outside of speech before the row is stopped.
        span_R: 1 stops the row at the end of its first image or speech, 0 at eos.
        used_R: False for rows that only fill up the batch.
    """

    seed_R: Int[Array, "R"]
    number_R: Int[Array, "R"]
    text: sampling.Sampling
    visual: sampling.Sampling
    audio: sampling.Sampling
    image_pairs: guidance.Pairs
    speech_pairs: guidance.Pairs
    delay_R: Int[Array, "R"]
    grid_R2: Int[Array, "R 2"]
    limit_R: Int[Array, "R"]
    max_text_R: Int[Array, "R"]
    span_R: Int[Array, "R"]
    used_R: Bool[Array, "R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loop:
    """What one step hands to the next.

    Attributes:
        step: positions made so far.
        h_RD: hidden states that predict the next position.
        cache, history_RH: of the trunk and of the n-gram hash.
        position_R, segment_R: of the last position.
        grammar: where each row stands.
        text_R: text ids made outside of speech.
        seen: per head, the classes made so far.
        out: tokens, transcript [R, T], codes [R, T, L], valid [R, T].
    """

    step: Int[Array, ""]
    h_RD: Float[Array, "R D"]
    cache: Cache
    history_RH: Int[Array, "R H"]
    position_R: Int[Array, "R"]
    segment_R: Int[Array, "R"]
    grammar: rules.State
    text_R: Int[Array, "R"]
    seen: dict[str, Bool[Array, "R ..."]]
    out: dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What many prompts begin with, read once; arrays of one row.

    Attributes:
        cache: the trunk's, as long as the prefix.
        history_RH: n-gram state behind it.
    """

    cache: Cache
    history_RH: Int[Array, "1 H"]


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def read_prefix(model: model_lib.Model, params: Any, stats: Any, prefix: dict[str, Array], chunk: int = 0) -> Prefix:
    """Reads a prefix: tokens, transcript [1, P], codes [1, P, L], without padding; `chunk` as of `run`."""
    arrays = prefix | {"segment": jnp.ones_like(prefix["tokens"])}
    width = prefix["tokens"].shape[1]
    history_RH = ngram.init_history(model.ngram, 1)
    _, cache, history_RH = _read(model, params, stats, arrays, history_RH, init_cache(model.trunk, 1, width, params["backbone"]), 0, jnp.zeros(1, jnp.int32), chunk)
    return Prefix(cache, history_RH)


@functools.partial(jax.jit, static_argnames=("model", "length", "order", "chunk"))
def run(
    model: model_lib.Model,
    params: Any,
    stats: Any,
    prompt: dict[str, Array],
    plan: Plan,
    steps: Int[Array, ""],
    length: int,
    order: str = "joint",
    prefix: Prefix | None = None,
    chunk: int = 0,
) -> dict[str, Array]:
    """Generates until every row is done or `steps` positions are made.

    Args:
        model: the modules.
        params: {part: tree} of all language parts.
        stats: {'backbone': {'router_bias'}}.
        prompt: tokens, transcript, segment [R, P], codes [R, P, L]; padded on the left with segment 0.
        plan: what each row asks for.
        steps: at most `length`; traced, so that it never recompiles.
        length: T.
        order: order of the sampling filters.
        prefix: what stands before every prompt but those of unconditional rows, from `read_prefix`.
        chunk: prompts are read in pieces of so many positions, so that attention never holds more queries; 0: at once.

    Returns:
        tokens, transcript [R, T], codes [R, T, L] and valid [R, T]: the reply's positions.
    """
    return go_on(model, params, stats, plan, begin(model, params, stats, prompt, plan, length, prefix, chunk), steps, order).out


def go_on(model, params, stats, plan: Plan, loop: Loop, steps, order: str = "joint") -> Loop:
    """Goes on until every row is done or `steps` positions are made, those before included."""
    key_R = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(plan.seed_R, plan.number_R)
    choices_2V = jnp.asarray(rules.text_choices(model.vocabulary))

    def more(loop: Loop):
        return (loop.step < steps) & jnp.any(loop.grammar.mode != rules.DONE)

    def body(loop: Loop):
        return _step(model, params, stats, plan, key_R, choices_2V, order, loop)

    return jax.lax.while_loop(more, body, loop)


def begin(model, params, stats, prompt, plan: Plan, length: int, prefix: Prefix | None, chunk: int) -> Loop:
    """Reads the prompts."""
    voc = model.vocabulary
    rows, width = prompt["tokens"].shape
    valid_RP = prompt["segment"] > 0
    pair_R = plan.image_pairs.cond_R
    cache, history_RH, before_R, first = _behind(model, params, prefix, pair_R, width + length)
    h_RD, cache, history_RH = _read(model, params, stats, prompt, history_RH, cache, first, before_R, chunk)
    grid = plan.grid_R2[:, 0], plan.grid_R2[:, 1]
    said = prompt["tokens"], prompt["transcript"], valid_RP
    read = rules.initial_state(voc, *said, plan.delay_R, grid, plan.limit_R)
    # An unconditional row says the same as its partner, whatever it has read itself.
    state = jax.tree.map(lambda x: x[pair_R], read)
    state = dataclasses.replace(state, mode=jnp.where(plan.used_R, state.mode, rules.DONE))
    most = lambda sizes: max(sizes) + 1
    false = lambda *shape: jnp.zeros((rows, *shape), bool)
    return Loop(
        step=jnp.int32(0),
        h_RD=h_RD,
        cache=cache,
        history_RH=history_RH,
        position_R=before_R + jnp.sum(valid_RP, 1, dtype=jnp.int32) - 1,
        segment_R=prompt["segment"][:, -1],
        grammar=state,
        text_R=jnp.zeros(rows, jnp.int32),
        seen={
            "text": false(voc.padded_classes),
            "visual": false(len(voc.visual), most(voc.visual)),
            "audio": false(len(voc.audio), most(voc.audio)),
        },
        out={
            "tokens": jnp.full((rows, length), voc.pad, jnp.int32),
            "transcript": jnp.full((rows, length), -1, jnp.int32),
            "codes": jnp.full((rows, length, voc.levels), -1, jnp.int32),
            "valid": false(length),
        },
    )


def _behind(model, params, prefix: Prefix | None, pair_R, length: int):
    """(cache, n-gram history, positions before the prompt, first free slot) of rows that continue `prefix`."""
    rows = len(pair_R)
    if prefix is None:
        return init_cache(model.trunk, rows, length, params["backbone"]), ngram.init_history(model.ngram, rows), jnp.zeros(rows, jnp.int32), 0
    first = prefix.cache.segment_BT.shape[1]
    # An unconditional row has not read it.
    told_R = pair_R == jnp.arange(rows)
    wide = lambda x: jnp.pad(jnp.repeat(x, rows, axis=-3), [(0, 0)] * (x.ndim - 2) + [(0, length), (0, 0)])
    segment_RT = jnp.pad(told_R[:, None] * prefix.cache.segment_BT, [(0, 0), (0, length)])
    cache = Cache(*jax.tree.map(wide, (prefix.cache.latents, prefix.cache.keys)), segment_RT)
    history_RH = jnp.where(told_R[:, None], prefix.history_RH, ngram.ABSENT)
    return cache, history_RH, told_R * jnp.int32(first), first


def _read(model, params, stats, prompt, history_RH, cache: Cache, slot: int, before_R, chunk: int):
    """(last hidden state, cache, n-gram history) after left-padded prompts, read in pieces of `chunk` positions."""
    width, valid_RP = prompt["tokens"].shape[1], prompt["segment"] > 0
    arrays = prompt | {"position": before_R[:, None] + jnp.maximum(jnp.cumsum(valid_RP, 1) - 1, 0).astype(jnp.int32)}
    chunk = min(chunk, width) or width
    count, rest = divmod(width, chunk)

    def read(carry, piece):
        _, cache, history_RH, slot = carry
        h_RD, cache, history_RH = _forward(model, params, stats, piece, piece["position"], history_RH, cache, slot)
        return (h_RD, cache, history_RH, slot + piece["tokens"].shape[1]), None

    carry = jnp.zeros((len(before_R), model.trunk.width), jnp.dtype(model.trunk.dtype)), cache, history_RH, jnp.int32(slot)
    if rest:  # the shorter piece first: with luck it is padding
        carry, _ = read(carry, {name: x[:, :rest] for name, x in arrays.items()})
    pieces = {name: jnp.swapaxes(x[:, rest:].reshape(len(before_R), count, chunk, *x.shape[2:]), 0, 1) for name, x in arrays.items()}
    (h_RD, cache, history_RH, _), _ = jax.lax.scan(read, carry, pieces)
    return h_RD, cache, history_RH


def _forward(model, params, stats, inputs, position_RS, history_RH, cache: Cache, slot):
    """(last hidden state, cache, n-gram history) after new positions of every row."""
    names = ("tokens", "transcript", "codes", "segment")
    x_RSD = model.embed.apply({"params": params["embed"]}, *(inputs[name] for name in names), history_RH)
    ids_RS = text_ids(model.vocabulary, inputs["tokens"], inputs["transcript"], inputs["segment"])
    out = model.backbone.apply(
        {"params": params["backbone"]}, x_RSD.astype(jnp.dtype(model.trunk.dtype)), position_RS, inputs["segment"],
        stats["backbone"]["router_bias"], cache=cache, slot=slot,
    )  # fmt: skip
    return out.h_BSD[:, -1], out.cache, ngram.next_history(history_RH, ids_RS, inputs["segment"])


def _step(model, params, stats, plan: Plan, key_R, choices_2V, order: str, loop: Loop) -> Loop:
    """One more position of every row."""
    voc, before = model.vocabulary, loop.grammar
    live_R = before.mode != rules.DONE
    need = rules.wants(voc, before)
    text_R = _draw_text(model, params, plan, key_R, choices_2V, order, loop, need)
    visual_RL = _draw_codes(model, params, plan, key_R, order, loop, "visual", need.visual)
    audio_RL = _draw_codes(model, params, plan, key_R, order, loop, "audio", need.audio)
    codes_RL = jnp.where(need.visual[:, None], _widen(visual_RL, voc.levels), _widen(audio_RL, voc.levels))
    grammar, next_ = rules.advance(voc, before, text_R, codes_RL)

    written_R = live_R & (before.mode == rules.TEXT)
    count_R = loop.text_R + written_R
    closed_R = (grammar.mode == rules.TEXT) & (before.mode != rules.TEXT)
    stop_R = (closed_R & (plan.span_R == 1)) | (written_R & (count_R >= plan.max_text_R) & (grammar.mode == rules.TEXT))
    grammar = dataclasses.replace(grammar, mode=jnp.where(stop_R, rules.DONE, grammar.mode))

    at = loop.step
    put = lambda name, x: jax.lax.dynamic_update_index_in_dim(loop.out[name], x.astype(loop.out[name].dtype), at, 1)
    out = {"tokens": put("tokens", next_.tokens), "transcript": put("transcript", next_.transcript),
           "codes": put("codes", next_.codes), "valid": put("valid", live_R)}  # fmt: skip
    position_R, segment_R, history_RH = _restart(voc, plan, loop, before, next_.tokens)
    # A finished row's positions are padding: neither routed nor attended to.
    inputs = {"tokens": next_.tokens, "transcript": next_.transcript, "codes": next_.codes,
              "segment": jnp.where(live_R, segment_R, 0)}  # fmt: skip
    inputs = {name: x[:, None] for name, x in inputs.items()}
    slot = loop.cache.segment_BT.shape[1] - out["tokens"].shape[1] + at
    h_RD, cache, history_RH = _forward(model, params, stats, inputs, position_R[:, None], history_RH, loop.cache, slot)
    seen = {
        "text": code_sampling.mark_seen(loop.seen["text"][:, None], text_R[:, None], need.text)[:, 0],
        "visual": code_sampling.mark_seen(loop.seen["visual"], visual_RL, need.visual),
        "audio": code_sampling.mark_seen(loop.seen["audio"], audio_RL, need.audio),
    }
    return Loop(at + 1, h_RD, cache, history_RH, position_R, segment_R, grammar, count_R, seen, out)


def _restart(voc, plan: Plan, loop: Loop, before: rules.State, tokens_R):
    """(position, document, n-gram history) of the next position: unconditional rows begin anew where a span opens."""
    opens_R = (before.mode == rules.TEXT) & ((tokens_R == voc.size_open) | (tokens_R == voc.audiogen_start))
    anew_R = opens_R & (plan.image_pairs.cond_R != jnp.arange(len(tokens_R)))
    position_R = jnp.where(anew_R, 0, loop.position_R + 1)
    history_RH = jnp.where(anew_R[:, None], ngram.ABSENT, loop.history_RH)
    return position_R, loop.segment_R + anew_R, history_RH


def _draw_text(model, params, plan: Plan, key_R, choices_2V, order, loop: Loop, need: rules.Wants):
    """Text ids, where any row wants one."""

    def draw(h_RD):
        logits_RV = model.lm_head.apply({"params": params["lm_head"]}, h_RD)
        logits_RV = jnp.where(choices_2V[need.choice], logits_RV, -jnp.inf)
        keys = sampling.row_keys(key_R, loop.step, TEXT_STREAM)
        text_R = sampling.sample(keys, logits_RV, plan.text, loop.seen["text"], order)
        return text_R[plan.image_pairs.cond_R]

    return jax.lax.cond(jnp.any(need.text), draw, lambda h_RD: jnp.zeros(len(h_RD), jnp.int32), loop.h_RD)


def _draw_codes(model, params, plan: Plan, key_R, order, loop: Loop, name: str, wanted_R):
    """Codes of one modality, where any row wants some."""
    voc = model.vocabulary
    head, bases, how, pairs, end = {
        "visual": (model.visual_head, voc.visual_base, plan.visual, plan.image_pairs, "never"),
        "audio": (model.audio_head, voc.audio_base, plan.audio, plan.speech_pairs, "first_level"),
    }[name]

    def draw(h_RD):
        return code_sampling.draw(
            head, params[f"{name}_head"], params["embed"]["table"], bases, h_RD, key_R, loop.step, CODE_STREAM,
            how, loop.seen[name], pairs, end, order,
        )  # fmt: skip

    return jax.lax.cond(jnp.any(wanted_R), draw, lambda h_RD: jnp.zeros((len(h_RD), len(bases)), jnp.int32), loop.h_RD)


def _widen(codes_RL, levels: int):
    return jnp.pad(codes_RL, ((0, 0), (0, levels - codes_RL.shape[1])), constant_values=-1)
