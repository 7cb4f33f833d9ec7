"""A Qwen2.5-VL vision tower: our encoder computes what transformers does; what we cannot express is refused by name."""

import json
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest
import safetensors.numpy

from dina import checkpoint, config as configs, stages
from dina.config import InputError
from dina.convert import hf_visual, qwen, rules, settings, visual
from dina.convert.released import Released
from dina.vision import bridge, preprocess
from tests.backbone.test_transformers import REASON
from tools import convert
from tools.bench import harness

TOWER = {"depth": 2, "hidden_size": 16, "intermediate_size": 12, "num_heads": 2, "out_hidden_size": 20, "window_size": 56, "fullatt_block_indexes": [1]}


def write(folder, start="visual", change=lambda arrays: None, **keys):
    """A checkpoint with the tensors of `TOWER` and one of the language model, and its config with `keys`."""
    module = bridge.make_encoder(hf_visual.as_config(hf_visual.tower(TOWER, "")))
    table = [*visual.tower(start), *visual.bridge(f"{start}.merger")]
    random = np.random.default_rng(0)
    arrays = {p.name: random.normal(0, 0.3, p.shape).astype(np.float32) for p in rules.pieces(table, *visual.encoder_sizes(module))}
    arrays["model.layers.0.mlp.up_proj.weight"] = np.ones((3, 4), np.float32)
    change(arrays)
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": TOWER | keys}))
    return arrays


@pytest.mark.skipif(REASON is not None, reason=f"no transformers to compare with: {REASON}")
def test_features_equal_those_of_transformers(tmp_path):
    peer = [harness.peer_python(), str(pathlib.Path(__file__).with_name("qwen_peer.py")), str(tmp_path)]
    subprocess.run(peer, check=True, capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert convert.main(["qwen-vision", "--checkpoint", str(tmp_path / "checkpoint"), "--workdir", str(tmp_path)]) == 0
    theirs = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    record = checkpoint.finished(tmp_path / convert.QWEN)
    config = hf_visual.as_config(record["vision"])
    frames = [(h // 2, w // 2) for t, h, w in theirs["grids"].tolist() for _ in range(t)]
    pack = preprocess.pack_layout(frames, sum(h * w for h, w in frames), len(frames), config.encoder.window_cells)
    pack = {name: array[None] for name, array in {**pack, "patches": theirs["patches"]}.items()}
    params = checkpoint.result(tmp_path / convert.QWEN)["params"]["vision_encoder"]
    model = bridge.make_encoder(config)
    cells_BNZ, seen = jax.jit(lambda params, pack: model.apply({"params": params}, pack, capture_intermediates=True))(params, pack)
    features_ND = np.asarray(seen["intermediates"]["vit"]["__call__"][0][0]).reshape(len(theirs["merged"]), -1)
    windowed_PD = features_ND[np.argsort(pack["window"][0, :: bridge.MERGED], kind="stable")].reshape(theirs["features"].shape)
    for ours, other in ((windowed_PD, theirs["features"]), (cells_BNZ[0], theirs["merged"])):
        assert np.max(np.abs(ours - other)) <= 1e-5 * np.max(np.abs(other))


@pytest.mark.parametrize("start", qwen.STARTS)
def test_both_spellings_are_read_and_nothing_is_dropped(tmp_path, start):
    arrays = write(tmp_path / "in", start)
    released = Released(tmp_path / "in")
    leaves, found = qwen.make(released)
    assert {piece.name for leaf in leaves.values() for piece in leaf.pieces} == {name for name in arrays if name.startswith(f"{start}.")}
    assert found["encoder"] == {"width": 16, "depth": 2, "heads": 2, "ff": 12, "window_cells": 2, "full_layers": [1], "pixels": "float32"}
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    abstract = jax.eval_shape(lambda: bridge.init_encoder(hf_visual.as_config(found), jax.random.key(0)))
    assert shapes == {f"params/vision_encoder/{path}": leaf.shape for path, leaf in checkpoint_paths(abstract).items()}


def checkpoint_paths(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_an_experiment_goes_on_from_a_tower(tmp_path, capsys):
    arrays = write(tmp_path / "in")
    convert.main(["qwen-vision", "--checkpoint", str(tmp_path / "in"), "--workdir", str(tmp_path)])
    config = configs.load("experiments/digits.py:smoke")
    with config.unlocked():
        config.stages.V1.init_from = {"vision_encoder": convert.QWEN}
        settings.apply_vision(config, tmp_path / convert.QWEN)
    assert config.imports[convert.QWEN] in capsys.readouterr().out
    assert config.vision.encoder.full_layers == (1,) and config.vision.bridge.out_dim == 20
    record = checkpoint.finished(tmp_path / convert.QWEN, stages.stage_identity(config, convert.QWEN))
    settings.check(record, config, ["vision_encoder"], "here")
    kernel = checkpoint.result(tmp_path / convert.QWEN)["params"]["vision_encoder"]["vit"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(kernel.T, arrays["visual.patch_embed.proj.weight"].reshape(16, -1))
    with config.unlocked():
        config.vision.encoder.window_cells = 3
    with pytest.raises(InputError, match="here/vision_encoder: config.vision.encoder.window_cells is 3, the imported weights have 2"):
        settings.check(record, config, ["vision_encoder"], "here")


@pytest.mark.parametrize("key, value", [
    ("hidden_act", "quick_gelu"), ("patch_size", 16), ("temporal_patch_size", 1), ("spatial_merge_size", 4), ("in_channels", 1),
    ("num_heads", 3), ("window_size", 20), ("fullatt_block_indexes", [2]), ("model_type", "qwen3_vl"), ("rope_parameters", {"rope_theta": 5e5}),
    ("out_hidden_size", "20"),
])  # fmt: skip
def test_a_setting_that_we_cannot_express_is_named(tmp_path, key, value):
    write(tmp_path / "in", **{key: value})
    with pytest.raises(InputError, match=rf"vision_config\b.*{key}"):
        qwen.make(Released(tmp_path / "in"))


@pytest.mark.parametrize("change, message", [
    (lambda arrays: arrays.pop("visual.blocks.1.norm2.weight"), "missing visual.blocks.1.norm2.weight"),
    (lambda arrays: arrays.update({"visual.deepstack.0.weight": np.zeros(3, np.float32)}), "unknown visual.deepstack.0.weight"),
    (lambda arrays: arrays.update({"visual.merger.ln_q.weight": np.zeros(3, np.float32)}), r"ln_q.weight .* has shape \[3\], config.json asks for \[16\]"),
])  # fmt: skip
def test_a_wrong_tensor_is_named_and_leaves_nothing(tmp_path, change, message):
    write(tmp_path / "in", change=change)
    with pytest.raises(InputError, match=message):
        convert.main(["qwen-vision", "--checkpoint", str(tmp_path / "in"), "--workdir", str(tmp_path)])
    assert not (tmp_path / convert.QWEN).exists()


def test_a_checkpoint_without_a_tower_is_refused(tmp_path):
    write(tmp_path / "in", change=lambda arrays: [arrays.pop(name) for name in list(arrays) if name.startswith("visual.")])
    with pytest.raises(InputError, match="holds no tensor whose name begins with visual. or model.visual."):
        qwen.make(Released(tmp_path / "in"))
    (tmp_path / "in" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no section 'vision_config'"):
        qwen.make(Released(tmp_path / "in"))
