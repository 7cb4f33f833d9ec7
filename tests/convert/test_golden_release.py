"""Golden cases under the names of a release: imported by the command, they give the reference's codes, pixels and frames.

Cases 04 and 05 are one visual tokenizer (the bridge's features are as wide as the quantizer's); the detokenizers of 07a and
07c have code vectors of their own widths and are imported alone. Parity has run the pipeline of 07c, mel decoder and flow of
08c and 08d, so modules and weights are enough.
"""

import json

import jax
import ml_collections
import numpy as np
import pytest
import safetensors.numpy

from dina import checkpoint
from dina.audio import config as audio_config, encoder, flow, mel_decoder, tokenizer as audio_tokenizer
from dina.config import InputError
from dina.convert import audio, hf_audio, hf_visual, settings, visual
from dina.quantize import rvq
from dina.vision import config as vision_config, pixel_decoder, preprocess, tokenizer
from tests import golden_io
from tools import convert
from tools.parity import audio_decoder, audio_flow, load, refiner_pipeline
from tools.parity.case import Case

PIXELS = ("patch_size", "temporal_patch_size", "spatial_merge_size")


def imported(folder, weights, visual_config, parts, file="model.safetensors", **files):
    """The finished stage of a release with these tensors; `files`: name -> content of further JSON files, or of config.json."""
    path = folder / "in" / file
    path.parent.mkdir(parents=True)
    safetensors.numpy.save_file(weights, path)
    for name, content in ({"config": {"visual_config": visual_config}} | files).items():
        (folder / "in" / f"{name}.json").write_text(json.dumps(content))
    convert.main(["import", "--checkpoint", str(folder / "in"), "--workdir", str(folder), "--parts", parts])
    return folder / convert.STAGE


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """(config of the experiment, variables) of the visual tokenizer of cases 04 and 05."""
    tower, vit, _ = golden_io.read_case("04_visual_encoder")
    vq, books, _ = golden_io.read_case("05_bridge_rvq")
    weights = {visual.TOKENIZER + name: array for name, array in (vit | books).items() if not name.startswith("visual_emb_bridge.")}
    for level in range(vq["depth"]):  # the case leaves out what only training reads
        book = visual.TOKENIZER + visual.BOOKS.format(level=level)
        weights |= {f"{book}.embed_ema": 2 * weights[f"{book}.embed"][:-1], f"{book}.cluster_size_ema": np.full(vq["codebook_size"], 2, np.float32)}
    names = ("depth", "hidden_size", "intermediate_size", "num_heads", "window_size", "fullatt_block_indexes", "out_hidden_size", *PIXELS)
    c = {name: tower[name] for name in names} | {"vq_config": {name: vq[name] for name in vq if not name.startswith("_")}}
    processor = {"min_pixels": tower["min_pixels"], "size": {"longest_edge": tower["max_pixels"]}, "image_mean": tower["image_mean"]}
    folder = imported(tmp_path_factory.mktemp("tokenizer"), weights, c, "vision_encoder,vision_quantizer", preprocessor_config=processor)
    config = ml_collections.ConfigDict({"vision": vision_config.default_config()})
    settings.apply_vision(config, folder)
    return config, checkpoint.result(folder)


def test_codes_of_case_05_are_the_references(encoded):
    config, variables = encoded
    _, _, data = golden_io.read_case("05_bridge_rvq")
    model = tokenizer.make_tokenizer(config.vision)
    x_ND = jax.jit(model.project)(variables["params"], data["features"])
    np.testing.assert_array_equal(rvq.encode(model.rvq, variables["stats"][tokenizer.PART], x_ND), data["codes"])
    assert golden_io.relative_error(x_ND, data["quant_conv_out"]) < 1e-5
    sums = model.sums(variables["stats"], data["codes"])
    assert golden_io.relative_error(sums, data["decoded_features"]) < 1e-5


def test_pictures_of_case_04_get_the_codes_of_the_references_features(encoded):
    config, variables = encoded
    _, _, data = golden_io.read_case("04_visual_encoder")
    vision = config.vision
    assert (vision.min_pixels, vision.max_pixels, vision.encoder.pixels) == (3136, 31360, "bfloat16")
    bounds = vision.min_pixels, vision.max_pixels
    images = [preprocess.resize_image(data[f"image{i}_uint8"], preprocess.CELL, *bounds) for i in (0, 1)]
    pack = preprocess.pack_images(images, 24, 4, vision.encoder.window_cells)
    batch = {name: array[None] for name, array in pack.items()}
    codes_NL = np.asarray(tokenizer.tokenize(vision, variables, batch))[0]
    model = tokenizer.make_tokenizer(vision)
    x_ND = jax.jit(model.project)(variables["params"], data["bridge_out"])
    wanted_NL = rvq.encode(model.rvq, variables["stats"][tokenizer.PART], x_ND)
    np.testing.assert_array_equal(codes_NL[: len(wanted_NL)], wanted_NL)
    assert (codes_NL[len(wanted_NL) :] == -1).all()


def test_pixels_of_case_07a_are_the_references(tmp_path):
    c, weights, data = golden_io.read_case("07a_pixel_decoder")
    folder = imported(tmp_path, weights, {"visual_decoder_config": {"image_decoder_config": c}}, "pixel_decoder", "image_decoder/image_decoder.safetensors")
    vision = hf_visual.as_config(checkpoint.finished(folder)["vision"])
    layout = preprocess.pack_layout([(2, 3)], 6, 1, 1)
    batch = {name: layout[name][None] for name in ("segment", "row", "col", "grid")}
    params = checkpoint.result(folder)["params"]["pixel_decoder"]
    patches_BPV = jax.jit(pixel_decoder.make_pixel_decoder(vision).apply)({"params": params}, data["quant_features"][None], batch)
    pixels = preprocess.patches_to_pixels(np.asarray(patches_BPV[0]), (2, 3)).transpose(2, 0, 1)
    assert golden_io.relative_error(pixels, data["gpu_image0_double_scale"]) < 1e-5


def test_weights_and_modules_of_case_07c_are_those_that_parity_runs(tmp_path):
    case = Case(golden_io.GOLDEN / "07c_refiner_pipeline")
    c, pipeline = case.config, refiner_pipeline.Pipeline(case)
    config = {"visual_decoder_config": {"transformer_config": c["tr"], "vae_config": c["vae"]}}
    weights = {name: case.weight(name) for name in case.weight_names}
    folder = imported(tmp_path, weights, config, "refiner", "image_decoder/image_decoder.safetensors")
    assert hf_visual.refiner_modules(checkpoint.finished(folder)["vision"]) == (pipeline.auto, pipeline.flow)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.result(folder)["params"]["refiner"], jax.device_get(pipeline.params))


def test_a_detokenizer_of_other_code_vectors_is_named(tmp_path):
    c, weights, _ = golden_io.read_case("07a_pixel_decoder")
    tower = {"vq_config": {"depth": 1, "codebook_size": 4, "codebook_dim": 24, "shared_codebook": False}}
    with pytest.raises(InputError, match="post_quant_conv.weight takes code vectors of 20, other parts have 24"):
        imported(tmp_path, weights, tower | {"visual_decoder_config": {"image_decoder_config": c}}, "vision_quantizer,pixel_decoder",
                 "image_decoder/image_decoder.safetensors")  # fmt: skip


def heard(folder, case, parts, config):
    """The finished stage of an audio case's weights, with the position tables that the case leaves out."""
    _, weights, _ = golden_io.read_case(case)
    weights = {f"model.{'' if tensor.startswith('audio_tokenizer.') else 'audio_tokenizer.'}{tensor}": array for tensor, array in weights.items()}
    found = hf_audio.of_config(config, parts.split(","))
    for part, name in (("audio_encoder", "audio_model"), ("audio_decoder", "audio_decoder"), ("flow", "audio_flow_matching_decoder.prenet")):
        if part in parts:
            wide = found["flow"]["prenet"]["width"] if part == "flow" else config["audio_config"]["d_model"]
            weights[f"{audio.TOKENIZER}{name}.positional_embedding"] = encoder.sinusoid(found["positions"][part], wide)
    for level, size in enumerate(found["quantizer"]["sizes"] if "audio_quantizer" in parts else ()):  # what only training reads
        book = f"{audio.TOKENIZER}{audio.BRIDGE}.vq_list.{level}.codebook"
        weights |= {f"{book}.embed_avg": 2 * weights[f"{book}.embed"], f"{book}.cluster_size": np.full(size, 2, np.float32)}
    return imported(folder, weights, {}, parts, config=config)


def test_codes_of_case_08b_are_the_references(tmp_path):
    c, _, data = golden_io.read_case("08b_audio_tokenizer")
    section = {"audio_config": c | {"vq_config": {"codebook_sizes": c["codebook_sizes"]}}}
    folder = heard(tmp_path, "08b_audio_tokenizer", "audio_encoder,audio_quantizer", section)
    config = ml_collections.ConfigDict({"audio": audio_config.default_config()})
    settings.apply_audio(config, folder)
    found = checkpoint.result(folder)
    params, stats = found["params"], found["stats"]["audio_quantizer"]
    assert config.audio.quantizer.residual == "activation" and config.audio.features.max_frames == 200

    @jax.jit
    def encode(mel_BTM, frames_B):
        z_BUZ = encoder.make_encoder(config.audio).apply({"params": params["audio_encoder"]}, mel_BTM, frames_B)
        return audio_tokenizer.search(config.audio, stats, z_BUZ)

    codes_BUL = np.asarray(encode(data["mel"].swapaxes(1, 2), data["frames"].astype(np.int32)))
    packed_NL = np.concatenate([codes_UL[:n] for codes_UL, n in zip(codes_BUL, data["bridge_length"], strict=True)])
    np.testing.assert_array_equal(packed_NL, data["codes_packed"])
    back_BNL = data["codes_packed"][None].astype(np.int32)
    x_BND = audio_tokenizer.decoder_input(config.audio, params["audio_quantizer"], stats, back_BNL)
    assert golden_io.relative_error(x_BND[0], data["decode_emb"]) < 1e-5


def test_weights_and_modules_of_cases_08c_and_08d_are_those_that_parity_runs(tmp_path):
    case = Case(golden_io.GOLDEN / "08c_audio_decoder")
    folder = heard(tmp_path / "c", case.name, "audio_decoder", {"audio_config": case.config["audio"] | {"vocoder_config": case.config["vocoder"]}})
    model = audio_decoder.module(case.config, "padded")
    params = load.variables(case, (audio.decoder(model, ""), *audio.decoder_sizes(model)))["params"]
    assert mel_decoder.make_decoder(hf_audio.as_config(checkpoint.finished(folder)["audio"])) == model
    jax.tree.map(np.testing.assert_array_equal, checkpoint.result(folder)["params"], jax.device_get(params))

    beside = case.config["audio"] | {"vocoder_config": case.config["vocoder"]}
    case = Case(golden_io.GOLDEN / "08d_flow_matching")
    c = case.config["flow"]
    folder = heard(tmp_path / "d", case.name, "flow", {"audio_config": beside, "flow_matching_config": c | {"cfm_params": c["cfm"]}})
    model = audio_flow.module(c)
    params = load.variables(case, (audio.flow(model, ""), *audio.flow_sizes(model, c["prenet_in_dim"])))["params"]
    found = hf_audio.as_config(checkpoint.finished(folder)["audio"])
    assert flow.make_flow(found) == model and (found.flow.steps, found.flow.guidance, found.flow.grid) == (4, 0.7, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.result(folder)["params"], jax.device_get(params))
