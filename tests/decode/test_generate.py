"""Generation: equal to teacher forcing, streams of the right shape, rows that do not depend on their company."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dina import model as model_lib
from dina.backbone import linear
from dina.config import InputError
from dina.decode import batching, prompts
from dina.grammar import Speech, Text, encode, rules
from dina.heads import depth
from tests import tiny_language as tiny

V = tiny.VOCABULARY
GREEDY = {"temperature": 0}
P, N, END = V.img_pad, V.img_newline, V.img_end


@functools.cache
def generator():
    """One compiled shape for all tests: 8 rows, prompts of 32, replies of 32 positions."""
    variables = tiny.variables()
    return batching.Generator(tiny.model(), variables["params"], variables["stats"], rows=8)


def _ask(*requests):
    return generator()(list(requests))


def _paint(number=0, grid=(2, 3), **fields):
    return batching.Request(prompts.build(V, (5, 6, 7), reply="image", grid=grid), number=number, **{"stop": "span"} | fields)


def _speak(number=0, delay=rules.SERIAL, **fields):
    return batching.Request(
        prompts.build(V, (8, 9), reply="speech"), number=number, delay=delay, **{"stop": "span", "max_frames": 6} | fields
    )


def _write(number=0, **fields):
    image = prompts.shown(np.array([[1, 2, 3], [0, 4, 1]]), (1, 2))
    return batching.Request(prompts.build(V, (5, 9), [image]), number=number, **{"max_text": 8} | fields)


def _hear(number=0, **fields):
    heard = Speech(np.array([[1, 2], [4, 0], [3, 3]]))
    return batching.Request(prompts.build(V, (12,), [heard]), number=number, **{"max_text": 8} | fields)


@jax.jit
def _teacher(params, stats, batch):
    return model_lib.run(tiny.model(), params, stats, batch).h_BSD


def _forced(request, reply):
    """Hidden states of prompt and reply read at once, [S, D], and the prompt's length."""
    batch = {name: np.full((6, 96), fill, np.int32) for name, fill in (("tokens", V.pad), ("transcript", -1), ("segment", 0))}
    batch["codes"] = np.full((6, 96, V.levels), -1, np.int32)
    made = {"tokens": reply.tokens_T, "transcript": reply.transcript_T, "codes": reply.codes_TL}
    length = len(request.prompt) + len(reply.tokens_T)
    for name, array in made.items():
        batch[name][0, :length] = np.concatenate([request.prompt.arrays[name], array])
    batch["segment"][0, :length] = 1
    batch["position"] = np.broadcast_to(np.arange(96, dtype=np.int32), (6, 96))
    batch["cell_index"] = np.full((6, 24), -1, np.int32)
    cells = np.flatnonzero(batch["tokens"][0] == V.img_pad)
    batch["cell_index"][0, : len(cells)] = cells
    variables = tiny.variables()
    return np.asarray(_teacher(variables["params"], variables["stats"], batch))[0], len(request.prompt)


def _greedy_codes(name, h, codes):
    """Argmax of every level given the true codes before it, end classes as generation allows them."""
    params, head, bases = tiny.variables()["params"], getattr(tiny.model(), f"{name}_head"), getattr(V, f"{name}_base")
    table = np.asarray(params["embed"]["table"])
    embedded = np.stack([table[b + c] if 0 <= c < s else 0 * table[0] for b, c, s in zip(bases, codes, head.sizes)])
    logits = depth.teacher_forced(head, params[f"{name}_head"], depth.input_rows(h[None], embedded[None]))
    last = [size + (name == "audio" and level == 0) for level, size in enumerate(head.sizes)]
    return [int(np.argmax(np.asarray(x)[0, :n])) for x, n in zip(logits, last)]


@pytest.mark.parametrize("rearranges, form", [pytest.param(True, "layers_0", marks=pytest.mark.slow), (False, "layers")])
def test_many_rows_say_the_same_as_few(rearranges, form, monkeypatch):
    few = generator()
    monkeypatch.setattr(linear, "rearranges", lambda: rearranges)
    requests = [_write(text=GREEDY), _paint(1, visual=GREEDY), _speak(2, text=GREEDY, audio=GREEDY)]
    variables = tiny.variables()
    many = batching.Generator(tiny.model(), variables["params"], variables["stats"], rows=linear.FEW_ROWS + 1)
    assert form in many.params["backbone"] and "layers_0" in few.params["backbone"]
    for ours, theirs in zip(many(requests), few(requests), strict=True):
        np.testing.assert_array_equal(ours.tokens_T, theirs.tokens_T)
        np.testing.assert_array_equal(ours.codes_TL, theirs.codes_TL)


def test_greedy_replies_are_the_argmax_of_teacher_forcing():
    requests = [_paint(visual=GREEDY), _speak(1, 0, audio=GREEDY, text=GREEDY), _speak(2, 2, audio=GREEDY, text=GREEDY),
                _write(3, text=GREEDY), _hear(4, text=GREEDY)]  # fmt: skip
    kernel = tiny.variables()["params"]["lm_head"]["kernel"]
    choices = rules.text_choices(V)
    counts = {"visual": 0, "audio": 0, "text": 0, "transcript": 0}
    for request, reply in zip(requests, _ask(*requests)):
        h, start = _forced(request, reply)
        text_over = False
        for t, token in enumerate(reply.tokens_T):
            before = h[start + t - 1]
            codes = reply.codes_TL[t]
            if token == V.img_pad:
                assert _greedy_codes("visual", before, codes[:3]) == codes.tolist()
                counts["visual"] += 1
            elif token == V.audio_pad:
                assert _greedy_codes("audio", before, codes[:2]) == codes[:2].tolist()
                counts["audio"] += 1
            spoken = reply.transcript_T[t] >= 0
            if request.prompt.reply == "text" or (spoken and not text_over and t < request.max_frames):
                allowed = np.where(choices[int(spoken)], before @ np.asarray(kernel), -np.inf)
                assert int(np.argmax(allowed)) == (reply.transcript_T[t] if spoken else token)
                counts["transcript" if spoken else "text"] += 1
            text_over |= bool(reply.transcript_T[t] == V.audiotext_pad)
    assert min(counts.values()) >= 2, counts


@pytest.mark.parametrize("grid,stream", [((2, 3), [P, P, P, N, P, P, P, END]), ((1, 2), [P, P, END]), ((3, 1), [P, N, P, N, P, END])])
def test_image_streams_are_the_grid(grid, stream):
    (reply,) = _ask(_paint(grid=grid))
    assert reply.tokens_T.tolist() == stream and reply.finished
    (image,) = reply.images()
    assert (image.h, image.w) == grid and image.codes.shape == (grid[0] * grid[1], 3)
    assert (image.codes.max(0) < V.visual).all() and image.codes.min() >= 0


def _as_trained(reply):
    """Whether the reply is finished speech of lengths that training has: an untrained model may stop mid-word."""
    return reply.finished and all(len(s.codes) >= len(s.transcript) - s.delay for s in reply.speech()) and reply.speech()


@pytest.mark.parametrize("delay", [0, 1, 2, rules.SERIAL])
def test_spoken_streams_are_those_of_training(delay):
    replies = [r for r in _ask(*(_speak(number, delay, max_frames=5) for number in range(16))) if _as_trained(r)]
    assert replies
    for reply in replies:
        (speech,) = reply.speech()
        written = encode((speech,), V)
        assert speech.delay == min(delay, len(speech.transcript))
        np.testing.assert_array_equal(reply.tokens_T, written["tokens"][1:])
        np.testing.assert_array_equal(reply.transcript_T, written["transcript"][1:])
        np.testing.assert_array_equal(reply.codes_TL[:-1], written["codes"][1:-1])


def test_a_mixed_batch_answers_each_row_in_its_kind():
    paint, speak, write, hear = _ask(_paint(), _speak(1), _write(2), _hear(3))
    assert paint.images() and not paint.text()
    assert speak.tokens_T[-1] == V.audiogen_end
    for reply in (write, hear):
        assert 0 < len(reply.tokens_T) <= 8 + 24 and not reply.images()


def test_a_row_does_not_depend_on_its_company():
    requests = [_paint(3, seed=5), _speak(4, seed=5), _write(5, seed=5), _paint(6, (1, 2), seed=5, image_guidance=2.0)]
    together = _ask(*requests)
    for request, reply in zip(requests, together):
        (alone,) = _ask(request)
        np.testing.assert_array_equal(alone.tokens_T, reply.tokens_T)
        np.testing.assert_array_equal(alone.codes_TL, reply.codes_TL)
    again, other = _ask(_paint(3, seed=5), _paint(3, seed=6))
    np.testing.assert_array_equal(again.codes_TL, together[0].codes_TL)
    assert (other.codes_TL != again.codes_TL).any()


def test_guidance_of_one_is_no_guidance_and_more_changes_codes():
    plain, one, more = _ask(_paint(), _paint(image_guidance=1 + 1e-6), _paint(image_guidance=8.0))
    np.testing.assert_array_equal(plain.codes_TL, one.codes_TL)
    assert (plain.codes_TL != more.codes_TL).any()
    spoken, guided = _ask(_speak(text=GREEDY), _speak(text=GREEDY, speech_guidance=8.0))
    n = min(len(spoken.codes_TL), len(guided.codes_TL))
    assert (spoken.codes_TL[:n] != guided.codes_TL[:n]).any() or len(spoken.codes_TL) != len(guided.codes_TL)


def test_guidance_over_the_same_prompt_changes_nothing():
    opening = (*V.size_tag(1, 3), V.img_start)
    silent = prompts.Prompt(V, (Text(opening),), len(opening), "image", (1, 3))
    request = lambda scale: batching.Request(silent, image_guidance=scale, stop="span")
    a, b = _ask(request(1.0), request(4.0))
    np.testing.assert_array_equal(a.codes_TL, b.codes_TL)


@pytest.mark.parametrize("variant", ["zeroed", "literal"])
def test_the_other_silent_prompts_run(variant):
    variables = tiny.variables()
    other = batching.Generator(tiny.model(), variables["params"], variables["stats"], rows=8, unconditional=variant)
    (reply,), (suffix,) = other([_paint(image_guidance=6.0)]), _ask(_paint(image_guidance=6.0))
    assert reply.finished and (reply.codes_TL != suffix.codes_TL).any()


def test_an_image_that_a_reply_opens_itself_is_guided_as_if_asked_for():
    # The prompt stops inside the size tag: the reply closes it, and the unconditional row begins anew only at tags.
    head = prompts.build(V, (5, 6, 7), reply="image", grid=(2, 3))
    assert head.opening == 6
    (reply,) = _ask(batching.Request(head, image_guidance=3.0, max_text=4))
    assert reply.images() and len(reply.tokens_T) > 8  # it goes on writing after the image


def test_budgets_end_replies():
    write, speak = _ask(_write(max_text=3), _speak(1, max_frames=2, text={"temperature": 0}))
    assert len(write.tokens_T) <= 3 or V.audiogen_start in write.tokens_T or V.img_start in write.tokens_T
    assert (speak.tokens_T == V.audio_pad).sum() <= 2
    transcript = speak.transcript_T[(speak.transcript_T >= 0) & (speak.transcript_T != V.audiotext_pad)]
    assert len(transcript) <= 2


def test_the_repetition_penalty_spreads_choices():
    distinct = {}
    for repetition in (1.0, 20.0):
        (paint,) = _ask(_paint(visual={"temperature": 0, "repetition": repetition}, grid=(3, 3)))
        distinct[repetition] = [len(set(level.tolist())) for level in paint.images()[0].codes.T]
    assert sum(distinct[1.0]) < sum(distinct[20.0]), str(distinct)


@pytest.mark.parametrize(
    "fields,match",
    [({"stop": "soon"}, "soon"), ({"visual": {"temperature": -1}}, "visual.*-1"), ({"max_text": 0}, "0"), ({"delay": -2}, "-2")],
)
def test_wrong_requests_are_named(fields, match):
    with pytest.raises(Exception, match=match):
        _ask(_paint(**fields))


def _mixed():
    return [_paint(1), _speak(2, 1), _write(3), _hear(4), _paint(5, (1, 2), image_guidance=3.0)]


def _equal(replies, others):
    for reply, other in zip(replies, others, strict=True):
        np.testing.assert_array_equal(reply.tokens_T, other.tokens_T)
        np.testing.assert_array_equal(reply.codes_TL, other.codes_TL)


def test_prompts_read_in_pieces_give_the_same_replies():
    variables = tiny.variables()
    pieces = batching.Generator(tiny.model(), variables["params"], variables["stats"], rows=8, prefill_chunk=7)
    _equal(pieces(_mixed()), _ask(*_mixed()))


@pytest.mark.parametrize("chunk", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_prefix_read_once_equals_prompts_that_begin_with_it(chunk):
    variables = tiny.variables()
    # Ends in the middle of the history of the next word, and holds a picture.
    before = (Text((V.user, 5, 6)), prompts.shown(np.array([[1, 2, 3], [0, 4, 1]]), (1, 2)), Text((7, V.assistant, 9, 8, V.eos)), Text((11, 12)))
    shared = batching.Generator(tiny.model(), variables["params"], variables["stats"], rows=8, prefill_chunk=chunk)

    def with_prefix(request):
        document = (*before, *request.prompt.document)
        prompt = prompts.Prompt(V, document, request.prompt.opening, request.prompt.reply, request.prompt.grid)
        return batching.Request(**{f.name: getattr(request, f.name) for f in dataclasses.fields(request)} | {"prompt": prompt})

    plain = [batching.Request(prompts.plain(V, (9, 5)), number=6, text=GREEDY, max_text=8)]
    requests = [*_mixed(), *plain]
    replies = shared(requests, shared.read(before))
    _equal(replies, _ask(*map(with_prefix, requests)))
    assert any((a.tokens_T.shape != b.tokens_T.shape) or (a.tokens_T != b.tokens_T).any() or (a.codes_TL != b.codes_TL).any()
               for a, b in zip(replies, _ask(*requests)))  # fmt: skip
    other = batching.Generator(tiny.model(), variables["params"], variables["stats"], rows=8, unconditional="zeroed")
    with pytest.raises(InputError, match="only 'suffix' leaves the prefix out"):
        other([_paint(image_guidance=2.0)], other.read(before))
