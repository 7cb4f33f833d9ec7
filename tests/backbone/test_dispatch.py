"""The ways to run experts agree, values and gradients, also where a buffer overflows and under several devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dina.backbone import dispatch
from dina.backbone.config import ExpertsConfig

CFG = ExpertsConfig(real=4, zero=2, top_k=3, hidden=6, capacity_factor=1.0, target_top_k=2.0)


def tokens(skew, count=40, width=5, seed=0):
    """Distinct choices per token; with `skew` most tokens want expert 0. Every seventh token is padding."""
    random = np.random.default_rng(seed)
    score = random.normal(size=(count, CFG.total)) + np.array([skew, 0, 0, 0, 0, 0])
    expert_NK = np.argsort(-score, 1)[:, : CFG.top_k].astype(np.int32)
    weight_NK = random.uniform(0.1, 1.0, expert_NK.shape).astype(np.float32)
    weight_NK[::7] = 0
    w = dispatch.Experts(*(jnp.asarray(random.normal(size=s), jnp.float32) for s in ((4, width, 6), (4, width, 6), (4, 6, width))))
    return w, jnp.asarray(random.normal(size=(count, width)), jnp.float32), jnp.asarray(expert_NK), jnp.asarray(weight_NK)


def by_hand(w, u, expert, weight):
    out = np.zeros(u.shape)
    for n, (row, ws) in enumerate(zip(np.asarray(expert), np.asarray(weight), strict=True)):
        for e, s in zip(row, ws, strict=True):
            if e < CFG.real:
                hidden = jax.nn.silu(u[n] @ w.gate_EDF[e]) * (u[n] @ w.up_EDF[e])
                out[n] += s * np.asarray(hidden @ w.down_EFD[e])
    return out


@pytest.fixture
def tight(monkeypatch):
    """Buffers of 24 rows for 40 tokens, which is less than three deviations more than the 20 that are expected."""
    monkeypatch.setattr(dispatch, "capacity", lambda _, count: min(count, 24))


def value_and_gradient(way, w, u, expert, weight):
    cfg = dataclasses.replace(CFG, dispatch=way)

    def loss(w, u, weight):
        y, overflow = dispatch.run(cfg, w, u, expert, weight)
        return jnp.sum(jnp.sin(y)), (y, overflow)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(w, u, weight)


@pytest.mark.parametrize("skew", [0.0, 9.0])
@pytest.mark.parametrize("way", ["dense", "gather", "ragged"])
def test_every_way_equals_one_token_at_a_time(way, skew, tight):
    w, u, expert, weight = tokens(skew)
    (_, (y, overflow)), gradient = value_and_gradient(way, w, u, expert, weight)
    np.testing.assert_allclose(y, by_hand(w, u, expert, weight), atol=1e-5)
    assert (int(overflow) > 0) == (way == "gather" and skew > 0)
    expected = value_and_gradient("dense", w, u, expert, weight)[1]
    live = (np.asarray(weight) != 0) & (np.asarray(expert) < CFG.real)
    masked = lambda g: (g[0], g[1], np.where(live, g[2], 0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), masked(gradient), masked(expected))
    assert np.all(np.asarray(y)[::7] == 0)


def test_overflow_counts_pairs_beyond_capacity(tight):
    w, u, expert, weight = tokens(9.0)
    rows = dispatch.capacity(CFG, len(u))
    live = (np.asarray(weight) != 0) & (np.asarray(expert) < CFG.real)
    counts = np.bincount(np.asarray(expert)[live], minlength=CFG.total)
    (_, (_, overflow)), _ = value_and_gradient("gather", w, u, expert, weight)
    assert int(overflow) == np.maximum(counts - rows, 0).sum() > 0


@pytest.mark.parametrize("axes", [(), ("data",)])
def test_one_shard_overflowing_alone_changes_nothing(axes, tight):
    w, *calm = tokens(0.0)
    _, *busy = tokens(9.0, seed=1)
    u, expert, weight = (jnp.concatenate(pair) for pair in zip(calm, busy, strict=True))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    cfg = dataclasses.replace(CFG, dispatch="gather")

    def local(w, u, expert, weight):
        def loss(w, u):
            y, overflow = dispatch.run(cfg, w, u, expert, weight, axes)
            return jnp.sum(jnp.sin(y)), (y, overflow[None])

        (_, aux), (dw, du) = jax.value_and_grad(loss, (0, 1), has_aux=True)(w, u)
        return aux, jax.lax.psum(dw, "data"), du

    spec = P("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(), spec, spec, spec), out_specs=((spec, spec), P(), spec), check_vma=False)
    (y, overflow), dw, du = jax.jit(sharded)(w, u, expert, weight)
    (_, (expected, _)), (dw_expected, du_expected, _) = value_and_gradient("dense", w, u, expert, weight)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(du, du_expected, atol=2e-5, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5, rtol=1e-5), dw, dw_expected)
    assert int(overflow[0]) == 0 < int(overflow[1])


def test_capacity_never_exceeds_the_tokens():
    assert dispatch.capacity(CFG, 3) == 3
    assert dispatch.capacity(CFG, 64) == 56  # 32 expected, and three deviations
    assert dispatch.capacity(dataclasses.replace(CFG, capacity_factor=1.25), 6400) == 4000


def test_many_rounds_change_nothing(monkeypatch):
    w, u, expert, weight = tokens(2.0)
    expected = value_and_gradient("dense", w, u, expert, weight)
    monkeypatch.setattr(dispatch, "capacity", lambda *_: 8)
    (_, (y, overflow)), gradient = value_and_gradient("gather", w, u, expert, weight)
    np.testing.assert_allclose(y, expected[0][1][0], atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient[:2]), jax.tree.leaves(expected[1][:2]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)
    assert int(overflow) > 8 * 4


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_handful_of_tokens_reads_chosen_experts_only_and_changes_nothing(count, monkeypatch):
    monkeypatch.setattr(dispatch, "SPARSE", 0)  # as if there were many experts
    w, u, expert, weight = tokens(0.0, count + 1)
    u, expert, weight = u[1:], expert[1:], weight[1:]  # the first is padding
    (_, (y, overflow)), gradient = value_and_gradient("gather", w, u, expert, weight)
    assert dispatch.capacity(CFG, count) == count and int(overflow) == 0
    np.testing.assert_allclose(y, by_hand(w, u, expert, weight), atol=1e-5)
    unused = sorted(set(range(CFG.real)) - set(np.asarray(expert)[np.asarray(weight) != 0].tolist()))
    broken = dispatch.Experts(*(x.at[np.array(unused, int)].set(np.nan) for x in w))
    np.testing.assert_array_equal(dispatch.run(CFG, broken, u, expert, weight)[0], dispatch.run(CFG, w, u, expert, weight)[0])
    expected = value_and_gradient("dense", w, u, expert, weight)[1]
    np.testing.assert_allclose(gradient[1], expected[1], atol=2e-5, rtol=1e-5)
    for ours, theirs in zip(gradient[0], expected[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 7, 40])
def test_experts_apart_compute_the_same(count, tight):
    w, u, expert, weight = tokens(3.0, count + 1)
    u, expert, weight = u[1:], expert[1:], weight[1:]
    cfg = dataclasses.replace(CFG, dispatch="gather")
    y, overflow = jax.jit(lambda w, *rest: dispatch.run(cfg, dispatch.served(w, few=True), *rest))(w, u, expert, weight)
    np.testing.assert_allclose(y, by_hand(w, u, expert, weight), atol=1e-5)
    assert (int(overflow) > 0) == (count > 24)


@pytest.mark.parametrize("count, skew", [(1, 0.0), (40, 0.0), (40, 9.0), (300, 3.0)])
def test_experts_in_turn_compute_the_same_and_nobody_waits(count, skew, tight):
    w, u, expert, weight = tokens(skew, count + 1)
    u, expert, weight = u[1:], expert[1:], weight[1:]
    cfg = dataclasses.replace(CFG, dispatch="gather")
    y, overflow = jax.jit(lambda w, *rest: dispatch.run(cfg, dispatch.served(w, few=False), *rest))(w, u, expert, weight)
    np.testing.assert_allclose(y, by_hand(w, u, expert, weight), atol=1e-5)
    assert int(overflow) == 0
