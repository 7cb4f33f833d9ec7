"""What a record says, from compiled text and sizes that are given; real compiles need libtpu (marker `aot`)."""

import importlib.util
import pathlib
import re

import pytest

from dina.backbone.config import AttentionConfig
from dina.config import InputError
from tools.aot import kernels, measure, plan, predict, report, topology
from tools.aot.count import Collective, Counts

ROOT = pathlib.Path(__file__).parents[3]
SPEC = f"{ROOT / 'experiments' / 'longcat_next.py'}:0.3b,stage=pretrain"
GIB = 2**30
KEYS = {"fits", "hbm_peak_gib", "hbm_spare_fraction", "hbm_by_kind", "flops_ratio", "collective_bytes", "params_by_family", "tokens_per_chip", "chips",
        "devices", "predicted_step_s", "predicted_mfu", "compile_s"}
HELD = {"parameters": GIB, "optimizer": 2 * GIB, "ngram": GIB, "statistics": 0, "batch": 0}
TEXT = """ENTRY %main (a: bf16[64,32]) -> f32[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} constant({...})
  ROOT %y = f32[64,16]{1,0} convolution(%a, %w), dim_labels=bf_io->bf, metadata={op_name="jit(step)/jvp(Backbone)/layers/ffn_0/dot_general"}
}
"""


def record(**changes):
    sizes = {"argument": 4 * GIB, "output": 4 * GIB, "alias": 4 * GIB, "temp": 3 * GIB, "generated_code": GIB // 4, "peak": 6 * GIB}
    return {"held": HELD, "params_by_family": {"trunk": 1, "all": 1}, "compile_s": 1.0, "lower_s": 1.0, "host_peak_gib": 1.0} | sizes | changes


@pytest.fixture(scope="module")
def pod():
    return plan.make(SPEC, "v5e:2x4")


def test_a_record_has_the_keys_that_others_read(pod):
    found = measure.result(pod, record(), TEXT)
    assert KEYS <= set(found)
    assert found["fits"] and found["compiled"] and found["hbm_peak_gib"] == 6.25 and found["hbm_spare_fraction"] == pytest.approx(1 - 6.25 / 16)
    kinds = found["hbm_by_kind"]
    assert kinds["activations"] + kinds["temporaries"] == pytest.approx(3) and kinds["parameters"] == 1
    assert found["tokens_per_chip"] == 8192 * 8192 / 8 and found["micro_batch_rows"] == 1
    assert found["flops"]["compiler"] == {"dense": 2 * 64 * 32 * 16}
    assert "FITS" in report.page(found) and "predicted MFU" in report.page(found)
    assert report.comparison([found]).count("\n") == 2


def test_a_state_alone_is_no_claim_that_the_step_fits(pod):
    found = measure.result(pod, {"held": HELD, "params_by_family": {"all": 1}}, "")
    assert found["fits"] and not found["compiled"] and "STATE FITS, not compiled" in report.page(found)


@pytest.mark.parametrize("changes,words", [
    ({"held": HELD | {"ngram": 30 * GIB}}, "rowwise"),
    ({"held": HELD | {"optimizer": 30 * GIB}}, "optimizer take most.*`data`"),
    ({"refusal": "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.50G of 15.75G hbm."}, "code_chunk"),
])
def test_what_does_not_fit_says_what_to_change(pod, changes, words):
    sizes = {key: value for key, value in record(**changes).items() if key not in ("temp", "peak", "argument", "output", "alias", "generated_code")}
    found = measure.result(pod, sizes, "")
    assert not found["fits"] and found["hbm_spare_fraction"] < 0
    assert re.search(words, found["advice"])
    assert "DOES NOT FIT" in report.page(found) and "no" in report.comparison([found])
    if "refusal" in changes:
        assert found["hbm_peak_gib"] == 40.5


def test_attention_kernels_count_the_blocks_that_they_run():
    cfg = AttentionConfig(heads=2, nope=128, rope=64, v=128, block=1024)
    pairs = 3 * 2 * 1024**2 * (1 + 2)  # of two blocks of queries the first sees one of keys, the second two
    forward = 2 * pairs * (192 + 128)
    calls = {"splash_mha_fwd_segmented": 5, "splash_mha_fwd_segmented again": 7, "splash_mha_dkv_segmented": 11, "gmm": 13}
    assert kernels.attention(cfg, 3, 2048, calls) == (5 * forward + 11 * 2 * forward, 7 * forward + 11 * 2 * pairs * 192)
    assert kernels.attention(cfg, 3, 2048, {}) == (0, 0)


def test_networks_take_their_own_time():
    pod = topology.parse("v5e:16x16*2")
    gather, exchange, cross = (Collective(kind, axes, n, 1e9, 3, "x") for kind, axes, n in
                               (("all-gather", "data", 32), ("all-to-all", "expert", 16), ("send", "dcn", 2)))
    one_link = 3e9 / (2 * pod.generation.link)
    assert predict.seconds(gather, pod) == pytest.approx(one_link)
    assert predict.seconds(exchange, pod) == pytest.approx(4 * one_link)  # four links on average
    assert [predict.longest_side(n, topology.parse("v5p:4x4x8")) for n in (4, 8, 16, 32, 128, 64)] == [4, 8, 4, 8, 8, 64]
    assert predict.seconds(cross, pod) == pytest.approx(3e9 / pod.generation.dcn)
    found = predict.terms(Counts({"dense": 1e12}, 1e12, [gather, exchange, cross], {}, 0), 0.0, 1e9, pod)
    assert found["arithmetic"] == pytest.approx(2e12 / 197e12)
    assert predict.step_seconds(found) == pytest.approx(max(found["arithmetic"], found["memory"]) + found["ici"] + found["dcn"])
    assert [row["network"] for row in predict.table(Counts({}, 0, [gather, exchange, cross], {}, 0), pod)] == ["DCN", "ICI", "ICI"]


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install 'dina\\[tpu\\]'"):
        measure.check_compiler()


needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install --target DIR --no-deps libtpu, PYTHONPATH=DIR")
@pytest.mark.aot
@needs_compiler
def test_two_slices_send_to_each_other():
    plan_ = plan.make(f"{SPEC},model.layers=1", "v6e:2x2*2", "replica=2,data=4")
    found = measure.measure(plan_)
    assert any(row["network"] == "DCN" and row["bytes"] > 0 for row in found["collective_bytes"])


@pytest.mark.aot
@needs_compiler
def test_state_that_cannot_fit_is_said_without_compiling():
    found = measure.measure(plan.make(SPEC.replace("0.3b,", ""), "v5e:2x4"))
    assert not found["fits"] and "compile_s" not in found and found["hbm_by_kind"]["ngram"] > 16

