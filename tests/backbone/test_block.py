"""The trunk: packs equal to separate documents, padding, loops, rematerialisation. Its golden case: tests/tools/test_parity.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.backbone import balance, block, dispatch
from dina.backbone.config import AttentionConfig, BackboneConfig, ExpertsConfig


def run(cfg, params, *args, **kwargs):
    return jax.jit(lambda p, a, k: block.Backbone(cfg).apply(p, *a, **k))(params, args, kwargs)


ATTENTION = AttentionConfig(2, 12, 8, 8, 4, 8, block=8)
EXPERTS = ExpertsConfig(4, 2, 2, 12, capacity_factor=1.25, target_top_k=1.0)
CONFIG = BackboneConfig(16, 2, 24, unroll=1, attention=ATTENTION, experts=EXPERTS)


def small(block=8, dispatch="gather", **settings):
    """Two rows: two documents and padding, and one long document."""
    attention, experts = dataclasses.replace(ATTENTION, block=block), dataclasses.replace(EXPERTS, dispatch=dispatch)
    cfg = dataclasses.replace(CONFIG, attention=attention, experts=experts, **settings)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 24, 16)), jnp.float32)
    segment = np.array([[1] * 10 + [2] * 9 + [0] * 5, [1] * 24], np.int32)
    position = np.array([[*range(10), *range(9), *[0] * 5], range(24)], np.int32)
    return cfg, initial(cfg.width), x, position, segment, balance.init_router_bias(cfg)


@functools.cache
def initial(width):
    """Parameters of `small()`; how the model runs does not enter them."""
    plain = dataclasses.replace(CONFIG, experts=dataclasses.replace(CONFIG.experts, dispatch="dense"))
    ones = np.ones((1, 2), np.int32)
    init = jax.jit(block.Backbone(plain).init)
    return init(jax.random.key(0), jnp.ones((1, 2, width)), ones, ones, balance.init_router_bias(plain))


def test_documents_of_a_pack_equal_documents_alone():
    cfg, params, x, position, segment, bias = small()
    packed = run(cfg, params, x, position, segment, bias)
    for start, stop in ((0, 10), (10, 19)):
        alone = run(cfg, params, x[:1, start:stop], position[:1, start:stop], np.ones((1, stop - start), np.int32), bias)
        np.testing.assert_allclose(packed.h_BSD[0, start:stop], alone.h_BSD[0], atol=1e-5)
    assert np.isfinite(packed.h_BSD).all()
    assert int(packed.counts_LGE.sum()) == cfg.layers * cfg.experts.top_k * int((segment > 0).sum())


@pytest.mark.parametrize("rows, settings, tolerance", [
    (1, {}, 1e-5), (2, {}, 1e-5), (17, {}, 1e-5), (2, {"dispatch": "ragged"}, 1e-5), (2, {"decode": "expanded"}, 1e-5), (2, {"dtype": "bfloat16"}, 0.05),
])  # fmt: skip
def test_served_parameters_compute_the_same(rows, settings, tolerance):
    decode = settings.get("decode", "absorbed")
    cfg, params, x, position, segment, bias = small(**{k: v for k, v in settings.items() if k != "decode"})
    cfg = dataclasses.replace(cfg, attention=dataclasses.replace(cfg.attention, decode=decode))
    served = {"params": block.serve(cfg, params["params"], rows)}
    x, position, ones = x[1:].repeat(rows, 0), position[1:].repeat(rows, 0), np.ones((rows, 24), np.int32)
    want, cache = run(cfg, params, x, position, ones, bias), block.init_cache(cfg, rows, 24, served["params"])
    for start, stop in ((0, 20), (20, 21), (21, 24)):
        part = run(cfg, served, x[:, start:stop], position[:, start:stop], ones[:, start:stop], bias, cache=cache, slot=start)
        np.testing.assert_allclose(part.h_BSD.astype(jnp.float32), want.h_BSD[:, start:stop].astype(jnp.float32), atol=tolerance)
        cache = part.cache
    assert ("served" in served["params"]["layers_0"]["experts"]) == (cfg.experts.dispatch == "gather")
    with pytest.raises(ValueError, match="not made for these parameters"):
        run(cfg, served, x[:, :1], position[:, :1], ones[:, :1], bias, cache=block.init_cache(cfg, rows, 24), slot=0)


@functools.cache
def reference():
    return loss_and_gradient(*small())


def loss_and_gradient(cfg, params, x, position, segment, bias):
    def loss(params, x):
        out = block.Backbone(cfg).apply(params, x, position, segment, bias)
        return jnp.sum(jnp.where(segment[..., None] > 0, jnp.sin(out.h_BSD), 0)) + 1e-3 * out.router_z[0]

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)


@pytest.mark.parametrize("settings", [{"unroll": 2}, {"remat": "full"}, {"remat": "attention+experts"}, {"block": 0}, {"dispatch": "dense"}])
def test_how_it_runs_does_not_change_what_it_computes(settings):
    other = loss_and_gradient(*small(**settings))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), reference(), other)


def test_padding_has_no_gradient_and_cannot_poison():
    cfg, params, x, position, segment, bias = small()
    loss, (_, dx) = reference()
    assert np.all(np.asarray(dx)[segment == 0] == 0)
    changed, _ = loss_and_gradient(cfg, params, jnp.where(segment[..., None] > 0, x, 7.0), position, segment, bias)
    assert loss == changed


def test_bfloat16_stays_close():
    cfg, params, x, position, segment, bias = small()
    exact = run(cfg, params, x, position, segment, bias)
    half = run(dataclasses.replace(cfg, dtype="bfloat16"), params, x, position, segment, bias)
    assert half.h_BSD.dtype == jnp.float32 and half.stream_BSD.dtype == jnp.float32
    assert 1e-6 < float(jnp.abs(half.h_BSD - exact.h_BSD)[0, :10].mean()) < 0.05


def test_a_layer_keeps_what_its_policy_names():
    cfg, params, x, position, segment, bias = small(remat="full")
    saved = {}
    for remat in ("none", "full", "attention", "attention+experts"):
        forward = lambda p: jnp.sum(block.Backbone(dataclasses.replace(cfg, remat=remat)).apply(p, x, position, segment, bias).h_BSD)
        residuals = jax.eval_shape(lambda p: jax.vjp(forward, p)[1], params)
        saved[remat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    one = x.size * cfg.layers
    buffers = cfg.layers * cfg.experts.real * dispatch.capacity(cfg.experts, x.size // cfg.width) * cfg.width
    assert saved["attention"] == saved["full"] + 2 * one  # two attentions a layer
    assert saved["attention+experts"] == saved["attention"] + buffers < saved["none"]
