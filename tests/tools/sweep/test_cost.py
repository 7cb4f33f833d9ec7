"""The price of the depth head against its matrix products; timed programs report what they hold."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.backbone.config import DepthConfig
from dina.heads import depth
from tools.sweep import cost


def _products(jaxpr) -> int:
    """Multiplications and additions of all matrix products of a jaxpr, those inside of other calls included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += _products(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("sizes", [(64, 64), (256, 64, 64, 64)])
def test_head_flops_are_those_of_its_matrix_products(sizes):
    cfg, trunk, positions = DepthConfig(width=64, layers=2, heads=4, ffn_scale=8), 96, 32
    module = depth.DepthHead(cfg, sizes)
    rows = jax.ShapeDtypeStruct((len(sizes), positions, trunk), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), rows)["params"]
    made = jax.make_jaxpr(lambda p, rows: depth.teacher_forced(module, p, rows))(params, rows)
    assert cost.head_flops(cfg, trunk, sizes) * positions == _products(made.jaxpr)


def test_a_program_is_timed_per_cell_and_weighed():
    found = cost.program((lambda x: jnp.tanh(x @ x), (np.ones((256, 256), np.float32),), 8), 3)
    low, middle, high = found["us_cell"]
    assert 0 < low <= middle <= high and found["mib"] >= 0.5  # the argument and the result have a quarter each
