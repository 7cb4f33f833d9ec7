"""Chunked sums equal the plain ones, gradients included, and skip what does not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dina import losses


def _problem(n=23, d=5, v=7):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)).astype(np.float32)
    labels = rng.integers(0, v, n).astype(np.int32)
    weight = (rng.random(n) < 0.4).astype(np.float32) * rng.random(n).astype(np.float32)
    return rng.normal(size=(d, v)).astype(np.float32), x, labels, weight


def _sums(w, piece):
    value, right = losses.nll(piece["x"] @ w, piece["labels"])
    return {"nll": jnp.sum(value * piece["weight"]), "right": jnp.sum(right * piece["weight"]), "weight": jnp.sum(piece["weight"])}


@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize("chunk", [4, 23, 64])
def test_chunks_do_not_change_sums_or_gradients(chunk, remat):
    w, x, labels, weight = _problem()

    def total(w, x):
        order = losses.front(jnp.asarray(weight > 0))
        arrays = {"x": x[order], "labels": labels[order], "weight": weight[order]}
        out = losses.chunked_sums(_sums, w, arrays, jnp.sum(weight > 0), chunk, remat)
        return out["nll"], out

    def plain(w, x):
        out = _sums(w, {"x": x, "labels": labels, "weight": weight})
        return out["nll"], out

    (_, out), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(w, x)
    (_, expected), expected_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(w, x)
    for name in expected:
        np.testing.assert_allclose(out[name], expected[name], rtol=1e-6)
    for g, e in zip(grads, expected_grads):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6)


def test_chunks_past_the_last_weight_are_never_run():
    w, x, labels, weight = _problem()
    order = np.asarray(losses.front(jnp.asarray(weight > 0)))
    used = int((weight > 0).sum())
    assert (weight[order][:used] > 0).all() and (np.diff(order[:used]) > 0).all()
    x = x[order]
    x[used:] = np.nan
    arrays = {"x": x, "labels": labels[order], "weight": weight[order]}
    out = losses.chunked_sums(_sums, w, arrays, used, used)  # one full chunk of weighted positions
    assert np.isfinite(out["nll"])
    assert not np.isfinite(losses.chunked_sums(_sums, w, arrays, used + 1, used)["nll"])


def test_padded_classes_stay_out_of_the_softmax():
    logits = np.array([[1.0, 2.0, 50.0]], np.float32)
    value, right = losses.nll(logits, np.array([1]), classes=2)
    np.testing.assert_allclose(value, np.log(1 + np.exp(-1.0)), rtol=1e-6)
    assert bool(right[0])
