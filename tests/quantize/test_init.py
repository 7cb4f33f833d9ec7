"""The start from real vectors: k-means finds clusters, seeded, blind to padding, no empty code, shared books pool the
residuals; every kind of quantizer starts with codes that are used and levels that lower the energy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.config import InputError
from dina.quantize import rvq


def _clusters(n=256, d=5, centres=8):
    key = jax.random.key(0)
    centre = 10 * jax.random.normal(key, (centres, d))
    return centre, centre[jnp.arange(n) % centres] + 0.05 * jax.random.normal(jax.random.key(1), (n, d))


def _energy(cfg, stats, x):
    out = rvq.quantize(cfg, stats, x, jnp.ones(len(x)))
    return np.asarray(out.energy_L[0] / out.energy_L[1])


def test_finds_separated_clusters_and_counts_them():
    centre, x = _clusters()
    cfg = rvq.RVQConfig(sizes=(24, 4), dim=5)
    stats = rvq.kmeans_init(cfg, x, jnp.ones(len(x)), jax.random.key(2), per_update=64.0)
    distance = ((stats["codebook"]["0"][:, None] - centre) ** 2).sum(-1)
    assert set(np.asarray(distance.argmin(-1))) == set(range(8)) and float(jnp.median(distance.min(-1))) < 0.1
    mass = jax.ops.segment_sum(stats["count"]["0"], distance.argmin(-1), 8)
    np.testing.assert_allclose(mass, 8.0)  # 256 vectors, 32 a cluster, scaled to 64 an update
    np.testing.assert_allclose(stats["sum"]["0"], stats["codebook"]["0"] * stats["count"]["0"][:, None], rtol=1e-6)


def test_same_seed_same_books_and_padding_is_ignored():
    _, x = _clusters()
    cfg = rvq.RVQConfig(sizes=(16, 16), dim=5)
    mask = (jnp.arange(len(x)) < 200).astype(jnp.float32)
    one = rvq.kmeans_init(cfg, x, mask, jax.random.key(3))
    two = rvq.kmeans_init(cfg, x.at[200:].set(1e3), mask, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    with pytest.raises(InputError, match="no valid vector"):
        rvq.kmeans_init(cfg, x, mask * 0, jax.random.key(3))


def test_every_code_lives_and_each_level_halves_the_energy():
    x = jax.random.normal(jax.random.key(4), (1024, 4))
    cfg = rvq.RVQConfig(sizes=(32, 32, 32), dim=4)
    stats = rvq.kmeans_init(cfg, x, jnp.ones(1024), jax.random.key(5))
    assert min(float(count.min()) for count in stats["count"].values()) >= 1
    energy = _energy(cfg, stats, x)
    assert (energy < [0.5, 0.25, 0.125]).all()


def test_shared_book_serves_all_levels():
    x = jax.random.normal(jax.random.key(6), (1024, 4))
    cfg = rvq.RVQConfig(sizes=(64, 64, 64), dim=4, codebook="shared")
    stats = rvq.kmeans_init(cfg, x, jnp.ones(1024), jax.random.key(7))
    energy = _energy(cfg, stats, x)
    assert (np.diff(energy) < 0).all() and energy[-1] < 0.1
    np.testing.assert_allclose(stats["count"]["0"].sum(), 3 * 1024)


def test_fewer_vectors_than_codes():
    x = jax.random.normal(jax.random.key(8), (6, 4))
    cfg = rvq.RVQConfig(sizes=(16,), dim=4)
    stats = rvq.kmeans_init(cfg, x, jnp.ones(6), jax.random.key(9))
    assert np.isfinite(stats["codebook"]["0"]).all() and _energy(cfg, stats, x)[0] < 1e-3


def test_a_crowd_of_equal_vectors_takes_one_centre():
    x = jnp.concatenate([jnp.full((180, 5), 2.0), 3 * jax.random.normal(jax.random.key(4), (76, 5))])
    cfg = rvq.RVQConfig(sizes=(32,), dim=5)
    stats = rvq.kmeans_init(cfg, x, jnp.ones(len(x)), jax.random.key(5), iterations=0)
    assert int((jnp.abs(stats["codebook"]["0"] - 2.0).max(-1) < 0.01).sum()) == 1  # drawn evenly it would be 22


STARTS = {
    "sgd": {"update": "sgd"}, "cosine": {"metric": "cosine"}, "simvq": {"kind": "simvq"}, "fsq": {"kind": "fsq"},
    "factor": {"factor_dim": 3, "commitment": "residual", "metric": "cosine"},
}  # fmt: skip


@pytest.mark.parametrize("case", STARTS)
def test_every_kind_starts_useful(case):
    x = jax.random.normal(jax.random.key(4), (512, 6)) * jnp.array([3.0, 2.0, 1.0, 1.0, 0.5, 0.5])
    cfg = rvq.RVQConfig(sizes=(32, 32, 32), dim=6, **STARTS[case])
    mask = (jnp.arange(512) < 400).astype(jnp.float32)
    params, stats = rvq.start(cfg, x.at[400:].set(1e3), mask, jax.random.key(5), per_update=100.0)
    out = rvq.quantize(cfg, rvq.view(cfg, params, stats), x, mask)
    energy = np.asarray(out.energy_L[0] / out.energy_L[1])
    assert (np.diff(energy) < 0).all() and energy[-1] < 0.1
    assert float(rvq.usage(out.codes_NL, mask, cfg.sizes)["usage"].min()) > 0.6
    hits = rvq.code_counts(out.codes_NL, mask, cfg.sizes)
    np.testing.assert_allclose(stats["count"]["0"], hits[0] / 4, atol=0.3)  # 400 vectors, 100 an update
