"""Beam search: a wide one is exhaustive, a narrow one never worse than the greedy search, tiles change nothing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina.quantize import lookup, rvq


def _error(cfg, stats, x, codes):
    return np.asarray(((x - rvq.decode(cfg, stats, codes)) ** 2).sum(-1))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(cfg, stats, x, beam):
    return rvq.encode(cfg, stats, x, beam)


@pytest.mark.parametrize("codebook", ["separate", "shared"])
def test_a_wide_beam_finds_the_best_codes_of_all(codebook):
    cfg = rvq.RVQConfig(sizes=(5, 5, 5), dim=4, codebook=codebook)
    stats, x = rvq.init_stats(cfg, jax.random.key(0)), jax.random.normal(jax.random.key(1), (40, 4))
    every = jnp.array(list(itertools.product(range(5), repeat=3)))
    error = ((np.asarray(x)[:, None] - np.asarray(rvq.decode(cfg, stats, every))) ** 2).sum(-1)
    codes = _encode(cfg, stats, x, 25)
    np.testing.assert_allclose(_error(cfg, stats, x, codes), error.min(-1), rtol=1e-5)
    greedy = _error(cfg, stats, x, _encode(cfg, stats, x, 1))
    assert (greedy > error.min(-1) * 1.01).mean() > 0.3  # there was something to find


CASES = {"rvq": {}, "cosine": {"metric": "cosine"}, "fsq": {"kind": "fsq"}}


@pytest.mark.parametrize("case", CASES)
def test_no_vector_loses_and_their_sum_gains(case):
    cfg = rvq.RVQConfig(sizes=(20, 16, 12), dim=6, **CASES[case])
    stats, x = rvq.init_stats(cfg, jax.random.key(0)), jax.random.normal(jax.random.key(1), (128, 6))
    errors = [_error(cfg, stats, x, _encode(cfg, stats, x, beam)) for beam in (1, 4)]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all() and errors[1].sum() < 0.98 * errors[0].sum()


def test_the_config_names_the_beam_and_training_does_not_use_it():
    cfg = rvq.RVQConfig(sizes=(8, 8, 8), dim=4, beam=4)
    stats, x = rvq.init_stats(cfg, jax.random.key(0)), jax.random.normal(jax.random.key(1), (40, 4))
    wide, greedy = _encode(cfg, stats, x, None), _encode(cfg, stats, x, 1)
    np.testing.assert_array_equal(wide, _encode(cfg, stats, x, 4))
    assert (np.asarray(wide) != np.asarray(greedy)).any()
    trained = jax.jit(lambda x: rvq.quantize(cfg, stats, x, jnp.ones(40)).codes_NL)
    np.testing.assert_array_equal(trained(x), greedy)


def test_tiles_give_the_same_codes_and_bound_the_scores(monkeypatch):
    cfg = rvq.RVQConfig(sizes=(50, 50), dim=4)
    stats, x = rvq.init_stats(cfg, jax.random.key(0)), jax.random.normal(jax.random.key(1), (30, 4))
    whole = _encode(cfg, stats, x, 3)
    monkeypatch.setattr(lookup, "TILE", 16)
    tiled = jax.jit(lambda x: rvq.encode(cfg, stats, x, beam=3))
    np.testing.assert_array_equal(tiled(x), whole)
    text = str(jax.make_jaxpr(tiled)(x))
    assert "f32[90,16]" in text and "f32[90,50]" not in text and "f32[30,50]" not in text
