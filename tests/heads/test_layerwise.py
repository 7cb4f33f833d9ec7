"""A head in parts, layer by layer, against the whole head: sums, gradients, and chunks that are left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dina import losses, optim, sharding
from dina.heads import depth, layerwise
from tests.heads.test_depth import small

DEVICES, EACH, USED = 4, 6, (6, 3, 1, 0)  # positions of a device, and how many of them count


def _inputs(levels):
    random = np.random.default_rng(1)
    used = np.arange(EACH) < np.array(USED)[:, None]
    h = random.normal(size=(DEVICES * EACH, 20)).astype(np.float32)
    embedded = random.normal(size=(DEVICES * EACH, levels, 20)).astype(np.float32)
    label = random.integers(-1, 6, (DEVICES * EACH, levels)).astype(np.int32)
    return h, embedded, label, np.where(used, random.choice([0.5, 2.0], used.shape), 0).reshape(-1).astype(np.float32)


@pytest.mark.parametrize("chunk, remat", [(2, "full"), (8, "none")])
def test_parts_layer_by_layer_are_the_whole_head(chunk, remat, monkeypatch):
    monkeypatch.setattr(sharding, "MINIMUM", 1)
    module, params, *_ = small(sizes=(7, 7, 5), class_multiple=4)
    mesh, batch = sharding.make_mesh({"data": DEVICES}, jax.devices()[:DEVICES]), sharding.batch_spec()
    flat, inputs = optim.flatten(params), _inputs(3)
    placed = {path: sharding.storage_spec(x.shape, mesh, path) for path, x in flat.items()}
    assert any(placed.values()) and placed["head_0"] != P()
    mix = jnp.array([1.0, 0.3, 0.7])

    def local(flat, *inputs):
        def loss(flat, h):
            own = optim.unflatten(sharding.as_shards(flat, placed))
            used = jnp.asarray(USED)[jax.lax.axis_index("data")]
            pieces = losses.cut(dict(zip(("h", "embedded", "label", "weight"), (h, *inputs[1:]), strict=True)), chunk)
            out = layerwise.level_losses(module, own, pieces, used, remat)
            return out.loss_L @ mix, out

        (_, out), (grads, of_h) = jax.value_and_grad(loss, (0, 1), has_aux=True)(flat, inputs[0])
        return sharding.psum(out, ("data",)), sharding.sum_left(grads, placed, ("data",)), of_h

    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
        run = jax.shard_map(local, mesh=mesh, in_specs=(placed, *[batch] * 4), out_specs=(P(), placed, batch), check_vma=False)
        found = jax.jit(run)({path: put(x, placed[path]) for path, x in flat.items()}, *(put(x, batch) for x in inputs))

    def whole(flat, h):
        out = depth.losses(module, optim.unflatten(flat), depth.input_rows(h, inputs[1]), inputs[2], inputs[3])
        return out.loss_L @ mix, out

    (_, want), grads = jax.jit(jax.value_and_grad(whole, (0, 1), has_aux=True))(flat, jnp.asarray(inputs[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, jax.device_get((want, *grads)))


def test_equal_neighbours_are_one_loop():
    assert list(layerwise.runs((8, 4, 2, 1, 1, 1))) == [(0, 1), (1, 1), (2, 1), (3, 3)]
    assert list(layerwise.runs((8, 8))) == [(0, 2)]
