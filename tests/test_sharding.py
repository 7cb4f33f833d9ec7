"""Mesh building, storage placement, parts and what is made of them, batches on the mesh."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dina import config as configs
from dina import sharding, stages, step as steps
from dina.config import InputError

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "shardings"
DEVICES = {"digits": {"data": 4, "expert": 2}}  # of configs whose own mesh is one device
NAMED = {"digits": ("experiments/digits.py", "pretrain", ("",)),
         "longcat_next": ("experiments/longcat_next.py", "pretrain",
                          ("v5e_256", "v5p_64", "v5p_128", "v5p_256", "v5p_1024", "v5p_4096", "v6e_256", "v6e_1024", "tpu7x_64", "tpu7x_256"))}


def test_mesh_axes_and_errors():
    mesh = sharding.make_mesh({"data": -1, "expert": 2})
    assert dict(mesh.shape) == {"replica": 1, "data": 4, "expert": 2, "seq": 1, "model": 1}
    with pytest.raises(InputError, match="unknown axes.*'rows'"):
        sharding.make_mesh({"rows": 2})
    with pytest.raises(InputError, match="16 devices, this job has 8"):
        sharding.make_mesh({"data": 16})


def test_only_large_divisible_arrays_are_split():
    mesh = sharding.make_mesh({"data": 8})
    assert sharding.storage_spec((8, 8), mesh) == P()
    assert sharding.storage_spec((1001, 1024), mesh) == P(None, "data")
    assert sharding.storage_spec((1001, 999), mesh) == P()


def test_rules_split_experts_by_expert_and_never_a_stack():
    mesh = sharding.make_mesh({"data": 4, "expert": 2})
    spec = lambda path, *shape: sharding.storage_spec(shape, mesh, path)
    assert spec("backbone/layers/ffn_0/up", 512, 64, 32) == P(None, ("data", "expert"))
    assert spec("backbone/layers/experts/up", 512, 16, 64, 32) == P(None, "expert", "data")
    assert spec("backbone/layers/experts/router/classifier", 512, 64, 24) == P(None, ("data", "expert"))
    assert spec("embed/table", 2**16, 64) == P(None, ("data", "expert"))
    assert spec("lm_head/kernel", 4, 2**16 + 4) == P(None, "data")  # which the product of both axes does not divide
    with pytest.raises(InputError, match="experts/up: 15 experts do not divide among 2 devices"):
        spec("backbone/layers/experts/up", 2, 15, 64, 32)


def test_a_placement_that_collides_is_refused():
    mesh = sharding.make_mesh({"data": 4, "expert": 2})
    state = {"params": {"embed": {"table": jax.ShapeDtypeStruct((64, 36), jnp.float32)}}}
    with pytest.raises(InputError, match="embed/table: mesh axis data would split two dimensions"):
        sharding.place(state, mesh, {"embed/table": P("data", ("expert", "data"))})
    with pytest.raises(InputError, match="embed/table: dimension 36 of .64, 36. does not divide by mesh axes data, expert"):
        sharding.place(state, mesh, {"embed/table": P(None, ("data", "expert"))})


def test_what_is_kept_of_a_parameter_lies_where_it_does():
    mesh = sharding.make_mesh({"data": 4, "expert": 2})
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    path = "backbone/layers/experts/up"
    state = {"params": {"backbone": {"layers": {"experts": {"up": like(2, 8, 64, 96)}}}}, "opt": [{path: like(2, 8, 64, 96)}, {path: like(2, 8, 64)}],
             "stats": {"backbone": {"router_bias": like(2, 12)}}}
    placed = jax.tree.map(lambda x: x.sharding.spec, sharding.place(state, mesh, {path: P(None, "expert", "data")}))
    assert placed["opt"] == [{path: P(None, "expert", "data")}, {path: P(None, "expert", "data")}]
    assert placed["stats"]["backbone"]["router_bias"] == P()


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "expert": 4}, {"replica": 2, "data": 4}], ids=str)
def test_parts_are_made_whole_and_gradients_come_back_in_parts(sizes):
    mesh, random = sharding.make_mesh(sizes), np.random.default_rng(0)
    axes = tuple(a for a in sharding.BATCH_AXES if mesh.shape[a] > 1)
    split = tuple(a for a in axes if a != "replica")
    placed = {"w": P(None, split), "table": P(None, split), "bias": P()}
    values = {"w": random.normal(size=(5, 16)), "table": random.normal(size=(9, 16)), "bias": random.normal(size=(16,))}
    values = {name: x.astype(np.float32) for name, x in values.items()}
    x, rows = random.normal(size=(8, 5)).astype(np.float32), random.integers(0, 9, (8, 3)).astype(np.int32)

    def total(p, x, rows):
        read = sharding.columns(lambda table, r: jnp.sum(table[r], -2), p["table"], rows)
        return jnp.sum(jnp.sin(x @ p["w"] + read + p["bias"]))

    def local(params, x, rows):
        def loss(params):
            parts = sharding.as_shards(params, placed)
            return total(parts | sharding.whole({name: parts[name] for name in ("w", "bias")}), x, rows)

        value, grads = jax.value_and_grad(loss)(params)
        return sharding.psum(value, axes), sharding.sum_left(grads, placed, axes)

    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
        run = jax.shard_map(local, mesh=mesh, in_specs=(placed, *[sharding.batch_spec()] * 2), out_specs=(P(), placed), check_vma=False)
        params = {name: put(x, placed[name]) for name, x in values.items()}
        value, grads = jax.jit(run)(params, put(x, sharding.batch_spec()), put(rows, sharding.batch_spec()))
    want, expected = jax.value_and_grad(total)(values, x, rows)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), jax.device_get(grads), expected)
    assert grads["w"].addressable_shards[0].data.shape == (5, 16 // (8 if "replica" not in sizes else 4))


def test_a_batch_is_cut_over_all_batch_axes():
    mesh = sharding.make_mesh({"data": 4, "expert": 2})
    x = sharding.put_batch({"x": np.arange(16).reshape(16, 1)}, mesh)["x"]
    assert sorted(int(s.data[0, 0]) for s in x.addressable_shards) == list(range(0, 16, 2))


def tables():
    """File name -> every placement of a named config's variables on the mesh that it names; no device is asked for."""
    out = {}
    for name, (file, stage, rows) in NAMED.items():
        config = configs.load(str(ROOT / file))
        task = stages.make_task(config, stage)
        state = {part: x for part, x in steps.shapes(task, config.stages[stage]).items() if part in ("params", "stats")}
        for row in rows:
            sizes = DEVICES.get(name) or configs.load(f"{ROOT / file}:{row},{stage}").mesh.to_dict()
            shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
            mesh = jax.sharding.AbstractMesh(shape, sharding.AXES, (jax.sharding.AxisType.Explicit,) * len(shape))
            head = f"{file}:{row} stage {stage} on {' '.join(f'{axis}={n}' for axis, n in zip(sharding.AXES, shape, strict=True))}\n"
            out[f"{name}_{row}".rstrip("_") + ".txt"] = head + sharding.table(steps.placed(state, task, mesh))
    return out


def test_placements_are_those_on_record():
    found = tables()
    assert {path.name for path in GOLDEN.glob("*.txt")} == set(found)
    for name, text in found.items():
        assert (GOLDEN / name).read_text() == text, f"placements changed; if meant: python -m tests.test_sharding rewrites {name}"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file, text in tables().items():
        (GOLDEN / file).write_text(text)
