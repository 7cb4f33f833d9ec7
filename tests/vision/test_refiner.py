"""Refiner: conditions, packs, sampler against a known flow, the released reference's numbers (07b)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.vision import autoencoder, refiner
from tests.golden_io import read_case, relative_error
from tests.vision import packs


@pytest.fixture(scope="module")
def setup():
    vision = packs.tiny_config().vision
    params = refiner.init_refiner(vision, jax.random.key(0))["dit"]
    module, auto = refiner.make_refiner(vision), autoencoder.make_autoencoder(vision.refiner.autoencoder)
    batch = packs.batch(vision, [[(1, 2), (2, 2)]])
    return module, params, auto, batch


def _velocity(setup, x, cond, ref, keep_cond=(1, 1, 1), keep_ref=(1, 1, 1)):
    module, params, auto, batch = setup
    keep = {"cond": jnp.array([keep_cond], jnp.float32), "ref": jnp.array([keep_ref], jnp.float32)}
    t = jnp.array([[0.3, 0.6, 0.5]])
    return module.apply({"params": params}, x, t, cond, ref, batch, auto.layout(batch), keep)


def test_an_image_sees_only_its_own_noise_reference_and_codes(setup):
    module, params, auto, batch = setup
    key = jax.random.key(1)
    x = jax.random.normal(key, (1, 24, auto.token_dim))
    cond, ref = jax.random.normal(key, (1, 6, 6)), auto.encode({}, batch["patches"], batch)
    base = _velocity(setup, x, cond, ref)
    for changed in ((x.at[:, 8:].add(1.0), cond, ref), (x, cond.at[:, 2:].add(1.0), ref), (x, cond, ref.at[:, 8:].add(1.0))):
        out = _velocity(setup, *changed)
        np.testing.assert_allclose(out[:, :8], base[:, :8], atol=1e-4)
        assert float(jnp.abs(out[:, 8:] - base[:, 8:]).max()) > 1e-3


def test_dropped_conditions_are_not_seen(setup):
    module, params, auto, batch = setup
    key = jax.random.key(2)
    x = jax.random.normal(key, (1, 24, auto.token_dim))
    cond, ref = jax.random.normal(key, (1, 6, 6)), auto.encode({}, batch["patches"], batch)
    off = (0, 1, 1)
    a, b = (_velocity(setup, x, cond, r, keep_ref=off) for r in (ref, ref + 1))
    np.testing.assert_allclose(a[:, :8], b[:, :8], atol=1e-4)
    assert float(jnp.abs(a[:, 8:] - b[:, 8:]).max()) > 1e-3
    a, b = (_velocity(setup, x, c, ref, keep_cond=off) for c in (cond, cond + 1))
    np.testing.assert_allclose(a[:, :8], b[:, :8], atol=1e-4)


class _Linear:
    """A stand-in whose velocity is known: conditions add constants."""

    def apply(self, variables, x, t, cond, ref, pack, layout, keep):
        del variables, t, cond, ref, pack, layout
        return jnp.full(x.shape, 1.0) + keep["ref"][0, 0] * 10 + keep["cond"][0, 0] * 100


def test_sampler_integrates_and_guides():
    pack = {"grid": jnp.ones((1, 1, 2), jnp.int32)}
    x = jnp.zeros((1, 2, 3))
    plain = refiner.sample(_Linear(), None, x, None, None, pack, None, steps=4, cond_scale=1.0, ref_scale=1.0)
    np.testing.assert_allclose(plain, 111.0, rtol=1e-6)
    guided = refiner.sample(_Linear(), None, x, None, None, pack, None, steps=4, cond_scale=1.5, ref_scale=2.0)
    np.testing.assert_allclose(guided, 1 + 2 * 10 + 1.5 * 100, rtol=1e-6)


def test_clean_prediction_is_a_velocity(setup):
    module, params, auto, batch = setup
    x = jax.random.normal(jax.random.key(3), (1, 24, auto.token_dim))
    cond, ref = jnp.zeros((1, 6, 6)), jnp.zeros_like(x)
    t = jnp.array([[0.3, 0.6, 0.5]])
    keep = {"cond": jnp.ones((1, 3)), "ref": jnp.ones((1, 3))}
    layout = auto.layout(batch)
    clean = module.clone(prediction="velocity").apply({"params": params}, x, t, cond, ref, batch, layout, keep)
    v = module.apply({"params": params}, x, t, cond, ref, batch, layout, keep)
    np.testing.assert_allclose((x + 0.7 * v)[:, :8], clean[:, :8], atol=1e-4)
    np.testing.assert_allclose((x + 0.4 * v)[:, 8:], clean[:, 8:], atol=1e-4)


def test_correction_starts_at_the_reference():
    vision = packs.tiny_config().vision
    vision.refiner.prediction = "correction"
    module, auto = refiner.make_refiner(vision), autoencoder.make_autoencoder(vision.refiner.autoencoder)
    params = refiner.init_refiner(vision, jax.random.key(0))["dit"]
    own = module, params, auto, packs.batch(vision, [[(1, 2), (2, 2)]])
    x, ref = jax.random.normal(jax.random.key(3), (2, 1, 24, auto.token_dim))
    v = _velocity(own, x, jnp.zeros((1, 6, 6)), ref, keep_ref=(1, 0, 1))  # t is 0.3 and 0.6
    np.testing.assert_allclose((x + 0.7 * v)[:, :8], ref[:, :8], atol=1e-4)
    np.testing.assert_allclose((x + 0.4 * v)[:, 8:], 0, atol=1e-4)


def released_params(weights, config, depth):
    """Parameters of `Refiner` from the released names; the projection of the codes is the identity."""
    root = "image_refiner.base_transformer."
    dense = lambda name: {"kernel": weights[f"{root}{name}.weight"].T} | (
        {"bias": weights[f"{root}{name}.bias"]} if f"{root}{name}.bias" in weights else {})
    norm = lambda name: {"scale": weights[f"{root}{name}.weight"]}

    def block(at, modulated):
        attn = {name: dense(f"{at}.attn.{name}") for name in ("to_q", "to_k", "to_v")}
        attn |= {"to_out": dense(f"{at}.attn.to_out.0"), "norm_q": norm(f"{at}.attn.norm_q"), "norm_k": norm(f"{at}.attn.norm_k")}
        out = {name: norm(f"{at}.{name}") for name in ("norm2", "ffn_norm1", "ffn_norm2")}
        out |= {f"linear_{i}": dense(f"{at}.feed_forward.linear_{i}") for i in (1, 2, 3)}
        out["norm1"] = norm(f"{at}.norm1.norm" if modulated else f"{at}.norm1")
        return out | {"attn": attn} | ({"modulate": dense(f"{at}.norm1.linear")} if modulated else {})

    def stack(name, count, modulated):
        blocks = [block(f"{name}.{i}", modulated) for i in range(count)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)

    few, text = config["num_refiner_layers"], config["text_feat_dim"]
    embed = "time_caption_embed."
    return {
        "x_embedder": dense("x_embedder"), "ref_embedder": dense("ref_image_patch_embedder"),
        "time1": dense(f"{embed}timestep_embedder.linear_1"), "time2": dense(f"{embed}timestep_embedder.linear_2"),
        "caption_norm": norm(f"{embed}caption_embedder.0"), "caption_embedder": dense(f"{embed}caption_embedder.1"),
        "cond_proj": {"kernel": np.eye(text, dtype=np.float32), "bias": np.zeros(text, np.float32)},
        "image_index_embedding": weights[f"{root}image_index_embedding"],
        "noise_refiner": stack("noise_refiner", few, True), "ref_refiner": stack("ref_image_refiner", few, True),
        "context_refiner": stack("context_refiner", few, False), "layers": stack("layers", depth, True),
        "modulate_out": dense("norm_out.linear_1"), "out": dense("norm_out.linear_2"),
    }


def test_matches_the_released_refiner():
    case, weights, data = read_case("07b_refiner")
    config = case["transformer_config"]
    (b, c, h, w), p = data["latents"].shape, config["patch_size"]
    rows, cols = h // p, w // p
    tokens = lambda x: x.reshape(b, c, rows, p, cols, p).transpose(0, 2, 4, 3, 5, 1).reshape(b, rows * cols, p * p * c)
    images = lambda x: np.asarray(x).reshape(b, rows, cols, p, p, c).transpose(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
    params = released_params(weights, config, config["num_layers"])
    module = refiner.Refiner(
        width=config["hidden_size"], depth=config["num_layers"], refiner_layers=config["num_refiner_layers"],
        heads=config["num_attention_heads"], kv_heads=config["num_kv_heads"], cond_dim=config["text_feat_dim"],
        ff=params["layers"]["linear_1"]["kernel"].shape[-1], references=5, token_dim=p * p * c, prediction="velocity",
    )
    ones = np.ones((b, rows * cols), np.int32)
    at = np.broadcast_to(np.arange(rows * cols), ones.shape)
    layout = {"segment": ones, "row": at // cols, "col": at % cols}
    length = data["text_feats"].shape[1]
    pack = {"cell_segment": np.ones((b, length), np.int32), "grid": np.tile([[1, length]], (b, 1, 1))}
    t = data["timestep"][:, None]

    def velocity(cond, ref):
        keep = {"cond": jnp.full((b, 1), cond), "ref": jnp.full((b, 1), ref)}
        args = (tokens(data["latents"]), t, data["text_feats"], tokens(data["ref_latents"]), pack, layout, keep)
        with jax.default_matmul_precision("highest"):
            return images(module.apply({"params": params}, *args))

    full = velocity(1.0, 1.0)
    assert relative_error(full, data["velocity"]) < 1e-4
    nothing, reference = velocity(0.0, 0.0), velocity(0.0, 1.0)
    assert relative_error(nothing, data["velocity_noref"]) < 1e-4
    assert relative_error(reference, data["velocity_ref_textzero"]) < 1e-4
    guided = nothing + 1.5 * (reference - nothing) + 1.5 * (full - reference)
    assert relative_error(guided, data["velocity_cfg1p5_1p5"]) < 1e-4
