"""A trained cell through the codec: the codes of the tokenizer, depths that ignore later levels, energy by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from dina import stages
from dina.quantize import rvq
from dina.tasks.vision_batches import ImageTable
from dina.vision import bridge, pixel_decoder, tokenizer
from tests.vision import packs
from tools.sweep import codec, measure

GRIDS = [(1, 2), (2, 2), (1, 1), (2, 3), (1, 1)]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (28 * h, 28 * w, 3), dtype=np.uint8) for h, w in GRIDS]


@pytest.fixture(scope="module")
def made():
    """A codec of random parameters."""
    config = packs.tiny_config()
    keys = jax.random.split(jax.random.key(0), 3)
    quiet = {"xla_backend_optimization_level": 0}
    params, stats = jax.jit(lambda k: tokenizer.init_quantizer(config.vision, k), compiler_options=quiet)(keys[0])
    encoder = jax.jit(lambda k: bridge.init_encoder(config.vision, k), compiler_options=quiet)(keys[1])
    decoder = jax.jit(lambda k: pixel_decoder.init_pixel_decoder(config.vision, k), compiler_options=quiet)(keys[2])
    parts = {"vision_encoder": encoder, tokenizer.PART: params, pixel_decoder.PART: decoder}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "load_parts", lambda config, folder, names: ({n: parts[n] for n in names}, {tokenizer.PART: stats}))
        return codec.TokenizerCodec(config, None)


@pytest.fixture(scope="module")
def pictures(images):
    return codec.Pictures(images, GRIDS, "five")


def test_codes_are_those_of_the_tokenizer(made, pictures):
    codes, _ = made.search(pictures)
    assert [len(code) for code in codes] == pictures.cells
    chunk, pack = next(codec.packs(made.vision, pictures.images, pictures.grids))
    want: list = [None] * len(codes)
    codec.split_rows(chunk, pictures.cells, np.asarray(tokenizer.tokenize(made.vision, made.variables, pack)), want)
    for a, b in zip(codes, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_energy_left_is_that_of_the_residual(made, pictures):
    codes, energy = made.search(pictures)
    x_ND = np.asarray(made.tokenizer.project(made.quantizer["params"], np.concatenate(made.features(pictures))))
    for depth in (1, 3):
        left_ND = x_ND - np.asarray(rvq.decode(made.cfg, made.quantizer["stats"], np.concatenate(codes), depth))
        np.testing.assert_allclose(energy[depth - 1], (left_ND**2).sum() / (x_ND**2).sum(), rtol=1e-5)


def test_a_picture_of_one_level_does_not_see_the_others(made, pictures):
    codes, _ = made.search(pictures)
    other = [np.concatenate([code[:, :1], (code[:, 1:] + 1) % 8], 1) for code in codes]
    one, same, full = (made.pictures(c, GRIDS, depth) for c, depth in ((codes, 1), (other, 1), (codes, 3)))
    assert [image.shape for image in one] == [image.shape for image in pictures.images]
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, full, strict=True))


def test_timed_programs_compute_what_is_measured(made, pictures):
    run, arguments, cells = made.search_program(2)
    assert cells == codec.VECTORS
    whole, others, _ = made.search_program(3)
    np.testing.assert_array_equal(jax.jit(run)(*arguments), np.asarray(jax.jit(whole)(*others))[:, :2])
    assert made.encoder_program(pictures)[2] == sum(pictures.cells)


def test_pictures_are_drawn_by_the_seed_alone(images, monkeypatch):
    table = ImageTable(images, {}, np.array(GRIDS, np.int32))
    monkeypatch.setattr(codec, "image_table", lambda config, split: table)
    a, b, c = (codec.choose(None, "test", 3, seed) for seed in (1, 1, 2))
    assert a.identity == b.identity != c.identity and a.grids == b.grids and len(a.images) == 3
    assert codec.choose(None, "test", 99, 1).cells == [h * w for h, w in codec.choose(None, "test", 99, 1).grids]


class _Fake:
    """A codec of two levels whose pictures get nearer to black ones with depth."""

    sizes = (4, 4)

    def __init__(self, config, folder):
        del config, folder

    def search(self, pictures):
        return [np.full((n, 2), 1, np.int32) for n in pictures.cells], [0.5, 0.25]

    def pictures(self, codes, grids, depth):
        del codes
        return [np.full((28 * h, 28 * w, 3), 90 - 40 * depth, np.uint8) for h, w in grids]

    def encoder_program(self, pictures):
        return lambda x: x + 1, (np.ones(3, np.float32),), sum(pictures.cells)

    def search_program(self, depth):
        return lambda x: x * 2, (np.ones(depth, np.float32),), 1


def test_a_cell_is_measured_at_every_depth(monkeypatch):
    blank = codec.Pictures([np.zeros((28 * h, 28 * w, 3), np.uint8) for h, w in GRIDS], GRIDS, "blank")
    monkeypatch.setattr(measure, "choose", lambda config, split, count, seed: dataclasses.replace(blank))
    options = measure.default_options()
    options.update({"timed": (1, 2, 4), "repeats": 1})
    options.language.steps = 0
    monkeypatch.setattr(measure, "resolve", lambda name, key: _Fake)
    found = measure.measure(None, options, None)
    assert found["depths"] == [1, 2] and found["bits"] == [2.0, 2.0] and found["pictures"]["cells"] == blank.cells
    psnr = {d: 20 * np.log10(255 / (90 - 40 * d)) for d in (1, 2)}
    assert all(found["psnr_db"][str(d)] == pytest.approx([psnr[d]] * 5, abs=1e-3) for d in (1, 2))
    assert found["codebooks"]["usage"] == [0.25, 0.25] and found["codebooks"]["dead"] == [3, 3] and found["codebooks"]["window"] == 14
    assert set(found["latency"]["search"]) == {"1", "2"} and found["language"] == {} and len(found["head_flops"]) == 2
