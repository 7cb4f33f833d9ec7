"""Encoder and bridge: what padding may not change (golden case 08b: tests/tools/test_parity.py), activations."""

import jax
import numpy as np
import pytest

from dina.audio.config import default_config
from dina.audio.encoder import activation, attention_mask, make_encoder
from dina.config import InputError


def test_other_clips_and_their_length_change_nothing():
    audio = default_config()
    audio.encoder.update({"width": 16, "ff": 24, "layers": 1})
    encoder = make_encoder(audio)
    rng = np.random.default_rng(0)
    mel = rng.normal(size=(3, 64, 80)).astype(np.float32)
    frames = np.array([64, 33, 17])
    mel *= (np.arange(64) < frames[:, None])[..., None]
    params = encoder.init(jax.random.key(0), mel, frames)
    both = encoder.apply(params, mel, frames)
    alone = encoder.apply(params, mel[1:2], frames[1:2])
    codes = ((33 - 1) // 2 + 1) // 4
    assert np.allclose(both[1, :codes], alone[0, :codes], atol=1e-5)
    short = encoder.apply(params, mel[1:2, :40], frames[1:2])
    assert np.allclose(short[0, :codes], alone[0, :codes], atol=1e-5)
    other = encoder.apply(params, mel[:, ::-1] * (np.arange(64) < frames[:, None])[..., None], frames)
    assert not np.allclose(both[1, :codes], other[1, :codes], atol=1e-2)


def test_queries_of_a_stream_see_what_they_see_in_the_whole():
    valid = np.arange(8) < np.array([8, 5])[:, None]
    whole = np.asarray(attention_mask(valid, "causal"))
    assert np.array_equal(whole[0], np.tri(8, dtype=bool)) and not whole[1, :, 5:].any()
    assert np.array_equal(attention_mask(valid, "causal", np.arange(3, 6)), whole[:, 3:6])
    assert np.array_equal(attention_mask(valid, "both")[1], np.tile(valid[1], (8, 1)))


def test_activations_are_those_of_their_names():
    x = np.array([-1.0, 0.5, 2.0], np.float32)
    assert np.allclose(activation("gelu")(x), [-0.158655, 0.345731, 1.954500], atol=1e-6)
    assert np.allclose(activation("gelu_new")(x), [-0.158808, 0.345714, 1.954598], atol=1e-6)
    assert np.allclose(activation("silu")(x), x / (1 + np.exp(-x)), atol=1e-6) and np.allclose(activation("relu")(x), [0, 0.5, 2])
    with pytest.raises(InputError, match="activation 'gelo' does not exist; did you mean 'gelu'"):
        activation("gelo")
