"""Stage V0 on captioned images: texts lie beside their own images, parts are drawn anew, and training reads captions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from dina.config import InputError
from dina.tasks import captions, vision_batches
from dina.tasks.base import merge_options
from tests.tasks.test_align import tiny_config

WORDS = ("red", "a green thing", "bleu ciel é", "x" * 90)


def columns(count=12):
    """Images of 4 x 3 cells, each of one colour, with its caption."""
    rng = np.random.default_rng(0)
    images = [np.full((112, 84, 3), 0, np.uint8) + np.uint8([255, 60, 60][i % 3]) * (np.arange(3) == i % 3).astype(np.uint8) for i in range(count)]
    images = [image + rng.integers(0, 20, image.shape, np.uint8) for image in images]
    return {"image": images, "caption": [WORDS[i % len(WORDS)] for i in range(count)], "source": [f"p/{i}" for i in range(count)]}


@pytest.fixture(scope="module")
def data():
    config, stage = tiny_config(batch=3)
    stage.task, stage.options = "captions", {"augment": "zoom", "parts": 2, "part_side": 2, "cells": 8, "images": 3}
    config.vision.align.text_tokens = 64
    options = merge_options(captions.default_options(), stage)
    table = vision_batches.make_table(columns(), 784, 16 * 784)
    return captions.Captions(config, stage), captions.CaptionBatches(config, stage, options, table)


def test_captions_lie_beside_their_own_images(data):
    _, batches = data
    seen = set()
    for step in range(4):
        batch = batches.batch(step)
        for row, slot in np.argwhere(batch["record"] >= 0):
            here = batch["text_segment"][row] == slot + 1
            ids, target = batch["text_in"][row][here], batch["text_target"][row][here]
            if not here.any():
                continue
            caption = batches.images.table.captions[batch["record"][row, slot]]
            whole = captions.caption_ids(caption)
            np.testing.assert_array_equal(ids, whole[: len(ids)])
            np.testing.assert_array_equal(target, whole[1 : len(ids) + 1])
            assert len(ids) == len(whole) - 1 or here[-1]  # cut at the end of the row only
            np.testing.assert_array_equal(batch["text_position"][row][here], np.arange(len(ids)))
            seen.add(caption)
    assert seen == set(WORDS)


def test_parts_are_drawn_anew_inside_their_image(data):
    _, batches = data
    first, again, later = batches.batch(0), batches.batch(0), batches.images.batch(7)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
    assert (first["grid"].max(axis=(0, 1)) == 2).all() and first["patches"].shape[1] == 32
    zoomed = vision_batches.zoom_views([np.tile(np.arange(84, dtype=np.uint8)[:, None, None], (1, 84, 3))], np.array([[2, 2]]), np.random.default_rng(3))[0]
    steps = np.diff(zoomed[4:-4, 0, 0].astype(int))
    assert zoomed.shape == (56, 56, 3) and 0.9 <= steps.mean() <= 1.5 and (zoomed == zoomed[:, :1]).all()
    assert not np.array_equal(first["patches"], later["patches"])


def test_training_reads_captions(data):
    task, batches = data
    params = task.init(jax.random.key(0))["params"]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            out = task.loss(params, {}, batch, jax.random.key(0), ())
            terms = {name: total / weight for name, (total, weight) in out.terms.items()}
            return terms["text"] + terms["pixels"], terms

        (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, terms

    state, history = optimizer.init(params), []
    for n in range(40):
        batch = {name: jnp.asarray(value) for name, value in batches.batch(n).items()}
        params, state, terms = step(params, state, batch)
        history.append({name: float(value) for name, value in terms.items()})
    for name in ("text", "pixels"):
        assert history[-1][name] < 0.6 * history[0][name], name


def test_data_that_does_not_fit_is_refused(data):
    task, _ = data
    table = vision_batches.make_table({"image": columns(3)["image"]}, 784, 16 * 784)
    empty = vision_batches.make_table(columns(3) | {"caption": [""] * 3}, 784, 16 * 784)
    for silent in (table, empty):
        with pytest.raises(InputError, match="images with captions"):
            captions.CaptionBatches(task.config, task.stage, ConfigDict(captions.default_options()), silent)
    with pytest.raises(InputError, match="about digits"):
        vision_batches.VisionBatches(task.config, task.stage, table, "affine")
