"""Sound while codes come: what is heard is the whole decode, piece by piece, segment by segment."""

import jax
import numpy as np
import pytest

from dina.audio import detokenizer, hift, sound_stream, stream, wave_stream
from dina.audio.config import hift_vocoder
from tests.audio import toy

SMALL = {"channels": 16, "f0_channels": 8, "kernels": (3, 5), "source_kernels": (3, 5, 3), "dilations": (1, 2)}


def small(statistics="frame", name="hift"):
    """Pieces of 16 codes, blocks of 4; a vocoder whose pitch is heard."""
    config = toy.experiment()
    audio = config.audio
    audio.features.max_frames, audio.decoder.statistics, audio.flow.estimator.chunk, audio.flow.guidance = 128, statistics, 16, 0.0
    variables = toy.variables(config)
    params = dict(variables["params"])
    if name == "hift":
        audio.vocoder = hift_vocoder()
        audio.vocoder.update(SMALL)
        module = hift.make_hift(audio)
        shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 2, 80), np.float32), np.array([2]), np.zeros((1, 9)), np.zeros((1, 960, 9)))["params"]
        rng = np.random.default_rng(5)
        draw = lambda path, x: (rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape) if path[-1].key == "kernel" else np.ones(x.shape) * (path[-1].key == "alpha"))
        params["vocoder"] = jax.tree_util.tree_map_with_path(lambda path, x: draw(path, x).astype(np.float32), shapes)
        params["vocoder"]["f0"]["out"]["bias"] += 140.0  # a voice, so that phases count
    return audio, params, variables["stats"]


def codes(count, seed=0):
    return np.random.default_rng(seed).integers(0, 8, (count, 3)).astype(np.int32)


def whole(detokenize, audio, params, stats, spoken, seed=0):
    """The reply of several segments at once."""
    cut = [sound_stream.pieces(codes_UL, sound_stream.longest_piece(audio)) for codes_UL in spoken]
    waves = iter(detokenizer.detokenize_codes(detokenize, audio, params, stats, [piece for own in cut for piece in own], seed, 4))
    return sound_stream.join_segments([sound_stream.join_pieces([next(waves) for _ in own], audio) for own in cut], audio)


def heard(streamed, spoken, step):
    """(reply, samples after every call) of segments that come `step` codes at a time."""
    streamed.begin()
    made = []
    for codes_UL in spoken:
        made += [streamed.push(codes_UL[at : at + step]) for at in range(0, len(codes_UL), step)] + [streamed.close()]
    return np.concatenate([*made, streamed.end()]), np.cumsum([len(part) for part in made])


@pytest.fixture(scope="module")
def exact():
    made = small()
    return *made, sound_stream.SoundStream(*made, seed=3), detokenizer.make_detokenize(made[0])


@pytest.mark.parametrize("lengths, step", [pytest.param((37,), 1, marks=pytest.mark.slow), ((16, 31), 3), ((4, 1, 20, 8), 5)])
def test_a_stream_is_the_whole_reply(exact, lengths, step):
    audio, params, stats, streamed, detokenize = exact
    spoken = [codes(count, seed) for seed, count in enumerate(lengths)]
    wave_N = whole(detokenize, audio, params, stats, spoken, 3)
    again_N, samples = heard(streamed, spoken, step)
    assert len(again_N) == len(wave_N) and np.ptp(wave_N) > 0.1
    assert np.max(np.abs(again_N - wave_N)) <= 1e-4
    assert samples[0] == 0 or step > 4


def test_sound_comes_as_soon_as_it_is_settled(exact):
    audio, _, _, streamed, _ = exact
    streamed.begin()
    frames, held, samples = 16, max(streamed.shared.values()) + 1, 0
    for count in range(1, 16):
        samples += len(streamed.push(codes(16)[count - 1 : count]))
        spoken = (count - 1) // 4 * frames  # a block is spoken when a code after it says that it is not the last
        assert samples == max(0, (spoken - streamed.wave.late) * audio.target.hop - held)


def test_the_window_is_as_wide_as_what_a_sample_depends_on(exact):
    audio, params, *_ = exact
    far = wave_stream.reach(audio.vocoder)
    mel_BMT = np.random.default_rng(1).normal(-4, 2, (1, 80, 4 * far)).astype(np.float32).repeat(2, 0)
    mel_BMT[1, :, 2 * far] += 3.0
    source_N = np.random.default_rng(2).normal(0, 0.1, (1, 4 * far * audio.target.hop)).astype(np.float32)
    module = hift.make_hift(audio)
    run = jax.jit(lambda *inputs: module.apply({"params": params["vocoder"]}, *inputs, method="filtered"))
    wave_BN = run(mel_BMT.swapaxes(1, 2), source_N.repeat(2, 0), np.full(2, 4 * far))
    touched = np.flatnonzero(np.abs(wave_BN[1] - wave_BN[0]) > 1e-6) // audio.target.hop
    assert far / 3 < 2 * far - touched.min() <= far and far / 3 < touched.max() - 2 * far <= far


def test_griffin_lim_comes_in_blocks_of_the_same_length_and_other_statistics_when_a_piece_is_over():
    audio, params, stats = small("masked", "griffin_lim")
    streamed, spoken = sound_stream.SoundStream(audio, params, stats), [codes(9), codes(20, 1)]
    wave_N, samples = heard(streamed, spoken, 4)
    frames = [4 * count - 1 for count in (9, 20)]
    assert len(wave_N) == sum(frames) * audio.target.hop - int(0.05 * audio.target.rate)
    assert samples[2] == 0 < samples[3] and np.ptp(wave_N) > 0.01
    assert np.array_equal(heard(streamed, spoken, 1)[0], wave_N)


def test_pieces_share_a_code_and_cover_everything():
    for count, sizes in ((0, []), (1, [1]), (4, [4]), (5, [4, 2]), (10, [4, 4, 4]), (11, [4, 4, 4, 2])):
        found = sound_stream.pieces(np.arange(count)[:, None], 4)
        assert [len(piece) for piece in found] == sizes
        assert all(one[-1] == other[0] for one, other in zip(found, found[1:]))
        assert sorted({int(i) for piece in found for i in piece[:, 0]}) == list(range(count))


def test_seams_are_those_of_join():
    rng = np.random.default_rng(0)
    for _ in range(30):
        waves = [rng.normal(size=rng.integers(1, 30)).astype(np.float32) for _ in range(4)]
        seams, made = wave_stream.Seams(), []
        for number, wave in enumerate(waves):
            cuts = np.sort(rng.integers(0, len(wave) + 1, 3))
            parts = [part for part in np.split(wave, cuts) if len(part)]
            made += [seams.push(part, 7 if number and at == 0 else 0, 8) for at, part in enumerate(parts)]
        np.testing.assert_allclose(np.concatenate([*made, seams.end()]), stream.join(waves, 7), atol=1e-6)
