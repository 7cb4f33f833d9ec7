"""tools.parity: every golden case passes, and nothing wrong or forgotten does."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from dina.config import InputError
from tests.golden_io import GOLDEN
from tools.parity import __main__ as parity
from tools.parity.case import Case

CASES = ("01_longcat_flash_lm", "02_ngram_embedding", "03_text_multimodal_path", "06_depth_head", "09_sampling", "04_visual_encoder",
         "05_bridge_rvq", "07a_pixel_decoder", "07b_refiner", "07c_refiner_pipeline", "08a_audio_mel", "08b_audio_tokenizer", "08c_audio_decoder", "08d_flow_matching",
         "08e_vocoder", "08c_wide_kernel", "08d_two_levels")  # fmt: skip
NAMED = {"01_longcat_flash_lm": {"incremental_logits", "greedy_ids", "padded_logits_valid_last_row"},
         "02_ngram_embedding": {"embeds", "serving_embeds", "ngram_row_ids"}, "03_text_multimodal_path": {"mm_embeds", "mm_logits"},
         "06_depth_head": {"tf_logits_level7", "greedy_audio_codes", "cfg3_codes"}, "09_sampling": {"kept_probs_vocab_order", "cfg_guided_bf16"},
         "04_visual_encoder": {"pixel_values", "window_index", "official_block3_out_windowed", "bridge_out", "fp32_bridge_out"},
         "05_bridge_rvq": {"codes", "argmin_margin", "commit_loss", "visual_emb_out"},
         "07a_pixel_decoder": {"cpu_layer1_out", "image0_pixels_single_scale", "gpu_image0_double_scale", "gpu_image0_uint8"},
         "07b_refiner": {"joint_before_norm_out", "rope_imag", "velocity_cfg1p5_1p5", "sample_4steps"},
         "07c_refiner_pipeline": {"ref_latents", "velocities", "images_pt"},
         "08a_audio_mel": {"mel_filters", "mel", "long_mel_last40", "long_split_lens", "len_bridge", "resampled_mono16k"},
         "08b_audio_tokenizer": {"layer1_out_packed", "bridge_prequant", "codes_packed", "quant_margin", "decode_emb"},
         "08c_audio_decoder": {"dconv1_out", "hidden_before_dconv2", "refined_mel", "mel_length", "single_refined_mel"},
         "08d_flow_matching": {"prenet_out", "estimator_x", "estimator_v", "flow_matching_mel", "long_v"},
         "08e_vocoder": {"f0", "source", "waveform"},
         "08c_wide_kernel": {"dconv1_out", "refined_mel", "single_coarse_mel"}, "08d_two_levels": {"estimator_v", "out_lengths", "long_v"}}  # fmt: skip
CLOSE = 1e-5  # ten times tighter than what the tool allows
# Towards t = 1 the refiner's sinusoids have angles of 750, whose last bit in float32 is 6e-5; the vocoder's phases are sums over
# all samples before.
WIDER = {"07c_refiner_pipeline": 3e-5, "08e_vocoder": 3e-5}


@pytest.mark.parametrize("name", CASES)
def test_golden_case_passes(name):
    lines = parity.run(GOLDEN / name).lines
    assert lines and [line for line in lines if not line.passed] == []
    assert max(line.relative_error for line in lines) < WIDER.get(name, CLOSE)
    assert NAMED[name] <= {line.tensor for line in lines}


@pytest.fixture
def copy(tmp_path):
    """A copy of the depth head's case, and how to change it."""
    folder = tmp_path / "06_copy"
    shutil.copytree(GOLDEN / "06_depth_head", folder)

    def change(arrays=None, weights=None):
        if arrays:
            np.savez(folder / "data.npz", **(dict(np.load(folder / "data.npz")) | arrays))
        if weights:
            path = folder / "weights.safetensors"
            safetensors.numpy.save_file(safetensors.numpy.load_file(path) | weights, path)
        return folder

    return change


def failed(folder):
    return {line.tensor: line for line in parity.run(folder).lines if not line.passed}


def test_a_changed_weight_fails(copy):
    name = "visual_head.transformer_layers.1.linear2.weight"
    weight = safetensors.numpy.load_file(GOLDEN / "06_depth_head" / "weights.safetensors")[name]
    found = failed(copy(weights={name: weight * np.float16(1.01)}))
    assert "layer1_out" in found and "layer0_out" not in found


def test_what_nobody_compares_or_reads_fails(copy, capsys, tmp_path):
    folder = copy({"mystery": np.ones(3)}, {"visual_head.mystery": np.ones(3, np.float32)})
    assert failed(folder)["mystery"].note == "not compared"
    assert failed(folder)["visual_head.mystery"].note == "weight not used"
    assert parity.main([str(folder), "--json", str(tmp_path / "out.json")]) == 1
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {row["tensor"] for row in rows if not row["passed"]} == {"mystery", "visual_head.mystery"}
    assert "linear1.bias left out: stored in the release, unused by its model" in capsys.readouterr().out


def test_bad_cases_are_named(copy, tmp_path):
    folder = copy()
    (folder / "data.npz").write_bytes((folder / "data.npz").read_bytes()[:-200])
    with pytest.raises(InputError, match="06_copy/data.npz cannot be read"):
        parity.run(folder)
    with pytest.raises(InputError, match="nowhere/config.json does not exist"):
        parity.run(pathlib.Path(tmp_path / "nowhere"))


def test_ids_may_differ_within_the_margin_only(copy):
    case = Case(copy({"ids": np.array([[1, 2, 3, 4]]), "other": np.array([[1, 2, 3, 4]])}))
    ours = np.array([[1, 5, 7, 4]])
    margin = np.array([[1.0, 0.01, 1.0, 1.0]])
    case.compare_ids("ids", ours, margin, error=0.002, along=1)  # the second is a toss-up and the third follows from it
    case.compare_ids("other", ours, margin, error=0.002)
    assert [line.passed for line in case.lines] == [True, False]
    assert case.lines[0].note == "2 within the margin" and case.lines[1].relative_error == 0.25


def test_an_expert_chosen_between_ties_excuses_what_follows_from_it_only(tmp_path):
    folder = tmp_path / "01_copy"
    shutil.copytree(GOLDEN / "01_longcat_flash_lm", folder)
    arrays = {name: array for name, array in np.load(folder / "data.npz").items() if not name.startswith(("greedy", "padded", "incremental"))}
    rows, length = arrays["input_ids"].shape
    token = (rows - 1) * length + length - 3  # of the last row; its choice in layer 0 goes to another expert
    ids = arrays["layer0_router_topk_ids"]
    ids[token, 0] = next(e for e in range(arrays["layer0_router_scores"].shape[1]) if e not in ids[token])
    for name, array in arrays.items():  # what such a choice changes: this token in layer 0, then everything from it on
        flat = array.reshape(rows * length, -1) if array.size % (rows * length) == 0 else None
        if name in ("layer0_router_dense_weights", "layer0_router_topk_weights", "layer0_moe_out", "layer0_out"):
            flat[token] += 1
        elif name in ("final_norm", "logits") or (name.startswith("layer1") and not name.endswith(("ids", "margin"))):
            flat[token:] += 1

    def wrong():
        np.savez(folder / "data.npz", **arrays)
        return failed(folder).keys()

    assert {"layer0_router_topk_ids", "layer0_out", "layer1_attn0_out", "layer1_out", "logits"} <= wrong()
    arrays["layer0_router_margin"][token] = 0
    assert not wrong()
    arrays["layer1_attn0_out"].reshape(rows * length, -1)[token - 1] += 1
    assert wrong() == {"layer1_attn0_out"}


def test_shapes_and_non_finite_values_fail(copy):
    case = Case(copy())
    golden = case.golden("headnorm_out")
    case.compare("headnorm_out", golden[:-1])
    case.compare("headnorm_out", np.where(golden == golden.max(), np.nan, golden))
    case.compare("headnorm_out", golden, golden * (1 + 1e-3))  # the worse of two forms counts
    assert [line.passed for line in case.lines] == [False] * 3
