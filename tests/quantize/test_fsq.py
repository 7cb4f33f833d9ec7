"""Grids: exact products, the paper's table, rounding is the nearest point."""

import math

import jax
import numpy as np
import pytest

from dina.quantize import fsq


def test_values_multiply_to_the_size_and_are_few_and_even():
    table = {240: (8, 6, 5), 1000: (8, 5, 5, 5), 15360: (8, 8, 8, 6, 5),  # Mentzer et al. 2023, table 1
             256: (8, 8, 4), 1024: (8, 8, 4, 4), 4096: (8, 8, 8, 8), 16384: (8, 8, 8, 8, 4), 2: (2,), 7: (7,)}  # fmt: skip
    assert {size: fsq.values(size) for size in table} == table
    for size in range(300):
        values = fsq.values(size)
        assert (math.prod(values) == size and min(values) >= 2 and max(values) <= 8) if values else True
        assert bool(values) == (size > 1 and 210**8 % size == 0)  # 210 is 2 * 3 * 5 * 7


@pytest.mark.parametrize("size,near", [(22, (21, 24)), (11, (10, 12)), (1, (2,)), (8193, (8192, 8232))])
def test_the_nearest_sizes(size, near):
    assert fsq.nearest_sizes(size) == near


@pytest.mark.parametrize("size", [6, 60, 64])
def test_rounding_finds_the_nearest_point(size):
    grid = fsq.points(size)
    assert len(np.unique(grid, axis=0)) == size and np.abs(grid).max(0).tolist() == [1.0] * grid.shape[1]
    np.testing.assert_array_equal(fsq.nearest(grid, size), np.arange(size))
    z = np.asarray(jax.random.uniform(jax.random.key(0), (200, grid.shape[1]), minval=-1, maxval=1))
    np.testing.assert_array_equal(fsq.nearest(z, size), ((z[:, None] - grid) ** 2).sum(-1).argmin(-1))
