"""The audio side of a released config.json: what it says becomes settings, what we cannot compute is refused by name."""

import copy
import json

import pytest

from dina.audio import detokenizer, flow
from dina.config import InputError
from dina.convert import hf_audio
from tools.bench import synthetic


def changed(section, key, value):
    """The synthetic config with one value of a (dotted) section of `audio_config` replaced, or left out where it is 'drop'."""
    c = copy.deepcopy(synthetic.AUDIO_CONFIG)
    at = c
    for name in filter(None, section.split(".")):
        at = at[name]
    at[key] = value
    if value == "drop":
        del at[key]
    return {"audio_config": c}


def test_settings_of_a_config():
    found = hf_audio.of_config({"audio_config": synthetic.AUDIO_CONFIG})
    assert json.loads(json.dumps(found)) == found  # a stage's record holds them
    assert found["encoder"] == {"width": 8, "layers": 2, "heads": 2, "ff": 12, "stride": 2, "activation": "gelu"}
    assert found["features"].items() >= {"mels": 6, "max_frames": 100, "resample": "linear", "tail": "drop"}.items()
    assert found["quantizer"] == {"sizes": [16, 8, 8], "residual": "activation"} and found["bridge"] == {"pool": 2}
    assert found["decoder"]["statistics"] == "padded" and found["decoder"]["post_channels"] == [4, 6, 7]
    assert found["flow"]["estimator"] == {"channels": [8, 16], "middle": 2, "blocks": 1, "heads": 2, "head_dim": 4, "chunk": 100, "act": "gelu"}
    assert found["flow"].items() >= {"steps": 3, "guidance": 0.7, "grid": "bfloat16", "spacing": "cosine", "prediction": "velocity"}.items()
    assert found["positions"] == {"audio_encoder": 50, "audio_decoder": 100, "flow": 20}
    audio = hf_audio.as_config(found)
    assert audio.recon.mels == 5 and audio.recon.mean == 0 and audio.quantizer.sizes == (16, 8, 8)
    assert flow.make_flow(audio).estimator.channels == (8, 16)
    assert detokenizer.mel_samples(4, audio) == (2 * 4) * 480  # k3 s2: nothing is lost at the end


def test_what_weights_mean_is_compared_and_how_they_are_trained_is_not():
    found = hf_audio.of_config({"audio_config": synthetic.AUDIO_CONFIG})
    audio = hf_audio.as_config(found)
    assert [hf_audio.differs(found, audio, part) for part in hf_audio.PARTS] == [""] * 4
    audio.quantizer.decay, audio.features.resample, audio.flow.steps, audio.flow.guidance = 0.5, "soxr", 20, 0.0
    assert [hf_audio.differs(found, audio, part) for part in hf_audio.PARTS] == [""] * 4
    audio.decoder.statistics, audio.flow.prediction, audio.features.mels = "masked", "clean", 80
    said = {part: hf_audio.differs(found, audio, part) for part in hf_audio.PARTS}
    assert said == {
        "audio_encoder": "config.audio.features.mels is 80, the imported weights have 6", "audio_quantizer": "",
        "audio_decoder": "config.audio.decoder.statistics is 'masked', the imported weights have 'padded'",
        "flow": "config.audio.flow.prediction is 'clean', the imported weights have 'velocity'",
    }  # fmt: skip


def test_a_field_that_an_experiment_leaves_out_is_the_modules_default():
    found = hf_audio.of_config(changed("", "stride_size", 1))
    audio = hf_audio.as_config(found)
    with audio.unlocked():
        del audio.encoder.stride
    assert hf_audio.differs(found, audio, "audio_encoder") == "config.audio.encoder.stride is 2, the imported weights have 1"


def test_vocoder_and_flow_may_stand_beside_the_audio_section():
    c = dict(synthetic.AUDIO_CONFIG)
    beside = {name: c.pop(name) for name in ("vocoder_config", "flow_matching_config")}
    assert hf_audio.of_config({"audio_config": c} | beside) == hf_audio.of_config({"audio_config": synthetic.AUDIO_CONFIG})
    with pytest.raises(InputError, match=r"audio_config \(or config.json\) has no section 'vocoder_config'"):
        hf_audio.of_config({"audio_config": c})
    assert set(hf_audio.of_config({"audio_config": c}, ["audio_encoder"])["positions"]) == {"audio_encoder"}


FLOW = "flow_matching_config"


@pytest.mark.parametrize("section, key, value, message", [
    ("", "kernel_size", 5, "audio_config.kernel_size is 5; this code computes 3"),
    ("", "d_model", "drop", "audio_config.d_model is missing"),
    ("", "encoder_attention_heads", 8, "d_model 8 must be encoder_attention_heads 8 times an even number"),
    ("", "activation_function", "tanh", "audio_config.activation_function is 'tanh'; this code computes gelu,"),
    ("", "vq_config", "drop", "audio_config has no section 'vq_config'"),
    ("vq_config", "codebook_sizes", [16, "8"], "codebook_sizes must list a number for each level, not .16, '8'."),
    ("vocoder_config", "channels", 256, "vocoder_config.channels must list"),
    (FLOW, "channels", [], f"{FLOW}.channels must list"),
    (FLOW, "act_fn", "snakebeta", f"{FLOW}.act_fn is 'snakebeta'; this code computes gelu, gelu-approximate, geglu"),
    (FLOW, "spk_emb_dim", 64, f"{FLOW}.spk_emb_dim is 64; this code computes 0"),
    (FLOW, "use_hidden_states_before_dconv2", False, "use_hidden_states_before_dconv2 is False; this code computes True"),
    (FLOW, "prenet_out_dim", 6, f"{FLOW}.prenet_out_dim is 6, in_channels 5"),
    (f"{FLOW}.cfm_params", "solver", "midpoint", "cfm_params.solver is 'midpoint'; this code computes 'euler'"),
    (f"{FLOW}.cfm_params", "inference_cfg_rate", "drop", "inference_cfg_rate is missing"),
])  # fmt: skip
def test_a_key_that_is_missing_or_that_we_cannot_compute_is_named(section, key, value, message):
    with pytest.raises(InputError, match=message):
        hf_audio.of_config(changed(section, key, value))
