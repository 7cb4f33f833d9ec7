"""Stage A3: each loss reaches its own side only, padding and order do not matter, crops lie inside clips, a few steps learn."""

import pathlib

import jax
import numpy as np
import optax
import pytest

from dina import config as configs
from dina import stages
from dina.audio import detokenizer, discriminator, hift
from dina.audio.config import hift_vocoder
from dina.config import InputError
from dina.tasks.audio_batches import make_table
from dina.tasks.vocoder import Crops, VocoderTask
from tests.audio import toy

WEIGHTS = {"mel": 45.0, "f0": 1.0, "adversarial": 1.0, "features": 2.0, "discriminator": 1.0}
KEY = jax.random.key(3)


def make_task(weights):
    config = toy.experiment()
    config.audio.vocoder = hift_vocoder()
    with config.audio.ignore_type():  # one stage
        config.audio.vocoder.update({"channels": 16, "f0_channels": 4, "rates": (120,), "up_kernels": (120,), "kernels": (3,), "source_kernels": (3,),
                                     "dilations": (1,)})  # fmt: skip
    stage = toy.stage("vocoder", seconds=0.12, mel_windows=(256,), periods=(3,), resolutions=(256,), width=2)
    stage.loss_weights.update(weights)
    return VocoderTask(config, stage)


@pytest.fixture(scope="module")
def setup(request):
    """(task, variables drawn on the host, batch, jitted (params, batch) -> (terms, gradients of each term))."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setattr(discriminator, "_GROWTH", (1, 2))  # few layers: it is the compilation that takes time
    patch.setattr(discriminator, "_BAND_STRIDES", (2,))
    task, rng = make_task(WEIGHTS), np.random.default_rng(0)

    def leaf(path, x):
        spread = 0.1 if path[-1].key == "bias" else np.prod(x.shape[:-1]) ** -0.5
        spread *= 100 if [key.key for key in path[1:]] == ["f0", "out", "kernel"] else 1  # else Hz take too many steps
        return np.ones(x.shape, np.float32) if path[-1].key == "alpha" else rng.normal(0, spread, x.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(task.init, KEY)["params"])
    batch = Crops(task.config, task.stage, make_table(toy.columns(), 10240), 0.12).batch(0)

    @jax.jit
    def run(params, batch):
        def sums(params):
            out = task.loss(params, {}, batch, KEY, ())
            return {name: total for name, (total, _) in out.terms.items()}, out.terms

        totals, pull, terms = jax.vjp(sums, params, has_aux=True)
        return terms, {name: pull({other: np.float32(other == name) for other in totals})[0] for name in totals}

    return task, params, batch, run


def test_each_loss_reaches_its_own_side_only(setup):
    _, params, batch, run = setup
    terms, grads = run(params, batch)
    assert set(terms) == set(WEIGHTS)
    norm = lambda tree: float(optax.global_norm(tree))
    for name, grad in grads.items():
        vocoder, judges = grad[hift.PART], grad[discriminator.PART]
        wave = name in ("mel", "adversarial", "features")
        reached = {"filter": wave, "source": wave, "f0": name == "f0"}
        assert {part: norm(vocoder[part]) > 0 for part in reached} == reached, name
        assert (norm(judges) > 0) == (name == "discriminator"), name


def test_terms_do_not_depend_on_order_or_padding(setup):
    _, params, batch, run = setup
    samples = np.minimum(batch["samples"], [2100, 1500, 1900, 700])
    short = batch | {"samples": samples, "wave": np.where(np.arange(batch["wave"].shape[1]) < samples[:, None], batch["wave"], 0)}
    terms, _ = run(params, short)
    turned, _ = run(params, {name: x[::-1] for name, x in short.items()})
    padded = jax.jit(lambda b: setup[0].loss(params, {}, b, KEY, ()).terms)(short | {"wave": np.pad(short["wave"], ((0, 0), (0, 2400)))})
    for name, (total, weight) in terms.items():
        for other in (turned, padded):
            np.testing.assert_allclose(other[name][0], total, rtol=2e-4, err_msg=name)
            assert other[name][1] == weight == sum(-(-int(n) // 480) for n in samples)


def test_without_weight_there_are_no_judges():
    task = make_task({"mel": 45.0, "f0": 0.1, "adversarial": 0.0})
    shapes = jax.eval_shape(task.init, KEY)
    assert set(shapes["params"]) == {hift.PART} and not shapes["stats"]
    batch = Crops(task.config, task.stage, make_table(toy.columns(), 10240), 0.12).batch(0)
    out = jax.eval_shape(lambda params, b: task.loss(params, {}, b, KEY, ()), shapes["params"], batch)
    assert set(out.terms) == {"mel", "f0"}


def test_a_few_steps_learn(setup):
    task, params, _, run = setup
    batches = Crops(task.config, task.stage, make_table(toy.columns(), 10240), 0.12)
    history = []
    for index in range(20):
        terms, grads = run(params, batches.batch(index))
        means = {name: float(total / weight) for name, (total, weight) in terms.items()}
        own = [jax.tree.map(lambda g, n=name: np.asarray(g / terms[n][1]), grads[name]) for name in ("mel", "f0", "discriminator")]
        params = jax.tree.map(lambda p, *g: p - 5e-3 * 0.95**index * np.sign(sum(g)), params, *own)
        history.append(means)
    for name in ("mel", "f0", "discriminator"):
        first, last = (np.mean([h[name] for h in part]) for part in (history[:3], history[-3:]))
        assert last < 0.85 * first, (name, first, last)


def test_crops_lie_inside_clips_and_are_a_function_of_the_step():
    task = make_task(WEIGHTS)
    table = make_table(toy.columns(), 10240)
    crops = Crops(task.config, task.stage, table, 0.3)
    seen = set()
    for step in range(6):
        batch = crops.batch(step)
        assert batch["wave"].shape == (4, 7200) and batch["example"].tolist() == list(range(4 * step, 4 * step + 4))
        for wave, samples in zip(batch["wave"], batch["samples"], strict=True):
            assert not np.any(wave[samples:])
            piece = np.round(wave[:samples] * 32768).astype(np.int16)
            places = [(i, np.flatnonzero(np.all(np.lib.stride_tricks.sliding_window_view(clip, len(piece)) == piece, axis=1)))
                      for i, clip in enumerate(table.waves24) if len(clip) >= len(piece)]  # fmt: skip
            found = [(i, int(at[0])) for i, at in places if len(at)]
            assert found and len(piece) == min(7200, len(table.waves24[found[0][0]]))
            seen.add(found[0])
    assert {i for i, _ in seen} == set(range(6)) and len(seen) > 8
    for name, x in crops.batch(3).items():
        np.testing.assert_array_equal(x, Crops(task.config, task.stage, table, 0.3).batch(3)[name])


def test_another_vocoder_cannot_be_trained():
    task = make_task(WEIGHTS)
    task.config.audio.vocoder.name = "griffin_lim"
    with pytest.raises(InputError, match="trains audio.vocoder.name 'hift'"):
        VocoderTask(task.config, task.stage)


@pytest.mark.parametrize("variants,steps", [("vocoder", 600), ("vocoder,smoke", 4)])
def test_the_speech_experiment_has_a_variant_that_trains_all_of_it(variants, steps):
    config = configs.load(f"{pathlib.Path(__file__).parents[2]}/experiments/speech.py:{variants}")
    stage = config.stages.A3
    assert config.jobs[-1] == config.order[-1] == "A3" and stage.steps == steps and set(stage.loss_weights) == set(WEIGHTS)
    params = jax.eval_shape(stages.make_task(config, "A3").init, KEY)["params"]
    assert set(params) == set(stage.train) == {hift.PART, discriminator.PART} and hift.PART in detokenizer.parts(config.audio)
    assert "A3" not in configs.load(f"{pathlib.Path(__file__).parents[2]}/experiments/speech.py").stages
