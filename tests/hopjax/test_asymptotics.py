"""The closed forms of large β: what they drop is what they say they drop."""

import math

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from hopjax import asymptotics, cluster, gaps
from tests.strategies import powers

ROWS = [(10.0, 0.5, 64.0), (3.0, -0.3, 8.0), (20.0, 0.3, 128.0), (2.0, 0.0, 3.0)]


energies, sharpnesses = jax.jit(asymptotics.energies), jax.jit(asymptotics.sharpnesses)
rises = jax.jit(lambda k, c, beta, dim, epsilon, sigma: asymptotics.rises(k, c, beta, dim, epsilon=epsilon, sigma=sigma))


def leak(members, cosine, beta):
    return (members - 1) * math.exp(-beta * (1 - cosine)) + members * math.exp(-beta)


@jax.jit
def both(members, cosine, beta, dim):
    at_outlier, at_cluster = cluster.outlier_point(members, cosine, beta), cluster.cluster_point(members, cosine, beta)
    exact = {
        "log_weights": (at_outlier.log_member, at_cluster.log_other, at_cluster.log_outlier),
        "energies": gaps.energies(members, cosine, beta)[:3],
        "sharpnesses": gaps.sharpnesses(members, cosine, beta, dim)[:3],
        "log_susceptibilities": [jax.nn.log_sigmoid(value) for value in gaps.replay_log_weights(members, cosine, beta)],
    }
    asymptotic = {
        "log_weights": asymptotics.log_weights(members, cosine, beta),
        "energies": asymptotics.energies(members, cosine, beta),
        "sharpnesses": asymptotics.sharpnesses(members, cosine, beta, dim),
        "log_susceptibilities": asymptotics.log_susceptibilities(members, cosine, beta),
    }
    return {name: (exact[name], asymptotic[name]) for name in exact}


@pytest.mark.parametrize(("members", "cosine", "dim"), ROWS)
@pytest.mark.parametrize("beta", [14.0, 20.0, 26.0])
def test_errors_are_of_the_order_that_is_dropped(members, cosine, dim, beta):
    """With ℓ ≤ 1e-2: errors below 8 times the dropped order, plus the rounding of the exact value."""
    beta = beta / (1 - max(cosine, 0))
    size, values = leak(members, cosine, beta), both(members, cosine, beta, dim)
    assert beta * size < 0.2
    dropped = {
        "log_weights": 8 * beta * size,
        "energies": 8 * size**2,
        "sharpnesses": 8 * (dim + beta) * beta * size**2,
        "log_susceptibilities": 8 * beta * size,
    }
    rounding = {"log_weights": 1e-14 * beta, "energies": 1e-15, "sharpnesses": 1e-14 * dim, "log_susceptibilities": 1e-14 * beta}
    for name, (exact, asymptotic) in values.items():
        errors = np.abs(np.subtract(exact, asymptotic))
        assert errors.max() <= dropped[name] + rounding[name], name
    # The two selves drop O(βℓ²) only.
    exact, asymptotic = values["log_susceptibilities"]
    assert np.abs(np.subtract(exact[:2], asymptotic[:2])).max() <= 8 * beta * size**2 + 1e-14


@pytest.mark.parametrize("name", ["energies", "sharpnesses"])
def test_ratios_tend_to_one(name):
    """The gap's relative error falls like βℓ, measured between β = 16 and 28: e^{−6} by the exponential, times 28/16."""
    errors = []
    for beta in (16.0, 28.0):
        exact, asymptotic = both(10.0, 0.5, beta, 64.0)[name]
        errors.append(abs(float(asymptotic[2] / exact[2]) - 1))
    assert errors[0] < 0.1
    assert 0.2 < (errors[1] / errors[0]) / (28 / 16 * math.exp(-6)) < 5


@pytest.mark.parametrize(
    ("row", "outlier", "cluster_side"),
    [
        ((10.0, 0.5, 20.0, 64.0), 62.9999970, 62.9681289),
        ((5.0, 0.8, 60.0, 32.0), 31.0, 30.9991644),
        ((20.0, 0.3, 15.0, 128.0), 126.9983542, 126.8997525),
    ],
)
def test_known_sharpnesses(row, outlier, cluster_side):
    computed = jax.jit(asymptotics.sharpnesses)(*row)
    np.testing.assert_allclose(computed[:2], (outlier, cluster_side), rtol=0, atol=6e-8)


@hypothesis.given(st.integers(2, 200).map(float), st.floats(-0.004, 0.99), st.floats(1, 30), powers(math.log10(2), 6))
def test_gaps_are_differences(members, cosine, beta, dim):
    eps = float(np.finfo(float).eps)
    for kernel, arguments in ((energies, ()), (sharpnesses, (dim,))):
        side = kernel(members, cosine, beta, *arguments)
        # Each side is rounded once at its own size.
        size = abs(float(side.outlier)) + abs(float(side.cluster)) + members * (dim + beta) * math.exp(-beta * (1 - cosine))
        assert abs(float(side.outlier) - float(side.cluster) - float(side.gap)) <= 8 * eps * size
    rise = rises(members, cosine, beta, dim, 0.02, 0.5)
    np.testing.assert_allclose(rise, 0.5 * (0.02 * 0.5) ** 2 * np.array(side), rtol=8 * eps, atol=4 * eps * 5e-5 * size)


def test_first_orders_are_the_two_points():
    """Eqs. (75)-(77) with the model's off-memory weights are Eqs. (78)-(81)."""
    members, cosine, beta, dim = 10.0, 0.5, 20.0, 64.0

    @jax.jit
    def first_order():
        near, far = np.exp(-beta * (1 - cosine)), np.exp(-beta)
        off = np.r_[np.full(9, near), far]
        sharpness = asymptotics.first_order_sharpness(jax.numpy.asarray(off), jax.numpy.asarray(np.r_[np.full(9, cosine), 0.0]), beta, dim)
        return sharpness, asymptotics.first_order_energy(jax.numpy.asarray([off.sum(), 10 * far]), beta)

    sharpness, energies = first_order()
    np.testing.assert_allclose(sharpness, jax.jit(asymptotics.sharpnesses)(members, cosine, beta, dim).cluster, rtol=1e-15)
    np.testing.assert_allclose(energies[::-1], jax.jit(asymptotics.energies)(members, cosine, beta)[:2], rtol=1e-15)


def test_impossible_parameters_give_nan():
    for row in ((1.0, 0.5, 20.0), (3.0, 1.0, 20.0), (3.0, -0.6, 20.0), (3.0, 0.5, 0.0), (3.0, 0.5, math.nan), (3.0, 0.5, math.inf)):
        assert np.isnan(jax.jit(asymptotics.energies)(*row)).all()
        assert np.isnan(jax.jit(asymptotics.sharpnesses)(*row, 8.0)).all()
        assert np.isnan(jax.jit(asymptotics.log_weights)(*row)).all()
        assert np.isnan(jax.jit(asymptotics.log_susceptibilities)(*row)).all()
