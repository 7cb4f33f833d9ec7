"""Row-sharded tables: the exchange against plain indexing, both optimizers against dense ones, whole steps against 'gather'."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from dina import optim, sharding, step as steps, tables
from dina.config import InputError
from dina.tasks.language import NGRAM_TABLE, Language
from tests import tiny_language

TABLES, ROWS, WIDTH = 3, 96, 5  # 12 rows an owner on eight devices
MESHES = [{"data": 1}, {"data": 8}, {"replica": 2, "data": 2, "expert": 2}, {"data": 2, "seq": 2, "model": 2}]


def _mesh(sizes):
    return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def _case(kind, seed=0):
    """Table, rows of 16 x 9 positions, and gradients of what they read."""
    random = np.random.default_rng(seed)
    table = random.normal(size=(TABLES, ROWS, WIDTH)).astype(np.float32)
    high = {"even": ROWS, "one owner": 12, "one row": 1}[kind]
    rows = random.integers(0, high, (16, 9, TABLES)).astype(np.int32)
    rows[random.random(rows.shape) < 0.2] = -1
    return table, rows, random.normal(size=(*rows.shape, WIDTH)).astype(np.float32)


def _put(mesh, x, spec):
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))


def _read(mesh, table, rows):
    placed = _put(mesh, table, tables.spec()), _put(mesh, rows, sharding.batch_spec())
    with jax.set_mesh(mesh):
        return jax.jit(lambda t, r: tables.read({"t": t}, lambda b: {"t": b}, r, mesh)[1]["t"])(*placed)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["even", "one owner", "one row"])
def test_reading_is_indexing(sizes, kind):
    table, rows, _ = _case(kind)
    found = _read(_mesh(sizes), table, rows)
    want = np.where(rows[..., None] >= 0, table[np.arange(TABLES), np.maximum(rows, 0)], 0)
    np.testing.assert_array_equal(found, want)


def _dense(rows, grads):
    dense = np.zeros((TABLES, ROWS, WIDTH), np.float64)
    table = np.broadcast_to(np.arange(TABLES), rows.shape)
    np.add.at(dense, (table[rows >= 0], rows[rows >= 0]), grads[rows >= 0])
    return dense


def _settings(kind, clip=1e9):
    return ConfigDict({"tables": kind, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "clip_norm": clip})


def _mover(mesh, settings, norm, proceed):
    """The jitted move of one table at a rate of 0.1, beside other gradients of this norm."""

    def run(table, state, grads, rows):
        given = ({"t": x} for x in (table, state, grads, rows, 0.1))
        return tables.move(*given, jnp.float32(norm), jnp.asarray(proceed), settings, mesh)

    return jax.jit(run)


def _move(mesh, settings, kind, steps_run=3):
    """Several steps; returns table, state, norm and rounds of the last."""
    table = _case(kind)[0]
    state = tables.init(settings.tables, jnp.asarray(table))
    table = _put(mesh, table, tables.spec())
    state = {k: _put(mesh, x, s) for (k, x), s in zip(state.items(), tables.state_spec(state).values(), strict=True)}
    run = _mover(mesh, settings, 0.5, True)
    for n in range(steps_run):
        _, rows, grads = _case(kind, seed=n + 1)
        rows, grads = (_put(mesh, x, sharding.batch_spec()) for x in (rows, grads))
        with jax.set_mesh(mesh):
            new, after, total, rounds = run(table, state, grads, rows)
        table, state = new["t"], after["t"]
    return np.asarray(table), jax.device_get(state), float(total), int(rounds)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["even", "one owner"])
def test_adam_is_the_dense_one(sizes, kind):
    table, _, norm, rounds = _move(_mesh(sizes), _settings("adam", clip=3.0), kind)
    tx = optax.chain(optax.clip_by_global_norm(3.0), optax.adam(0.1, 0.9, 0.95))
    # The norm of all other gradients is that of one more entry, which nothing else touches.
    params = {"t": jnp.asarray(_case(kind)[0]), "other": jnp.zeros(1)}
    state = tx.init(params)
    for n in range(3):
        grads = {"t": jnp.asarray(_dense(*_case(kind, seed=n + 1)[1:]), jnp.float32), "other": jnp.full(1, 0.5)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(norm, optax.tree.norm(grads), rtol=1e-5)
    np.testing.assert_allclose(table, params["t"], rtol=1e-4, atol=1e-5)
    assert (rounds > 1) == (kind == "one owner" and sizes != {"data": 1})  # so that both ways are seen


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["even", "one owner"])
def test_rowwise_moves_only_rows_that_were_read(sizes, kind):
    table, state, _, _ = _move(_mesh(sizes), _settings("rowwise"), kind)
    want, second = _case(kind)[0].astype(np.float64), np.zeros((TABLES, ROWS))
    for n in range(3):
        dense = _dense(*_case(kind, seed=n + 1)[1:])
        square = np.mean(dense**2, -1)
        fresh = np.where(second > 0, 0.95 * second + 0.05 * square, square)
        second = np.where(square > 0, fresh, second)
        want -= 0.1 * dense / (np.sqrt(second) + 1e-8)[..., None]
    np.testing.assert_allclose(table, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state["second"], second, rtol=1e-4)
    if kind == "one owner":
        np.testing.assert_array_equal(table[:, 12:], _case(kind)[0][:, 12:])


@pytest.mark.parametrize("kind", tables.KINDS)
@pytest.mark.parametrize("spoil", ["loss", "norm", "rows"])
def test_a_refused_step_moves_nothing(kind, spoil):
    mesh, settings = _mesh({"data": 8}), _settings(kind)
    before, state = _move(mesh, settings, "even", 2)[:2]
    for crowded in ("even", "one owner"):
        table, after = _refused(mesh, settings, crowded, before, state, spoil)
        np.testing.assert_array_equal(table, before)
        for name in state:
            np.testing.assert_array_equal(after[name], state[name])


def _refused(mesh, settings, kind, table, state, spoil):
    _, rows, grads = _case(kind, seed=9)
    if spoil == "rows":
        grads[np.unravel_index(np.argmax(rows >= 0), rows.shape)] = np.nan
    specs = tables.state_spec(state)
    args = (_put(mesh, table, tables.spec()), {k: _put(mesh, x, specs[k]) for k, x in state.items()},
            _put(mesh, grads, sharding.batch_spec()), _put(mesh, rows, sharding.batch_spec()))
    with jax.set_mesh(mesh):
        new, after, _, _ = _mover(mesh, settings, np.nan if spoil == "norm" else 0.5, spoil != "loss")(*args)
    return np.asarray(new["t"]), jax.device_get(after["t"])


def _run(lookup, sizes, accumulate=1, kind="adam", steps_run=6, train=None, **options):
    config, stage = tiny_language.experiment()
    config.model.ngram.lookup = lookup
    stage.optimizer.update({"tables": kind, "multipliers": (("embed/ngram/*", 5.0),), "clip_norm": 0.5})
    stage.update({"accumulate": accumulate, "ema_decay": 0.9, **options})
    if train:
        stage.train = train
    task, mesh, documents = Language(config, stage), _mesh(sizes), tiny_language.documents()
    batch = tiny_language.pack([[documents[(i + j) % 6] for j in range(2)] for i in range(8)])
    with jax.set_mesh(mesh):
        abstract = steps.abstract_state(task, stage, mesh)
        place = lambda x, like: jax.device_put(np.array(x), like.sharding)
        start = tiny_language.variables()
        variables = {kind: jax.tree.map(place, start[kind], abstract[kind]) for kind in start}
        state = jax.tree.map(place, steps.init_state(task, stage, variables), abstract)
        step = jax.jit(steps.make_train_step(task, stage, 0, mesh), donate_argnums=0)
        losses = []
        for _ in range(steps_run):
            state, values = step(state, sharding.put_batch(batch, mesh), np.float32(0.01))
            losses.append([float(values[name]) for name in ("loss", "grad_norm")])
    return np.array(losses), jax.device_get(state), values


@pytest.mark.parametrize("sizes, accumulate", [({"data": 1}, 1), ({"data": 2, "model": 2}, 2), ({"replica": 2, "data": 2, "expert": 2}, 1)], ids=str)
def test_a_step_by_exchange_is_the_step_by_gathering(sizes, accumulate):
    want, truth, _ = _run("gather", {"data": 1})
    losses, state, values = _run("exchange", sizes, accumulate)
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    assert losses[-1, 0] < losses[0, 0] and values["tables/rounds"] >= 1
    for kind in ("params", "ema"):
        flat, wanted = ({**optim.flatten(s["params"]), **s["ema"]} if kind == "ema" else optim.flatten(s["params"]) for s in (state, truth))
        np.testing.assert_allclose(flat[NGRAM_TABLE], wanted[NGRAM_TABLE], atol=2e-3)


def test_a_frozen_table_is_read_and_has_no_state():
    losses, state, _ = _run("exchange", {"data": 2}, train=("lm_head", "visual_head", "audio_head"), ema_decay=0.0)
    want, _, _ = _run("gather", {"data": 1}, train=("lm_head", "visual_head", "audio_head"), ema_decay=0.0)
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    assert "tables" not in state


def test_rowwise_learns():
    losses, state, _ = _run("exchange", {"data": 2}, kind="rowwise", steps_run=12)
    assert losses[-1, 0] < losses[0, 0] - 0.1 and set(state["tables"][NGRAM_TABLE]) == {"second"}


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="row_multiple"):
        tables.check((3, 20, 4), _mesh({"data": 8}), NGRAM_TABLE)
    with pytest.raises(InputError, match="optimizer.tables is 'sgd'"):
        tables.init("sgd", jnp.zeros((1, 8, 2)))
