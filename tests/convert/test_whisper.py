"""A Whisper checkpoint: our encoder computes what transformers does; what we cannot express is refused by name."""

import json
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest
import safetensors.numpy

from dina import checkpoint, config as configs, stages
from dina.audio import encoder
from dina.config import InputError
from dina.convert import audio, hf_audio, rules, settings, whisper
from dina.convert.released import Released
from dina.optim import flatten
from tests.backbone.test_transformers import REASON
from tools import convert
from tools.bench import harness

TOWER = {"model_type": "whisper", "num_mel_bins": 6, "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 12,
         "max_source_positions": 10, "activation_function": "gelu"}  # fmt: skip


def write(folder, start="model.encoder", change=lambda arrays: None, **keys):
    """A checkpoint with the tensors of `TOWER` and one of the decoder, and its config with `keys`."""
    config = hf_audio.as_config(hf_audio.whisper(TOWER, "", "encoder_", 20))
    table, random = f"{start}.embed_positions.weight", np.random.default_rng(0)
    listed = [*audio.whisper(start), *audio.positions("audio_encoder", table, "d")]
    sizes = audio.encoder_sizes(encoder.make_encoder(config), 6, 10)
    arrays = {p.name: random.normal(0, 0.3, p.shape).astype(np.float32) for p in rules.pieces(listed, *sizes)}
    arrays |= {table: encoder.sinusoid(10, 16), "model.decoder.layers.0.fc1.weight": np.ones((3, 4), np.float32)}
    change(arrays)
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TOWER | keys))
    return arrays


@pytest.mark.skipif(REASON is not None, reason=f"no transformers to compare with: {REASON}")
def test_frames_equal_those_of_transformers(tmp_path):
    peer = [harness.peer_python(), str(pathlib.Path(__file__).with_name("whisper_peer.py")), str(tmp_path)]
    subprocess.run(peer, check=True, capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert convert.main(["whisper", "--checkpoint", str(tmp_path / "checkpoint"), "--workdir", str(tmp_path)]) == 0
    theirs = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    record = checkpoint.finished(tmp_path / convert.WHISPER)
    model = encoder.make_encoder(hf_audio.as_config(record["audio"])).encoder
    params = checkpoint.result(tmp_path / convert.WHISPER)["params"]["audio_encoder"]["encoder"]
    mel_BTM = theirs["features"].swapaxes(1, 2)
    frames_B = np.full(len(mel_BTM), mel_BTM.shape[1], np.int32)
    apply = jax.jit(lambda params: model.apply({"params": params}, mel_BTM, frames_B, capture_intermediates=True))
    out_BTD, seen = apply(params)
    for ours, other in ((seen["intermediates"]["layer0"]["__call__"][0], theirs["layer0"]), (out_BTD, theirs["out"])):
        assert ours.shape == other.shape and np.max(np.abs(ours - other)) <= 1e-5 * np.max(np.abs(other))


@pytest.mark.parametrize("start", whisper.STARTS)
def test_both_spellings_are_read_and_nothing_of_the_encoder_is_dropped(tmp_path, start):
    arrays = write(tmp_path / "in", start)
    leaves, found = whisper.make(Released(tmp_path / "in"))
    assert {piece.name for leaf in leaves.values() for piece in leaf.pieces} == {name for name in arrays if name.startswith(f"{start}.")}
    assert found["encoder"] == {"width": 16, "layers": 2, "heads": 2, "ff": 12, "stride": 2, "activation": "gelu"}
    config = hf_audio.as_config(found)
    shapes = {path: leaf.shape for path, leaf in leaves.items() if path.startswith("params/")}
    shapes |= {path: array.shape for path, array in whisper.bridge(found).items()}
    args = np.zeros((1, 20, 6), np.float32), np.array([20], np.int32)
    abstract = jax.eval_shape(lambda: encoder.make_encoder(config).init(jax.random.key(0), *args)["params"])
    assert shapes == {f"params/audio_encoder/{path}": leaf.shape for path, leaf in flatten(abstract).items()}


def test_an_experiment_goes_on_from_an_encoder(tmp_path, capsys):
    arrays = write(tmp_path / "in")
    convert.main(["whisper", "--checkpoint", str(tmp_path / "in"), "--workdir", str(tmp_path)])
    config = configs.load("experiments/digits.py:smoke")
    with config.unlocked():
        config.stages.A1.init_from = {"audio_encoder": convert.WHISPER}
        tail = config.audio.features.tail
        settings.apply_audio(config, tmp_path / convert.WHISPER)
    assert config.imports[convert.WHISPER] in capsys.readouterr().out
    assert config.audio.encoder.width == 16 and config.audio.features.mels == 6 and config.audio.features.tail == tail
    record = checkpoint.finished(tmp_path / convert.WHISPER, stages.stage_identity(config, convert.WHISPER))
    settings.check(record, config, ["audio_encoder"], "here")
    held = settings.load(config, tmp_path / convert.WHISPER, ["audio_encoder"])["params"]["audio_encoder"]
    np.testing.assert_array_equal(held["encoder"]["layer1"]["q"]["kernel"].T, arrays["model.encoder.layers.1.self_attn.q_proj.weight"])
    assert held["bridge"]["gate"]["kernel"].shape == (64, 64)
    with config.unlocked():
        config.audio.encoder.heads = 4
    with pytest.raises(InputError, match="here/audio_encoder: config.audio.encoder.heads is 4, the imported weights have 2"):
        settings.check(record, config, ["audio_encoder"], "here")
    with pytest.raises(InputError, match="holds no imported audio part"):
        settings.apply_audio(config, tmp_path / "none")


@pytest.mark.parametrize("key, value", [
    ("activation_function", "tanh"), ("encoder_attention_heads", 3), ("model_type", "wav2vec2"), ("d_model", "16"),
])  # fmt: skip
def test_a_setting_that_we_cannot_express_is_named(tmp_path, key, value):
    write(tmp_path / "in", **{key: value})
    with pytest.raises(InputError, match=key):
        whisper.make(Released(tmp_path / "in"))


def test_features_of_another_processor_are_named(tmp_path):
    write(tmp_path / "in")
    (tmp_path / "in" / whisper.PROCESSOR).write_text(json.dumps({"hop_length": 320}))
    with pytest.raises(InputError, match="preprocessor_config.json.hop_length is 320; this code computes 160"):
        whisper.make(Released(tmp_path / "in"))


@pytest.mark.parametrize("change, message", [
    (lambda arrays: arrays.pop("model.encoder.layer_norm.bias"), "missing model.encoder.layer_norm.bias"),
    (lambda arrays: arrays.update({"model.encoder.extra.weight": np.zeros(3, np.float32)}), "unknown model.encoder.extra.weight"),
    (lambda arrays: arrays.update({"model.encoder.conv2.bias": np.zeros(3, np.float32)}), r"conv2.bias .* has shape \[3\], config.json asks for"),
    (lambda arrays: arrays.update({"model.encoder.embed_positions.weight": np.zeros((10, 16), np.float32)}), "weight is 1 off the sinusoids"),
    (lambda arrays: [arrays.pop(name) for name in list(arrays) if ".encoder." in name], "whose name begins with model.encoder. or encoder."),
])  # fmt: skip
def test_a_wrong_tensor_is_named_and_leaves_nothing(tmp_path, change, message):
    write(tmp_path / "in", change=change)
    with pytest.raises(InputError, match=message):
        convert.main(["whisper", "--checkpoint", str(tmp_path / "in"), "--workdir", str(tmp_path)])
    assert not (tmp_path / convert.WHISPER).exists()
