import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina import grammar
from dina.grammar import Image, Speech, Text, rules

from tests.grammar import cases

V = cases.vocabulary()


@functools.partial(jax.jit, static_argnums=0)
def teacher_forced(v, state, text_TB, codes_TBL):
    """Feeds samples step by step; returns what came out and what was wanted."""

    def step(state, inputs):
        need = rules.wants(v, state)
        state, out = rules.advance(v, state, *inputs)
        return state, (out, need)

    return jax.lax.scan(step, state, (text_TB, codes_TBL))


def replay(documents, delay, v=V):
    """Runs the state machine from nothing, with the documents' own labels as samples; noise where it must not look."""
    arrays = [grammar.encode(document, v) for document in documents]
    steps, rng = max(len(a["tokens"]) for a in arrays), np.random.default_rng(0)
    # Noise: never an end class or an end mark by chance unless the rules read a sample that they should ignore.
    text = rng.integers(4, v.classes, (steps, len(arrays))).astype(np.int32)
    codes = rng.integers(0, 9, (steps, len(arrays), v.levels)).astype(np.int32)
    for row, a in enumerate(arrays):
        label = grammar.text_label(a["tokens"], a["transcript"])
        # In spoken replies the outer ids are never sampled; everything with an own text label is.
        ignored = np.isin(label, [v.img_pad, v.img_newline, v.img_end, v.audio_pad, v.audiogen_end])
        text[: len(label), row] = np.where(ignored, text[: len(label), row], label)
        learnt = a["code_weight"] > 0
        codes[: len(label), row] = np.where(learnt[:, None], a["codes"], codes[: len(label), row])
    state = rules.start(v, len(arrays), delay=delay)
    state, (out, need) = teacher_forced(v, state, jnp.asarray(text), jnp.asarray(codes))
    return arrays, jax.device_get(state), jax.device_get(out), jax.device_get(need)


def targets_only(rng, v):
    """A reply that has everything in it: text, painted images, one form of speech."""
    makers = [lambda: cases.text(rng), lambda: cases.image(rng, v, True), lambda: cases.speech(rng, v, True)]
    return (cases.text(rng), *(makers[rng.integers(3)]() for _ in range(rng.integers(1, 6))), Text((v.eos,), True))


def one_delay(document, delay):
    """The document with every spoken reply at the row's delay."""
    out = []
    for span in document:
        if isinstance(span, Speech):
            if delay == rules.PURE:
                span = Speech(span.codes, None, True)
            else:
                letters = (span.transcript or (5, 6))[: len(span.codes)]
                span = Speech(span.codes, letters, True, min(delay, len(letters)))
        out.append(span)
    return tuple(out)


def test_the_state_machine_reproduces_random_documents():
    rng = np.random.default_rng(5)
    delay = np.array([rules.PURE, 0, 1, 2, 3, 5, rules.SERIAL, rules.SERIAL] * 8)
    documents = [one_delay(targets_only(rng, V), d) for d in delay]
    arrays, state, out, need = replay(documents, delay)
    for row, a in enumerate(arrays):
        size = len(a["tokens"])
        assert out.tokens[:size, row].tolist() == a["tokens"].tolist(), documents[row]
        assert out.transcript[:size, row].tolist() == a["transcript"].tolist(), documents[row]
        fed = np.where((a["tokens"] == V.audiogen_end)[:, None], -1, a["codes"])
        assert out.codes[:size, row].tolist() == fed.tolist()
        learnt = a["code_weight"] > 0
        assert need.visual[:size, row].tolist() == (learnt & (a["tokens"] == V.img_pad)).tolist()
        assert need.audio[:size, row].tolist() == (learnt & (a["tokens"] != V.img_pad)).tolist()
        spoken = (a["transcript"] >= 0) & (a["text_weight"] > 0)
        assert (need.text[:size, row] & (need.choice[:size, row] == 1)).tolist() == spoken.tolist()
        forced = need.forced[:size, row]
        assert ((forced < 0) | (forced == a["tokens"])).all()
        assert (out.tokens[size:, row] == V.pad).all() and not need.text[size:, row].any()
    assert (state.mode == rules.DONE).all()


def test_every_grid_is_painted_as_it_is_packed():
    rng = np.random.default_rng(6)
    grids = grammar.grids(12)
    documents = [(Image(cases.codes(rng, V, V.visual, h * w), h, w, True), Text((V.eos,), True)) for h, w in grids]
    arrays, state, out, _ = replay(documents, 0)
    for row, a in enumerate(arrays):
        assert out.tokens[: len(a["tokens"]), row].tolist() == a["tokens"].tolist(), grids[row]
    assert list(zip(state.height.tolist(), state.width.tolist(), strict=True)) == grids


def padded(arrays, left):
    size = max(len(a["tokens"]) for a in arrays)
    out = {"tokens": np.full((len(arrays), size), V.pad), "transcript": np.full((len(arrays), size), -1), "valid": np.zeros((len(arrays), size), bool)}
    for row, a in enumerate(arrays):
        n = len(a["tokens"])
        at = slice(size - n, size) if left else slice(0, n)
        out["tokens"][row, at], out["transcript"][row, at], out["valid"][row, at] = a["tokens"], a["transcript"], True
    return out


@pytest.mark.parametrize("left", [True, False])
def test_a_prompt_sets_the_state_that_generation_would_have(left):
    """Cut anywhere, inside a span too, after shown images and heard speech; padding on either side changes nothing."""
    rng = np.random.default_rng(7)
    delay = np.array([0, 2, rules.SERIAL, rules.PURE] * 6)
    documents = [one_delay(targets_only(rng, V), d) for d in delay]
    shown = (cases.text(rng), cases.image(rng, V, False), cases.speech(rng, V, False))
    cut = [int(rng.integers(1, grammar.cost(d, V).positions)) for d in documents]
    prompts = []
    for document, n in zip(documents, cut, strict=True):
        before = grammar.cost(shown, V).positions
        prompts.append({k: a[: before + n] for k, a in grammar.encode((*shown, *document), V).items()})
    p = padded(prompts, left)
    state = rules.initial_state(V, p["tokens"], p["transcript"], p["valid"], delay=delay)
    for row, (document, n) in enumerate(zip(documents, cut, strict=True)):
        a = grammar.encode(document, V)
        one = jax.tree.map(lambda x: x[row : row + 1], state)
        rest = slice(n, None)
        label = grammar.text_label(a["tokens"], a["transcript"])[rest]
        codes = np.maximum(a["codes"][rest], 0)
        for t in range(len(label)):
            one, out = ADVANCE(V, one, jnp.asarray(label[t : t + 1]), jnp.asarray(codes[t : t + 1]))
            assert int(out.tokens[0]) == a["tokens"][rest][t], (document, n, t)
            assert int(out.transcript[0]) == a["transcript"][rest][t]
        assert int(one.mode[0]) == rules.DONE


ADVANCE = jax.jit(rules.advance, static_argnums=0)


def test_a_prompt_that_ends_in_img_start_paints_the_asked_grid():
    tokens = np.array([[V.user, 5, V.assistant, V.img_start]])
    state = rules.initial_state(V, tokens, np.full_like(tokens, -1), tokens >= 0, grid=(2, 3))
    assert (int(state.mode[0]), int(state.height[0]), int(state.width[0])) == (rules.IMAGE, 2, 3)


def test_limits_end_a_transcript_and_a_reply():
    tokens = np.array([[V.audiogen_start]] * 2)
    state = rules.initial_state(V, tokens, np.full_like(tokens, -1), tokens >= 0, delay=np.array([rules.SERIAL, 0]), limit=3)
    out = []
    for _ in range(9):
        state, step = ADVANCE(V, state, jnp.array([5, 5]), jnp.zeros((2, V.levels), jnp.int32))
        out.append(step.tokens.tolist())
    p, s, f, e = V.audiotext_pad, V.audiotext_start, V.audio_pad, V.audiogen_end
    assert [o[0] for o in out[:8]] == [p, p, p, s, f, f, f, e]
    assert [o[1] for o in out[:5]] == [s, f, f, f, e]


def test_choices_ban_what_rules_force():
    choices = rules.text_choices(V)
    assert choices.shape == (2, V.padded_classes)
    assert choices[0, V.eos] and choices[0, V.audiogen_start] and choices[1, V.audiotext_pad] and choices[:, 10].all()
    banned = [V.img_pad, V.img_newline, V.img_end, V.audio_pad, V.audio_start, V.audiotext_start, V.user, V.pad]
    assert not choices[:, banned].any() and not choices[1, [V.eos, V.img_start]].any() and not choices[0, V.audiotext_pad]
    assert not choices[:, V.classes :].any()
