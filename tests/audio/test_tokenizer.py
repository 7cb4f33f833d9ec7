"""Waves to codes: golden case 08b's codes, lengths, chunks, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.audio import tokenizer
from dina.config import InputError
from dina.convert import audio as tables
from tests.audio import toy
from tests.golden_io import read_case, relative_error


@pytest.fixture(scope="module")
def golden():
    config, weights, data = read_case("08b_audio_tokenizer")
    audio = toy.experiment().audio
    audio.encoder.width, audio.decoder.width = config["d_model"], config["d_model"]
    audio.quantizer.sizes = tuple(config["codebook_sizes"])
    names = [*tables.codebooks("audio_tokenizer."), *tables.projection("audio_tokenizer.")]
    found = toy.from_released(weights, names, *tables.quantizer_sizes(tokenizer.quantizer_config(audio), config["d_model"]))
    lengths = data["bridge_length"]
    x = np.concatenate([data["bridge_prequant"][row, :n] for row, n in enumerate(lengths)])[None]
    return audio, found["params"]["audio_quantizer"], jax.tree.map(jnp.asarray, found["stats"]["audio_quantizer"]), x, data


@pytest.mark.parametrize("residual", ["float32", "activation"])
def test_codes_match_golden(golden, residual):
    audio, _, stats, x, data = golden
    audio.quantizer.residual = residual
    assert np.array_equal(tokenizer.search(audio, stats, jnp.asarray(x))[0], data["codes_packed"])


def test_activation_residual_is_rounded(golden):
    audio, _, stats, x, _ = golden
    rng = np.random.default_rng(0)
    x16 = jnp.asarray(rng.normal(size=(1, 400, x.shape[-1])), jnp.bfloat16)
    audio.quantizer.residual = "float32"
    exact = tokenizer.search(audio, stats, x16)
    audio.quantizer.residual = "activation"
    rounded = tokenizer.search(audio, stats, x16)
    assert np.array_equal(exact[..., 0], rounded[..., 0])
    assert np.any(exact != rounded)
    audio.quantizer.residual = "half"
    with pytest.raises(InputError, match="half"):
        tokenizer.search(audio, stats, x16)


def test_decoder_input_matches_golden(golden):
    audio, params, stats, _, data = golden
    codes = jnp.asarray(data["codes_packed"], jnp.int32)[None]
    assert relative_error(tokenizer.decoder_input(audio, params, stats, codes)[0], data["decode_emb"]) < 1e-4
    few = tokenizer.decoder_input(audio, params, stats, codes, levels=2)
    cut = tokenizer.decoder_input(audio, params, stats, codes.at[..., 2:].set(-1))
    assert np.allclose(few, cut, atol=1e-6)
    over = tokenizer.decoder_input(audio, params, stats, codes.at[..., 1].set(10_000))
    last = tokenizer.decoder_input(audio, params, stats, codes.at[..., 1].set(audio.quantizer.sizes[1] - 1))
    assert np.array_equal(over, last)


@pytest.fixture(scope="module")
def small():
    config = toy.experiment()
    variables = toy.variables(config)
    return config.audio, variables["params"], variables["stats"], tokenizer.make_tokenize(config.audio)


def test_codes_have_12_5_a_second_and_do_not_depend_on_the_batch(small):
    audio, params, stats, tokenize = small
    waves = toy.waves(5)[0]
    codes = tokenizer.tokenize_waves(tokenize, audio, params, stats, waves, batch=4)
    for wave, clip in zip(waves, codes, strict=True):
        assert clip.shape == (-(-len(wave) // 1280), 3)
        assert clip.min() >= 0 and np.all(clip < np.array(audio.quantizer.sizes))
    alone = tokenizer.tokenize_waves(tokenize, audio, params, stats, waves[3:4], batch=4)
    assert np.array_equal(alone[0], codes[3])


def test_padding_rows_and_frames_are_marked(small):
    audio, params, stats, tokenize = small
    wave, samples = tokenizer.pad_waves([np.full(2560, 0.1, np.float32)], audio, 2)
    codes, lengths = tokenize(params, stats, wave, samples)
    assert lengths[0] == 2 and np.all(codes[0, 2:] == -1) and np.all(codes[0, :2] >= 0)


def test_long_waves_are_cut_into_chunks(small):
    audio, params, stats, tokenize = small
    chunk = audio.features.max_frames * audio.features.hop
    wave = np.sin(np.arange(2 * chunk + 3000) / 9).astype(np.float32)
    (codes,) = tokenizer.tokenize_waves(tokenize, audio, params, stats, [wave], batch=4)
    (first,) = tokenizer.tokenize_waves(tokenize, audio, params, stats, [wave[:chunk]], batch=4)
    assert len(codes) == 8 + 8 + 3 and np.array_equal(codes[:8], first)


def test_bad_waves_are_named(small):
    audio, params, stats, tokenize = small
    good = toy.waves(1)[0][0]
    with pytest.raises(InputError, match="wave 1.*silent"):
        tokenizer.tokenize_waves(tokenize, audio, params, stats, [good, np.zeros(8000, np.int16)])
    with pytest.raises(InputError, match="wave 0.*3 samples"):
        tokenizer.tokenize_waves(tokenize, audio, params, stats, [good[:3]])


def test_quantizer_dimension_is_that_of_the_joined_frames(small):
    audio, params, _, _ = small
    assert tokenizer.quantizer_config(audio).dim == 64
    assert jax.tree.map(np.shape, params["audio_quantizer"])["proj_decoder"]["kernel"] == (64, 16)
