"""Stage V2: it learns, whole images are cut, only the decoder gets gradient, rows do not depend on their batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.config import InputError
from dina.tasks import pixels
from dina.vision import detokenize, perceptual, pixel_decoder, tokenizer
from tests.vision import packs

ROWS = [[(1, 2), (2, 2)], [(2, 3)], [(1, 1), (2, 1)], [(1, 3)]]
WEIGHTS = {"l1": 1.0, "l2": 1.0, "align": 0.1, "perceptual": 2.0}


@pytest.fixture(scope="module")
def setup():
    config, stage = packs.tiny_config(), packs.stage("pixels", align_stride=2, network="random", window=28, windows=3)
    stage.loss_weights = WEIGHTS
    task = pixels.Pixels(config, stage)
    variables = task.start(jax.jit(task.init)(jax.random.key(0)), iter(()), jax.random.key(0))
    return task, variables, packs.batch(config.vision, ROWS)


@pytest.fixture(scope="module")
def run(setup):
    """The compiled loss: (parameters, batch) -> LossOut."""
    task, variables, _ = setup
    return jax.jit(lambda params, batch: task.loss(params, variables["stats"], batch, jax.random.key(2), ()))


def _total(task, variables, batch):
    def total(trained, key):  # not the frozen networks: their gradients take a minute to compile
        terms = task.loss(variables["params"] | trained, variables["stats"], batch, key, ()).terms
        return sum(WEIGHTS[name] * value / weight for name, (value, weight) in terms.items())

    return total


def test_gradient_descent_lowers_the_loss(setup, run):
    task, variables, batch = setup
    step = jax.jit(jax.value_and_grad(_total(task, variables, batch)))
    key, params = jax.random.key(1), {part: variables["params"][part] for part in (pixel_decoder.PART, tokenizer.PART)}
    losses = []
    for _ in range(12):
        value, grads = step(params, key)
        losses.append(float(value))
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params[pixel_decoder.PART], grads[pixel_decoder.PART])
        params[pixel_decoder.PART] = moved
    assert losses[-1] < 0.95 * losses[0]
    before, after = (run(variables["params"] | p, batch).terms["perceptual"] for p in ({}, params))
    assert float(after[0]) < 0.97 * float(before[0]) and float(before[1]) == 3 * len(ROWS)
    quantizer = jax.tree.leaves(grads[tokenizer.PART])
    assert max(float(jnp.abs(leaf).max()) for leaf in quantizer) == 0


def test_a_row_depends_neither_on_its_batch_nor_on_its_padding(setup, run):
    _, variables, batch = setup
    params = variables["params"]
    whole = run(params, batch)
    parts = [run(params, {name: value[i : i + 2] for name, value in batch.items()}) for i in (0, 2)]
    summed = jax.tree.map(jnp.add, *[(part.terms, part.metrics) for part in parts])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), summed, (whole.terms, whole.metrics))
    padding = (batch["segment"] == 0)[..., None]
    spoilt = run(params, batch | {"patches": np.where(padding, 7.0, batch["patches"]).astype(np.float32)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), spoilt.terms, whole.terms)


def test_the_feature_network_sees_pixels_as_they_are_shown(setup):
    task, variables, batch = setup
    low, high = (np.asarray(bound) for bound in detokenize.pixel_range())
    made = np.where(batch["patches"] > 0, high + batch["patches"], low / 2)  # beyond white, or dark
    windows, *_ = task.draw_windows(batch, jax.random.key(0))
    maps = jax.jit(lambda patches: task.feature_maps(variables["params"], patches, windows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), maps(made), maps(np.clip(made, low, high)))
    assert float(jnp.abs(maps(made)[0] - maps(0.9 * np.clip(made, low, high))[0]).max()) > 0.01


def test_truncation_cuts_whole_images(setup):
    task, variables, batch = setup
    always = pixels.Pixels(packs.tiny_config(), packs.stage("pixels", truncate=1.0, align_stride=0))
    never = pixels.Pixels(packs.tiny_config(), packs.stage("pixels", truncate=0.0, align_stride=0))
    loss = lambda task: task.loss(variables["params"], variables["stats"], batch, jax.random.key(3), ())
    cut, full = jax.jit(lambda: [loss(task) for task in (always, never)])()
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
        jax.eval_shape(lambda: task.loss(variables["params"], variables["stats"], odd, jax.random.key(0), ()).terms)


def test_the_feature_network_is_there_only_where_it_has_weight(setup):
    task, variables, _ = setup
    plain = pixels.Pixels(packs.tiny_config(), packs.stage("pixels"))
    blank, bare = (jax.eval_shape(t.init, jax.random.key(0)) for t in (task, plain))
    weights = perceptual.random_weights()
    jax.tree.map(np.testing.assert_array_equal, variables["params"][perceptual.PART], weights)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(blank["params"].pop(perceptual.PART)) == shapes(weights) and shapes(blank) == shapes(bare)
    assert plain.start(bare, iter(()), jax.random.key(0)) is bare
