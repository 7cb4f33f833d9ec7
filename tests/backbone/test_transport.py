"""Tokens that travel to their experts give what whole experts give, values and gradients, however uneven the choices are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dina import sharding
from dina.backbone import dispatch, transport
from dina.backbone.config import EXCHANGES, ExpertsConfig

CFG = ExpertsConfig(real=8, zero=4, top_k=3, hidden=6, target_top_k=2.0)
TOKENS, ROWS, WIDTH = 40, 28, 5  # of a device
SHARDED = P(sharding.BATCH_AXES)


def _mesh():
    return sharding.make_mesh({"data": 2, "expert": 4})


def _case(kind):
    """Weights, and tokens of eight devices; every seventh is padding. One device's, or all tokens want expert 0 first."""
    random = np.random.default_rng(0)
    score = random.normal(size=(8, TOKENS, CFG.total))
    score[{"even": slice(0, 0), "one device": slice(5, 6), "all": slice(None)}[kind], :, 0] += 99
    expert = np.argsort(-score.reshape(8 * TOKENS, -1), 1)[:, : CFG.top_k].astype(np.int32)
    weight = random.uniform(0.1, 1.0, expert.shape).astype(np.float32)
    weight[::7] = 0
    w = dispatch.Experts(*(random.normal(size=s).astype(np.float32) for s in ((8, WIDTH, 6), (8, WIDTH, 6), (8, 6, WIDTH))))
    return w, random.normal(size=(len(expert), WIDTH)).astype(np.float32), expert, weight


def _loss(cfg, axes, w, u, expert, weight):
    y, overflow = dispatch.run(cfg, w, u, expert, weight, axes)
    return jnp.sum(jnp.sin(y)), (y, overflow[None])


@functools.cache
def _compiled(way):
    cfg = dataclasses.replace(CFG, dispatch=way)
    axes = ("data", "expert")

    def local(w, u, expert, weight):
        def loss(w, u, weight):
            parts = w if way == "dense" else dispatch.Experts(*(sharding.Shard(x, ((-3, ("expert",)),)) for x in w))
            return _loss(cfg, axes, parts, u, expert, weight)

        (_, aux), (dw, du, dweight) = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(w, u, weight)
        return aux, jax.tree.map(lambda g: jax.lax.psum(g, axes if way == "dense" else "data"), dw), du, dweight

    experts = P() if way == "dense" else P("expert")
    out_specs = ((SHARDED, SHARDED), experts, SHARDED, SHARDED)
    return jax.jit(jax.shard_map(local, mesh=_mesh(), in_specs=(experts, SHARDED, SHARDED, SHARDED), out_specs=out_specs, check_vma=False))


def _run(way, case):
    w, *rest = case
    with jax.set_mesh(_mesh()):
        put = lambda x, spec: jax.device_put(x, jax.NamedSharding(_mesh(), spec))
        w = jax.tree.map(lambda x: put(x, P() if way == "dense" else P("expert")), w)
        return jax.device_get(_compiled(way)(w, *(put(x, SHARDED) for x in rest)))


@pytest.mark.parametrize("kind", ["even", "one device", "all"])
@pytest.mark.parametrize("way", EXCHANGES)
def test_every_transport_equals_dense(way, kind, monkeypatch):
    monkeypatch.setattr(transport, "places", lambda *_: ROWS)
    case = _case(kind)
    (y, overflow), *gradients = _run(way, case)
    (want, _), *expected = _run("dense", case)
    np.testing.assert_allclose(y, want, atol=2e-5)
    live = (case[3] != 0) & (case[2] < CFG.real)
    for ours, theirs in zip((*gradients[0], gradients[1], np.where(live, gradients[2], 0)), (*expected[0], expected[1], np.where(live, expected[2], 0)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5, rtol=1e-5)
    # 28 rows for one device are enough for even choices; buffers shared by all senders also for one uneven device.
    enough = {"even": EXCHANGES, "one device": ("ragged_all_to_all",), "all": ()}[kind]
    assert (int(overflow.sum()) == 0) == (way in enough)


def test_a_token_goes_to_a_device_once_and_identity_experts_stay():
    key = np.array([[0, 1, 7], [8, 3, 2], [8, 8, 8], [5, 0, 4]], np.int32)  # 8: none; two experts a device
    np.testing.assert_array_equal(transport.destinations(key, 2, 4), [[0, 4, 3], [4, 1, 4], [4, 4, 4], [2, 0, 4]])


def test_room_for_a_device_is_what_even_choices_need_and_never_more_than_all_tokens():
    random, tokens, devices = np.random.default_rng(0), 4096, 4
    key = np.argsort(random.random((tokens, CFG.real)), 1)[:, :2].astype(np.int32)
    to = np.asarray(transport.destinations(key, 2, devices))
    counts = np.bincount(to.reshape(-1), minlength=devices)[:devices]
    rows = transport.places(CFG, tokens, devices)
    assert counts.max() < rows < 1.4 * counts.mean() and transport.places(CFG, 5, devices) == 5
