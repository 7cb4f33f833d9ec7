"""Depth head: golden case 06, incremental equal to teacher-forced, level losses equal to plain cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.backbone.config import DepthConfig
from dina.heads import depth
from tests.golden_io import read_case, relative_error

PREFIX = "visual_head."


def released(weights, layers, levels, heads):
    """Released tensors in our layout."""
    get = lambda name: weights[PREFIX + name]
    width = get("hidden_proj.weight").shape[0]
    params = {"hidden_norm": {"scale": get("hidden_norm.weight")}, "hidden_proj": get("hidden_proj.weight").T,
              "head_norm": {"scale": get("headnorm.weight")}}  # fmt: skip
    for i in range(layers):
        layer, attention = f"transformer_layers.{i}.", f"transformer_layers.{i}.self_attention."
        split = lambda name: get(attention + name).T.reshape(*get(attention + name).shape[1:], heads, width // heads)
        first, second = get(layer + "linear1.weight"), get(layer + "linear2.weight")
        params[f"layer_{i}"] = {
            "norm_1": {"scale": get(layer + "layernorm1.weight")}, "norm_2": {"scale": get(layer + "layernorm2.weight")},
            "q": split("q_proj.weight"), "k": split("k_proj.weight"), "v": split("v_proj.weight"),
            "q_bias": get(attention + "q_proj.bias").reshape(heads, -1), "v_bias": get(attention + "v_proj.bias").reshape(heads, -1),
            "out": get(attention + "out_proj.weight").T.reshape(heads, -1, width), "out_bias": get(attention + "out_proj.bias"),
            "ffn_in": first.reshape(-1, levels, width).transpose(1, 2, 0),
            "ffn_out": second.reshape(width, levels, -1).transpose(1, 2, 0),
        }  # fmt: skip
    for i in range(levels):
        params[f"head_{i}"], params[f"head_{i}_bias"] = get(f"heads.{i}.weight").T, get(f"heads.{i}.bias")
    return params


@pytest.fixture(scope="module")
def golden():
    config, weights, data = read_case("06_depth_head")
    sizes = tuple(config["codebook_sizes"])
    cfg = DepthConfig(width=config["dims"], layers=config["layers"], heads=config["dims"] // 128, ffn_scale=config["ffn_scale"])
    module = depth.DepthHead(cfg, sizes)
    params = released(weights, cfg.layers, len(sizes), cfg.heads)
    tables = [jnp.asarray(weights[f"embedding_layers.{i}.weight"]) for i in range(len(sizes))]
    return module, jax.tree.map(jnp.asarray, params), tables, data


def embedded(tables, codes):
    return jnp.stack([table[codes[:, i]] for i, table in enumerate(tables)], 1)


def test_teacher_forced_logits_match_golden(golden):
    module, params, tables, data = golden
    rows = depth.input_rows(jnp.asarray(data["hidden"]), embedded(tables, data["teacher_codes"]))
    (hidden, _, _), seen = module.apply({"params": params}, rows, capture_intermediates=True)
    assert relative_error(np.swapaxes(hidden, 0, 1), data["headnorm_out"]) < 1e-5
    for i in range(module.cfg.layers):
        out = seen["intermediates"][f"layer_{i}"]["__call__"][0][0]
        assert relative_error(np.swapaxes(out, 0, 1), data[f"layer{i}_out"]) < 1e-5
    for i, logits in enumerate(depth.teacher_forced(module, params, rows)):
        assert relative_error(logits, data[f"tf_logits_level{i}"]) < 1e-5


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_greedy_codes_match_golden(golden, kind):
    module, params, tables, data = golden
    cache, row = depth.init_cache(module, len(data["hidden"])), jnp.asarray(data["hidden"])
    assert data[f"greedy_{kind}_margin"].min() > 1e-3
    for level, size in enumerate(module.sizes):
        logits, cache = depth.step(module, params, level, row, cache)
        if kind == "image":  # the end class is masked
            logits = logits[:, :size]
            assert relative_error(logits, data[f"greedy_image_logits_level{level}"]) < 1e-5
        code = jnp.argmax(logits, -1)
        np.testing.assert_array_equal(code, data[f"greedy_{kind}_codes"][:, level])
        # An end class has no row of its own: the case's tables hold one more row, as in the reference.
        row = tables[level][code] if level == 0 else row + tables[level][code]


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


def test_later_rows_do_not_change_earlier_levels():
    module, params, rows, _, _ = small()
    changed = rows.at[2].add(1.0)
    before, after = (depth.teacher_forced(module, params, r) for r in (rows, changed))
    np.testing.assert_array_equal(before[1], after[1])
    assert np.abs(np.asarray(before[2] - after[2])).max() > 1e-3
