"""Latent attention: the two cached forms agree with training, segments are walls, padding is zero."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.backbone import rope
from dina.backbone.attention import MLA
from dina.backbone.config import AttentionConfig

LENGTH = 12
SIZES = AttentionConfig(heads=2, q_rank=10, kv_rank=8, nope=6, rope=4, v=5, block=0)


def setting(**settings):
    cfg = dataclasses.replace(SIZES, **settings)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, 14)), jnp.float32)
    segment = jnp.asarray([[1] * 5 + [2] * 7, [0] * 4 + [1] * 8], jnp.int32)
    rotary = rope.table(jnp.asarray([[*range(5), *range(7)], [0] * 4 + [*range(8)]]), 4, 1e4)
    return MLA(cfg), initial(x, rotary, segment), x, rotary, segment


@functools.cache
def _initialiser():
    return jax.jit(MLA(SIZES).init)


def initial(x, rotary, segment):
    return _initialiser()(jax.random.key(0), x, rotary, segment)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, *args):
    return module.apply(*args)


@pytest.mark.parametrize("decode", ["absorbed", "expanded"])
@pytest.mark.parametrize("chunks", [(12,), (5, 4, 3), (1,) * 12])
def test_cached_calls_equal_training(decode, chunks):
    module, params, x, rotary, segment = setting(decode=decode)
    expected, _ = apply(module, params, x, rotary, segment)
    cache = (jnp.zeros((2, LENGTH + 3, 8)), jnp.zeros((2, LENGTH + 3, 4)))
    held, parts, start = jnp.zeros((2, LENGTH + 3), jnp.int32), [], 0
    for size in chunks:
        now = slice(start, start + size)
        held = held.at[:, now].set(segment[:, now])
        y, cache = apply(module, params, x[:, now], tuple(t[:, now] for t in rotary), segment[:, now], cache, held, jnp.int32(start))
        parts.append(y)
        start += size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), expected, atol=1e-5)


@pytest.mark.parametrize("block", [0, 4, 5])
def test_no_position_sees_the_future_or_another_document(block):
    module, params, x, rotary, segment = setting(block=block)
    base, _ = apply(module, params, x, rotary, segment)
    np.testing.assert_allclose(base, apply(MLA(SIZES), params, x, rotary, segment)[0], atol=1e-6)
    moved, _ = apply(module, params, x.at[0, 3].add(1.0), rotary, segment)
    changed = np.abs(np.asarray(moved - base)).max(-1)[0] > 1e-6
    np.testing.assert_array_equal(changed, [False] * 3 + [True] * 2 + [False] * 7)


def test_padding_is_zero_and_gradients_are_finite():
    module, params, x, rotary, segment = setting()
    y, _ = apply(module, params, x, rotary, segment)
    assert np.all(np.asarray(y)[np.asarray(segment) == 0] == 0)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(apply(module, p, x, rotary, jnp.zeros_like(segment))[0])))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_only_relative_positions_matter():
    module, params, x, _, segment = setting()
    outs = [apply(module, params, x, rope.table(jnp.arange(LENGTH)[None] + start, 4, 1e4), segment)[0] for start in (0, 1000)]
    np.testing.assert_allclose(*outs, atol=1e-4)
