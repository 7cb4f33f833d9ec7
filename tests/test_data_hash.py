"""The batch of step n is one: whatever the number of hosts that read it, of threads that make it, and of the step begun at."""

import hashlib

import jax
import numpy as np
import pytest

from dina import sharding, train
from tests.data.test_packing import packed

ROWS, STEPS, DEVICES = 8, 6, 8


def _hash(batches):
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            found.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode())
            found.update(np.ascontiguousarray(batch[name]).tobytes())
    return found.hexdigest()


def _host(number, hosts, threads, mesh, first=0):
    """What one host of several puts on its own devices: for each step, (rows, batch of these rows). It plans by itself."""
    place = jax.sharding.NamedSharding(mesh, sharding.batch_spec())
    own = mesh.devices.ravel()[number * DEVICES // hosts : (number + 1) * DEVICES // hosts]
    for batch in train.prefetched(packed(ROWS), first, STEPS, threads=threads):
        where = place.devices_indices_map((ROWS,))
        rows = sorted(row for device in own for row in range(*where[device][0].indices(ROWS)))
        yield {name: array[rows] for name, array in batch.items()}


@pytest.fixture(scope="module")
def wanted():
    batches = packed(ROWS)
    return _hash(batches.batch(step) for step in range(STEPS))


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_one_hash(hosts, threads, wanted):
    mesh = sharding.make_mesh({"data": DEVICES}, jax.devices()[:DEVICES])
    parts = [list(_host(number, hosts, threads, mesh)) for number in range(hosts)]
    whole = [{name: np.concatenate([part[step][name] for part in parts]) for name in parts[0][step]} for step in range(STEPS)]
    assert _hash(whole) == wanted
    # And a host that begins in the middle, with nothing planned, sees the same.
    (*_, last) = _host(hosts - 1, hosts, threads, mesh, first=STEPS - 1)
    assert _hash([last]) == _hash([parts[-1][-1]])


def test_devices_hold_the_rows_that_the_hosts_read():
    mesh = sharding.make_mesh({"data": DEVICES}, jax.devices()[:DEVICES])
    batch = packed(ROWS).batch(3)
    placed = sharding.put_batch(batch, mesh)
    for number, device in enumerate(mesh.devices.ravel()):
        for name, array in placed.items():
            (shard,) = [shard for shard in array.addressable_shards if shard.device == device]
            np.testing.assert_array_equal(shard.data, batch[name][number : number + 1], err_msg=name)
