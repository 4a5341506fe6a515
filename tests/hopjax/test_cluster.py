"""The cluster-plus-outlier model: geometry, fixed points to fifty digits, folds, and the onset."""

import functools
import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from mpmath import mp, mpf

from hopjax import cluster
from tests import oracles
from tests.strategies import clusters, member_counts, powers

EPS = float(np.finfo(float).eps)
outlier_point, cluster_point = jax.jit(cluster.outlier_point), jax.jit(cluster.cluster_point)
regime = jax.jit(cluster.regime)
onset, onset_bounds = jax.jit(cluster.critical_beta), jax.jit(cluster.critical_effective_beta_bounds)
effective_onset = jax.jit(cluster.critical_effective_beta)
outlier_leakage, cluster_leakage = jax.jit(cluster.log_outlier_leakage), jax.jit(cluster.log_cluster_leakage)


@functools.cache
def outlier_fold(members, cosine):
    with mp.workdps(30):
        fold = oracles.outlier_fold(members, cosine)
        return None if fold is None else fold[1]


@functools.cache
def cluster_fold(members, cosine):
    with mp.workdps(30):
        return oracles.cluster_fold(members, cosine)


def log_ratios(point):
    """What tells the oracle which root is meant: y, or (v, w)."""
    if isinstance(point, cluster.OutlierPoint):
        return float(point.log_member) - float(point.log_self)
    return float(point.log_self) - float(point.log_other), float(point.log_outlier) - float(point.log_self)


def assert_accurate(point, exact, eps=EPS):
    """The docstring: each log-weight within 8 eps·max(1, |log weight|)·condition."""
    for value, reference in zip(point, exact, strict=False):
        if reference is not None and not isinstance(reference, bool):
            assert abs(mpf(float(value)) - reference) <= 8 * eps * max(1, abs(reference)) * float(point.condition), (value, reference)


# ---- Geometry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "dim", "cosine"), [(2, 3, -1.0), (2, 7, 0.3), (5, 6, -0.25), (12, 50, 0.35), (30, 31, 0.999), (4, 9, 0.0)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_memories_have_the_gram_matrix(members, dim, cosine, dtype):
    rows = np.asarray(jax.jit(lambda: cluster.memories(members, dim, cosine, dtype=dtype))())
    assert rows.dtype == dtype
    assert rows.shape == (members + 1, dim)
    gram = np.full((members + 1, members + 1), cosine)
    gram[-1] = gram[:, -1] = 0
    np.fill_diagonal(gram, 1)
    # K products of unit vectors' entries, each rounded twice.
    np.testing.assert_allclose(rows.astype(float) @ rows.astype(float).T, gram, rtol=0, atol=4 * members * float(np.finfo(dtype).eps))


def test_latent_gaussian_memories_concentrate_on_the_model(key):
    dim = 40_000
    rows = np.asarray(jax.jit(lambda key: cluster.latent_gaussian_memories(key, 6, dim, 0.4))(key))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-14)
    gram = rows @ rows.T
    expected = np.full((7, 7), 0.4)
    expected[-1] = expected[:, -1] = 0
    np.fill_diagonal(expected, 1)
    # Each cosine has a standard deviation below 2/√d = 0.01; six of them for 21 cosines.
    assert np.abs(gram - expected).max() <= 6 * 2 / math.sqrt(dim)
    assert np.abs(gram - expected).max() >= 0.01 / math.sqrt(dim)  # it is a draw, not the model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 5, 0.1), r"members=1: .* at least K = 2"),
        ((3, 5, -0.51), r"cosine=-0.51 is out of range: need -0.5 ≤ c < 1 for K = 3"),
        ((3, 5, 1.0), r"cosine=1.0 is out of range"),
        ((3, 5, math.nan), r"cosine=nan is out of range"),
        ((3, 3, 0.5), r"dim=3 is too small: need d ≥ 4 for K = 3"),
    ],
)
def test_impossible_geometry_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        cluster.memories(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1, 5, 0.1), "members=1"), ((3, 5, -0.1), "need 0 ≤ c < 1"), ((3, 5, 1.0), "cosine=1.0"), ((3, 1, 0.5), "dim=1 .* need d ≥ 2")],
)
def test_impossible_latent_geometry_raises(arguments, message, key):
    with pytest.raises(ValueError, match=message):
        cluster.latent_gaussian_memories(key, *arguments)


# ---- Fixed points -------------------------------------------------------------------------------------------------------


@hypothesis.given(clusters(), powers(0, 4), powers(-9, 0.5))
@hypothesis.settings(max_examples=60)
def test_log_weights_agree_with_fifty_digits(geometry, beta, above):
    """Anywhere, and right above each fold; missing exactly where the branch has ended."""
    members, cosine = geometry
    for beta_here in (beta, float(cluster_fold(*geometry)) * (1 + above), float(outlier_fold(*geometry) or 1) * (1 + above)):
        at_outlier, at_cluster = outlier_point(*geometry, beta_here), cluster_point(*geometry, beta_here)
        fold = outlier_fold(*geometry)
        assert bool(at_outlier.exists) == (fold is None or beta_here >= fold)
        assert bool(at_cluster.exists) == (beta_here >= cluster_fold(*geometry))
        with mp.workdps(50):
            if at_outlier.exists:
                assert_accurate(at_outlier, oracles.outlier_weights_near(members, cosine, beta_here, log_ratios(at_outlier)))
            else:
                assert np.isnan(at_outlier.log_self)
                assert np.isnan(at_outlier.log_member)
            if at_cluster.exists:
                assert_accurate(at_cluster, oracles.cluster_weights_near(members, cosine, beta_here, log_ratios(at_cluster)))
            else:
                assert np.isnan([at_cluster.log_self, at_cluster.log_other, at_cluster.log_outlier]).all()


@pytest.mark.parametrize(("members", "cosine"), [(2.0, -1.0), (2.0, 0.5), (3.0, 0.0), (10.0, 0.5), (12.0, -1 / 11), (1e4, 0.9), (1e9, 0.1)])
def test_branches_end_at_their_folds(members, cosine):
    for point, fold in ((outlier_point, outlier_fold(members, cosine)), (cluster_point, cluster_fold(members, cosine))):
        if fold is not None:
            # 1e-12 is some thousands of eps: what rounding moves the fold by.
            assert point(members, cosine, float(fold) * (1 + 1e-12)).exists
            assert not point(members, cosine, float(fold) * (1 - 1e-12)).exists
            # Far below, another branch is there to be taken for this one.
            assert not any(point(members, cosine, float(fold) * share).exists for share in (0.9, 0.5, 0.1, 1e-3))


def test_the_outlier_of_few_opposed_members_has_no_fold():
    # K = 2, c < 0: at β → 0 all three weights are equal, along the same branch.
    assert outlier_fold(2.0, -0.9) is None
    point = outlier_point(2.0, -0.9, 1e-3)
    assert point.exists
    with mp.workdps(50):
        root = oracles.outlier_weights(2.0, -0.9, 1e-3)
        assert_accurate(point, root)
    assert abs(float(point.log_self) + math.log(3)) < 1e-3


@pytest.mark.parametrize(("members", "cosine", "beta"), [(10.0, 0.5, 20.0), (12.0, 0.35, 8.0), (2.0, -0.5, 5.0), (1e6, 0.2, 40.0)])
def test_bisection_along_the_branch_finds_the_same_outlier(members, cosine, beta):
    with mp.workdps(50):
        assert_accurate(outlier_point(members, cosine, beta), oracles.outlier_weights(members, cosine, beta))
    assert oracles.outlier_weights(10.0, 0.5, 2.0) is None


@hypothesis.given(clusters(), powers(0, 4))
def test_weights_sum_to_one_and_favour_their_memory(geometry, beta):
    members, at_outlier, at_cluster = geometry[0], outlier_point(*geometry, beta), cluster_point(*geometry, beta)
    if at_outlier.exists:
        total = math.exp(float(at_outlier.log_self)) + members * math.exp(float(at_outlier.log_member))
        assert abs(total - 1) <= 64 * EPS * (1 + abs(float(at_outlier.log_member))) * float(at_outlier.condition)
        assert at_outlier.log_self >= at_outlier.log_member
        leak = float(outlier_leakage(at_outlier, members))
        assert abs(leak - math.log(members) - float(at_outlier.log_member)) <= 8 * EPS * (1 + abs(leak) + math.log(members))
    if at_cluster.exists:
        others = math.log(members - 1) + float(at_cluster.log_other)
        total = math.exp(float(at_cluster.log_self)) + math.exp(others) + math.exp(float(at_cluster.log_outlier))
        assert abs(total - 1) <= 64 * EPS * (1 + abs(float(at_cluster.log_outlier))) * float(at_cluster.condition)
        assert at_cluster.log_self > at_cluster.log_other
        leak = float(cluster_leakage(at_cluster, members))
        expected = np.logaddexp(others, float(at_cluster.log_outlier))
        assert abs(leak - expected) <= 8 * EPS * (1 + abs(leak) + math.log(members))


@hypothesis.given(clusters(st.integers(2, 1000).map(float)), st.floats(1.5, 50))
@hypothesis.settings(max_examples=25)
def test_single_precision_keeps_its_own_accuracy(geometry, above):
    members, cosine = np.float32(geometry[0]), np.float32(geometry[1])
    hypothesis.assume(1 + (float(members) - 1) * float(cosine) >= 0)
    hypothesis.assume(cosine < 1)
    beta = np.float32(above * float(cluster_fold(float(members), float(cosine))))
    point = cluster_point(members, cosine, beta)
    assert point.log_self.dtype == point.condition.dtype == np.float32
    assert point.exists
    with mp.workdps(40):
        exact = oracles.cluster_weights_near(float(members), float(cosine), float(beta), log_ratios(point))
        assert_accurate(point, exact, float(np.finfo(np.float32).eps))


def test_the_condition_is_what_a_change_of_the_equations_does():
    """Next to the fold, changing β by 1e-9 moves log b by the condition times that: it grows like 1/√(β/β_c − 1)."""
    fold = float(cluster_fold(10.0, 0.5))
    conditions = []
    for above in (1e-2, 1e-4, 1e-6):
        beta = fold * (1 + above)
        point, moved = cluster_point(10.0, 0.5, beta), cluster_point(10.0, 0.5, beta * (1 + 1e-9))
        change = max(abs(float(b) - float(a)) / max(1.0, abs(float(a))) for a, b in zip(point[:3], moved[:3], strict=True))
        # Between the worst sign pattern (the condition) and a tenth of it; curvature is 1e-9/above.
        assert 0.1 * float(point.condition) <= change / 1e-9 <= 1.01 * float(point.condition)
        conditions.append(float(point.condition))
    assert 5 < conditions[1] / conditions[0] < 15
    assert 8 < conditions[2] / conditions[1] < 12


@pytest.mark.parametrize(
    ("members", "cosine", "beta"), [(10.0, 0.5, 20.0), (12.0, 0.35, 8.0), (2.0, -0.5, 5.0), (1e6, 0.9, 400.0), (5.0, 0.0, 4.0)]
)
def test_derivatives_are_those_of_the_roots(members, cosine, beta):
    grad = jax.jit(
        lambda c, b: (
            jax.jacrev(lambda c, b: cluster.outlier_point(members, c, b)[:2], (0, 1))(c, b),
            jax.jacfwd(lambda c, b: cluster.cluster_point(members, c, b)[:3], (0, 1))(c, b),
            jax.grad(jax.grad(lambda b: cluster.cluster_point(members, c, b).log_other))(b),
        )
    )
    at_outlier, at_cluster, second = grad(cosine, beta)
    y, vw = log_ratios(outlier_point(members, cosine, beta)), log_ratios(cluster_point(members, cosine, beta))
    with mp.workdps(60):
        step = mpf(10) ** -20

        def slopes(root, index):
            """Central differences with step 1e-20 in sixty digits: error 1e-40."""
            low, high = root(cosine - step, beta), root(cosine + step, beta)
            left, right = root(cosine, beta - step), root(cosine, beta + step)
            return float((high[index] - low[index]) / (2 * step)), float((right[index] - left[index]) / (2 * step))

        def outlier_root(c, b):
            return oracles.outlier_weights_near(members, mpf(c), mpf(b), y)

        def cluster_root(c, b):
            return oracles.cluster_weights_near(members, mpf(c), mpf(b), vw)

        for got, root in ((at_outlier, outlier_root), (at_cluster, cluster_root)):
            for index, pair in enumerate(got):
                for value, expected in zip(pair, slopes(root, index), strict=True):
                    # Both slopes come from terms of order one or more that may cancel; the point's condition is below 1e3.
                    assert abs(float(value) - expected) <= 1e-11 * max(1, abs(expected)), (index, float(value), expected)
        curve = [cluster_root(cosine, beta + i * step)[1] for i in (-1, 0, 1)]
        expected = float((curve[0] - 2 * curve[1] + curve[2]) / step**2)
    assert abs(float(second) - expected) <= 1e-10 * max(1, abs(expected))


# ---- The onset and the regimes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "printed"),
    [
        (2.0, 2.0),
        (3.0, 2.7456436),
        (5.0, 3.5645018),
        (10.0, 4.5597786),
        (100.0, 7.4586755),
        (1e4, 12.662823),
        (1e6, 17.624495),
        (1e9, None),
    ],
)
def test_the_onset_is_the_minimum_of_the_printed_curve(members, printed):
    value = float(effective_onset(members))
    with mp.workdps(40):
        # At K = 2 the minimum is the limit m → 0, which the oracle's grid stops 1e-16 short of.
        exact = oracles.critical_effective_beta(members)
        assert abs(value - exact) <= 8 * EPS * exact
    assert printed is None or abs(value - printed) <= 5e-7 * max(1, printed / 10)


@hypothesis.given(member_counts())
def test_the_onset_lies_between_its_elementary_bounds(members):
    hypothesis.assume(members >= 3)
    lower, upper = onset_bounds(members)
    value = effective_onset(members)
    assert float(lower) < float(value) <= float(upper) * (1 + 4 * EPS)
    if members > 1e6:
        assert float(upper) - float(lower) < 0.3  # both tend to L + log L + 1
    with_cosine = onset(members, 0.25)
    assert abs(float(with_cosine) * 0.75 - float(value)) <= 4 * EPS * float(value)


def test_the_onset_has_the_derivative_of_the_envelope():
    # ∂/∂K min_v [v + K v/(e^v − 1)] = v/(e^v − 1) at the minimum; in mpmath by differences.
    slope = float(jax.jit(jax.grad(cluster.critical_effective_beta))(10.0))
    with mp.workdps(50):
        step = mpf(10) ** -10
        expected = (oracles.critical_effective_beta(mpf(10) + step) - oracles.critical_effective_beta(mpf(10) - step)) / (2 * step)
    assert abs(slope - float(expected)) <= 1e-11
    # β_c = β_eff/(1−c): ∂/∂c multiplies by 1/(1−c).
    value, in_cosine = jax.jit(jax.value_and_grad(cluster.critical_beta, 1))(10.0, 0.4)
    assert abs(float(in_cosine) - float(value) / 0.6) <= 8 * EPS * float(in_cosine)


def test_without_the_outlier_the_branch_ends_at_the_onset():
    # The outlier adds O(e^{−β}): at c = 0.9 β_c = 46, and the fold is the closed value.
    assert abs(float(cluster_fold(10.0, 0.9)) - float(onset(10.0, 0.9))) < 1e-12 * 46


@hypothesis.given(clusters(), powers(0, 4))
def test_regimes_are_their_definitions(geometry, beta):
    members, cosine = geometry
    place = regime(members, cosine, beta)
    leak_outlier = beta * members * math.exp(float(outlier_point(members, cosine, beta).log_member))
    point = cluster_point(members, cosine, beta)
    leak_cluster = beta * ((members - 1) * math.exp(float(point.log_other)) + math.exp(float(point.log_outlier)))
    # XLA may flush a leakage below the smallest normal number to zero, and β multiplies what that loses.
    flushed = beta * float(np.finfo(float).tiny)
    np.testing.assert_allclose(float(place.outlier_leak), leak_outlier, rtol=1e-12, atol=flushed)
    np.testing.assert_allclose(float(place.cluster_leak), leak_cluster, rtol=1e-12, atol=flushed)
    np.testing.assert_allclose(float(place.critical_ratio), beta / float(onset(members, cosine)), rtol=8 * EPS)
    np.testing.assert_allclose(float(place.strength), beta * (1 - cosine) / math.log(members * beta), rtol=64 * EPS)
    assert bool(place.exists) == (place.critical_ratio >= 1)
    assert bool(place.localised) == (leak_outlier <= 0.1 and leak_cluster <= 0.1)
    assert bool(place.strong) == (place.strength >= 2)
    if place.strong and members * beta >= 100:  # the chain of Eq. (50): Kβ·(Kβ)^{−2} ≤ 1/100 twice over
        assert place.localised
    if place.localised:
        assert point.exists


def test_regime_thresholds_are_arguments():
    loose = jax.jit(lambda: cluster.regime(10.0, 0.5, 12.0, localised_below=10.0, strong_above=0.1))()
    assert loose.localised
    assert loose.strong
    tight = regime(10.0, 0.5, 12.0)
    assert not tight.localised
    assert not tight.strong
    # Nothing is required where log Kβ ≤ 0.
    assert regime(2.0, 0.0, 0.4).strength == math.inf


@pytest.mark.parametrize(
    ("members", "cosine", "beta"),
    [
        *((members, 0.5, 20.0) for members in (1.0, 0.0, math.nan, math.inf)),
        *((3.0, cosine, 20.0) for cosine in (-0.51, 1.0, 1.5, math.nan, -math.inf)),
        *((3.0, 0.5, beta) for beta in (0.0, -1.0, math.nan, math.inf)),
    ],
)
def test_impossible_parameters_give_nan(members, cosine, beta):
    for point in (outlier_point(members, cosine, beta), cluster_point(members, cosine, beta)):
        assert not point.exists
        assert np.isnan([float(value) for name, value in point._asdict().items() if name.startswith("log_")]).all()
    place = regime(members, cosine, beta)
    assert np.isnan(place.outlier_leak)
    assert np.isnan(place.cluster_leak)
    assert not any([place.localised, place.strong, place.exists])


@pytest.mark.parametrize("members", [1.0, 0.0, -3.0, math.nan])
def test_an_onset_needs_two_members(members):
    assert np.isnan(effective_onset(members))
    assert np.isnan(onset(members, 0.5))
    assert np.isnan(onset_bounds(members)).all()


@pytest.mark.usefixtures("unchecked")
def test_whole_numbers_are_welcome():
    np.testing.assert_array_equal(jax.jit(lambda: cluster.cluster_point(5, 0, 8)[:3])(), cluster_point(5.0, 0.0, 8.0)[:3])


def test_batches_compile_once_and_agree_with_loops():
    members, cosine, beta = np.array([2.0, 10.0, 1e6, 5.0]), np.array([-1.0, 0.5, 0.9, 0.2]), np.array([3.0, 12.0, 500.0, 1.0])
    for kernel in (cluster.outlier_point, cluster.cluster_point, cluster.regime):
        single: Any = jax.jit(lambda *row, kernel=kernel: kernel(*row))  # a cache of its own
        rows = [single(*row) for row in zip(members, cosine, beta, strict=True)]
        assert single._cache_size() == 1
        many = jax.jit(jax.vmap(kernel))(members, cosine, beta)
        for i, row in enumerate(rows):
            for alone, batched in zip(row, many, strict=True):
                np.testing.assert_allclose(batched[i], alone, rtol=1e-13)


def test_without_jit_the_numbers_are_the_same():
    np.testing.assert_allclose(cluster.cluster_point(10.0, 0.5, 20.0)[:3], cluster_point(10.0, 0.5, 20.0)[:3], rtol=8 * EPS)
    np.testing.assert_allclose(cluster.outlier_point(10.0, 0.5, 20.0)[:2], outlier_point(10.0, 0.5, 20.0)[:2], rtol=8 * EPS)
    assert isinstance(jnp.asarray(0.0), jax.Array)
