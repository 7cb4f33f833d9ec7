"""The audio side through the command: parts are what the modules run on, and what trained parts become on the way back."""

import jax
import ml_collections
import numpy as np
import pytest

from dina import checkpoint, config as configs, sharding, stages, step as steps
from dina.audio import flow, mel_decoder, tokenizer
from dina.config import InputError
from dina.convert import audio, hf_audio, settings
from dina.convert.released import Released
from dina.optim import flatten
from tools import convert
from tools.bench import synthetic

PARTS = ",".join(hf_audio.PARTS)
BOOK = f"{audio.TOKENIZER}{audio.BRIDGE}.vq_list.1.codebook"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A release that holds the audio tokenizer alone."""
    folder = tmp_path_factory.mktemp("released")
    synthetic.write_tensors(folder, {name: what for name, what in synthetic.tensors().items() if name.startswith(audio.TOKENIZER)})
    return folder


@pytest.fixture(scope="module")
def imported(released, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("work")
    convert.main(["import", "--checkpoint", str(released), "--workdir", str(workdir), "--parts", PARTS])
    return workdir


def test_imported_parts_are_what_the_modules_run_on(released, imported):
    record, found = checkpoint.finished(imported / "released"), checkpoint.result(imported / "released")
    config = hf_audio.as_config(record["audio"])
    hidden, one = np.zeros((1, 4, 8), np.float32), np.ones(1, np.int32)
    wanted = {
        "audio_decoder": lambda: mel_decoder.make_decoder(config).init(jax.random.key(0), hidden, one),
        "flow": lambda: flow.make_flow(config).init(jax.random.key(0), hidden, one, np.zeros((1, 4, 5), np.float32), np.zeros(1, np.float32)),
        "audio_quantizer": lambda: tokenizer.CodeProjection(8).init(jax.random.key(0), np.zeros((1, 1, 16), np.float32)),
    }
    shapes = lambda tree: {path: leaf.shape for path, leaf in flatten(tree).items()}
    for part, init in wanted.items():
        assert shapes(found["params"][part]) == shapes(jax.eval_shape(init)["params"])
    source = Released(released)
    np.testing.assert_array_equal(found["stats"]["audio_quantizer"]["codebook"]["1"], source.read(f"{BOOK}.embed"))
    np.testing.assert_array_equal(found["stats"]["audio_quantizer"]["count"]["1"], source.read(f"{BOOK}.cluster_size"))
    table = source.read(f"{audio.TOKENIZER}audio_model.positional_embedding")
    np.testing.assert_array_equal(found["carried"]["audio_encoder"]["positions"].view(np.uint16), table.view(np.uint16))


def test_export_is_equal_bit_by_bit_and_a_trained_codebook_is_all_that_changes(released, imported, tmp_path):
    convert.main(["export", "--workdir", str(imported), "--out", str(tmp_path / "same")])
    assert convert.main(["verify", "--checkpoint", str(released), "--parts", PARTS, "--against", str(tmp_path / "same")]) == 0
    found = checkpoint.result(imported / "released", {"params": ["audio_quantizer"], "stats": ["audio_quantizer"]})
    found["stats"]["audio_quantizer"]["codebook"]["1"] = found["stats"]["audio_quantizer"]["codebook"]["1"] + np.float32(1)
    checkpoint.finish(imported / "A1", found, {"identity": "x"})
    convert.main(["export", "--workdir", str(imported), "--stage", "A1", "--out", str(tmp_path / "out")])
    ours, theirs = Released(tmp_path / "out"), Released(released)
    different = [name for name in theirs.tensors if ours.read(name).tobytes() != theirs.read(name).tobytes()]
    assert different == [f"{BOOK}.embed"]
    np.testing.assert_array_equal(ours.read(f"{BOOK}.embed"), theirs.read(f"{BOOK}.embed") + np.float32(1))


def test_a_stage_starts_from_imported_parts(imported):
    config = configs.load("experiments/digits.py:smoke")
    with config.unlocked():
        settings.apply_audio(config, imported / "released")
        config.stages.A2.init_from = ml_collections.ConfigDict({part: "released" for part in hf_audio.PARTS})
    task = stages.make_task(config, "A2")
    like = steps.abstract_state(task, config.stages.A2, sharding.make_mesh({"data": 2}, jax.devices()[:2]))
    found = stages.initial_variables(config, "A2", task, imported, like)
    ours = checkpoint.result(imported / "released")
    np.testing.assert_array_equal(found["stats"]["audio_quantizer"]["codebook"]["1"], ours["stats"]["audio_quantizer"]["codebook"]["1"])
    kernel = found["params"]["flow"]["estimator"]["up1_conv"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, ours["params"]["flow"]["estimator"]["up1_conv"]["kernel"].astype(np.float32))
    with config.unlocked():
        config.audio.flow.prediction = "clean"
    with pytest.raises(InputError, match="released/flow: config.audio.flow.prediction is 'clean', the imported weights have 'velocity'"):
        stages.initial_variables(config, "A2", task, imported, like)


def test_a_codebook_that_lost_its_precision_and_an_unknown_tensor_are_named(tmp_path):
    listed = {name: what for name, what in synthetic.tensors().items() if name.startswith(audio.TOKENIZER)}
    listed[f"{BOOK}.embed"] = (listed[f"{BOOK}.embed"][0], np.dtype(np.float16))
    del listed[f"{audio.TOKENIZER}audio_decoder.post_net.layers.0.bias"]
    synthetic.write_tensors(tmp_path / "in", listed)
    with pytest.raises(InputError, match="missing .*post_net.layers.0.bias(.|\n)*vq_list.1.codebook.embed in .* has dtype F16, it must be F32"):
        convert.main(["import", "--checkpoint", str(tmp_path / "in"), "--workdir", str(tmp_path), "--parts", PARTS])
