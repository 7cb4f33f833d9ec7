"""Depth head: incremental equal to teacher-forced, level losses equal to plain cross-entropy. Golden case: tests/tools/test_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.backbone import linear
from dina.backbone.config import DepthConfig
from dina.heads import depth


def small(sizes=(9, 7, 5), **settings):
    module = depth.DepthHead(DepthConfig(width=24, layers=2, heads=2, ffn_scale=3, **settings), sizes)
    random = np.random.default_rng(0)
    rows = jnp.asarray(random.normal(size=(len(sizes), 11, 20)), jnp.float32)
    params = jax.jit(module.init)(jax.random.key(0), rows)["params"]
    params = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(random.normal(size=x.shape), x.dtype) * (x != 0), params)
    labels = jnp.asarray(np.stack([random.integers(-1, s + 1, 11) for s in sizes], 1), jnp.int32)
    weight = jnp.asarray(random.choice([0.0, 0.5, 2.0], 11), jnp.float32)
    return module, params, rows, labels, weight


@pytest.mark.parametrize("kind", ["static", "traced"])
def test_incremental_equals_teacher_forced(kind):
    module, params, rows, _, _ = small(class_multiple=4)
    cache = depth.init_cache(module, rows.shape[1])
    for level, expected in enumerate(depth.teacher_forced(module, params, rows)):
        logits, cache = depth.step(module, params, level if kind == "static" else jnp.int32(level), rows[level], cache)
        np.testing.assert_allclose(logits[:, : expected.shape[1]], expected, atol=1e-5)
        assert kind == "static" or np.all(np.asarray(logits[:, expected.shape[1] :]) < -1e29)


@pytest.mark.parametrize("settings", [{}, {"class_multiple": 4, "loss_chunk": 4}])
def test_level_losses_and_gradients_equal_plain_cross_entropy(settings):
    module, params, rows, labels, weight = small(**settings)

    def plain(params, rows):
        total = []
        for i, logits in enumerate(depth.teacher_forced(module, params, rows)):
            log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels[:, i], 0)[:, None], 1)[:, 0]
            total.append(-jnp.sum(jnp.where(labels[:, i] >= 0, weight, 0.0) * log_p))
        return jnp.stack(total)

    mix = jnp.array([1.0, 0.3, 0.7])
    ours = lambda params, rows: depth.losses(module, params, rows, labels, weight).loss_L
    np.testing.assert_allclose(ours(params, rows), plain(params, rows), rtol=1e-5)
    gradients = [jax.jit(jax.grad(lambda p, r, f=f: f(p, r) @ mix, (0, 1)))(params, rows) for f in (ours, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *gradients)
    out = depth.losses(module, params, rows, labels, weight)
    hits = [(np.argmax(x, -1) == labels[:, i]) @ np.asarray(weight) for i, x in enumerate(depth.teacher_forced(module, params, rows))]
    np.testing.assert_allclose(out.correct_L, hits)
    np.testing.assert_allclose(out.weight_L, jnp.sum((labels >= 0) * weight[:, None], 0))


@pytest.mark.parametrize("rows", [1, 11])
def test_served_parameters_compute_the_same(rows):
    module, params, inputs, _, _ = small(class_multiple=4)
    served = depth.serve(params, rows)
    assert isinstance(served["head_0"], linear.Turned) == isinstance(served["layer_1"]["out"], linear.Turned) == (rows > 1)
    caches = [depth.init_cache(module, rows)] * 2
    for level in range(3):
        found = [depth.step(module, p, jnp.int32(level), inputs[level, :rows], cache) for p, cache in zip((params, served), caches, strict=True)]
        np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-5)
        caches = [cache for _, cache in found]


def test_later_rows_do_not_change_earlier_levels():
    module, params, rows, _, _ = small()
    changed = rows.at[2].add(1.0)
    before, after = (depth.teacher_forced(module, params, r) for r in (rows, changed))
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(np.asarray(before[2] - after[2])).max() > 1e-3
