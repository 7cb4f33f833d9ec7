"""The rules that generation follows: what may come next, row by row, as pure functions on integer state.

A batch may mix tasks: some rows write, some paint, some speak. One step of a sampler:

    need = wants(vocabulary, state)                  # which heads this step needs, and from which text ids to choose
    text_B, codes_BL = ...                           # samples; rows that need none may hold anything
    state, next = advance(vocabulary, state, text_B, codes_BL)   # ids and codes of the next position

`follow` is the only transition; it reads finished positions, so a prompt sets the state by the same rule
(`initial_state`) and training's layout and the sampler cannot disagree. Source: reference/backbone.md §5.3 to §5.5.

Legend: B rows, S positions, L levels, G grids of size tags, T ids of a size tag.
"""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dina.grammar.spans import ABSENT
from dina.grammar.vocabulary import Vocabulary

TEXT, IMAGE, SPEECH, READ, DONE = range(5)  # READ: inside something shown or heard, prompts only
SERIAL, PURE = 1 << 30, -1  # delays: finish the transcript first; no transcript
NO_LIMIT = 1 << 30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where each row stands after its last position.

    Attributes:
        mode: TEXT, IMAGE, SPEECH, READ or DONE.
        step: positions since the one that opened the span.
        height, width: grid in cells of the image being painted, or of the next one.
        tagged: 1 if a size tag has just named the grid.
        tag: ids of the size tag being read, tag_length of them; -1 if none is open.
        delay: of the next spoken reply, SERIAL or PURE.
        lag: delay of the reply being spoken; the end of its transcript may lower it.
        text_end: 1 once the transcript has ended.
        limit: longest transcript and most frames of a spoken reply.
    """

    mode: Int[Array, "B"]
    step: Int[Array, "B"]
    height: Int[Array, "B"]
    width: Int[Array, "B"]
    tagged: Int[Array, "B"]
    tag: Int[Array, "B T"]
    tag_length: Int[Array, "B"]
    delay: Int[Array, "B"]
    lag: Int[Array, "B"]
    text_end: Int[Array, "B"]
    limit: Int[Array, "B"]


class Wants(typing.NamedTuple):
    """What one step needs.

    Attributes:
        text: rows that sample from the text head, and
        choice: the row of `text_choices` that says from which ids: 0 text, 1 transcript.
        visual, audio: rows that sample codes; at most one of them is true.
        forced: the next outer id where it does not depend on samples, else -1.
    """

    text: Bool[Array, "B"]
    choice: Int[Array, "B"]
    visual: Bool[Array, "B"]
    audio: Bool[Array, "B"]
    forced: Int[Array, "B"]


class Next(typing.NamedTuple):
    """The next position: outer id, transcript id (-1 none) and codes (-1 none), as in training's arrays."""

    tokens: Int[Array, "B"]
    transcript: Int[Array, "B"]
    codes: Int[Array, "B L"]


def text_choices(vocabulary: Vocabulary) -> Bool[np.ndarray, "2 classes"]:
    """Text-head classes that may be sampled in text (row 0) and in a transcript (row 1), padding classes included.

    In text these are pieces, eos and what opens an image or a spoken reply; the rest is forced or belongs to prompts.
    """
    v = vocabulary
    choices = np.zeros((2, v.padded_classes), bool)
    choices[:, : v.text] = True
    choices[:, [v.bos, v.pad]] = False
    roles = [number for name, number in v.named if number < v.text]
    choices[:, roles] = False
    choices[1, v.eos] = False
    choices[0, [v.size_open, v.size_close, v.img_start, v.audiogen_start]] = True
    choices[1, v.audiotext_pad] = True
    return choices


def start(vocabulary: Vocabulary, rows: int, delay=SERIAL, grid=(1, 1), limit=NO_LIMIT) -> State:
    """State before any position.

    Args:
        rows: B.
        delay: of spoken replies, a number or one per row: 0 is parallel; SERIAL and PURE.
        grid: (h, w), numbers or one per row: of images whose size no tag names.
        limit: longest transcript and most frames of a spoken reply, a number or one per row.
    """
    full = lambda value: jnp.broadcast_to(jnp.asarray(value, jnp.int32), (rows,))
    length = max((len(ids) for _, _, ids in vocabulary.sizes), default=1)
    zero = full(0)
    return State(
        mode=full(TEXT), step=zero, height=full(grid[0]), width=full(grid[1]), tagged=zero,
        tag=jnp.full((rows, length), ABSENT, jnp.int32), tag_length=full(ABSENT), delay=full(delay), lag=full(delay),
        text_end=zero, limit=full(limit),
    )


def initial_state(
    vocabulary: Vocabulary,
    tokens_BS: Int[Array, "B S"],
    transcript_BS: Int[Array, "B S"],
    valid_BS: Bool[Array, "B S"],
    delay=SERIAL,
    grid=(1, 1),
    limit=NO_LIMIT,
) -> State:
    """State after a prompt, which may end anywhere: before a reply, at img_start or audiogen_start, inside a span.

    Args:
        tokens_BS, transcript_BS: the prompt's arrays.
        valid_BS: false on padding, wherever it stands.
        delay, grid, limit: as for `start`.
    """

    def read(state, inputs):
        token_B, transcript_B, valid_B = inputs
        after = follow(vocabulary, state, token_B, transcript_B)
        return _where(valid_B, after, state), None

    state = start(vocabulary, tokens_BS.shape[0], delay, grid, limit)
    columns = tuple(jnp.asarray(x).T for x in (tokens_BS, transcript_BS, valid_BS))
    state, _ = jax.lax.scan(read, state, columns)
    # An img_start without size tag shows an image to the model, unless the prompt ends there.
    tokens_BS, valid_BS = jnp.asarray(tokens_BS), jnp.asarray(valid_BS)
    last_B = tokens_BS.shape[1] - 1 - jnp.argmax(valid_BS[:, ::-1], axis=1)
    last_id_B = jnp.take_along_axis(tokens_BS, last_B[:, None], 1)[:, 0]
    return dataclasses.replace(state, mode=jnp.where(last_id_B == vocabulary.img_start, IMAGE, state.mode))


def _where(chosen_B, yes: State, no: State) -> State:
    pick = lambda a, b: jnp.where(chosen_B.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
    return jax.tree.map(pick, yes, no)


def follow(vocabulary: Vocabulary, state: State, token_B: Int[Array, "B"], transcript_B: Int[Array, "B"]) -> State:
    """State after one more position of each row."""
    v, s = vocabulary, state
    writing = (s.mode == TEXT) | (s.mode == DONE)
    speaking = s.mode == SPEECH
    is_ = lambda token: token_B == token

    opened = jnp.where(s.tagged == 1, IMAGE, READ)
    mode = jnp.where(is_(v.img_start), opened, jnp.where(is_(v.audio_start), READ, TEXT))
    mode = jnp.where(is_(v.audiogen_start), SPEECH, jnp.where(is_(v.eos), DONE, mode))
    closes = is_(v.img_end) | is_(v.audio_end) | is_(v.audiogen_end)
    mode = jnp.where(writing, mode, jnp.where(closes, TEXT, s.mode))

    opens_speech = writing & is_(v.audiogen_start)
    ended = speaking & (transcript_B == v.audiotext_pad)
    position_B = s.step  # of the position just read, counted from 0 after audiogen_start
    # A transcript that ends, or frames that start, before the asked delay is over settle the delay.
    settled = (ended & (s.text_end == 0)) | (speaking & is_(v.audiotext_start))
    asked = jnp.where(is_(v.audiotext_start) & (s.lag == PURE), SERIAL, s.lag)
    lag = jnp.where(settled, jnp.minimum(asked, position_B), asked)
    first = speaking & (position_B == 0)
    lag = jnp.where(first & is_(v.audio_pad), PURE, jnp.where(first & is_(v.audiotext_pad) & (lag == PURE), SERIAL, lag))
    new = dataclasses.replace(
        s,
        mode=mode.astype(jnp.int32),
        step=jnp.where(writing, 0, s.step + 1),
        lag=jnp.where(opens_speech, s.delay, lag),
        text_end=jnp.where(opens_speech, 0, jnp.where(ended, 1, s.text_end)),
    )
    return _follow_tag(v, new, token_B, writing)


def _follow_tag(v: Vocabulary, s: State, token_B, writing) -> State:
    """Reads a size tag: its ids are compared with those of every known grid when it closes."""
    inside = writing & (s.tag_length >= 0)
    close, open_ = inside & (token_B == v.size_close), writing & (token_B == v.size_open)
    append = inside & ~close & ~open_
    slot_BT = jnp.arange(s.tag.shape[1]) == s.tag_length[:, None]
    tag_BT = jnp.where(append[:, None] & slot_BT, token_B[:, None], s.tag)
    height, width, tagged = s.height, s.width, jnp.zeros_like(s.tagged)
    if v.sizes:
        grid_G2, table_GT = _size_table(v, s.tag.shape[1])
        same_BG = (s.tag[:, None] == table_GT).all(-1) & (s.tag_length <= s.tag.shape[1])[:, None]
        known = close & same_BG.any(-1)
        grid_B2 = jnp.asarray(grid_G2)[jnp.argmax(same_BG, -1)]
        height, width = jnp.where(known, grid_B2[:, 0], height), jnp.where(known, grid_B2[:, 1], width)
        tagged = known.astype(jnp.int32)
    length = jnp.where(open_, 0, jnp.where(append, s.tag_length + 1, jnp.where(close, ABSENT, s.tag_length)))
    tag_BT = jnp.where((open_ | close)[:, None], ABSENT, tag_BT)
    return dataclasses.replace(s, height=height, width=width, tagged=tagged, tag=tag_BT, tag_length=length)


def _size_table(v: Vocabulary, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Grids [G, 2] and the ids of their tags [G, T], -1 behind the end."""
    table_GT = np.full((len(v.sizes), length), ABSENT, np.int32)
    for row, (_, _, ids) in zip(table_GT, v.sizes, strict=True):
        row[: len(ids)] = ids
    return np.array([size[:2] for size in v.sizes], np.int32), table_GT


def _speech(state: State):
    """(speaking, transcript still runs, its next id may be sampled, frames run, a frame may be sampled)."""
    speaking = state.mode == SPEECH
    guided = speaking & (state.lag != PURE)
    says = guided & (state.text_end == 0)
    frames = speaking & (~guided | (state.step > state.lag))
    done_B = jnp.where(guided, state.step - state.lag - 1, state.step)  # frames spoken
    return speaking, says, says & (state.step < state.limit), frames, frames & (done_B < state.limit)


def wants(vocabulary: Vocabulary, state: State) -> Wants:
    """Which heads the next position needs; see `Wants`."""
    v, s = vocabulary, state
    speaking, _, samples_text, frames, samples_frame = _speech(s)
    painting = s.mode == IMAGE
    at = s.step + 1
    closing = jnp.where(at == s.height * (s.width + 1), v.img_end, jnp.where(at % (s.width + 1) == 0, v.img_newline, ABSENT))
    forced = jnp.where(painting, closing, ABSENT)
    forced = jnp.where(frames & ~samples_frame, v.audiogen_end, forced)
    forced = jnp.where(s.mode == DONE, v.pad, forced)
    # Before the frames the outer id depends on the transcript only if its end starts them.
    waits = speaking & ~frames & ~samples_text
    forced = jnp.where(waits, v.audiotext_start, forced)
    return Wants(
        text=(s.mode == TEXT) | samples_text,
        choice=speaking.astype(jnp.int32),
        visual=painting & (closing == ABSENT),
        audio=samples_frame,
        forced=forced,
    )


def advance(
    vocabulary: Vocabulary, state: State, text_B: Int[Array, "B"], codes_BL: Int[Array, "B L"]
) -> tuple[State, Next]:
    """The next position of every row, and the state after it.

    Args:
        text_B: samples of the text head, used where `wants(...).text`.
        codes_BL: samples of the visual or audio head, used where `wants(...).visual` or `.audio`. Class `size` of
            level 0 ends a spoken reply.

    Returns:
        (state, Next). Rows that are DONE give padding and stay as they are. Codes at the end of speech are -1.
    """
    v, s = vocabulary, state
    need = wants(v, s)
    speaking, says, samples_text, frames, _ = _speech(s)

    transcript = jnp.where(says & samples_text, text_B, v.audiotext_pad)
    transcript = jnp.where(speaking & (s.lag != PURE), transcript, ABSENT)
    lag = jnp.where(says & (transcript == v.audiotext_pad), jnp.minimum(s.lag, s.step), s.lag)
    waiting = jnp.where(s.step >= lag, v.audiotext_start, v.audiotext_pad)
    ends = need.audio & (codes_BL[:, 0] >= v.audio[0]) if v.audio else jnp.zeros_like(frames)
    spoken = jnp.where(frames, jnp.where(ends, v.audiogen_end, v.audio_pad), waiting)

    outer = jnp.where(need.visual, v.img_pad, jnp.where(speaking, spoken, text_B))
    outer = jnp.where(need.forced >= 0, need.forced, outer).astype(jnp.int32)
    transcript = jnp.where(outer == v.audiogen_end, ABSENT, transcript).astype(jnp.int32)
    depth_B = jnp.where(need.visual, len(v.visual), len(v.audio))
    used = (need.visual | (need.audio & ~ends))[:, None] & (jnp.arange(codes_BL.shape[1]) < depth_B[:, None])
    codes = jnp.where(used, codes_BL, ABSENT).astype(jnp.int32)

    after = follow(v, s, outer, transcript)
    # A sampled img_start paints: only prompts show images.
    after = dataclasses.replace(after, mode=jnp.where(after.mode == READ, IMAGE, after.mode))
    return _where(s.mode == DONE, s, after), Next(outer, transcript, codes)
