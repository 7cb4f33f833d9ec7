"""Row-sharded tables: the exchange against plain indexing and its gradient, whole steps against 'gather'."""

import functools

import jax
import numpy as np
import pytest

from dina import checkpoint, optim, sharding, stages, step as steps, tables
from dina.config import InputError
from dina.tasks.language import NGRAM_TABLE, Language
from tests import tiny_language

TABLES, ROWS, WIDTH = 3, 96, 5  # 12 rows an owner on eight devices
MESHES = [{"data": 1}, {"data": 8}, {"replica": 2, "data": 2, "expert": 2}, {"data": 2, "seq": 2, "model": 2}]
KINDS = ["even", "one owner", "one row", "none"]


def _mesh(sizes):
    return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def _case(kind):
    """Table, rows of 16 x 9 positions, and gradients of what they read."""
    random = np.random.default_rng(0)
    table = random.normal(size=(TABLES, ROWS, WIDTH)).astype(np.float32)
    high = {"even": ROWS, "one owner": 12, "one row": 1, "none": 1}[kind]
    rows = random.integers(0, high, (16, 9, TABLES)).astype(np.int32)
    rows[random.random(rows.shape) < (1.0 if kind == "none" else 0.2)] = -1
    grads = random.normal(size=(*rows.shape, WIDTH)).astype(np.float32)
    grads[rows < 0] = np.nan  # nobody may look at these
    return table, rows, grads


def _put(mesh, x, spec):
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reading_is_indexing_and_giving_back_is_its_transpose(sizes, kind):
    table, rows, grads = _case(kind)
    mesh, batch = _mesh(sizes), sharding.batch_spec()
    axes = tuple(axis for axis in sharding.AXES if mesh.shape[axis] > 1)

    def local(table, rows, grads):
        found, asked = tables.read({"t": table}, {"t": rows}, axes)
        return found["t"], tables.rounds(asked), tables.give_back({"t": table}, {"t": grads}, asked, axes)["t"]

    specs = (tables.spec(), batch, batch), (batch, jax.P(), tables.spec())
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False))
    with jax.set_mesh(mesh):
        found, rounds, given = run(_put(mesh, table, tables.spec()), _put(mesh, rows, batch), _put(mesh, grads, batch))
    number, live = np.broadcast_to(np.arange(TABLES), rows.shape), rows >= 0
    np.testing.assert_array_equal(found, np.where(live[..., None], table[number, np.maximum(rows, 0)], 0))
    dense = np.zeros((TABLES, ROWS, WIDTH))
    np.add.at(dense, (number[live], rows[live]), grads[live])
    np.testing.assert_allclose(given, dense, rtol=1e-5, atol=1e-5)
    assert given.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, tables.spec()), 3)
    wanted = {"even": {1}, "one owner": {1} if sizes == {"data": 1} else {2, 3}, "one row": {1}, "none": {0}}[kind]
    assert int(rounds) in wanted  # so that one round, several and none are seen


@functools.cache
def _step(lookup, sizes, accumulate, train, rowwise):
    """(task, stage, mesh, abstract state, compiled step) of a model that is asked for words only: the tables serve all inputs alike."""
    config, stage = tiny_language.experiment(text=1.0)
    config.model.ngram.lookup = lookup
    stage.optimizer.update({"multipliers": (("embed/ngram/*", 5.0),), "clip_norm": 0.5, "rowwise": rowwise})
    stage.update({"accumulate": accumulate, "ema_decay": 0.9, "train": train})
    task, mesh = Language(config, stage), _mesh(dict(sizes))
    with jax.set_mesh(mesh):
        return task, stage, mesh, steps.abstract_state(task, stage, mesh), jax.jit(steps.make_train_step(task, stage, 0, mesh))


def _run(lookup, sizes, accumulate=1, steps_run=6, poison=False, train=("embed", "backbone", "lm_head"), rowwise=()):
    task, stage, mesh, abstract, step = _step(lookup, tuple(sizes.items()), accumulate, train, rowwise)
    documents = tiny_language.documents()
    start = tiny_language.variables()  # kept for other tests, so made outside of the mesh
    batch = tiny_language.pack([[documents[(i + j) % 6] for j in range(2)] for i in range(8)])
    with jax.set_mesh(mesh):
        place = lambda x, like: jax.device_put(np.array(x), like.sharding)
        variables = {kind: jax.tree.map(place, start[kind], abstract[kind]) for kind in start}
        state = jax.tree.map(place, steps.init_state(task, stage, variables), abstract)
        losses = []
        for n in range(steps_run):
            if poison and n == steps_run - 1:
                batch["text_weight"] = np.full_like(batch["text_weight"], np.nan)
            before = state
            state, values = step(state, sharding.put_batch(batch, mesh), np.float32(0.01))
            losses.append([float(values[name]) for name in ("loss", "grad_norm")])
    return np.array(losses), jax.device_get(state), values, jax.device_get(before)


@pytest.mark.parametrize(
    "sizes, accumulate", [({"data": 2, "model": 2}, 2), pytest.param({"replica": 2, "data": 2, "expert": 2}, 1, marks=pytest.mark.slow)], ids=str
)
def test_a_step_by_exchange_is_the_step_by_gathering(sizes, accumulate):
    want, truth, _, _ = _run("gather", {"data": 1})
    losses, state, values, _ = _run("exchange", sizes, accumulate)
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    assert losses[-1, 0] < losses[0, 0] and values["tables/rounds"] >= 1
    assert jax.tree.structure(state) == jax.tree.structure(truth)  # a checkpoint of one goes on as the other
    for part in ("params", "ema"):
        found, wanted = (optim.flatten(s[part]) for s in (state, truth))
        for path in wanted:
            # Adam divides by the root of its second moment: where that is rounding noise, so is the step.
            moved = np.abs(np.asarray(found[path]) - wanted[path]) > 1e-3
            assert moved.mean() < 1e-3, path


@pytest.mark.slow
def test_rowwise_is_the_same_by_exchange():
    want, truth, _, _ = _run("gather", {"data": 1}, rowwise=(NGRAM_TABLE,))
    losses, state, _, _ = _run("exchange", {"data": 4}, rowwise=(NGRAM_TABLE,))
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    found, wanted = (optim.flatten(s["params"])[NGRAM_TABLE] for s in (state, truth))
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    start = tiny_language.variables()["params"]["embed"]["ngram"]["table"]
    still = np.all(wanted == start, -1)
    assert 0.3 < still.mean() < 1 and losses[-1, 0] < losses[0, 0]  # rows that nobody read have not moved


@pytest.mark.slow
def test_a_frozen_table_is_read():
    losses, state, _, before = _run("exchange", {"data": 2}, train=("lm_head",))
    want, _, _, _ = _run("gather", {"data": 1}, train=("lm_head",))
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    np.testing.assert_array_equal(*(optim.flatten(s["params"])[NGRAM_TABLE] for s in (state, before)))


def test_a_step_with_poison_leaves_table_moments_and_average():
    _, state, values, before = _run("exchange", {"replica": 2, "data": 2, "expert": 2}, steps_run=3, poison=True)
    assert values["refused"] == 1.0
    for name in ("params", "opt", "ema", "stats"):
        jax.tree.map(np.testing.assert_array_equal, state[name], before[name])


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="20 stored rows a table do not divide among 8 devices; see model.ngram.row_multiple"):
        tables.check((3, 20, 4), _mesh({"data": 8}), NGRAM_TABLE)


@pytest.mark.slow
def test_a_fresh_table_is_made_in_shards_and_a_checkpoint_moves_to_another_mesh(tmp_path):
    config, stage = tiny_language.experiment()
    config.seed, config.model.ngram.lookup = 3, "exchange"
    task, placed = Language(config, stage), {}
    for sizes in ({"data": 1}, {"data": 4, "model": 2}):
        mesh = _mesh(sizes)
        with jax.set_mesh(mesh):
            abstract = steps.abstract_state(task, stage, mesh)
            init, key = stages.initialiser(config, task, abstract)
            placed[mesh.size] = mesh, abstract, init(key)
    (_, small, one), (mesh, large, eight) = placed[1], placed[8]
    own = jax.sharding.NamedSharding(mesh, tables.spec())
    found = optim.flatten(eight["params"])[NGRAM_TABLE]
    assert found.sharding.is_equivalent_to(own, 3) and found.addressable_shards[0].data.shape[1] * 8 == found.shape[1]
    jax.tree.map(np.testing.assert_array_equal, one, jax.device_get(eight))
    with jax.set_mesh(mesh):
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), steps.init_state(task, stage, eight), large)
        saves = checkpoint.Checkpoints(tmp_path, "identity")
        saves.save(1, state, 1, 1.0)
        saves.close()
    restored, _ = checkpoint.Checkpoints(tmp_path, "identity").restore(1, small)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(restored))
    moments = [x for x in jax.tree.leaves(state["opt"]) if x.shape == found.shape]
    assert moments and all(x.sharding.is_equivalent_to(own, 3) for x in moments)
