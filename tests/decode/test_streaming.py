"""A reply slice by slice is the whole reply, for every delay, in ids, codes and samples; several segments, and their budgets."""

import functools

import numpy as np
import pytest

from dina.audio import sound_stream
from dina.config import InputError
from dina.decode import batching, prompts, streaming
from dina.grammar import Speech, rules
from tests import tiny_language as tiny
from tests.audio import test_sound_stream as sounds

V = tiny.VOCABULARY


@functools.cache
def generator():
    variables = tiny.variables()
    return streaming.Generator(tiny.model(), variables["params"], variables["stats"], rows=2, reply_step=64)  # one shape for all


def _ask(number=0, delay=rules.SERIAL, before=(), **fields):
    fields = {"stop": "span", "max_frames": 9} | fields
    return batching.Request(prompts.build(V, (8, 9), reply="speech", before=before), seed=3, number=number, delay=delay, **fields)


@pytest.mark.parametrize("delay", [0, 3, rules.SERIAL, rules.PURE])
@pytest.mark.parametrize("every", [1, 5])
def test_slices_are_the_reply(delay, every):
    request = _ask(delay, delay, speech_guidance=1.5)
    (whole,) = generator()([request])
    parts = list(generator().stream(request, every))
    for name in ("tokens_T", "transcript_T", "codes_TL"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    assert [part.reply is None for part in parts] == [True] * (len(parts) - 1) + [False]
    assert all(len(part.tokens_T) == every for part in parts[:-1]) and parts[-1].reply.finished == whole.finished
    for one, other in zip(parts[-1].reply.speech(), whole.speech(), strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)


class Counted:
    """Stands for the detokenizer: a sample a code, one more where a segment closes."""

    def begin(self):
        self.calls = []

    def push(self, codes_UL):
        self.calls.append("push")
        assert codes_UL.shape == (1, len(V.audio)) and (codes_UL >= 0).all()
        return np.ones(1, np.float32)

    def close(self):
        self.calls.append("close")
        return np.zeros(1, np.float32)

    end = close


def test_several_segments_are_spoken_each_within_its_limits():
    found, text = [], 0
    for number in range(12):  # an untrained model opens another segment now and then
        request = _ask(number, 2, stop="eos", segments=3, max_text=12, max_frames=4, text={"top_k": 0})
        assert request.longest() == 3 * (2 * 4 + 3) - 1 + 12
        sound, parts = Counted(), []
        for part in streaming.speak(generator(), request, sound):
            parts.append(part)
        reply, (whole,) = parts[-1].reply, generator()([request])
        assert [len(span.codes) for span in reply.speech()] == [len(span.codes) for span in whole.speech()]
        assert all(len(span.codes) <= 4 and len(span.transcript) <= 4 for span in reply.speech())
        assert sum(len(part.wave_N) for part in parts) == parts[-1].codes + sound.calls.count("close")
        assert sound.calls.count("close") == (reply.tokens_T == V.audiogen_end).sum() + 1
        found.append(len(reply.speech()))
        if found[-1] == (reply.tokens_T == V.audiogen_end).sum():  # none without a frame, which is no speech
            assert [i for part in parts for i in part.text] == [i for span in reply.speech() for i in span.transcript]
            text += 1
    assert max(found) > 1 and text
    with pytest.raises(InputError, match="segments 0"):
        next(generator().stream(_ask(segments=0)))


def test_a_voice_before_the_question_changes_what_is_said():
    clip = Speech(np.array([[1, 2], [4, 0], [3, 3]]), (5, 6), True)
    turn = prompts.voice((11, 12), clip, V)
    arrays = _ask(before=turn).prompt.arrays
    assert arrays["tokens"][:7].tolist() == [V.system, 11, 12, V.audio_start, *[V.audio_pad] * 3] and not arrays["code_weight"].any()
    plain, voiced = generator()([_ask(5), _ask(5, before=turn)])
    assert not np.array_equal(plain.codes_TL, voiced.codes_TL) or not np.array_equal(plain.transcript_T, voiced.transcript_T)


def test_what_is_heard_is_the_reply_s_codes():
    audio, params, stats = sounds.small("masked", "griffin_lim")
    with audio.unlocked():
        audio.quantizer.sizes = V.audio
    stats = {"audio_quantizer": {kind: dict(list(books.items())[:2]) for kind, books in stats["audio_quantizer"].items()}}
    sound = sound_stream.SoundStream(audio, params, stats)
    parts = list(streaming.speak(generator(), _ask(1), sound))
    codes = parts[-1].reply.speech()[0].codes
    sound.begin()
    np.testing.assert_array_equal(np.concatenate([part.wave_N for part in parts]), np.concatenate([sound.push(codes), sound.end()]))
