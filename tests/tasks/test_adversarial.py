"""Stage V3: neither side's loss reaches the other's parameters, the adversarial weight is VQGAN's, statistics add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.config import InputError
from dina.tasks import adversarial
from dina.tasks.adversarial import LAST
from dina.vision import discriminator, pixel_decoder
from dina.vision.discriminator import PART
from tests.vision import packs

ROWS = [[(1, 2), (2, 2)], [(2, 3)], [(1, 1), (2, 1)], [(1, 3)]]
COEFFICIENTS = {"l1": 1.0, "l2": 0.5, "perceptual": 0.7, "adversarial": 1.0, "discriminator": 1.0, "regularise": 1.0}
KEY, STRENGTH = jax.random.key(2), 0.05


def _task(**options):
    stage = packs.stage("adversarial", align_stride=0, network="random", window=28, windows=2, heads=8, **options)
    stage.loss_weights = COEFFICIENTS
    return adversarial.Adversarial(packs.tiny_config(), stage)


@pytest.fixture(scope="module")
def setup(request):
    """(task, variables, batch, trained, jitted (trained, batch) -> (terms, gradients of each term's sum, updates)).

    Of the decoder only the last layer is differentiated: what reaches the others goes through it.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(discriminator, "FIRST", 3)  # one head: it is the compilation that takes time
    request.addfinalizer(patch.undo)
    task = _task(head_start=0)
    batch, rng = packs.batch(task.config.vision, ROWS), np.random.default_rng(0)
    # Random values for all, and random code vectors: neither init nor the encoder need be compiled.
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    variables = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    variables = task.start(variables, iter(()), KEY)
    variables["stats"][PART] = {"weight": jnp.float32(STRENGTH), "real": jnp.zeros(()), "made": jnp.zeros(())}
    dim, levels = task.tokenizer.rvq.dim, task.tokenizer.rvq.levels
    codes_BND = rng.normal(size=(len(ROWS), batch["cell_segment"].shape[1], dim)).astype(np.float32)
    task.conditions = lambda params, stats, batch, key: (
        None, batch["coded"], jnp.full(batch["cell_segment"].shape, levels))
    params, batch = variables["params"], batch | {"coded": codes_BND}
    decoder = params[pixel_decoder.PART]

    @jax.jit
    def run(trained, batch):
        def sums(trained):
            mine = {pixel_decoder.PART: decoder | {LAST: trained[LAST]}, PART: trained[PART]}
            out = task.loss(params | mine, variables["stats"], batch, KEY, ())
            return {name: total for name, (total, _) in out.terms.items()}, out

        totals, pull, out = jax.vjp(sums, trained, has_aux=True)
        grads = {name: pull({other: jnp.float32(other == name) for other in totals})[0] for name in totals}
        return out.terms, grads, out.updates

    return task, variables, batch, {LAST: decoder[LAST], PART: params[PART]}, run


@pytest.fixture(scope="module")
def first(setup):
    _, _, batch, trained, run = setup
    return run(trained, batch)


def _largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_each_side_learns_from_its_own_terms_only(first):
    terms, grads, _ = first
    assert set(terms) == set(COEFFICIENTS)
    for name in ("discriminator", "regularise"):
        assert _largest(grads[name][LAST]) == 0 and _largest(grads[name][PART]) > 0
    for name in ("l1", "l2", "perceptual", "adversarial"):
        assert _largest(grads[name][PART]) == 0 and _largest(grads[name][LAST]) > 0


@pytest.mark.parametrize("name", ["perceptual", "adversarial"])
def test_gradients_by_the_decoder_are_those_of_finite_differences(setup, first, name):
    _, _, batch, trained, run = setup
    grad = first[1][name][LAST]
    length = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grad)))
    values = []
    for step in (-0.02, 0.02):
        moved = jax.tree.map(lambda p, g: p + step * g / length, trained[LAST], grad)
        values.append(float(run(trained | {LAST: moved}, batch)[0][name][0]))
    np.testing.assert_allclose((values[1] - values[0]) / 0.04, length, rtol=0.02)


def test_the_adaptive_weight_is_the_ratio_of_the_last_layer_s_gradients(setup, first):
    task, variables, *_ = setup
    terms, grads, updates = first
    kernel = lambda name: grads[name][LAST]["kernel"] / terms[name][1]
    near = sum(COEFFICIENTS[name] * kernel(name) for name in ("l1", "l2", "perceptual"))
    ratio = jnp.linalg.norm(near) / (jnp.linalg.norm(kernel("adversarial") / STRENGTH) + 1e-4)
    for cap in (1e6, 0.01):
        task.options.weight = cap
        new = task.update_stats(variables["stats"], updates, KEY, jnp.int32(5))[PART]
        np.testing.assert_allclose(new["weight"], min(float(ratio), cap), rtol=1e-4)
    assert float(ratio) > 0.01
    np.testing.assert_allclose(new["real"], 0.01 * updates[PART]["real"] / (2 * len(ROWS)), rtol=1e-4)


def test_statistics_add_up_over_micro_batches(setup, first):
    _, _, batch, trained, run = setup
    halves = []
    for keep in (slice(0, 2), slice(2, 4)):  # the other rows empty, for one compiled shape
        part = {name: np.zeros_like(value) for name, value in batch.items()}
        for name, value in batch.items():
            part[name][keep] = value[keep]
        halves.append(run(trained, part)[2])
    summed = jax.tree.map(jnp.add, *halves)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))
    jax.tree.map(close, summed, first[2])


def test_the_discriminator_learns_to_tell_real_from_decoded(setup, first):
    _, _, batch, trained, run = setup
    values = []
    for _ in range(12):
        terms, grads, _ = run(trained, batch)
        values.append(float(terms["discriminator"][0] / terms["discriminator"][1]))
        heads = jax.tree.map(lambda p, g: p - 0.02 * g, trained[PART], grads["discriminator"][PART])
        trained = trained | {PART: heads}
    assert values[0] > 1.5 and values[-1] < 0.8 * values[0]


def test_the_discriminator_has_a_head_start_and_the_weight_may_be_fixed(setup, first):
    _, variables, *_ = setup
    task = _task(weighting="fixed", weight=0.3, head_start=4)
    own = {"real": 2.0, "made": -1.0, "count": 4.0, "last": {}, "patches": 9.0}
    for step, weight in ((0, 0.0), (2, 0.0), (3, 0.3)):
        new = task.update_stats(variables["stats"], {PART: own}, KEY, jnp.int32(step))
        assert float(new[PART]["weight"]) == pytest.approx(weight)
        assert float(new[PART]["real"]) == pytest.approx(0.5 if step == 0 else 0.005)


def test_unknown_choices_are_named():
    with pytest.raises(InputError, match="stage option weighting 'adaptiv' does not exist; did you mean 'adaptive'"):
        _task(weighting="adaptiv")
    with pytest.raises(InputError, match="stage option regularise 'gp' does not exist"):
        _task(regularise="gp")
