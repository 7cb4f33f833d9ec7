"""Stage V2: it learns, whole images are cut, only the decoder gets gradient, rows do not depend on their batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.config import InputError
from dina.tasks import pixels
from dina.vision import pixel_decoder
from tests.vision import packs

ROWS = [[(1, 2), (2, 2)], [(2, 3)], [(1, 1), (2, 1)], [(1, 3)]]
WEIGHTS = {"l1": 1.0, "l2": 1.0, "align": 0.1}


@pytest.fixture(scope="module")
def setup():
    config = packs.tiny_config()
    task = pixels.Pixels(config, packs.stage("pixels", align_stride=2))
    variables = jax.jit(task.init)(jax.random.key(0))
    return task, variables, packs.batch(config.vision, ROWS)


def _total(task, stats, batch):
    def total(params, key):
        terms = task.loss(params, stats, batch, key, ()).terms
        return sum(WEIGHTS[name] * value / weight for name, (value, weight) in terms.items())

    return total


def test_gradient_descent_lowers_the_loss(setup):
    task, variables, batch = setup
    step = jax.jit(jax.value_and_grad(_total(task, variables["stats"], batch)))
    params, key = dict(variables["params"]), jax.random.key(1)
    losses = []
    for _ in range(12):
        value, grads = step(params, key)
        losses.append(float(value))
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params[pixel_decoder.PART], grads[pixel_decoder.PART])
        params[pixel_decoder.PART] = moved
    assert losses[-1] < 0.95 * losses[0]
    quantizer = jax.tree.leaves(grads["vision_quantizer"])
    assert max(float(jnp.abs(leaf).max()) for leaf in quantizer) == 0


def test_a_row_does_not_depend_on_its_batch(setup):
    task, variables, batch = setup
    run = lambda b: task.loss(variables["params"], variables["stats"], b, jax.random.key(2), ())
    whole = run(batch)
    parts = [run({name: value[i : i + 2] for name, value in batch.items()}) for i in (0, 2)]
    summed = jax.tree.map(jnp.add, *[(part.terms, part.metrics) for part in parts])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), summed, (whole.terms, whole.metrics))


def test_truncation_cuts_whole_images(setup):
    task, variables, batch = setup
    always = pixels.Pixels(packs.tiny_config(), packs.stage("pixels", truncate=1.0, align_stride=0))
    never = pixels.Pixels(packs.tiny_config(), packs.stage("pixels", truncate=0.0, align_stride=0))
    cut, full = (t.loss(variables["params"], variables["stats"], batch, jax.random.key(3), ()) for t in (always, never))
    assert set(cut.terms) == {"l1", "l2"}
    patches = 4.0 * (batch["cell_segment"] > 0).sum()
    assert float(full.metrics["l2_all_levels"][1]) == float(full.terms["l1"][1]) == patches
    kept = float(cut.metrics["l2_all_levels"][1])
    sizes = [4 * h * w for row in ROWS for h, w in row]
    sums = {0}
    for size in sizes:
        sums |= {s + size for s in sums}
    assert kept < patches and kept in sums
    assert float(cut.terms["l1"][0]) != float(full.terms["l1"][0])


def test_stride_must_divide_the_rows(setup):
    task, variables, batch = setup
    odd = {name: value[:3] for name, value in batch.items()}
    with pytest.raises(InputError, match="align_stride=2 does not divide the 3 rows"):
        task.loss(variables["params"], variables["stats"], odd, jax.random.key(0), ())
