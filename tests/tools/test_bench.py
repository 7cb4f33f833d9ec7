"""tools.bench: ours and the peer compute the same before anything is timed, and a result has the promised keys."""

import functools
import json
import subprocess

import numpy as np
import pytest

from dina.config import InputError
from tests.backbone.test_transformers import REASON
from tools.bench import __main__ as bench
from tools.bench import harness, lm, peak, rvq, small

needs_peer = pytest.mark.skipif(REASON is not None, reason=f"no peer: {REASON}")


@needs_peer
def test_small_workloads_agree_with_the_peer_and_report_all_keys(monkeypatch, tmp_path):
    makes = [lambda: small.ngram(length=64, width=60, vocab=97), lambda: small.depth_head(batch=3, classes=20, width=128, trunk=24, layers=2)]
    monkeypatch.setitem(bench.BENCHES, "tiny", (makes, "rows/s", "rate", 2))
    assert bench.main(["tiny", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert {"name", "ours", "peer", "ratio", "floor", "peer_version", "unit", "samples", "machine"} <= set(found)
    assert len(found["ratio"]) == 2
    for case, ratio in found["ratio"].items():
        assert ratio == pytest.approx(found["ours"][case] / found["peer"][case])
        assert len(found["samples"][case]["ours"]) == 2
    assert found["peer_version"].startswith("torch ")


@needs_peer
def test_results_that_differ_are_not_timed():
    work = small.ngram(length=32, width=60, vocab=97)
    broken = {name: x if name != "word" else x + 1 for name, x in work.tensors.items()}
    with pytest.raises(AssertionError):
        harness.compare(harness.dataclasses.replace(work, tensors=broken), rounds=1)


def test_arithmetic_of_a_forward_pass_is_counted_by_hand():
    c = lm.CONFIG
    cfg = lm.hf.backbone(c)
    d, h = c["hidden_size"], c["num_attention_heads"]
    attention = d * 192 + 192 * h * 96 + d * 160 + 128 * h * 128 + h * 64 * d + 10 * h * (96 + 64)
    layer = 2 * attention + 6 * d * 1024 + d * 48 + 4 * 32 / 48 * 3 * d * 256
    assert lm.flops(cfg, 3, 20) == pytest.approx(2 * 3 * 20 * (8 * layer + d * 8192))


def test_an_unknown_benchmark_and_a_missing_peer_are_named(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="benchmark 'lm_foreward' does not exist; did you mean 'lm_forward'"):
        bench.main(["lm_foreward"])
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="run `make peers`"):
        harness.peer_python()


def test_random_weights_are_the_same_on_both_sides():
    c = lm.CONFIG | {"num_layers": 2, "hidden_size": 64, "vocab_size": 50, "n_routed_experts": 3}
    released, variables, cfg = lm.random_weights(c)
    np.testing.assert_array_equal(released["lm_head.weight"].T, variables["params"]["lm_head"]["kernel"])
    up = variables["params"]["backbone"]["layers"]["experts"]["up"]
    assert up.shape == (2, 3, 64, 256) and cfg.layers == 2
    np.testing.assert_array_equal(released["model.layers.1.mlp.experts.2.up_proj.weight"].T, up[1, 2])


def _library_missing():
    python = harness.peer_python()
    return subprocess.run([python, "-c", "import vector_quantize_pytorch"], capture_output=True).returncode


@needs_peer
@pytest.mark.parametrize("peer", rvq.PEERS)
def test_quantizer_workloads_agree_with_the_peers_and_report_memory(peer, monkeypatch, tmp_path):
    if peer == "library" and _library_missing():
        pytest.skip("no vector-quantize-pytorch: run `make peers`")
    small = {"tokens": 150, "levels": 3, "codes": 1100}
    makes = [functools.partial(rvq.encode, 12, peer, **small), functools.partial(rvq.train_step, 16, peer, **small)]
    monkeypatch.setitem(bench.BENCHES, "tiny", (makes, "s", "time", 1))
    assert bench.main(["tiny", "--json", str(tmp_path / "all.json")]) == 0
    assert bench.main(["tiny", "--case", "1", "--json", str(tmp_path / "one.json")]) == 0
    found, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("all", "one"))
    assert isinstance(one["ratio"], float) and len(found["ratio"]) == 2
    assert one["memory"]["ratio"] == pytest.approx(one["memory"]["ours"] / one["memory"]["peer"])


def test_a_quantizer_s_wrong_code_is_no_tie():
    cfg, stats, x, _ = rvq._random(4, tokens=20, levels=2, codes=30)
    codes = np.asarray(rvq.rvq.encode(cfg, stats, x))
    rvq._same_codes(np.asarray(x), stats, codes, codes)
    wrong = codes.copy()
    wrong[3, 1] = (wrong[3, 1] + 1) % 30
    with pytest.raises(AssertionError, match="vector 3, level 1"):
        rvq._same_codes(np.asarray(x), stats, codes, wrong)


@pytest.mark.skipif(not peak.CLEAR.exists(), reason="no /proc")
def test_a_peak_is_what_is_held_at_once_over_what_was_held_before():
    held = np.ones(2**21)  # 16 MiB, not counted
    result, found = peak.above(lambda: sum(np.ones(2**22).sum() for _ in range(3)))  # 32 MiB at a time
    assert result == 3 * 2**22 and held.sum() == 2**21
    assert 31 * 2**20 < found < 48 * 2**20
