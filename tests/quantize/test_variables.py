"""Where a quantizer's numbers are kept: statistics are what readers need, gradient reaches parameters through the view."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.quantize import rvq, variables

FACTOR = {"factor_dim": 2, "commitment": "residual"}
CASES = {
    "ema": ({}, {"codebook", "count", "sum"}, set()),
    "sgd": ({"update": "sgd"}, {"codebook", "count", "base"}, {"code_table"}),
    "sgd shared": ({"update": "sgd", "codebook": "shared"}, {"codebook", "count", "base"}, {"code_table"}),
    "simvq": ({"kind": "simvq"}, {"codebook", "count", "base"}, {"map"}),
    "fsq": ({"kind": "fsq"}, {"codebook", "count", "in", "out"}, {"in", "out"}),
    "factor": (FACTOR, {"codebook", "count", "sum", "in", "out"}, {"in", "out"}),
    "all": (FACTOR | {"kind": "simvq"}, {"codebook", "count", "base", "in", "out"}, {"map", "in", "out"}),
}  # fmt: skip
X = jax.random.normal(jax.random.key(1), (24, 5))
ONES = jnp.ones(24)


@pytest.mark.parametrize("case", CASES)
def test_one_update_publishes_what_the_forward_pass_saw(case):
    fields, kept, trained = CASES[case]
    cfg = rvq.RVQConfig(sizes=(8, 8), dim=5, **fields)
    params, stats = rvq.init(cfg, jax.random.key(0))
    assert set(stats) == kept and set(params) == trained
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, stats))]
    assert len(set(pointers)) == len(pointers)  # a training step gives its state away
    jax.tree.map(np.testing.assert_array_equal, rvq.view(cfg, params, stats), stats)

    @jax.jit
    def update(params):
        seen = rvq.view(cfg, params, stats)
        one = rvq.statistics(cfg, seen, X, rvq.encode(cfg, seen, X), ONES, jax.random.key(2))
        return seen, rvq.apply(cfg, stats, jax.tree.map(lambda a: a + a + a, one), jax.random.key(3))  # three micro-batches

    seen, new = update(jax.tree.map(lambda p: p + 0.1, params))
    assert jax.tree.structure(new) == jax.tree.structure(stats)
    for name in variables.published(cfg):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new[name], seen[name])


@pytest.mark.parametrize("case", ["sgd", "fsq", "all"])
def test_gradient_reaches_all_parameters(case):
    cfg = rvq.RVQConfig(sizes=(8, 8), dim=5, **CASES[case][0])
    params, stats = rvq.init(cfg, jax.random.key(0))

    @jax.jit
    def gradients(params):
        def loss(params):
            out = rvq.quantize(cfg, rvq.view(cfg, params, stats), X, ONES)
            return jnp.sum((out.q_ND - 1) ** 2) + out.commit[0] + out.codebook[0]

        return jax.grad(loss)(params)

    for leaf in jax.tree.leaves(gradients(params)):
        assert np.isfinite(leaf).all() and float(jnp.abs(leaf).max()) > 0


def test_tables_are_what_codes_add():
    cfg = rvq.RVQConfig(sizes=(8, 12), dim=5, kind="fsq")
    stats = rvq.init_stats(cfg, jax.random.key(0))
    tables, codes = rvq.tables(cfg, stats), rvq.encode(cfg, stats, X)
    expected = np.asarray(tables["0"])[codes[:, 0]] + np.asarray(tables["1"])[codes[:, 1]]
    np.testing.assert_allclose(rvq.decode(cfg, stats, codes), expected, atol=1e-6)
