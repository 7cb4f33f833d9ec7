"""The visual side through the command: in and out bit by bit, into stages, and what does not fit is named."""

import json
import shutil

import jax
import ml_collections
import numpy as np
import pytest
import safetensors.numpy

from dina import checkpoint, config as configs, sharding, stages, step as steps
from dina.config import InputError
from dina.convert import hf_visual, plan, settings, visual
from dina.convert.released import APART, INDEX, Released
from dina.vision import tokenizer
from tools import convert
from tools.bench import synthetic

BESIDE = next(iter(APART))
BOOKS = [visual.TOKENIZER + visual.BOOKS.format(level=level) for level in (0, 1)]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A whole release with its other folders."""
    folder = tmp_path_factory.mktemp("released")
    synthetic.write(folder, files="all")
    for name in ("vocoder/hift.pt", ".cache/lock", "vocoder/other.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture(scope="module")
def imported(released, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("work")
    convert.main(["import", "--checkpoint", str(released), "--workdir", str(workdir)])
    return workdir


def seeing(folder, target):
    """A copy that holds the visual tokenizer alone."""
    source = Released(folder)
    target.mkdir()
    names = [name for name in source.tensors if name.startswith((f"{visual.TOKENIZER}visual_model.", f"{visual.TOKENIZER}visual_bridge_model."))]
    safetensors.numpy.save_file({name: source.read(name) for name in names}, target / "model.safetensors")
    shutil.copyfile(folder / "config.json", target / "config.json")
    return target


def edit(folder, changes):
    """Rewrites tensors of the single file by name; None drops one."""
    path = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    for name, array in changes.items():
        arrays.pop(name, None)
        arrays |= {} if array is None else {name: array}
    safetensors.numpy.save_file(arrays, path)


PARTS = ["--parts", "vision_encoder,vision_quantizer"]


def test_export_of_an_import_is_equal_bit_by_bit(released, imported, tmp_path, capsys):
    out = tmp_path / "out"
    convert.main(["export", "--workdir", str(imported), "--out", str(out), "--shard-gb", "2e-4"])
    assert convert.main(["verify", "--checkpoint", str(released), "--against", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"all {len(synthetic.tensors(files='all'))} tensors are equal" in said and "WARNING" not in said
    in_file = lambda folder: {tensor.name for tensor in Released(folder).in_shard(BESIDE)}
    assert in_file(out) == in_file(released) and len(in_file(out)) == 260
    assert BESIDE not in (out / INDEX).read_text()
    assert (out / "vocoder" / "hift.pt").read_text() == "vocoder/hift.pt"
    assert not (out / ".cache").exists() and not (out / "vocoder" / "other.safetensors").exists()


def test_imported_parts_are_what_the_modules_run_on(released, imported):
    record, found = checkpoint.finished(imported / "released"), checkpoint.result(imported / "released")
    vision = hf_visual.as_config(record["vision"])
    params, stats = jax.eval_shape(lambda: tokenizer.init_quantizer(vision, jax.random.key(0)))
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shapes(found["params"][tokenizer.PART]) == shapes(params) and shapes(found["stats"][tokenizer.PART]) == shapes(stats)
    source = Released(released)
    embed = source.read(f"{BOOKS[1]}.embed")
    np.testing.assert_array_equal(found["stats"][tokenizer.PART]["codebook"]["0"], embed[:-1])
    np.testing.assert_array_equal(found["carried"][tokenizer.PART]["padding"]["0"], embed[-1:])
    np.testing.assert_array_equal(found["stats"][tokenizer.PART]["count"]["0"], source.read(f"{BOOKS[0]}.cluster_size_ema"))
    kernel = found["params"]["vision_encoder"]["vit"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(kernel.T, source.read(f"{visual.TOKENIZER}visual_model.patch_embed.proj.weight").reshape(16, -1))


def test_a_trained_codebook_is_written_to_every_level_above_its_padding(released, tmp_path):
    convert.main(["import", "--checkpoint", str(seeing(released, tmp_path / "in")), "--workdir", str(tmp_path), *PARTS])
    found = checkpoint.result(tmp_path / "released", {"params": [tokenizer.PART], "stats": [tokenizer.PART]})
    found["stats"][tokenizer.PART]["codebook"]["0"] = found["stats"][tokenizer.PART]["codebook"]["0"] + np.float32(1)
    checkpoint.finish(tmp_path / "V1", found, {"identity": "x"})
    convert.main(["export", "--workdir", str(tmp_path), "--stage", "V1", "--out", str(tmp_path / "out")])
    ours, theirs = Released(tmp_path / "out"), Released(tmp_path / "in")
    different = [name for name in theirs.tensors if ours.read(name).tobytes() != theirs.read(name).tobytes()]
    assert different == [f"{book}.embed" for book in BOOKS]
    old, new = theirs.read(f"{BOOKS[0]}.embed"), ours.read(f"{BOOKS[1]}.embed")
    np.testing.assert_array_equal(new, np.concatenate([old[:-1] + np.float32(1), old[-1:]]))


def test_of_copies_that_differ_the_last_is_kept_and_said(released, tmp_path, capsys):
    folder = seeing(released, tmp_path / "in")
    embed = Released(folder).read(f"{BOOKS[0]}.embed")
    edit(folder, {f"{BOOKS[0]}.embed": embed + np.float32(1)})
    convert.main(["import", "--checkpoint", str(folder), "--workdir", str(tmp_path), *PARTS])
    said = f"WARNING: 2 copies of one tensor are stored, and {BOOKS[0]}.embed differ from {BOOKS[1]}.embed"
    assert said in capsys.readouterr().out
    book = checkpoint.result(tmp_path / "released")["stats"][tokenizer.PART]["codebook"]["0"]
    np.testing.assert_array_equal(book, embed[:-1])
    convert.main(["export", "--workdir", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "WARNING: of the import" in capsys.readouterr().out
    np.testing.assert_array_equal(Released(tmp_path / "out").read(f"{BOOKS[0]}.embed"), embed)
    assert (tmp_path / "out" / "config.json").exists()  # the checkpoint lies in the workdir


def test_books_larger_than_a_block_are_copied_in_blocks(released, imported, tmp_path, monkeypatch):
    monkeypatch.setattr("dina.convert.stream.BLOCK_BYTES", 7 * 40)  # 7 rows of 10 values; 32 are no multiple
    convert.main(["import", "--checkpoint", str(seeing(released, tmp_path / "in")), "--workdir", str(tmp_path), *PARTS])
    small, large = (checkpoint.result(w / "released", {"stats": [tokenizer.PART]}) for w in (tmp_path, imported))
    jax.tree.map(np.testing.assert_array_equal, small, large)


@pytest.mark.parametrize("changes, message", [
    ({f"{BOOKS[1]}.embed": None}, f"missing {BOOKS[1]}.embed"),
    ({f"{BOOKS[1]}.embed": np.zeros((32, 10), np.float32)}, r"codebooks.1.embed in .* has shape \[32, 10\], config.json asks for \[33, 10\]"),
    ({f"{BOOKS[1]}.embed": np.zeros((33, 10), np.float16)}, "codebooks.1.embed in .* has dtype F16, it must be F32"),
])  # fmt: skip
def test_a_wrong_tensor_is_named(released, tmp_path, changes, message):
    folder = seeing(released, tmp_path / "in")
    edit(folder, changes)
    with pytest.raises(InputError, match=message):
        convert.main(["import", "--checkpoint", str(folder), "--workdir", str(tmp_path), *PARTS])
    assert not (tmp_path / "released").exists()


def test_files_of_the_detokenizers_that_do_not_fit_are_named(released, tmp_path):
    folder = shutil.copytree(released, tmp_path / "in")
    arrays = safetensors.numpy.load_file(folder / BESIDE)
    safetensors.numpy.save_file(arrays | {"image_decoder.mystery": np.zeros(3, np.float32)}, folder / BESIDE)
    with pytest.raises(InputError, match=f"unknown image_decoder.mystery in {BESIDE}"):
        plan.make(Released(folder))
    safetensors.numpy.save_file({name: array for name, array in arrays.items() if not name.startswith("image_refiner.vae.decoder.conv_in")}, folder / BESIDE)
    with pytest.raises(InputError, match="missing image_refiner.vae.decoder.conv_in.bias"):
        plan.make(Released(folder))
    safetensors.numpy.save_file(arrays | {"lm_head.weight": np.zeros(3, np.float32)}, folder / BESIDE)
    with pytest.raises(InputError, match=f"tensor lm_head.weight is in model-.* and in {BESIDE}"):
        Released(folder)
    (folder / BESIDE).write_bytes(b"12345678")
    with pytest.raises(InputError, match="image_decoder.safetensors is truncated"):
        Released(folder)


def test_other_names_of_the_refiner_are_kept(released, tmp_path):
    """`transformer_blocks` for its joint layers, and a placeholder where code vectors need no projection (tokenizers.md A.7)."""
    arrays = {name.replace("base_transformer.layers.", "base_transformer.transformer_blocks."): array
              for name, array in safetensors.numpy.load_file(released / BESIDE).items() if name.startswith("image_refiner.") and ".cond_proj." not in name}
    arrays["image_refiner.cond_proj._dummy"] = np.zeros((), np.float32)
    (tmp_path / "in" / BESIDE).parent.mkdir(parents=True)
    safetensors.numpy.save_file(arrays, tmp_path / "in" / BESIDE)
    shutil.copyfile(released / "config.json", tmp_path / "in" / "config.json")
    convert.main(["import", "--checkpoint", str(tmp_path / "in"), "--workdir", str(tmp_path), "--parts", "refiner"])
    convert.main(["export", "--workdir", str(tmp_path), "--out", str(tmp_path / "out")])
    assert convert.main(["verify", "--checkpoint", str(tmp_path / "in"), "--parts", "refiner", "--against", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / INDEX).exists()


def test_a_stage_starts_from_imported_parts(imported, tmp_path):
    config = configs.load("experiments/digits.py:smoke")
    with config.unlocked():
        settings.apply_vision(config, imported / "released")
        config.stages.V2.init_from = ml_collections.ConfigDict({part: "released" for part in hf_visual.PARTS[:3]})
    task = stages.make_task(config, "V2")
    like = steps.abstract_state(task, config.stages.V2, sharding.make_mesh({"data": 2}, jax.devices()[:2]))
    found = stages.initial_variables(config, "V2", task, imported, like)
    ours = checkpoint.result(imported / "released")
    np.testing.assert_array_equal(found["stats"][tokenizer.PART]["codebook"]["0"], ours["stats"][tokenizer.PART]["codebook"]["0"])
    head = found["params"]["pixel_decoder"]["head2"]["kernel"]
    assert head.dtype == np.float32
    np.testing.assert_array_equal(head, ours["params"]["pixel_decoder"]["head2"]["kernel"].astype(np.float32))
    with config.unlocked():
        config.vision.quantizer.codebook = "separate"
    with pytest.raises(InputError, match="released/vision_quantizer: config.vision.quantizer.codebook is 'separate', the imported weights have 'shared'"):
        stages.initial_variables(config, "V2", task, imported, like)
    with config.unlocked():
        config.vision.quantizer.codebook = "shared"
    held = settings.load(config, imported / "released", ["vision_quantizer", "audio_reader"])
    assert {kind: list(parts) for kind, parts in held.items()} == {"params": ["vision_quantizer"], "stats": ["vision_quantizer"]}
    np.testing.assert_array_equal(held["stats"]["vision_quantizer"]["codebook"]["0"], ours["stats"]["vision_quantizer"]["codebook"]["0"])
    with config.unlocked():
        config.imports.released = "another"
    with pytest.raises(InputError, match="holds a run of another config"):
        settings.load(config, imported / "released", ["vision_quantizer"])
    record = checkpoint.finished(imported / "released")
    with pytest.raises(InputError, match="here/refiner: it works in a latent space that no stage trains in"):
        settings.check(record, config, ["refiner"], "here")


def test_a_workdir_in_the_checkpoint_is_no_part_of_it(released, tmp_path):
    folder = seeing(released, tmp_path / "in")
    (folder / "w" / "other").mkdir(parents=True)
    (folder / "w" / "other" / "log").write_text("ours")
    convert.main(["import", "--checkpoint", str(folder), "--workdir", str(folder / "w"), "--parts", "vision_encoder"])
    assert checkpoint.finished(folder / "w" / "released")["files"] == ["config.json"]


def test_what_is_not_there_is_said(tmp_path):
    synthetic.write(tmp_path / "in")
    convert.main(["import", "--checkpoint", str(tmp_path / "in"), "--workdir", str(tmp_path), "--parts", "audio_encoder"])
    with pytest.raises(InputError, match="image_decoder.post_quant_conv.weight is missing"):
        plan.make(Released(tmp_path / "in"), ["pixel_decoder"])
    for folder in ("none", "released"):
        with pytest.raises(InputError, match="holds no imported visual part"):
            settings.apply_vision(ml_collections.ConfigDict(), tmp_path / folder)
    record = json.loads((tmp_path / "released" / "stage.json").read_text())
    del record["vision"]
    (tmp_path / "released" / "stage.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="lacks 'vision'; import the checkpoint again"):
        convert.main(["export", "--workdir", str(tmp_path), "--out", str(tmp_path / "out")])
