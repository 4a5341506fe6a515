"""Gaps of Theorem 4.1 and Appendix C against mpmath, far below the rounding of either side, and the theorems as properties."""

import math
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from mpmath import mp, mpf

import hopjax
from hopjax import cluster, gaps
from tests import oracles
from tests.strategies import clusters, powers

EPS = float(np.finfo(float).eps)
energies, sharpnesses = jax.jit(gaps.energies), jax.jit(gaps.sharpnesses)
outlier_point, cluster_point = jax.jit(cluster.outlier_point), jax.jit(cluster.cluster_point)
onset, regime = jax.jit(cluster.critical_beta), jax.jit(cluster.regime)


@jax.jit
def replay(members, cosine, beta, outlier_rise, cluster_rise):
    """log π and exact gains of the five canonical pairs."""
    pi = gaps.replay_log_weights(members, cosine, beta)
    rises = (outlier_rise, cluster_rise, cluster_rise, cluster_rise, outlier_rise)
    return pi, [hopjax.gain(log_pi, rise, beta) for log_pi, rise in zip(pi, rises, strict=True)]


# S and E by the printed formulas need twice the digits of the smallest weight: squares of it are added to one.
TABLE = [  # (K, c, β): the presets, gaps near 1e-30 and 1e-300, next to the fold, c at its bound, many members
    (10.0, 0.5, 20.0),
    (12.0, 0.35, 8.0),
    (10.0, 0.5, 140.0),
    (10.0, 0.5, 1400.0),
    (10.0, 0.01, 700.0),
    (10.0, 0.999, 1e4),
    (3.0, -0.5, 30.0),
    (2.0, -1.0, 9.0),
    (2.0, 1e-9, 50.0),
    (1e6, 0.9, 400.0),
    (1e9, 0.2, 60.0),
    (10.0, 0.5, 9.13),
]


def points(members, cosine, beta):
    """The two points in as many digits as their gap needs, with the largest |log weight| and condition."""
    at_outlier, at_cluster = outlier_point(members, cosine, beta), cluster_point(members, cosine, beta)
    y = float(at_outlier.log_member) - float(at_outlier.log_self)
    v, w = float(at_cluster.log_self) - float(at_cluster.log_other), float(at_cluster.log_outlier) - float(at_cluster.log_self)
    exact = oracles.outlier_weights_near(members, cosine, beta, y), oracles.cluster_weights_near(members, cosine, beta, (v, w))
    logs = [float(value) for value in (*at_outlier[:2], *at_cluster[:3])]
    return *exact, max(1.0, *map(abs, logs)), max(float(at_outlier.condition), float(at_cluster.condition))


def digits(members, cosine, beta):
    return 70 + int(2 * beta / math.log(10))


def assert_gap(computed, sides, base, log_weight, condition):
    """The docstring of Gap: within 16 eps·|log weight|·condition of the larger leakage term, and 1e-12 of it where that applies."""
    exact, larger = sides[0] - sides[1], max(abs(side - base) for side in sides)
    value = mpf(float(computed.sign)) * mp.exp(mpf(float(computed.log_gap))) if computed.sign else mpf(0)
    error = abs(value - exact) / larger
    assert error <= 16 * EPS * log_weight * condition
    assert abs(mpf(float(computed.log_scale)) - mp.log(larger)) <= 16 * EPS * log_weight * condition
    if log_weight < 708 and condition <= 100:
        assert error <= 1e-12
        if abs(exact) > 1e-290:
            assert abs(mpf(float(computed.gap)) - exact) <= 1e-12 * larger
    if abs(exact) > 1e-11 * condition * larger:
        assert float(computed.sign) == mp.sign(exact)
    for side, reference in zip(computed[:2], sides, strict=True):
        assert abs(mpf(float(side)) - reference) <= 4 * EPS * max(abs(base), larger) + 16 * EPS * log_weight * condition * larger


@pytest.mark.parametrize("dim", [2.0, 64.0, 1e6])
@pytest.mark.parametrize(("members", "cosine", "beta"), TABLE)
def test_gaps_agree_with_many_digits(members, cosine, beta, dim):
    with mp.workdps(digits(members, cosine, beta)):
        at_outlier, at_cluster, log_weight, condition = points(members, cosine, beta)
        sides = oracles.side_sharpnesses(members, cosine, beta, dim, at_outlier, at_cluster)
        assert_gap(sharpnesses(members, cosine, beta, dim), sides, mpf(dim) - 1, log_weight, condition)
        if dim == 64:
            sides = oracles.side_energies(members, cosine, beta, at_outlier, at_cluster)
            assert_gap(energies(members, cosine, beta), sides, -mpf(1) / 2, log_weight, condition)


def test_the_table_holds_gaps_of_every_size():
    sizes = [float(sharpnesses(*row, 64.0).log_gap) / math.log(10) for row in TABLE]
    assert any(-33 < size < -27 for size in sizes)
    assert any(-303 < size < -297 for size in sizes)


def test_a_gap_that_underflows_has_a_sign_and_a_logarithm():
    computed = sharpnesses(10.0, 0.5, 1e4, 64.0)
    assert computed.gap == 0
    assert computed.sign == 1
    # Eq. (73) is exact to relative βKe^{−β/2}: log gap = log[(K−1)(1−c)(2(d−1) + β(1+c))] − β(1−c).
    expected = math.log(9 * 0.5 * (126 + 1.5e4)) - 5000
    assert abs(float(computed.log_gap) - expected) <= 4 * EPS * 5000
    computed = energies(10.0, 0.5, 1e4)
    assert computed.sign == 1
    assert abs(float(computed.log_gap) - (math.log(9 / 1e4) - 5000)) <= 4 * EPS * 5000


@hypothesis.given(clusters(), powers(0, 2.3), st.sampled_from([2.0, 64.0, 1e6]))
@hypothesis.settings(max_examples=40)
def test_gaps_agree_with_many_digits_anywhere(geometry, beta, dim):
    members, cosine = geometry
    computed = sharpnesses(members, cosine, beta, dim)
    if np.isnan(computed.gap):
        assert not (outlier_point(members, cosine, beta).exists and cluster_point(members, cosine, beta).exists)
        return
    with mp.workdps(digits(members, cosine, beta)):
        at_outlier, at_cluster, log_weight, condition = points(members, cosine, beta)
        sides = oracles.side_sharpnesses(members, cosine, beta, dim, at_outlier, at_cluster)
        assert_gap(computed, sides, mpf(dim) - 1, log_weight, condition)
        sides = oracles.side_energies(members, cosine, beta, at_outlier, at_cluster)
        assert_gap(energies(members, cosine, beta), sides, -mpf(1) / 2, log_weight, condition)


@pytest.mark.parametrize(("members", "dim", "cosine", "beta"), [(12, 50, 0.35, 8.0), (10, 64, 0.5, 20.0), (3, 4, -0.5, 6.0)])
def test_scalars_are_those_of_the_full_model(members, dim, cosine, beta):
    """Energy and sharpness of `hopjax.energy` at the fixed points that the iteration finds among d-dimensional memories."""

    @jax.jit
    def dense():
        rows = cluster.memories(members, dim, cosine)
        at = [hopjax.fixed_point(row, rows, beta).state for row in (rows[-1], rows[0])]
        return [hopjax.energy(x, rows, beta) for x in at], [hopjax.sharpness(x, rows, beta) for x in at]

    energy, sharpness = dense()
    scalar = energies(float(members), cosine, beta)
    np.testing.assert_allclose(energy, scalar[:2], rtol=0, atol=32 * EPS)  # E is stationary: only its own rounding
    scalar = sharpnesses(float(members), cosine, beta, float(dim))
    np.testing.assert_allclose(sharpness, scalar[:2], rtol=0, atol=1e-13 * 100 * dim)  # x to 1e-13/λ, slopes of order d + β²


@pytest.mark.parametrize(
    ("row", "outlier", "cluster_side"),
    [
        ((10.0, 0.5, 20.0, 64.0), 62.9999970, 62.9680049),
        ((5.0, 0.8, 60.0, 32.0), 31.0, 30.9991641),
        ((20.0, 0.3, 15.0, 128.0), 126.9983541, 126.8992516),
    ],
)
def test_known_sharpnesses(row, outlier, cluster_side):
    computed = sharpnesses(*row)
    assert abs(float(computed.outlier) - outlier) <= 6e-8
    assert abs(float(computed.cluster) - cluster_side) <= 6e-8


# ---- The theorems -------------------------------------------------------------------------------------------------------


@hypothesis.given(st.integers(2, 200).map(float), st.floats(0.01, 0.95), st.floats(2, 20), powers(math.log10(2), 6).map(np.floor))
def test_the_outlier_rises_more(members, cosine, strength, dim):
    """Theorem 4.1 and Appendix C in the regime: 0 < c < 1, β(1−c) ≥ 2(log K + log β), and βc not small against 1."""
    beta = max(strength * 2 * math.log(members) / (1 - cosine), 4 / cosine, 5.0)
    while beta * (1 - cosine) < strength * math.log(members * beta):
        beta *= 1.3
    assert regime(members, cosine, beta).strong
    for computed in (sharpnesses(members, cosine, beta, dim), energies(members, cosine, beta)):
        assert computed.sign == 1
        # Not by rounding: the gap is a sizeable part of the larger leakage.
        assert computed.log_gap - computed.log_scale > -3


@hypothesis.given(st.integers(2, 200).map(float), st.floats(0.05, 0.9), st.floats(2, 10), st.integers(4, 10**6).map(float), powers(-4, -2))
def test_replay_gains_are_ordered(members, cosine, strength, dim, epsilon):
    """Theorem 5.1 (15): G(o←o) > G(c←c) > G(c←c′) ≫ G(c←o) ≍ G(o←c), at equal rises ½ε²S/(d−1), β times them small."""
    beta = max(strength * 2 * math.log(members) / (1 - cosine), 8 / cosine)
    while beta * (1 - cosine) < strength * math.log(members * beta):
        beta *= 1.3
    sides = sharpnesses(members, cosine, beta, dim)

    scale = 0.5 * epsilon**2 / (beta * (dim - 1))
    pi, values = replay(members, cosine, beta, scale * float(sides.outlier), scale * float(sides.cluster))
    own_outlier, own_cluster, same, across, back = (float(value) for value in values)
    assert own_cluster > same > 0
    # χ of both selves are ½ to order ℓ: equal in float64 once ℓ < eps.
    assert own_outlier >= own_cluster
    if float(sides.log_scale) > math.log(1e-12 * dim):
        assert own_outlier > own_cluster
    if across > 1e-300:
        assert same > across * math.exp(0.5 * beta * cosine)  # ≫: the ratio grows like e^{βc}
        assert 0.5 < across / back < 2  # ≍
    at_cluster, at_outlier = cluster_point(members, cosine, beta), outlier_point(members, cosine, beta)
    expected = (at_outlier.log_self, at_cluster.log_self, at_cluster.log_other, at_cluster.log_outlier, at_outlier.log_member)
    np.testing.assert_allclose(pi, expected, rtol=64 * EPS)


@hypothesis.given(st.integers(2, 10**6).map(float), st.floats(1.01, 100), powers(math.log10(2), 6))
def test_orthogonal_members_leave_no_gap(members, above, dim):
    beta = above * float(onset(members + 1, 0.0))
    for computed in (sharpnesses(members, 0.0, beta, dim), energies(members, 0.0, beta)):
        assert computed.gap == 0
        assert computed.sign == 0
        assert computed.log_gap == -math.inf
        # The two sides are the same number, rounded along two ways.
        assert abs(float(computed.outlier - computed.cluster)) <= 1e-10 * abs(float(computed.cluster))


def test_opposed_members_reverse_the_energy_gap():
    """c < 0 gives E_o < E_c (82): at ξ₁ the others weigh less than the outlier's companions do."""
    assert energies(5.0, -0.2, 12.0).sign == -1


def test_a_missing_point_leaves_the_other_side():
    beta = 0.9 * float(onset(10.0, 0.5))
    computed = energies(10.0, 0.5, beta)
    assert outlier_point(10.0, 0.5, beta).exists
    assert np.isfinite(computed.outlier)
    assert np.isnan([computed.cluster, computed.gap, computed.sign, computed.log_gap, computed.log_scale]).all()
    assert np.isnan(energies(10.0, 0.5, -1.0)).all()
    assert np.isnan(sharpnesses(10.0, 1.5, 20.0, 64.0)).all()


def test_values_do_not_recompile_and_vmap_is_a_loop():
    fresh: Any = jax.jit(lambda *row: gaps.sharpnesses(*row))
    rows = [fresh(*row, 64.0) for row in TABLE]
    assert fresh._cache_size() == 1
    many = jax.jit(jax.vmap(gaps.sharpnesses, (0, 0, 0, None)))(*np.array(TABLE).T, 64.0)
    for i, row in enumerate(rows):
        for alone, batched in zip(row, many, strict=True):
            np.testing.assert_allclose(batched[i], alone, rtol=1e-11)


def test_gaps_have_derivatives():
    slope = float(jax.jit(jax.grad(lambda b: gaps.sharpnesses(10.0, 0.5, b, 64.0).gap))(20.0))
    high, low = (float(sharpnesses(10.0, 0.5, 20.0 + h, 64.0).gap) for h in (1e-4, -1e-4))
    assert abs(slope - (high - low) / 2e-4) <= 1e-7 * abs(slope)  # h² f‴/6 with f = e^{−10}: 1e-9 relative; rounding 1e-12/1e-4
