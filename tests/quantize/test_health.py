"""Windows: numbers by hand, sums of parts, closing and opening."""

import jax
import jax.numpy as jnp
import numpy as np

from dina.quantize import health, rvq


def test_report_by_hand():
    codes = jnp.array([[0, 3]] * 10 + [[1, 3]] * 9 + [[2, -1], [7, 2]])
    mask = jnp.ones(21).at[20].set(0)
    out = health.report(health.observe(codes, mask, (8, 4), (jnp.array([30.0, 6.0]), jnp.full(2, 60.0))))
    np.testing.assert_allclose(out["usage"], [3 / 8, 1 / 4])
    p = np.array([10, 9, 1]) / 20
    np.testing.assert_allclose(out["perplexity"], [np.exp(-(p * np.log(p)).sum()), 1.0], rtol=1e-6)
    np.testing.assert_allclose(out["energy"], [0.5, 0.1])
    np.testing.assert_array_equal(out["dead"], [5, 3])  # one hit is 0.4 of the mean 2.5
    assert float(health.report(health.observe(codes, mask, (8, 4)), 0.5)["dead"][0]) == 6 and float(out["vectors"]) == 20


def test_a_window_is_the_sum_of_its_parts_and_not_a_mean_of_them():
    cfg = rvq.RVQConfig(sizes=(16, 16), dim=3)
    stats, x = rvq.init_stats(cfg, jax.random.key(0)), jax.random.normal(jax.random.key(1), (60, 3))

    def seen(part):
        out = rvq.quantize(cfg, stats, part, jnp.ones(len(part)))
        return health.observe(out.codes_NL, jnp.ones(len(part)), cfg.sizes, out.energy_L)

    parts = [seen(x[i : i + 20]) for i in (0, 20, 40)]
    total = health.report(jax.tree.map(lambda *leaves: sum(leaves), *parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), total, health.report(seen(x)))
    assert float(total["usage"][0]) > np.mean([health.report(part)["usage"][0] for part in parts])


def test_windows_close_at_their_length():
    state, codes = health.rolling((4,)), jnp.zeros((3, 1), jnp.int32)
    lengths = []
    for step in range(7):
        seen = health.observe(codes + step % 4, jnp.ones(3), (4,), (jnp.ones(1), jnp.ones(1)))
        state = health.roll(state, seen, length=8)
        window = health.report(health.latest(state))
        lengths.append((int(window["vectors"]), float(window["usage"][0]) * 4))
    # open windows of 3 and 6 until the first of 9 is full; the second one is full at the sixth step
    assert lengths == [(3, 1), (6, 2), (9, 3), (9, 3), (9, 3), (9, 3), (9, 3)]
    assert int(state["open"]["vectors"]) == 3
    np.testing.assert_array_equal(state["closed"]["hits"]["0"], [3, 3, 0, 3])
