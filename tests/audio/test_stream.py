"""Streams equal the whole clip block by block; segments and their joints."""

import jax
import numpy as np
import pytest

from dina.audio import detokenizer, stream
from dina.config import InputError
from tests.audio import toy

CLOSE = 1e-4
LENGTHS = np.array([5, 8, 2, 4], np.int32)  # blocks of 2 codes: ends within a block and with one


def small(statistics, guidance):
    config = toy.experiment()
    audio = config.audio
    audio.decoder.statistics, audio.flow.guidance, audio.flow.estimator.chunk = statistics, guidance, 8
    variables = toy.variables(config)
    codes = np.random.default_rng(0).integers(0, 8, (4, 8, 3)).astype(np.int32)
    return audio, variables["params"], variables["stats"], codes


@pytest.fixture(scope="module", params=[("frame", 0.7), ("padded", 0.0)], ids=lambda param: param[0])
def decoded(request):
    """(settings, variables, codes, the whole clips' sound)."""
    audio, params, stats, codes = small(*request.param)
    sound = detokenizer.make_detokenize(audio)(params, stats, codes, LENGTHS, jax.random.key(3), np.arange(4))
    return audio, params, stats, codes, np.asarray(sound.mel), stream.MelStream(audio, 8)


def test_blocks_of_a_stream_are_those_of_the_whole(decoded):
    audio, params, stats, codes, mel_BTM, streamed = decoded
    blocks = list(streamed.whole(params, stats, codes, LENGTHS, jax.random.key(3), np.arange(4)))
    assert [block.shape[1] for block in blocks] == [8] * 4
    together = np.concatenate(blocks, axis=1)
    assert mel_BTM.shape[1] == 31 and np.max(np.abs(together[:, :31] - mel_BTM)) <= CLOSE
    assert np.all(together[:, 31:] == detokenizer.SILENT) and np.ptp(mel_BTM[:, :7]) > 1
    turned = np.concatenate(list(streamed.whole(params, stats, codes[::-1], LENGTHS[::-1], jax.random.key(3), np.arange(4)[::-1])), axis=1)
    assert np.max(np.abs(turned[::-1] - together)) <= CLOSE


def test_codes_come_without_an_end_in_sight_and_two_streams_do_not_mix(decoded):
    audio, params, stats, codes, mel_BTM, streamed = decoded
    if audio.decoder.statistics != "frame":
        with pytest.raises(InputError, match="audio.decoder.statistics is 'padded'; a stream of codes needs 'frame'"):
            streamed.hear(params, stats, {}, codes[:, :2], LENGTHS)
        return
    state, other = (streamed.start(params, 4, jax.random.key(seed), np.arange(4)) for seed in (3, 4))
    for at in range(0, 8, 2):
        ended_B = np.where(LENGTHS <= at + 2, LENGTHS, -1)  # who has ended is known with the last code only
        heard, state = streamed.hear(params, stats, state, codes[:, at : at + 2], ended_B)
        _, other = streamed.hear(params, stats, other, codes[:, 6 - at : 8 - at], ended_B)
        spoken, state = streamed.speak(params, state, heard, ended_B)
        frames = min(8, 31 - 4 * at)
        assert np.max(np.abs(spoken[:, :frames] - mel_BTM[:, 4 * at : 4 * at + frames])) <= CLOSE
    with pytest.raises(InputError, match="a stream of 8 codes has no room for more"):
        streamed.speak(params, state, heard, ended_B)


def test_what_sees_beyond_a_block_is_refused():
    audio, params, _, _ = small("frame", 0.0)
    audio.flow.estimator.chunk = 10
    with pytest.raises(InputError, match="audio.flow.estimator.chunk, which is 10, in whole codes of 4 frames"):
        stream.MelStream(audio, 8)
    audio.flow.estimator.chunk = 8
    with audio.ignore_type():
        audio.flow.estimator.channels = (8, 16)
    with pytest.raises(InputError, match="channels has 2 levels; a stream needs one"):
        stream.MelStream(audio, 8).start(params, 1, jax.random.key(0), np.arange(1))


def test_segments_end_at_the_end_class_and_at_the_longest_chunk():
    codes = np.arange(20).reshape(10, 2)
    assert [piece[:, 0].tolist() for piece in stream.segments(codes, 99, 4)] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]
    codes[[0, 3, 9], 0] = 99
    assert [piece[:, 0].tolist() for piece in stream.segments(codes, 99, 4)] == [[2, 4], [8, 10, 12, 14], [16]]
    assert stream.segments(np.zeros((0, 2), int), 99, 4) == []


def test_joined_waves():
    one, two, short = np.full(10, 1.0, np.float32), np.full(8, 3.0, np.float32), np.full(4, 5.0, np.float32)
    blend = [1, 5 / 3, 7 / 3, 3]
    np.testing.assert_allclose(stream.join([one, two], 4), [*[1] * 6, *blend, *[3] * 4], rtol=1e-6)
    np.testing.assert_allclose(stream.join([one, two], 4, "insert"), [*[1] * 10, *blend, *[3] * 8], rtol=1e-6)
    np.testing.assert_array_equal(stream.join([one, short], 4), [*[1] * 10, *[5] * 4])
    same = np.sin(np.arange(100)).astype(np.float32)
    np.testing.assert_allclose(stream.join([same[:60], same[50:]], 10), same, atol=1e-6)  # what is there twice is heard once
    assert stream.join([], 4).shape == (0,) and len(stream.join([one, two], 0)) == 18
    with pytest.raises(InputError, match="way to join segments 'overlap' does not exist"):
        stream.join([one], 4, "overlap")
