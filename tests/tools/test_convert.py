"""tools.convert: a released checkpoint goes in and comes out bit by bit; what does not fit is named and leaves nothing behind."""

import collections
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from dina import checkpoint, config as configs, sharding, stages, step as steps
from dina import model as model_lib
from dina.config import InputError
from dina.convert import plan, settings, stream
from dina.convert.released import INDEX, Released
from dina.data import digits as digits_data, packing
from dina.text.released import ReleasedTokenizer
from experiments import digits
from tests.text import test_released
from tools.bench import synthetic
from tools import convert


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    synthetic.write(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def imported(released, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("work")
    assert convert.main(["import", "--checkpoint", str(released), "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture
def copy(released, tmp_path):
    return shutil.copytree(released, tmp_path / "copy")


def attempt(folder, tmp_path, *more):
    try:
        return convert.main(["import", "--checkpoint", str(folder), "--workdir", str(tmp_path / "w"), *more])
    finally:
        assert (tmp_path / "w" / "released").exists() == (tmp_path / "w" / "released" / "stage.json").exists()


def test_export_of_an_import_is_equal_bit_by_bit(released, imported, tmp_path, capsys):
    out = tmp_path / "out"
    convert.main(["export", "--workdir", str(imported), "--out", str(out), "--shard-gb", "2e-4"])
    assert len(Released(out).shards) > 3
    assert convert.main(["verify", "--checkpoint", str(released), "--against", str(out)]) == 0
    assert f"all {len(synthetic.tensors())} tensors are equal" in capsys.readouterr().out
    assert (out / "tokenizer.json").exists() and json.loads((out / "config.json").read_text()) == synthetic.SMALL


def test_imported_parts_are_what_the_model_runs_on(released, imported):
    record = checkpoint.finished(imported / "released")
    made = plan.make(Released(released))
    assert json.loads(json.dumps(made.config.to_dict())) == record["model"]
    model = model_lib.build(made.config, made.vocabulary)
    parts = {"params": list(model_lib.PARTS), "stats": ["backbone"]}
    found = checkpoint.result(imported / "released", parts)
    wanted = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0)))
    assert jax.tree.map(lambda a: a.shape, found) == jax.tree.map(lambda a: a.shape, wanted)
    kernel = found["params"]["lm_head"]["kernel"]
    assert kernel.dtype == ml_dtypes.bfloat16 and found["params"]["backbone"]["layers"]["experts"]["router"]["classifier"].dtype == np.float32
    source = Released(released)
    np.testing.assert_array_equal(kernel[:, : made.vocabulary.classes].T, source.read("lm_head.weight"))
    assert not kernel[:, made.vocabulary.classes :].any() and kernel.shape[1] > made.vocabulary.classes


def test_a_later_stage_is_exported_with_what_the_import_carries(released, imported, tmp_path):
    later = imported / "later"
    later.mkdir()
    parts = checkpoint.result(imported / "released", {"params": ["lm_head"], "stats": []})
    changed = jax.tree.map(lambda x: x.astype(np.float32) + 1, parts)
    checkpoint.finish(later, changed, {"identity": "x"})
    convert.main(["export", "--workdir", str(imported), "--stage", "later", "--out", str(tmp_path / "out")])
    ours, theirs = Released(tmp_path / "out"), Released(released)
    different = [n for n in theirs.tensors if not np.array_equal(ours.read(n).view(np.uint8), theirs.read(n).view(np.uint8))]
    assert different == ["lm_head.weight"]
    want = (theirs.read("lm_head.weight").astype(np.float32) + 1).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(ours.read("lm_head.weight"), want)


def test_parts_need_only_themselves(copy, tmp_path):
    index = json.loads((copy / INDEX).read_text())
    kept = {n: s for n, s in index["weight_map"].items() if "layers" in n and n.startswith("model.") or n == "model.norm.weight"}
    arrays = {n: Released(copy).read(n) for n in kept}
    for path in copy.glob("model*"):
        path.unlink()
    safetensors.numpy.save_file(arrays, copy / "model.safetensors")
    with pytest.raises(InputError, match="missing"):
        attempt(copy, tmp_path)
    assert attempt(copy, tmp_path, "--parts", "backbone") == 0
    found = checkpoint.result(tmp_path / "w" / "released")
    assert set(found["params"]) == {"backbone"} and set(found["stats"]) == {"backbone"}
    with pytest.raises(InputError, match="part of a released checkpoint 'backbones' does not exist"):
        convert.main(["import", "--checkpoint", str(copy), "--workdir", str(tmp_path / "v"), "--parts", "backbones"])


def test_what_no_model_uses_is_carried_alone(tmp_path):
    count = {"visual_model.num_batches_tracked": ((), np.dtype(np.int64))}  # of a type that copies have
    synthetic.write_tensors(tmp_path / "in", synthetic.tensors(files="all") | count)
    assert attempt(tmp_path / "in", tmp_path, "--parts", "vision_copy") == 0
    record = checkpoint.finished(tmp_path / "w" / "released")
    assert record["model"] is None and record["vision"] == {} and record["audio"] == {}
    convert.main(["export", "--workdir", str(tmp_path / "w"), "--out", str(tmp_path / "out")])
    ours, theirs = Released(tmp_path / "out"), Released(tmp_path / "in")
    assert set(ours.tensors) == set(synthetic.OTHERS) | set(count)
    assert all(ours.read(name).tobytes() == theirs.read(name).tobytes() for name in ours.tensors)


def edit(folder, name, change):
    """Rewrites one tensor of its shard; None drops it."""
    shard = json.loads((folder / INDEX).read_text())["weight_map"][name]
    arrays = safetensors.numpy.load_file(folder / shard)
    new = change(arrays.pop(name))
    safetensors.numpy.save_file(arrays | ({} if new is None else {name: new}), folder / shard)
    return shard


NORM = "model.layers.1.input_layernorm.0.weight"


@pytest.mark.parametrize("change, message", [
    (lambda x: None, "lacks tensor " + NORM),
    (lambda x: x[:-1], NORM + r" in .* has shape \[63\], config.json asks for \[64\]"),
    (lambda x: x.astype(np.float32), NORM + " in .* has dtype F32, others of .*input_norm_0/scale have BF16"),
    (lambda x: x.astype(np.int32), NORM + " in .* has dtype I32; known here: F64"),
])  # fmt: skip
def test_a_wrong_tensor_is_named(copy, tmp_path, change, message):
    edit(copy, NORM, change)
    with pytest.raises(InputError, match=message):
        attempt(copy, tmp_path)


def test_a_router_that_lost_its_precision_is_named(copy, tmp_path):
    for layer in (0, 1):
        edit(copy, f"model.layers.{layer}.mlp.router.classifier.weight", lambda x: x.astype(ml_dtypes.bfloat16))
    with pytest.raises(InputError, match="router.classifier.weight in .* has dtype BF16, it must be F32"):
        attempt(copy, tmp_path)


@pytest.mark.parametrize("kind, level", [("visual", 0), ("visual", 1), ("audio", 2)])
def test_codes_that_were_never_loaded_are_named(copy, tmp_path, kind, level):
    voc = plan.make(Released(copy)).vocabulary
    start = getattr(voc, f"{kind}_base")[level]
    stop = start + getattr(voc, kind)[level]
    edit(copy, plan.JOINT, lambda x: np.concatenate([x[:start], 0 * x[start:stop], x[stop:]]))
    with pytest.raises(InputError, match=f"of rows {start} to {stop - 1}, the codes of {kind} level {level}"):
        attempt(copy, tmp_path)


def test_unknown_and_unlisted_tensors_are_named(copy, tmp_path):
    index = json.loads((copy / INDEX).read_text())
    shard = edit(copy, NORM, lambda x: x)
    arrays = safetensors.numpy.load_file(copy / shard)
    safetensors.numpy.save_file(arrays | {"model.mtp.thing": np.zeros(3, np.float32)}, copy / shard)
    with pytest.raises(InputError, match="holds tensor model.mtp.thing, which"):
        attempt(copy, tmp_path)
    index["weight_map"]["model.mtp.thing"] = shard
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"unknown model.mtp.thing in {shard}"):
        attempt(copy, tmp_path)


def test_damaged_files_are_named(copy, tmp_path):
    shard = sorted(copy.glob("model-*"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=f"{shard.name} is truncated or no safetensors file"):
        attempt(copy, tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing, although"):
        attempt(copy, tmp_path)
    shard.write_bytes(whole)
    (copy / INDEX).write_text("{")
    with pytest.raises(InputError, match=f"{INDEX} is no JSON"):
        attempt(copy, tmp_path)
    (copy / INDEX).unlink()
    with pytest.raises(InputError, match=f"holds neither {INDEX} nor model.safetensors"):
        attempt(copy, tmp_path)


def test_a_missing_or_foreign_config_is_named(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())

    def refused(message, **changes):
        (copy / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "drop"}))
        with pytest.raises(InputError, match=message):
            attempt(copy, tmp_path)

    refused("rope_scaling is .*yarn.*; this code computes None", rope_scaling={"type": "yarn"})
    refused("norm_topk_prob is True; this code computes False", norm_topk_prob=True)
    refused("key 'emb_split_num' is missing", emb_split_num="drop")
    refused(r"key 'eos_token_id' is \[2\], not a number", eos_token_id=[2])
    refused("vocab_size is 300, but text, specials and codes need", vocab_size=300)
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match="config.json does not exist"):
        attempt(copy, tmp_path)


def test_nothing_is_overwritten(released, imported, tmp_path):
    with pytest.raises(InputError, match="already holds an import"):
        convert.main(["import", "--checkpoint", str(released), "--workdir", str(imported)])
    with pytest.raises(InputError, match="is not empty; choose another folder"):
        convert.main(["export", "--workdir", str(imported), "--out", str(released)])
    with pytest.raises(InputError, match="holds no import"):
        convert.main(["export", "--workdir", str(tmp_path / "none"), "--out", str(tmp_path / "out")])


def test_large_tensors_are_copied_in_blocks(released, imported, tmp_path, monkeypatch):
    monkeypatch.setattr("dina.convert.stream.BLOCK_BYTES", 4096)
    assert attempt(released, tmp_path, "--parts", ",".join(model_lib.PARTS)) == 0
    parts = {"params": list(model_lib.PARTS), "stats": ["backbone"]}
    small, large = (checkpoint.result(w / "released", parts) for w in (tmp_path / "w", imported))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), small, large))


def test_a_head_that_lost_a_layer_or_level_is_named(tmp_path):
    listed = synthetic.tensors(head=dataclasses.replace(synthetic.HEAD, layers=3))
    for lost, message in (("visual_head.transformer_layers.1.", "visual_head lacks number 1 of transformer_layers"),
                          ("visual_head.heads.0.", "visual_head lacks number 0 of heads")):  # fmt: skip
        folder = tmp_path / lost
        synthetic.write_tensors(folder, {name: what for name, what in listed.items() if not name.startswith(lost)})
        with pytest.raises(InputError, match=message):
            attempt(folder, tmp_path)


def test_other_names_that_copies_have_are_kept(tmp_path, capsys):
    old, new = "audio_head.hidden_proj.weight", "audio_head.hidden_in_proj.weight"
    listed = {new if name == old else name: what for name, what in synthetic.tensors().items()}
    synthetic.write_tensors(tmp_path / "in", listed)
    assert attempt(tmp_path / "in", tmp_path) == 0
    assert "holds no image_decoder folder: without pixel_decoder, refiner, vision_copy" in capsys.readouterr().out
    convert.main(["export", "--workdir", str(tmp_path / "w"), "--out", str(tmp_path / "out")])
    assert convert.main(["verify", "--checkpoint", str(tmp_path / "in"), "--against", str(tmp_path / "out")]) == 0


def test_an_interrupted_export_leaves_nothing_in_the_way(imported, released, tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "model-00009-of-00014.safetensors").write_bytes(b"stale")
    convert.main(["export", "--workdir", str(imported), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out.part").exists() and len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    assert convert.main(["verify", "--checkpoint", str(released), "--against", str(tmp_path / "out")]) == 0


def test_a_full_disk_is_said_and_leaves_nothing(released, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dina.convert.stream._regions", full)
    with pytest.raises(InputError, match="could not be written and was removed .*No space left"):
        attempt(released, tmp_path)
    assert not (tmp_path / "w" / "released").exists()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lies", [".", "inner/release"])
def test_a_checkpoint_where_the_import_would_be_written_survives(released, tmp_path, monkeypatch, lies):
    shutil.copytree(released, tmp_path / "w" / "released" / lies)
    whole = contents(tmp_path / "w")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream, "_regions", full)
    (tmp_path / "link").symlink_to(tmp_path / "w" / "released" / lies)
    for path in (tmp_path / "w" / "released" / lies, tmp_path / "link"):
        with pytest.raises(InputError, match="lies where the import would be written"):
            convert.main(["import", "--checkpoint", str(path), "--workdir", str(tmp_path / "w"), "--parts", "audio_decoder"])
    # Nor is it the place of another checkpoint's import.
    with pytest.raises(InputError, match="released/.* is in the import's place and no import wrote it"):
        convert.main(["import", "--checkpoint", str(released), "--workdir", str(tmp_path / "w"), "--parts", "audio_decoder"])
    assert contents(tmp_path / "w") == whole


@pytest.mark.parametrize("error, raised", [(OSError("unreadable"), InputError), (InputError("a shard is gone"), InputError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_an_import_that_ends_early_takes_away_what_it_wrote_and_nothing_else(released, tmp_path, monkeypatch, error, raised):
    def fail(source, target):
        assert (tmp_path / "w" / "released" / "result").exists() and target.parent.exists()
        raise error

    (tmp_path / "w" / "V1").mkdir(parents=True)
    (tmp_path / "w" / "V1" / "log").write_text("ours")
    monkeypatch.setattr(convert.shutil, "copyfile", fail)
    with pytest.raises(raised, match="unreadable|a shard is gone|^$"):
        attempt(released, tmp_path, "--parts", "audio_decoder")
    assert contents(tmp_path) == {"w/V1/log": b"ours"}


def test_files_count_in_the_room_that_an_import_needs(released, tmp_path, monkeypatch):
    own = [tensor for name, tensor in Released(released).tensors.items() if name.startswith("model.audio_tokenizer.audio_decoder.")]
    room = sum(tensor.nbytes for tensor in own) + sum((released / name).stat().st_size for name in ("config.json", "tokenizer.json"))
    free = collections.namedtuple("Usage", "free")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: free(room - 1))
    with pytest.raises(InputError, match="the import needs"):
        attempt(released, tmp_path, "--parts", "audio_decoder")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: free(room))
    assert attempt(released, tmp_path, "--parts", "audio_decoder") == 0


def test_an_identity_tells_checkpoints_apart_by_the_middle_of_any_tensor(tmp_path):
    arrays = {name: np.zeros((512, 1024), np.float32) for name in ("a", "b", "c")} | {"d": np.zeros(3, np.float32)}  # 2 MiB each

    def identity(name="a", index=0, value=0.0):
        arrays[name].reshape(-1)[index] = value
        safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
        arrays[name].reshape(-1)[index] = 0
        return convert._identity(Released(tmp_path))

    assert identity() == identity()
    found = [identity(), *(identity(name, 2**18, 1.0) for name in "abc"), identity("d", 0, 1.0), identity("d", 2, 1.0)]
    assert len(set(found)) == len(found)


def test_a_killed_import_is_no_import_and_is_not_in_the_way(released, imported, tmp_path, monkeypatch):
    regions, seen = stream._regions, []

    def killed(*args):
        seen.append(args)
        if len(seen) > 20:
            raise KeyboardInterrupt
        return regions(*args)

    monkeypatch.setattr(stream, "_regions", killed)
    monkeypatch.setattr(convert, "_remove", lambda *_: None)  # as SIGKILL: nothing cleans up
    with pytest.raises(KeyboardInterrupt):
        convert.main(["import", "--checkpoint", str(released), "--workdir", str(tmp_path / "w")])
    assert (tmp_path / "w" / "released").exists() and checkpoint.finished(tmp_path / "w" / "released") is None
    with pytest.raises(InputError, match="holds no import"):
        convert.main(["export", "--workdir", str(tmp_path / "w"), "--out", str(tmp_path / "out")])
    monkeypatch.undo()
    assert attempt(released, tmp_path) == 0
    jax.tree.map(np.testing.assert_array_equal, *(checkpoint.result(w / "released") for w in (tmp_path / "w", imported)))


def test_a_trained_part_that_the_import_lacks_is_not_dropped(released, tmp_path):
    attempt(released, tmp_path, "--parts", "backbone")
    head = {"params": {"lm_head": {"kernel": np.zeros((64, 256), np.float32)}}, "stats": {}}
    checkpoint.finish(tmp_path / "w" / "later", head, {"identity": "x"})
    with pytest.raises(InputError, match="stage 'later' trained params/lm_head/kernel, which the import .* does not hold"):
        convert.main(["export", "--workdir", str(tmp_path / "w"), "--stage", "later", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_stage_starts_from_an_import(tmp_path):
    config = digits.get_config("smoke")
    m = config.model
    a, e = m.attention, m.experts
    c = synthetic.SMALL | {
        "num_layers": m.layers, "hidden_size": m.width, "num_attention_heads": a.heads, "q_lora_rank": a.q_rank, "kv_lora_rank": a.kv_rank,
        "qk_nope_head_dim": a.nope, "qk_rope_head_dim": a.rope, "v_head_dim": a.v, "ffn_hidden_size": m.ffn, "n_routed_experts": e.real,
        "zero_expert_num": e.zero, "moe_topk": e.top_k, "expert_ffn_hidden_size": e.hidden,
        "rope_theta": a.theta, "routed_scaling_factor": e.scale, "rms_norm_eps": m.norm_eps,
    }  # fmt: skip
    kept = {name: what for name, what in synthetic.tensors(c).items() if name.startswith("model.layers.") or name == "model.norm.weight"}
    synthetic.write_tensors(tmp_path / "in", kept, c)
    assert attempt(tmp_path / "in", tmp_path, "--parts", "backbone") == 0
    record = checkpoint.finished(tmp_path / "w" / "released")
    config.imports = ConfigDict({"released": record["identity"]})
    config.stages.prealign.init_from = ConfigDict({"backbone": "released"})
    before = stages.stage_identity(config, "prealign")
    task = stages.make_task(config, "prealign")
    mesh = sharding.make_mesh({"data": 8}, jax.devices())
    like = steps.abstract_state(task, config.stages.prealign, mesh)
    found = stages.initial_variables(config, "prealign", task, tmp_path / "w", like)
    abstract = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    up = found["params"]["backbone"]["layers"]["experts"]["up"]
    assert "data" in up.sharding.spec and up.addressable_shards[0].data.size * 8 == up.size  # each device its slice
    source = Released(tmp_path / "in").read("model.layers.1.mlp.experts.2.up_proj.weight")
    np.testing.assert_array_equal(found["params"]["backbone"]["layers"]["experts"]["up"][1, 2], source.T.astype(np.float32))
    config.imports.released = "another"
    assert stages.stage_identity(config, "prealign") != before
    with pytest.raises(InputError, match="holds a run of another config"):
        stages.initial_variables(config, "prealign", task, tmp_path / "w", like)
    config.imports.released, config.model.attention.theta = record["identity"], 123.0
    with pytest.raises(InputError, match=r"released/backbone: config.model.attention.theta is 123.0, the imported weights have"):
        stages.initial_variables(config, "prealign", task, tmp_path / "w", like)
    config.stages.prealign.init_from = ConfigDict({"backbone": "unknown"})
    with pytest.raises(InputError, match="stage or import 'unknown' does not exist"):
        stages.stage_identity(config, "prealign")


def _language(tmp_path):
    """A workdir with an import that has the released text vocabulary, and the experiment that goes on from it."""
    c = synthetic.SMALL | {"text_vocab_size": 131072, "text_vocab_plus_multimodal_special_token_size": 131125, "vocab_size": 132096}
    listed = synthetic.tensors(c, audio=(16, 8, 8), visual=(32, 32))
    synthetic.write_tensors(tmp_path / "in", listed, c, shard_bytes=10**8)
    test_released.write(tmp_path / "in" / "tokenizer.json")
    assert attempt(tmp_path / "in", tmp_path) == 0
    return configs.load(f"experiments/finetune.py:{tmp_path / 'w'},smoke")


def test_an_experiment_takes_model_vocabulary_and_text_from_an_import(tmp_path):
    config = _language(tmp_path)
    assert config.model.width == 64 and config.model.unroll == 1 and config.model.ngram.blank == "row0"
    task = stages.make_task(config, "sft")
    mesh = sharding.make_mesh({"data": 2}, jax.devices()[:2])
    like = steps.abstract_state(task, config.stages.sft, mesh)
    found = stages.initial_variables(config, "sft", task, tmp_path / "w", like)
    table = Released(tmp_path / "in").read("model.embed_tokens.weight")
    np.testing.assert_array_equal(found["params"]["embed"]["table"][: len(table)], table.astype(np.float32))
    assert task.vocabulary.audiotext_pad == 131122 and task.vocabulary.user == 5
    assert config.model.experts.target_top_k == 2.0 and config.model.experts.dispatch == "gather"  # 8 of 12 as released, ours
    # It takes a step.
    with jax.set_mesh(mesh):
        state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), steps.init_state(task, config.stages.sft, found), like)
        batch = packing.blank_batch(config, config.stages.sft)
        batch["tokens"][:, :4], batch["segment"][:, :4], batch["text_weight"][:, 1:4] = 7, 1, 1.0
        step = jax.jit(steps.make_train_step(task, config.stages.sft, 0, mesh))
        state, values = step(state, sharding.put_batch(batch, mesh), np.float32(1e-3))
        assert np.isfinite(float(values["loss"])) and float(values["refused"]) == 0 and values["tables/rounds"] >= 1
    identity = stages.stage_identity(config, "sft")
    with config.unlocked():
        config.text.path = "elsewhere"
        assert stages.stage_identity(config, "sft") == identity
        config.text.sha256 = "other"
        assert stages.stage_identity(config, "sft") != identity
        config.model.ngram.blank = "zero"
        with pytest.raises(InputError, match=r"released/embed: config.model.ngram.blank is 'zero', the imported weights have 'row0'"):
            stages.initial_variables(config, "sft", task, tmp_path / "w", like)
        config.model.ngram.blank = "row0"
        # The same sizes, other ids: only names tell.
        record = checkpoint.finished(tmp_path / "w" / "released")
        record["vocabulary"]["specials"] = record["vocabulary"]["specials"][::-1]
        with pytest.raises(InputError, match="has other specials than the imported one"):
            settings.check(record, config, ["lm_head"], "here")


def test_text_of_a_released_tokenizer_is_prepared_once_and_by_content(tmp_path):
    config = _language(tmp_path)
    (tmp_path / "data").mkdir()
    path = digits_data._make_tokenizer(config, tmp_path / "data")
    assert ReleasedTokenizer(path).encode_prompt("<user>a") == [5, ReleasedTokenizer(path).encode("a")[0]]
    same = digits_data.cache_path(config)
    with config.unlocked():
        config.text.path = str(path)
        assert digits_data.cache_path(config) == same
        config.text.sha256 = "other"
    assert digits_data.cache_path(config) != same
    with pytest.raises(InputError, match="is not the file that text.sha256 is of"):
        digits_data._make_tokenizer(config, tmp_path / "data")


def test_an_experiment_without_an_import_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="holds no imported language side; `python -m tools.convert import`"):
        configs.load(f"experiments/finetune.py:{tmp_path}")
    with pytest.raises(InputError, match="needs the workdir of the import"):
        configs.load("experiments/finetune.py")
