"""Moving averages by hand, restarts, and the same update on 1, 2 and 8 devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dina.quantize import rvq
from dina.quantize.stats import STEP_ASIDE

CFG = rvq.RVQConfig(sizes=(4, 4), dim=3, decay=0.9, restart_cap=0.0)
KEY = jax.random.key(0)


def _update(cfg, stats, x, mask=None, key=KEY):
    mask = jnp.ones(len(x)) if mask is None else mask
    return rvq.statistics(cfg, stats, x, rvq.encode(cfg, stats, x), mask, key)


def _beside(cfg, stats, x):
    """Where a dead code of the first book may restart: on the way from each vector's code to the vector."""
    code = np.asarray(stats["codebook"]["0"])[np.asarray(rvq.encode(cfg, stats, x))[:, 0]]
    return code + STEP_ASIDE * (np.asarray(x) - code)


@pytest.mark.parametrize("codebook", ["separate", "shared"])
def test_moving_average_by_hand(codebook):
    cfg = dataclasses.replace(CFG, codebook=codebook)
    stats, x = rvq.init_stats(cfg, KEY), jax.random.normal(jax.random.key(1), (30, 3))
    mask = (jnp.arange(30) < 25).astype(jnp.float32)
    new = rvq.apply(cfg, stats, _update(cfg, stats, x, mask), KEY)
    codes, residual, pairs = np.asarray(rvq.encode(cfg, stats, x)), np.asarray(x), []
    for level in range(2):
        pairs.append((codes[:25, level], residual[:25]))
        residual = residual - np.asarray(stats["codebook"][cfg.book(level)])[codes[:, level]]
    if codebook == "shared":
        pairs = [tuple(np.concatenate(part) for part in zip(*pairs))]
    for book, (code, vector) in zip("01", pairs):
        hits = np.bincount(code, minlength=4)
        count = 0.9 * np.asarray(stats["count"][book]) + 0.1 * hits
        total = np.stack([vector[code == k].sum(0) for k in range(4)])
        mean = (0.9 * np.asarray(stats["sum"][book]) + 0.1 * total) / (
            (count + 1e-5) / (count.sum() + 4e-5) * count.sum())[:, None]
        np.testing.assert_allclose(new["count"][book], count, rtol=1e-6)
        np.testing.assert_allclose(new["codebook"][book], mean, rtol=1e-5, atol=1e-6)


def test_an_update_without_vectors_changes_nothing():
    stats, x = rvq.init_stats(CFG, KEY), jnp.ones((5, 3))
    cfg = dataclasses.replace(CFG, restart_cap=1.0)
    jax.tree.map(np.testing.assert_array_equal, rvq.apply(cfg, stats, _update(cfg, stats, x, jnp.zeros(5)), KEY), stats)


def test_dead_codes_restart_from_the_batch_with_all_their_statistics():
    cfg = rvq.RVQConfig(sizes=(8,), dim=3, restart_fraction=0.1, restart_cap=0.25)
    stats = rvq.init_stats(cfg, KEY)
    dead = jnp.array([1, 4, 6])
    stats["count"] = {"0": jnp.full(8, 10.0).at[dead].set(0.01)}
    stats["sum"] = {"0": stats["codebook"]["0"] * stats["count"]["0"][:, None]}
    x = stats["codebook"]["0"][jnp.array([0, 2, 3, 5, 7] * 4)] + 0.01 * jax.random.normal(KEY, (20, 3))
    updates = _update(cfg, stats, x)
    new = rvq.apply(cfg, stats, updates, KEY)
    moved = [k for k in (1, 4, 6) if not np.allclose(new["codebook"]["0"][k], stats["codebook"]["0"][k], atol=1e-3)]
    assert len(moved) == 2  # the cap: a quarter of eight
    threshold = 0.1 * float(np.sum(0.99 * np.asarray(stats["count"]["0"])) + 0.01 * 20) / 8
    for k in moved:
        assert np.abs(_beside(cfg, stats, x) - new["codebook"]["0"][k]).sum(-1).min() < 1e-6
        np.testing.assert_allclose(new["count"]["0"][k], 2 * threshold, rtol=1e-5)
        np.testing.assert_allclose(new["sum"]["0"][k], new["codebook"]["0"][k] * new["count"]["0"][k], rtol=1e-5)
    assert not np.allclose(new["codebook"]["0"][moved[0]], new["codebook"]["0"][moved[1]])


def test_restarts_revive_a_collapsed_book():
    cfg = rvq.RVQConfig(sizes=(16,), dim=2, decay=0.8, restart_cap=0.25)
    x = jax.random.normal(KEY, (256, 2))
    stats = rvq.from_codebooks([jnp.full((16, 2), 50.0) + jnp.arange(16)[:, None]])
    step = jax.jit(lambda s, k: rvq.apply(cfg, s, _update(cfg, s, x, key=k), k))
    for i in range(40):
        stats = step(stats, jax.random.fold_in(KEY, i))
    assert float(rvq.usage(rvq.encode(cfg, stats, x), jnp.ones(256), (16,))["usage"][0]) == 1.0


def test_micro_batches_add_up():
    cfg = dataclasses.replace(CFG, sizes=(32, 4), restart_cap=0.5)
    stats, x = rvq.init_stats(cfg, KEY), jax.random.normal(KEY, (40, 3))
    keys = rvq.token_keys(jax.random.key(5), jnp.arange(10), 4)
    parts = [_update(cfg, stats, x[i : i + 20], key=keys[i : i + 20]) for i in (0, 20)]
    total, whole = jax.tree.map(jnp.add, *parts), _update(cfg, stats, x, key=keys)
    np.testing.assert_array_equal(total["count"]["0"], whole["count"]["0"])
    np.testing.assert_allclose(total["sum"]["0"], whole["sum"]["0"], rtol=1e-5, atol=1e-5)
    drawn = total["candidate"]["0"] / total["weight"]["0"][:, None]
    near = np.abs(_beside(cfg, stats, x)[:, None] - np.asarray(drawn)).sum(-1).min(0) < 0.03
    assert near.mean() > 0.7  # one in 16 pairs has equal weights and gives a mean of two


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("keyed,update", [("step", "ema"), ("token", "ema"), ("token", "sgd")])
def test_any_number_of_devices_gives_the_same_update(devices, keyed, update):
    cfg = rvq.RVQConfig(sizes=(16, 16), dim=3, restart_fraction=0.9, restart_cap=0.3, update=update)
    stats, x = rvq.init_stats(cfg, KEY), jax.random.normal(KEY, (48, 3))
    stats["count"] = jax.tree.map(lambda c: c.at[:8].set(0.1), stats["count"])
    mask = (jnp.arange(48) % 7 > jnp.arange(48) // 12).astype(jnp.float32)  # very uneven over shards
    keys = rvq.token_keys(KEY, jnp.arange(48), 1)

    def run(x, mask, keys, axes):
        key, codes = KEY if keyed == "step" else keys, rvq.encode(cfg, stats, x)
        return codes, rvq.statistics(cfg, stats, x, codes, mask, key, axes)

    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    body = lambda x, m, k: run(x, m, k, ("data",))
    sharded = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()), check_vma=False)
    put = lambda a: jax.device_put(a, jax.sharding.NamedSharding(mesh, P("data")))
    many_codes, many = jax.device_get(jax.jit(sharded)(put(x), put(mask), put(keys)))
    one_codes, one = jax.device_get(jax.jit(lambda *args: run(*args, ()))(x, mask, keys))
    np.testing.assert_array_equal(one_codes, many_codes)
    assert np.abs(one["weight"]["0"]).max() > 0  # there is something to restart from
    apply = jax.jit(lambda updates: rvq.apply(cfg, stats, updates, KEY))
    a, b = apply(one), apply(many)
    for before, after in ((one, many), (a, b)):
        for name in before:  # ids and counts are exact; sums are rounded as each program's arithmetic rounds them
            exact = name in ("count", "weight", "parts")
            close = lambda u, v: np.abs(np.asarray(u) - v).max() <= 1e-6 * np.abs(np.asarray(u)).max()
            same = jax.tree.map(np.array_equal if exact else close, before[name], after[name])
            assert all(jax.tree.leaves(same)), name
    assert (a["count"]["0"][:8] > 0.5).sum() == 5  # the cap of restarts


def test_a_code_of_sgd_restarts_by_its_base_and_the_optimizer_goes_on():
    cfg = rvq.RVQConfig(sizes=(8,), dim=3, update="sgd", restart_cap=0.25)
    _, stats = rvq.init(cfg, KEY)
    params = {"code_table": {"0": 0.1 * jax.random.normal(jax.random.key(7), (8, 3))}}
    stats["count"] = {"0": jnp.full(8, 10.0).at[jnp.array([1, 6])].set(0.01)}
    view = rvq.view(cfg, params, stats)
    x = view["codebook"]["0"][jnp.array([0, 2, 3, 5, 7] * 4)] + 0.01 * jax.random.normal(KEY, (20, 3))
    new = rvq.apply(cfg, stats, _update(cfg, view, x), KEY)
    after = rvq.view(cfg, params, new)["codebook"]["0"]
    np.testing.assert_allclose(after, new["codebook"]["0"], atol=1e-6)
    for k in range(8):
        if k in (1, 6):
            assert np.abs(_beside(cfg, view, x) - after[k]).sum(-1).min() < 1e-6
            assert float(new["count"]["0"][k]) > 0.1
        else:
            np.testing.assert_array_equal(new["base"]["0"][k], stats["base"]["0"][k])


def test_restarts_are_drawn_by_squared_error():
    cfg = rvq.RVQConfig(sizes=(4,), dim=1, restart_cap=0.25)
    stats = rvq.from_codebooks([jnp.array([[0.0], [10.0], [20.0], [30.0]])])
    x = jnp.concatenate([jnp.full((90, 1), 0.1), jnp.full((10, 1), 10.9)])  # errors 0.9 and 8.1 in all
    far = 0
    for i in range(200):
        updates = _update(cfg, stats, x, key=jax.random.key(i))
        far += float(updates["candidate"]["0"][0, 0] / updates["weight"]["0"][0]) > 5
    assert 160 < far < 196  # 180 expected; drawn evenly it would be 20
