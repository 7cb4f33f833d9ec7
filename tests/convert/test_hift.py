"""The released vocoder in and out: folded weights, the same tensors back, settings from shapes, and what does not fit is named."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from dina import checkpoint
from dina.audio.config import default_config
from dina.config import InputError
from dina.convert import hift, settings
from tests.golden_io import GOLDEN
from tools import convert

CASE = GOLDEN / "08e_vocoder" / "weights.safetensors"


@pytest.fixture(scope="module")
def tensors():
    return hift.read_file(CASE)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    assert convert.main(["hift", str(CASE), str(folder)]) == 0
    return folder / "hift"


def test_a_weight_has_its_length_and_direction():
    rng = np.random.default_rng(0)
    v, g = rng.normal(size=(5, 3, 4)).astype(np.float32), rng.uniform(0.5, 2, (5, 1, 1)).astype(np.float32)
    weight = hift.fold(g, v)
    np.testing.assert_allclose(np.linalg.norm(weight.reshape(5, -1), axis=1), g[:, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(weight, g * v / np.linalg.norm(v.reshape(5, -1), axis=1)[:, None, None], rtol=1e-6)
    for _ in range(20):  # bit by bit, though the length is rounded
        weight = rng.normal(size=(7, 3, 2)).astype(np.float32)
        np.testing.assert_array_equal(hift.fold(*hift.unfold(weight)), weight)


def test_export_of_an_import_is_the_same_vocoder_under_the_same_names(tensors, imported, tmp_path, capsys):
    assert convert.main(["hift", str(imported), str(tmp_path)]) == 0
    out = tmp_path / "hift.pt"
    assert f"{len(tensors)} tensors in {out}" in capsys.readouterr().out
    again = hift.read_file(out)
    assert {name: x.shape for name, x in again.items()} == {name: x.shape for name, x in tensors.items()} and len(again) == 328
    whole = [hift.folding(found.__getitem__, found) for found in (tensors, again)]
    for stem in {name.rpartition(".")[0] for name in tensors}:
        kind = "alpha" if f"{stem}.alpha" in tensors else "weight"
        np.testing.assert_array_equal(*(read(f"{stem}.{kind}") for read in whole))
    assert convert.main(["hift", str(out), str(tmp_path)]) == 0
    params = [checkpoint.result(folder)["params"] for folder in (imported, tmp_path / "hift")]
    jax.tree.map(np.testing.assert_array_equal, *params)
    with pytest.raises(InputError, match="hift.pt exists"):
        convert.main(["hift", str(imported), str(tmp_path)])


def test_the_newer_names_are_read_alike(tensors, imported, tmp_path):
    renamed = {name.replace("weight_g", "parametrizations.weight.original0").replace("weight_v", "parametrizations.weight.original1"): x
               for name, x in tensors.items()}  # fmt: skip
    safetensors.numpy.save_file(renamed, tmp_path / "other.safetensors")
    hift.import_file(tmp_path / "other.safetensors", tmp_path / "other")
    params = [checkpoint.result(folder)["params"] for folder in (imported, tmp_path / "other")]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_an_experiment_takes_over_settings_and_is_refused_with_others(imported):
    config = ConfigDict({"audio": default_config()})
    hift.apply(config, imported)
    v = config.audio.vocoder
    assert (v.name, v.channels, v.f0_channels, v.rates, v.kernels, v.source_kernels) == ("hift", 16, 10, (8, 5, 3), (3, 7, 11), (7, 7, 11))
    assert config.audio.target.mean == 0 and config.imports.hift == checkpoint.finished(imported)["identity"]
    found = settings.load(config, imported, ["vocoder"])
    assert found["params"]["vocoder"]["filter"]["pre"]["kernel"].shape == (7, 80, 16)
    record = checkpoint.finished(imported)["vocoder"]
    assert hift.differs(record, config.audio) == ""
    v.dilations = (1, 2, 4)
    assert "audio.vocoder.dilations is (1, 2, 4), the imported weights have (1, 3, 5)" in hift.differs(record, config.audio)
    with pytest.raises(InputError, match="record lacks audio"):  # another part of an import that has none
        settings.check(checkpoint.finished(imported), config, ["audio_encoder"], "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_pre.weight_g"), "tensor conv_pre.weight is missing"),
        (lambda t: t.update({"decoder.weight": np.ones((2, 2), np.float32)}), "decoder.weight is no part of a vocoder"),
        (lambda t: t.update({"ups.1.bias": np.ones(5, np.float32)}), r"filter/up1/bias: shape \(5,\) in the checkpoint, \(4,\)"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("ups.")], "is this hift.pt"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(tensors, tmp_path, change, message):
    changed = dict(tensors)
    change(changed)
    safetensors.numpy.save_file(changed, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=message):
        convert.main(["hift", str(tmp_path / "bad.safetensors"), str(tmp_path)])
    assert not (tmp_path / "hift").exists()


def test_files_that_are_none_are_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    for name, message in (("a.safetensors", "truncated"), ("b.safetensors", "no such weight file"), ("c.pt", "no such weight file")):
        with pytest.raises(InputError, match=message):
            hift.import_file(tmp_path / name, tmp_path / "hift")
