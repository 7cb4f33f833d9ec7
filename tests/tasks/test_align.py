"""Stage V0: texts lie beside their own images, and training on them teaches the encoder digits it can be asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dina.data import phrases
from dina.tasks import align, vision_batches
from tests.tasks.test_vision_batches import make_columns, make_config


def tiny_config(batch=4):
    config, stage = make_config(batch)
    config.vision.encoder.update(width=16, depth=2, heads=2, ff=24, full_layers=(1,))
    config.vision.bridge.out_dim = 16
    config.vision.align.update(width=16, heads=2)
    stage.options = {"augment": "none", "canvas_power": 0.0, "views": 0}
    return config, stage


def named_columns(count):
    """Records at places that the grammar names, so that captions exist; the box is the digit's own brightness."""
    columns = make_columns(count)
    for i, image in enumerate(columns["image"]):
        canvas = (image.shape[0] // 28, image.shape[1] // 28)
        size, top, left = phrases.placements(canvas)[0]
        columns["image"][i] = np.zeros_like(image)
        columns["image"][i][top + 4 : top + 24, left + 4 : left + 4 + 2 * (1 + i % 10)] = 255
        columns["top"][i], columns["left"][i], columns["size"][i] = top, left, size
    return columns


@pytest.fixture(scope="module")
def data():
    config, stage = tiny_config()
    table = vision_batches.make_table(named_columns(40), 784, 16 * 784)
    return config, stage, align.AlignBatches(config, stage, table)


def test_texts_speak_about_their_own_image(data):
    _, _, batches = data
    words = {number: word for word, number in align.vocabulary().items()}
    kinds = set()
    for step in range(6):
        batch = batches.batch(step)
        for row, slot in np.argwhere(batch["record"] >= 0):
            here = batch["text_segment"][row] == slot + 1
            if not here.any():
                continue
            ids_in, target = batch["text_in"][row][here], batch["text_target"][row][here]
            np.testing.assert_array_equal(ids_in[1:], target[:-1])
            assert words[ids_in[0]] == align.BOS and words[target[-1]] == align.EOS
            weight = batch["text_weight"][row][here]
            answer = [words[i] for i in target[weight > 0]][:-1]
            prompt = [words[i] for i in target[weight == 0]]
            assert (np.diff(weight) >= 0).all() and answer
            digit = phrases.DIGIT_WORDS[batch["digit"][row, slot]]
            asked = "digit" in prompt
            kinds.add((bool(prompt), asked))
            if asked or not prompt:
                assert digit in answer
    assert kinds == {(False, False), (True, True), (True, False)}


def test_text_that_does_not_fit_is_left_out(data):
    config, stage, batches = data
    short = config.copy_and_resolve_references()
    short.vision.align.text_tokens = 12
    batch = align.AlignBatches(short, stage, batches.images.table).batch(0)
    assert batch["text_in"].shape == (4, 12)
    for row in range(4):
        for number in set(batch["text_segment"][row].tolist()) - {0}:
            last = batch["text_target"][row][batch["text_segment"][row] == number][-1]
            assert last == align.vocabulary()[align.EOS]


def test_cells_are_named_by_what_lies_in_them():
    """A 28-px digit at (14, 0) of a 2 x 2 canvas lies in the two left cells; the right ones hold nothing."""
    batch = {"cell_segment": np.array([[1, 1, 1, 1, 0]]), "digit": np.array([[7]]), "size": np.array([[28]])}
    batch |= {"top": np.array([[14]]), "left": np.array([[0]])}
    batch["row"] = np.array([[0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2 + [0] * 4])
    batch["col"] = np.array([[0, 1, 0, 1, 2, 3, 2, 3] * 2 + [0] * 4])
    seven, nothing = align.FIRST_DIGIT + 7, align.vocabulary()[align.NOTHING]
    assert align.cell_words(batch).tolist() == [[seven, nothing, seven, nothing, 0]]


def test_reader_sees_only_its_own_image_and_the_past(data):
    config, stage, batches = data
    task = align.Align(config, stage)
    batch = {name: jnp.asarray(array) for name, array in batches.batch(0).items()}
    params = task.init(jax.random.key(0))["params"]["align_lm"]
    z = jax.random.normal(jax.random.key(1), (*batch["cell_segment"].shape, config.vision.bridge.out_dim))
    read = jax.jit(lambda z, batch: task.reader.apply({"params": params}, z, batch)["text"])
    base = read(z, batch)
    first = np.asarray(batch["text_segment"]) == 1
    other = read(jnp.where((batch["cell_segment"] == 1)[..., None], z, -z), batch)
    np.testing.assert_allclose(base[first], other[first], atol=1e-5)
    assert np.abs(base - other)[np.asarray(batch["text_segment"]) == 2].max() > 1e-3
    changed = read(z, batch | {"text_in": batch["text_in"].at[:, 2].set(5)})
    np.testing.assert_allclose(base[:, :2], changed[:, :2], atol=1e-5)
    assert np.abs(base[:, 2] - changed[:, 2]).max() > 1e-4


def test_padding_changes_no_term(data):
    config, stage, batches = data
    single = config.copy_and_resolve_references()
    single.vision.pack.images = 1
    task = align.Align(single, stage)
    variables = task.init(jax.random.key(0))
    batch = align.AlignBatches(single, stage, batches.images.table).batch(1)
    loss = jax.jit(lambda b: task.loss(variables["params"], {}, b, jax.random.key(0), ()))
    noisy = dict(batch, patches=np.where(batch["segment"][..., None] > 0, batch["patches"], 9.0).astype(np.float32))
    noisy["text_in"] = np.where(batch["text_segment"] > 0, batch["text_in"], 6).astype(np.int32)
    assert (batch["segment"] == 0).any()
    for terms in ("terms", "metrics"):
        clean, dirty = (getattr(loss(b), terms) for b in (batch, noisy))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clean, dirty)


def test_training_teaches_digits(data):
    config, stage, batches = data
    task = align.Align(config, stage)
    params = task.init(jax.random.key(0))["params"]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, batch):
        def total(params):
            out = task.loss(params, {}, batch, jax.random.key(0), ())
            means = {name: value / weight for name, (value, weight) in {**out.terms, **out.metrics}.items()}
            return sum(means[name] for name in out.terms), means

        grads, means = jax.grad(total, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, means

    state, history = optimizer.init(params), []
    for number in range(120):
        params, state, means = step(params, state, batches.batch(number % 20))
        history.append(jax.device_get(means))
    late = {name: np.mean([means[name] for means in history[-15:]]) for name in history[0]}
    assert set(late) >= {"text", "cells", "pixels", "nothing", "digit_accuracy", "text_accuracy", "cell_digit_accuracy"}
    assert late["cell_digit_accuracy"] > 0.4 and late["pixels"] < 0.7 * history[0]["pixels"], late
    assert late["text"] < 0.5 * history[0]["text"], late
