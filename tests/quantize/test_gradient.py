"""What passes a quantizer: the value is exact, and the gradient is the rule's own formula."""

import jax
import jax.numpy as jnp
import numpy as np

from dina.quantize.gradient import through

X, Q, G = (jax.random.normal(jax.random.key(i), (12, 5)) for i in range(3))


def _gradient(x, q, rule):
    return jax.grad(lambda x: jnp.sum(through(x, q, rule) * G))(x)


def test_rotation_is_two_householder_reflections_and_a_scale():
    np.testing.assert_array_equal(through(X, Q, "rotation"), Q)
    for x, q, g, got in zip(*(np.asarray(a, np.float64) for a in (X, Q, G, _gradient(X, Q, "rotation"))), strict=True):
        a, b = x / np.linalg.norm(x), q / np.linalg.norm(q)
        reflect = lambda v: np.eye(5) - 2 * np.outer(v, v) / (v @ v)
        turn = reflect(b) @ reflect(a + b)  # the first takes a to -b, the second that to b
        np.testing.assert_allclose(turn @ a, b, atol=1e-12)
        scale = np.linalg.norm(q) / np.linalg.norm(x)
        np.testing.assert_allclose(scale * turn @ x, q, atol=1e-12)
        np.testing.assert_allclose(got, scale * turn.T @ g, atol=1e-5)


def test_rotation_keeps_the_angle_between_gradient_and_code():
    got, cosine = _gradient(X, Q, "rotation"), lambda a, b: (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    np.testing.assert_allclose(cosine(got, X), cosine(G, Q), atol=1e-5)


def test_where_there_is_no_rotation_the_gradient_passes_as_it_is():
    x = X.at[0].set(0.0)
    q = Q.at[1].set(0.0).at[2].set(-2 * x[2]).at[3].set(x[3])
    got = np.asarray(_gradient(x, q, "rotation"))
    np.testing.assert_allclose(got[:4], G[:4], atol=1e-5)
    assert np.isfinite(got).all() and np.abs(got[4:] - G[4:]).max() > 0.1


def test_straight_through_passes_the_gradient_as_it_is():
    np.testing.assert_allclose(through(X, Q, "straight_through"), Q, atol=1e-6)
    np.testing.assert_array_equal(_gradient(X, Q, "straight_through"), G)
    for rule in ("straight_through", "rotation"):
        assert float(jnp.abs(jax.grad(lambda q: jnp.sum(through(X, q, rule)))(Q)).max()) == 0
