"""Encoder and bridge: golden case 08b, and what padding may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.audio.encoder import AudioEncoder, Bridge, WhisperEncoder, make_encoder, sinusoid
from dina.audio.config import default_config
from tests.audio import golden_weights
from tests.golden_io import read_case, relative_error


@pytest.fixture(scope="module")
def golden():
    config, weights, data = read_case("08b_audio_tokenizer")
    params = {
        "encoder": golden_weights.encoder(weights, "audio_tokenizer.audio_model", config["encoder_layers"]),
        "bridge": golden_weights.bridge(weights, "audio_tokenizer.audio_bridge_model"),
    }
    whisper = WhisperEncoder(
        config["d_model"], config["encoder_layers"], config["encoder_attention_heads"], config["encoder_ffn_dim"], parent=None
    )
    return AudioEncoder(whisper, Bridge(config["avg_pooler"], parent=None)), params, data


def test_encoder_matches_golden(golden):
    module, params, data = golden
    mel, frames = data["mel"].swapaxes(1, 2), jnp.asarray(data["frames"], jnp.int32)
    out, state = module.encoder.apply({"params": params["encoder"]}, mel, frames, capture_intermediates=True)
    assert relative_error(out, data["encoder_out"]) < 1e-4
    assert relative_error(sinusoid(45, 32), data["positional_embedding"]) < 1e-5
    first = np.asarray(state["intermediates"]["layer0"]["__call__"][0])
    packed = np.concatenate([first[row, :n] for row, n in enumerate(data["encoder_length"])])
    assert relative_error(packed, data["layer0_out_packed"]) < 1e-4


def test_bridge_matches_golden(golden):
    module, params, data = golden
    out = module.apply({"params": params}, data["mel"].swapaxes(1, 2), jnp.asarray(data["frames"], jnp.int32))
    assert relative_error(out, data["bridge_prequant"]) < 1e-4


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
