"""Mel decoder: statistics, padding, lengths (golden cases: tests/tools/test_parity.py)."""

import jax
import numpy as np
import pytest

from dina.audio import mel_decoder
from dina.audio.config import default_config
from dina.config import InputError
from dina.convert import audio as tables
from tests.audio import toy
from tests.golden_io import read_case


@pytest.fixture(scope="module")
def golden():
    config, weights, data = read_case("08c_audio_decoder")
    audio, vocoder = config["audio"], config["vocoder"]
    layers, channels = audio["decoder_layers"], tuple(vocoder["channels"])

    def build(statistics):
        frames = mel_decoder.FrameDecoder(
            audio["d_model"], layers, audio["decoder_attention_heads"], audio["decoder_ffn_dim"], statistics, parent=None
        )
        mel = (vocoder["num_mel_bins"], vocoder["sampling_rate"], vocoder["hop_length"])
        return mel_decoder.MelDecoder(frames, mel_decoder.MelHead(*mel, channels, statistics, parent=None))

    lengths = data["lengths"].astype(np.int32)
    x = np.zeros((2, lengths.max(), audio["d_model"]), np.float32)
    start = 0
    for row, length in enumerate(lengths):
        x[row, :length] = data["audio_embed_packed"][start : start + length]
        start += length
    module = build("padded")
    params = toy.from_released(weights, tables.decoder(module, ""), *tables.decoder_sizes(module))["params"]["audio_decoder"]
    return build, params, data, x, lengths


def test_masked_statistics_make_a_batch_equal_its_clips(golden):
    build, params, _, x, lengths = golden
    batch = build("masked").apply({"params": params}, x, lengths)
    alone = build("masked").apply({"params": params}, x[1:, : lengths[1]], lengths[1:])
    for together, single in zip(batch, alone, strict=True):
        assert np.allclose(together[1, : single.shape[1]], single[0], atol=1e-5)
    padded = build("padded").apply({"params": params}, x, lengths)
    assert not np.allclose(padded[0][1, :5], batch[0][1, :5], atol=1e-3)


def test_padding_values_do_not_matter(golden):
    build, params, _, x, lengths = golden
    spoilt = x.copy()
    spoilt[1, lengths[1] :] = 99.0
    clean, dirty = (build("masked").apply({"params": params}, inputs, lengths) for inputs in (x, spoilt))
    for a, b in zip(clean, dirty, strict=True):
        assert np.array_equal(a, b)


def test_hidden_frames_do_not_see_later_codes_but_for_the_norm(golden):
    build, params, _, x, lengths = golden
    frames = build("masked").frames
    grads = jax.grad(lambda inputs: frames.apply({"params": params["frames"]}, inputs, lengths)[0, :4].sum())(x)
    # Group statistics couple all frames; through attention nothing later arrives, so the own code dominates.
    size = np.abs(grads[0]).sum(-1)
    assert size[0] > 5 * size[2:].max()


def test_statistics_of_a_frame_are_its_own():
    rng = np.random.default_rng(0)
    x, valid = rng.normal(2, 3, size=(2, 5, 4)).astype(np.float32), np.ones((2, 5), bool)
    variables = {"params": {"scale": np.full(4, 2.0, np.float32), "bias": np.arange(4, dtype=np.float32)}}
    out = mel_decoder.GroupNorm("frame").apply(variables, x, valid)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * 2 + np.arange(4)
    assert np.allclose(out, want, atol=1e-5)


def test_transposed_convolution_by_definition():
    rng = np.random.default_rng(0)
    for stride, size in ((4, 3), (2, 3), (1, 3), (3, 5)):
        x, kernel = rng.normal(size=(2, 5, 3)).astype(np.float32), rng.normal(size=(size, 3, 4)).astype(np.float32)
        expected = np.zeros((2, 4 * stride + size, 4))
        for t in range(5):
            for k in range(size):
                expected[:, t * stride + k] += x[:, t] @ kernel[k]
        assert np.allclose(mel_decoder.transposed(x, kernel, stride), expected, atol=1e-5)


def test_lengths():
    codes = np.array([0, 1, 16])
    assert list(mel_decoder.hidden_length(codes)) == [0, 3, 63]
    assert list(mel_decoder.mel_length(codes, 16000, 256)) == [0, 3, 78]
    assert mel_decoder.mel_length(15, 24000, 480) == 58  # 59 in exact arithmetic; the reference's float32 gives 58


def test_unknown_statistics_are_refused():
    audio = default_config()
    audio.decoder.statistics = "batch"
    with pytest.raises(InputError, match="batch"):
        mel_decoder.make_decoder(audio).init(jax.random.key(0), np.zeros((1, 2, audio.decoder.width)), np.array([2]))
