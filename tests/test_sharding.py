"""Mesh building, storage placement, batches on the mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dina import sharding
from dina.config import InputError


def test_mesh_axes_and_errors():
    mesh = sharding.make_mesh({"data": -1, "expert": 2})
    assert dict(mesh.shape) == {"replica": 1, "data": 4, "expert": 2, "seq": 1, "model": 1}
    with pytest.raises(InputError, match="unknown axes.*'rows'"):
        sharding.make_mesh({"rows": 2})
    with pytest.raises(InputError, match="16 devices, this job has 8"):
        sharding.make_mesh({"data": 16})


def test_only_large_divisible_arrays_are_split():
    mesh = sharding.make_mesh({"data": 8})
    assert sharding.storage_spec((8, 8), mesh) == P()
    assert sharding.storage_spec((1001, 1024), mesh) == P(None, "data")
    assert sharding.storage_spec((1001, 999), mesh) == P()


def test_a_large_parameter_is_stored_in_pieces_and_gathered():
    mesh = sharding.make_mesh({"data": 8})
    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((1024, 512), np.float32), jax.NamedSharding(mesh, P("data")))
        y = jax.jit(sharding.gathered)({"x": x})["x"]
        assert x.addressable_shards[0].data.shape == (128, 512) and y.addressable_shards[0].data.shape == (1024, 512)


def test_a_batch_is_cut_over_all_batch_axes():
    mesh = sharding.make_mesh({"data": 4, "expert": 2})
    x = sharding.put_batch({"x": np.arange(16).reshape(16, 1)}, mesh)["x"]
    assert sorted(int(s.data[0, 0]) for s in x.addressable_shards) == list(range(0, 16, 2))
