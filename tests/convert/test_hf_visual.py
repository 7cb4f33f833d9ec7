"""The visual side of a released config.json: what it says becomes settings, what we cannot compute is refused by name."""

import copy
import json

import pytest

from dina.config import InputError
from dina.convert import hf_visual
from dina.convert.released import Released, Tensor
from tools.bench import synthetic

TOLD = {name: Tensor(name, "", shape, dtype.name) for name, (shape, dtype) in synthetic.tensors(files="all").items()}


def changed(section, key, value):
    """The synthetic config with one value of a (dotted) section replaced, or left out where it is 'drop'."""
    c = copy.deepcopy(synthetic.VISUAL_CONFIG)
    at = c
    for name in filter(None, section.split(".")):
        at = at[name]
    at[key] = value
    if value == "drop":
        del at[key]
    return c


def test_settings_of_a_config():
    found = hf_visual.of_config(synthetic.VISUAL_CONFIG, TOLD)
    assert json.loads(json.dumps(found)) == found  # a stage's record holds them
    assert found["encoder"] == {"width": 16, "depth": 2, "heads": 2, "ff": 12, "window_cells": 2, "full_layers": [1], "pixels": "bfloat16"}
    assert found["quantizer"].items() >= {"sizes": [32, 32], "dim": 10, "codebook": "shared", "decay": 0.99, "metric": "euclidean"}.items()
    assert found["pixel_decoder"] == {"width": 16, "depth": 2, "heads": 2, "ff": 12, "eps": 1e-6, "positions": "raster", "attn_scale": "double",
                                      "norms": "sub", "ffn": "swiglu", "qkv_bias": "qv"}  # fmt: skip
    assert (found["refiner"]["ff"], found["refiner"]["references"], found["refiner"]["token_dim"], found["code_dim"]) == (20, 5, 8, 10)
    vision = hf_visual.as_config(found)
    assert vision.quantizer.sizes == (32, 32) and vision.encoder.remat == "block"
    assert [hf_visual.differs(found, vision, part) for part in hf_visual.PARTS] == [""] * 4
    vision.quantizer.decay, vision.encoder.remat = 0.5, "none"  # how it is trained, not what its weights mean
    assert [hf_visual.differs(found, vision, part) for part in hf_visual.PARTS] == [""] * 4
    vision.pixel_decoder.attn_scale, vision.quantizer.metric = "single", "cosine"
    assert hf_visual.differs(found, vision, "vision_quantizer") == "config.vision.quantizer.metric is 'cosine', the imported weights have 'euclidean'"
    assert hf_visual.differs(found, vision, "pixel_decoder") == "config.vision.pixel_decoder.attn_scale is 'single', the imported weights have 'double'"


def test_what_is_left_out_is_the_default_of_the_class_that_reads_it():
    c = changed("", "fullatt_block_indexes", "drop") | {"depth": 32, "num_heads": 1, "in_chans": 3}
    del c["hidden_act"], c["window_size"]
    made = hf_visual.tower(c, "visual_config")["encoder"]
    assert made["full_layers"] == [7, 15, 23, 31] and made["window_cells"] == 4


def test_sizes_of_levels_may_be_a_list():
    c = changed("vq_config", "codebook_sizes", [32, 16])
    del c["vq_config"]["codebook_size"]
    c["vq_config"]["shared_codebook"] = False
    assert hf_visual.of_config(c, TOLD, ["vision_quantizer"])["quantizer"]["sizes"] == [32, 16]
    c["vq_config"]["shared_codebook"] = True
    with pytest.raises(InputError, match="a shared codebook has one size"):
        hf_visual.of_config(c, TOLD, ["vision_quantizer"])


DECODER = "visual_decoder_config"


@pytest.mark.parametrize("section, key, value, message", [
    ("", "hidden_act", "gelu", "visual_config.hidden_act is 'gelu'; this code computes 'silu'"),
    ("", "vq_config", "drop", "visual_config has no section 'vq_config'"),
    ("vq_config", "quantizer_type", "fsq", "vq_config.quantizer_type is 'fsq'; this code computes 'rq'"),
    ("vq_config", "quant_conv", False, "vq_config.quant_conv is False; this code computes True"),
    ("vq_config", "shared_codebook", "drop", "vq_config.shared_codebook is None, not true or false"),
    ("vq_config", "in_channels", 21, "vq_config.in_channels is 21, but visual_config.out_hidden_size is 20"),
    ("vq_config", "codebook_size", [32], r"codebook_size \(or codebook_sizes\) must be a number, or one for each of 2 levels, not \[32\]"),
    ("vq_config", "codebook_dim", "drop", "vq_config.codebook_dim is missing"),
    ("vq_config", "codebook_dim", 12, "takes code vectors of 10, other parts have 12"),
    (f"{DECODER}.image_decoder_config", "layer_norm_eps", "drop", "image_decoder_config.layer_norm_eps is missing"),
    (f"{DECODER}.image_decoder_config", "patch_size", 16, "image_decoder_config.patch_size is 16"),
    (f"{DECODER}.transformer_config", "axes_dim_rope", [4, 4, 2], "axes_dim_rope is .* three parts of a head of 12 values"),
    (f"{DECODER}.transformer_config", "timestep_scale", "drop", "transformer_config.timestep_scale is missing"),
    (f"{DECODER}.vae_config", "scaling_factor", None, "vae_config.scaling_factor is missing"),
    (f"{DECODER}.vae_config", "block_out_channels", 4, "vae_config.block_out_channels is 4"),
    ("", DECODER, "drop", "has no section 'visual_decoder_config'"),
])  # fmt: skip
def test_a_key_that_is_missing_or_that_we_cannot_compute_is_named(section, key, value, message):
    with pytest.raises(InputError, match=message):
        hf_visual.of_config(changed(section, key, value), TOLD)


def test_a_size_that_only_a_tensor_tells_is_asked_for():
    with pytest.raises(InputError, match="image_index_embedding is missing, and with it a size"):
        hf_visual.of_config(synthetic.VISUAL_CONFIG, {name: tensor for name, tensor in TOLD.items() if name != hf_visual.INDEX})


def test_the_detokenizers_config_may_stand_with_the_serving_code(tmp_path):
    c = dict(synthetic.VISUAL_CONFIG)
    decoder = c.pop(DECODER)
    synthetic.write(tmp_path / "in", synthetic.SMALL, files="all")
    (tmp_path / "in" / "config.json").write_text(json.dumps(synthetic.SMALL | {"visual_config": c}))
    with pytest.raises(InputError, match="visual_config .or nmm_infer/config.json. has no section 'visual_decoder_config'"):
        hf_visual.settings(Released(tmp_path / "in"), hf_visual.PARTS)
    (tmp_path / "in" / "nmm_infer").mkdir()
    (tmp_path / "in" / hf_visual.SERVING).write_text(json.dumps({DECODER: decoder}))
    assert hf_visual.settings(Released(tmp_path / "in"), hf_visual.PARTS)["pixel_decoder"]["width"] == 16


def test_pixels_are_those_of_the_processor(tmp_path):
    synthetic.write(tmp_path / "in")
    read = lambda **keys: ((tmp_path / "in" / hf_visual.PROCESSOR).write_text(json.dumps(keys)), hf_visual.pixels(Released(tmp_path / "in")))[1]
    assert hf_visual.pixels(Released(tmp_path / "in")) == {}
    assert read(min_pixels=3136, size={"longest_edge": 9999}) == {"min_pixels": 3136, "max_pixels": 9999}
    with pytest.raises(InputError, match="image_std is .* this code computes"):
        read(image_std=[0.5, 0.5, 0.5])
    with pytest.raises(InputError, match="patch_size is 16"):
        read(patch_size=16)
    with pytest.raises(InputError, match="preprocessor_config.json.merge_size is 4; this code computes 2"):
        read(merge_size=4)
