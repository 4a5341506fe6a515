"""Statistics against SciPy, brute force and closed forms; intervals against how often they cover; confounds that are known."""

from math import factorial, pi
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from diffusion import statistics
from diffusion.over_seeds import binned, of_correlations, of_samples
from diffusion.statistics import (
    Bootstrap,
    Sampled,
    across_seeds,
    bin_edges,
    bin_means,
    bin_of,
    confound,
    correlation_across_seeds,
    departure,
    groups,
    mean_of,
    rank_correlation,
    rank_order,
    reach,
    trend,
)

EPS = np.finfo(np.float64).eps
columns = arrays(np.float64, st.integers(8, 40), elements=st.integers(-1000, 1000).map(lambda i: i / 8))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def numbers(values: Any) -> list[Sampled]:
    """Of seeds whose samples are not known."""
    return [Sampled(float(value)) for value in values]


# Means


def test_bootstrap_is_scipys_bca():
    values = np.random.default_rng(0).exponential(size=20)
    ours = Bootstrap(50_000)(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=50_000, method="BCa", rng=np.random.default_rng(1))
    assert ours.value == pytest.approx(values.mean(), rel=4 * EPS)
    assert ours.error == pytest.approx(stats.sem(values), rel=40 * EPS)
    # A tail's quantile and twice the bias each add 2.6/√B of standard error, in both: four times their sum. BCa differs from
    # percentiles by 0.4 standard errors here.
    slack = 4 * 2**0.5 * 3.7 / 50_000**0.5 * ours.error
    assert abs(ours.low - theirs.confidence_interval.low) < slack
    assert abs(ours.high - theirs.confidence_interval.high) < slack


@given(columns, st.integers(0, 2**32 - 1))
def test_bootstrap_depends_on_the_numbers_alone(values, seed):
    shuffled = np.random.default_rng(seed).permutation(values)
    interval = Bootstrap(200)
    found = interval(values)
    assert found == interval(shuffled)
    assert found.low <= found.value <= found.high or found.error > 0
    moved = interval(2 * values + 64)  # exact in binary: only roundings of means differ
    slack = 100 * EPS * (np.abs(values).max() + 64)
    np.testing.assert_allclose(
        moved[:4], [2 * found.value + 64, 2 * found.error, 2 * found.low + 64, 2 * found.high + 64], rtol=0, atol=slack
    )


def test_resampled_means_that_are_the_mean_are_no_bias():
    # Ten coins show five heads in a quarter of all tosses. Without a bias the ends are quantiles of theirs, two and eight.
    found = Bootstrap(20_000)(np.repeat([0.1, 1.1], 5))
    assert (found.low, found.high) == pytest.approx((0.3, 0.9), abs=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_bootstrap_of_any_scale(scale):
    values = normal(0, 30)
    np.testing.assert_allclose(np.array(Bootstrap(100)(scale * values)[:4]) / scale, Bootstrap(100)(values)[:4], rtol=1e-12)


def test_bootstrap_holds_a_bounded_number_of_values(monkeypatch):
    values = normal(0, 100)
    whole = Bootstrap(500)(values)
    monkeypatch.setattr(statistics, "_HELD", 1000)
    assert Bootstrap(500)(values) == whole


def test_of_equal_numbers_the_interval_is_that_number():
    assert Bootstrap()(np.full(7, 0.1)) == (0.1, 0.0, 0.1, 0.1, "")
    assert across_seeds(numbers([0.5] * 3))[:4] == (0.5, 0.0, 0.5, 0.5)
    assert across_seeds([mean_of(np.full(7, 0.5))] * 3)[:4] == (0.5, 0.0, 0.5, 0.5)


def test_bins_of_equal_counts():
    energy = np.random.default_rng(0).permutation(103).astype(np.float32)
    values = normal(1, 103)
    found = binned([values], energy, bin_edges(energy, 4), Bootstrap(200))
    order = np.argsort(energy)
    assert np.ptp(found.counts) <= 1
    assert found.counts.sum() == 103
    for i, part in enumerate(np.split(values[order], found.counts.cumsum()[:-1])):
        assert found.values[i] == pytest.approx(part.mean(), abs=10 * EPS)
        assert found.errors[i] == pytest.approx(stats.sem(part), rel=40 * EPS)
        assert (found.values[i], found.low[i], found.high[i]) == Bootstrap(200)(part)[:1] + Bootstrap(200)(part)[2:4]
        one = bin_means(values, energy, 4)[i]
        assert (one.value, one.error, one.freedom) == pytest.approx((part.mean(), stats.sem(part), len(part) - 1), rel=100 * EPS)
    sums = found.sums()
    assert sums.values.sum() == pytest.approx(values.sum(), abs=1000 * EPS)
    np.testing.assert_array_equal(sums.low, found.counts * found.low)
    np.testing.assert_array_equal(sums.errors, found.counts * found.errors)


@given(columns, st.integers(1, 6))
def test_samples_between_their_edges(energy, bins):
    if len(np.unique(energy)) < len(energy):
        energy = energy + np.arange(len(energy)) * 1e-3
    edges = bin_edges(energy, bins)
    where = bin_of(energy, edges)
    np.testing.assert_array_equal(where, bin_of(energy, bins))
    assert ((edges[where] <= energy) & ((energy < edges[where + 1]) | (where == bins - 1))).all()


def test_differences_are_paired_and_grouped():
    energy = np.arange(100.0)
    hard = 100 * normal(0, 100)  # common to both: it would drown an unpaired comparison
    other, policy = hard + energy, hard + 0.5 * energy
    masks = groups(energy, 0.1)
    assert {name: group.sum() for name, group in masks.items()} == {"low": 10, "high": 10, "all": 100}
    for name, samples in (("low", energy[:10]), ("high", energy[-10:]), ("all", energy)):
        for found in (mean_of(other - policy, masks[name]), mean_of(other, masks[name]) - mean_of(policy, masks[name])):
            assert found.value == pytest.approx(samples.mean() / 2, abs=1e-12)
            assert found.error == pytest.approx(stats.sem(samples) / 2, rel=1e-11)
            assert found.freedom == len(samples) - 1
    # Of groups that have no sample in common, by the textbook.
    apart = mean_of(other, masks["high"]) - mean_of(other, masks["low"]) * 0.5
    assert apart.error == pytest.approx(np.hypot(stats.sem(other[-10:]), stats.sem(other[:10]) / 2), rel=1e-11)


def test_seeds_get_students_interval():
    values = np.array([1.0, 2.0, 4.0])
    found = across_seeds(numbers(values), level=0.9)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.9, 2, values.mean(), stats.sem(values)), rel=1e-12)


def test_of_one_seed_it_is_students_interval_of_samples():
    values = normal(0, 20)
    found = across_seeds([mean_of(values)])
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 19, values.mean(), stats.sem(values)), rel=1e-12)


def test_samples_that_seeds_share_count_once():
    """Seeds that agree on every sample have the interval of samples; of seeds whose samples differ by chance alone it is Student's."""
    values = normal(0, 50)
    for seeds in (1, 2, 5):
        same = across_seeds([mean_of(values)] * seeds)
        assert same[:4] == pytest.approx(across_seeds([mean_of(values)])[:4], rel=1e-12)
    # By the analysis of variance: the mean squares of samples, seeds and what is left of 50 × 3 numbers.
    table = values[:, None] + normal(1, 3) + 0.5 * normal(2, 50, 3)
    residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    samples, seeds, left = 3 * table.mean(axis=1).var(ddof=1), 50 * table.mean(axis=0).var(ddof=1), (residual**2).sum() / (49 * 2)
    found = across_seeds([mean_of(column) for column in table.T])
    assert found.error**2 == pytest.approx((samples + seeds - left) / 150, rel=1e-12)
    reach = np.sqrt(stats.t.ppf(0.975, 2) ** 2 * seeds / 150 + stats.t.ppf(0.975, 49) ** 2 * (samples - left) / 150)
    assert found.high - found.value == pytest.approx(reach, rel=1e-12)
    cancelling = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert across_seeds([mean_of(column) for column in cancelling])[:4] == (0.0, 0.0, 0.0, 0.0)


# Order


@pytest.mark.parametrize("levels", [None, 4], ids=["distinct", "ties"])
def test_rank_correlation_is_scipys(levels):
    x, y = normal(0, 2, 50) + 0.5 * normal(1, 50)
    if levels:
        x, y = np.round(x), np.round(levels * y) / levels
    assert rank_correlation(x, y).value == pytest.approx(stats.spearmanr(x, y).statistic, abs=20 * EPS)


def partial_of_weights(samples: np.ndarray, weights: np.ndarray) -> float:
    """The partial rank correlation as a function of how much each sample weighs, by all pairs and by the inverse of a matrix."""
    above = (samples[:, :, None] > samples[:, None, :]) + 0.5 * (samples[:, :, None] == samples[:, None, :])
    ranks = above @ weights - 0.5
    inverse = np.linalg.inv(np.einsum("in,n,jn->ij", ranks, weights, ranks))
    return -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])


@pytest.mark.parametrize("given_columns", [0, 1, 2])
@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_and_its_error_are_those_of_all_pairs(given_columns, ties):
    count = 40
    samples = normal(0, 2 + given_columns, count) + normal(1, count)
    if ties:
        samples = np.round(samples)
    found = rank_correlation(samples[0], samples[1], list(samples[2:]))
    even, step = np.full(count, 1 / count), 1e-5
    influence = []
    for i in range(count):
        towards = np.eye(count)[i] - even
        influence.append(
            (partial_of_weights(samples, even + step * towards) - partial_of_weights(samples, even - step * towards)) / (2 * step)
        )
    error = np.sqrt(np.mean(np.square(influence)) / (count - 3 - given_columns))
    value = partial_of_weights(samples, even)
    assert found.value == pytest.approx(value, abs=1e-13)
    assert found.error == pytest.approx(error, rel=1e-7)  # the step's square and eps over the step
    reach = stats.norm.ppf(0.975) * error / (1 - value**2)
    assert (found.low, found.high) == pytest.approx(np.tanh(np.arctanh(value) + np.array([-reach, reach])), rel=1e-6)


@pytest.mark.parametrize("r", [0.0, 0.5, 0.8])
def test_error_of_a_normal_copula_is_bonett_and_wrights(r):
    x, noise = normal(0, 2, 20_000)
    found = rank_correlation(x, r * x + (1 - r**2) ** 0.5 * noise)
    z_error = found.error / (1 - found.value**2)
    assert z_error == pytest.approx(((1 + found.value**2 / 2) / (20_000 - 3)) ** 0.5, rel=0.05)  # theirs is a fit


@given(columns, st.integers(0, 2**32 - 1))
def test_rank_correlation_knows_order_alone(first, seed):
    rng = np.random.default_rng(seed)
    second, third = rng.integers(0, 12, (2, len(first))).astype(np.float64)
    second = second + first / 100
    found = rank_correlation(first, second, [third])
    order = rng.permutation(len(first))
    for same in (
        rank_correlation(first[order], second[order], [third[order]]),
        rank_correlation(np.exp(first / 200), second**3, [third - 7]),
        rank_correlation(second, first, [third]),
        rank_correlation(first, second, [-third]),
    ):
        np.testing.assert_allclose(same[:4], found[:4], rtol=0, atol=1e-8)
    turned = rank_correlation(-first, second, [third])
    np.testing.assert_allclose([turned.value, turned.low, turned.high], [-found.value, -found.high, -found.low], rtol=0, atol=1e-8)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert np.isfinite(found[:4]).all()


def test_what_has_no_order_says_so():
    x, y = normal(0, 2, 20)
    for found, why in (
        (rank_correlation(np.ones(20), y), "first column is constant"),
        (rank_correlation(x, np.ones(20)), "second column is constant"),
        (rank_correlation(x, y, [y**3]), "second column follows from the given"),
    ):
        assert found[:4] == (0.0, 1.0, -1.0, 1.0)
        assert why in found.note
        assert found.sign == 0
    assert rank_correlation(x, x**3)[:4] == (1.0, 0.0, 1.0, 1.0)
    assert "every pair" in rank_correlation(x, -x).note


def test_given_columns_that_say_nothing_change_nothing():
    x, y, z = normal(0, 3, 30)
    plain, same = rank_correlation(x, y, [z]), rank_correlation(x, y, [z, z**3, np.ones(30)])
    assert same.value == pytest.approx(plain.value, abs=1e-12)
    assert same.error == pytest.approx(plain.error * (26 / 24) ** 0.5, rel=1e-10)


def test_difficulty_that_makes_the_correlation_is_taken_away():
    difficulty, *noise = normal(0, 6, 4000)
    energy, complexity = difficulty + 0.5 * noise[0], difficulty + 0.2 * noise[1]
    before, control = difficulty + 0.1 * noise[2], difficulty + 0.05 * noise[3]
    found = confound(energy, before, before + 0.5 * difficulty + 0.3 * noise[4], control, [complexity])
    before_, after, rise, given_control, given_all = (correlation_across_seeds([each]) for each in found)
    assert min(before_.low, after.low) > 0.8
    assert rise.low > 0.7
    assert given_all.low < 0.05
    assert given_all.high > -0.05
    assert given_all.value < rise.value / 10
    assert abs(given_control.value) < 0.1
    real = confound(energy, before, before + 0.5 * difficulty + 0.3 * noise[4] + 0.5 * noise[0], control, [complexity])
    assert correlation_across_seeds([real.given_all]).low > 0.3


def test_noise_shared_with_the_control_makes_a_correlation_from_nothing():
    difficulty, first, second, own = normal(0, 4, 4000)
    before, after = difficulty + 0.5 * first, difficulty + 0.5 * second  # nothing is forgotten
    assert rank_correlation(difficulty, after - before, [before]).low > 0.4
    found = confound(difficulty, before, after, difficulty + 0.5 * own)
    assert [correlation_across_seeds([each]).sign for each in found] == [1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="control holds the same errors as before"):
        confound(difficulty, before, after, before)


def test_departure_is_the_test_of_order_restrictions():
    found = departure(np.array([0.0, 2.0, 1.0, 3.0]), np.ones(4), draws=4000)
    assert found.share == pytest.approx(0.5 / 5, rel=1e-12)  # the closest that never falls is 0, 1.5, 1.5, 3
    # Of k equal means the fit has l levels with probability |s(k, l)|/k!; what it leaves is then χ² with k − l degrees of freedom.
    stirling = {1: 6, 2: 11, 3: 6}  # and 1: the fit is the means themselves
    p = sum(ways / factorial(4) * stats.chi2.sf(0.5, 4 - levels) for levels, ways in stirling.items())
    assert abs(found.p_value - p) < 4 * (p * (1 - p) / 4000) ** 0.5


def test_departure_weighs_by_errors():
    found = departure(np.array([1.0, 0.0]), np.array([1.0, 2.0]))
    assert found.share == pytest.approx(1)
    assert found.p_value == pytest.approx(stats.norm.sf(1 / 5**0.5), abs=4 * 0.5 / 2000**0.5)
    assert departure(np.zeros(3), np.zeros(3)) == (0.0, 1.0)
    assert departure(np.array([0.1, 0.1 + EPS / 8, 0.1]), np.zeros(3)).share == 0.0
    assert departure(np.arange(9.0), np.full(9, 0.1)) == (0.0, 1.0)
    assert departure(np.arange(9.0)[::-1], np.full(9, 0.1), draws=99) == pytest.approx((1, 0.01))


def test_trend_over_bins():
    energy, noise = normal(0, 2, 2000)
    assert correlation_across_seeds([trend(0.3 * energy + noise, energy)]).sign == 1
    assert correlation_across_seeds([trend(-0.3 * energy + noise, energy)]).sign == -1
    where = bin_of(energy, 20)
    assert trend(energy + noise, energy).value == pytest.approx(stats.spearmanr(where, energy + noise).statistic, abs=1e-13)


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.1, 1e100))
def test_reach_counts_the_bins_that_share(reached, more, size):
    found = reach(numbers([size] * reached + [0.0] * more))
    assert found.bins.value == pytest.approx(reached, rel=1e-12)
    assert found.peak.value == size


def test_reach_of_what_saves_nothing():
    peak, bins = reach(numbers([-1.0, 0.0]))
    assert (peak.value, bins.value) == (0.0, 0.0)
    assert reach(numbers([3.0, 1.0, -2.0])).bins.value == pytest.approx(16 / 10)


def test_the_errors_of_peak_and_reach_are_those_of_draws():
    """Of bins that differ by many of their errors, from which noise lifts the peak and the reach by little."""
    energy, truth, rng = np.repeat(np.arange(4.0), 400), np.repeat([3.0, 1.0, 0.5, -1.0], 400), np.random.default_rng(0)
    found = [reach(bin_means(truth + rng.normal(size=1600), energy + np.tile(np.linspace(0, 0.9, 400), 4), 4)) for _ in range(400)]
    for each in zip(*found, strict=True):
        spread = np.std([one.value for one in each])
        assert each[0].error == pytest.approx(spread, rel=4 / 800**0.5)
        assert each[0].freedom == 399


# How often intervals cover


def spearman_of(r: Any) -> Any:
    """Of normal columns with correlation r."""
    return 6 / pi * np.arcsin(np.asarray(r) / 2)


def of_normals(rng: np.random.Generator, count: int) -> tuple[float, Any]:
    x, noise = rng.normal(size=(2, count))
    return float(spearman_of(0.6)), rank_correlation(x, 0.6 * x + 0.8 * noise)


def of_spreads(rng: np.random.Generator, count: int) -> tuple[float, Any]:
    x, noise = rng.normal(size=(2, count))
    return 0.0, rank_correlation(x, x * noise)


def of_partials(rng: np.random.Generator, count: int) -> tuple[float, Any]:
    x, y, z = rng.normal(size=(3, count))
    matrix = np.array([[1, 0.5 + 0.3 / 2, 0.5**0.5], [0.5 + 0.3 / 2, 1, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1]])
    x, y, z = np.linalg.cholesky(matrix) @ np.array([x, y, z])
    inverse = np.linalg.inv(spearman_of(matrix))
    return float(-inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])), rank_correlation(x, y, [z])


def of_ties(rng: np.random.Generator, count: int) -> tuple[float, Any]:
    """Of a fair coin and another that agrees with it in 7 of 10 cases: both correlations are 2 · 0.7 − 1."""
    x, agrees = rng.random((2, count)) < np.array([[0.5], [0.7]])
    return 0.4, rank_correlation(x.astype(np.float64), (x == agrees).astype(np.float64))


def of_means(rng: np.random.Generator, count: int) -> tuple[float, Any]:
    return 1.0, Bootstrap(500, seed=int(rng.integers(2**31)))(rng.exponential(size=count))


def of_seeds(rng: np.random.Generator, count: int) -> tuple[float, Any]:
    return 0.0, across_seeds(numbers(rng.normal(size=3)))


SITUATIONS = [of_normals, of_spreads, of_partials, of_ties, of_means, of_seeds]


def covered(situation: Any, simulations: int, count: int) -> int:
    rng = np.random.default_rng(count)
    found = [situation(rng, count) for _ in range(simulations)]
    return sum(estimate.low <= truth <= estimate.high for truth, estimate in found)


def check_coverage(situation: Any, simulations: int, count: int, least: float, most: float) -> None:
    found = covered(situation, simulations, count)
    low, high = stats.binom.ppf(1e-4, simulations, least), stats.binom.isf(1e-4, simulations, most)
    assert low <= found <= high, f"{found} of {simulations}"


@pytest.mark.parametrize("situation", SITUATIONS)
def test_coverage(situation):
    check_coverage(situation, 200, 60, 0.92, 0.96)


@pytest.mark.slow
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("count", "least"), [(50, 0.92), (200, 0.935), (1000, 0.945)])
def test_coverage_closely(situation, count, least):
    check_coverage(situation, 1000, count, least, 0.96)


# Images, which all seeds share; what is by chance in a seed; and in a seed's every image. Each adds so much of standard error.
CHANCE = {"images": (1.0, 0.1, 0.1), "seeds": (0.1, 1.0, 0.1), "both": (1.0, 1.0, 0.3), "neither": (0.0, 0.0, 1.0)}


def shared(rng: np.random.Generator, count: int, chance: tuple[float, float, float], seeds: int) -> np.ndarray:
    """Seeds' columns of mean zero, skewed."""
    images, seed, own = chance
    scale = count**0.5
    columns = scale * images * (rng.exponential(size=count) - 1) + seed * rng.normal(size=(seeds, 1))
    return columns + scale * own * rng.normal(size=(seeds, count))


def a_mean(rng: np.random.Generator, count: int, chance: Any, seeds: int) -> tuple[float, Any]:
    return 0.0, of_samples(list(shared(rng, count, chance, seeds)), Bootstrap(500))


def a_bin(rng: np.random.Generator, count: int, chance: Any, seeds: int) -> tuple[float, Any]:
    """The fourth of ten, each of a tenth of the samples."""
    columns, order = shared(rng, count, chance, seeds), np.arange(float(count))
    bins = binned(list(columns[:, order < 0.4 * count]), order[order < 0.4 * count], np.linspace(0, 0.4 * count, 5), Bootstrap(500))
    return 0.0, {"low": bins.low[3], "high": bins.high[3]}


def a_correlation(rng: np.random.Generator, count: int, chance: Any, seeds: int) -> tuple[float, Any]:
    """A seed's own correlation moves by chance, as errors of Fisher's z over 3, about a true 0."""
    images, seed, own = chance
    energy, common = rng.normal(size=(2, count))
    found = []
    for _ in range(seeds):
        r = np.tanh(seed * rng.normal() / count**0.5)
        column = (images * common + own * rng.normal(size=count)) / np.hypot(images, own)
        found.append(rank_order(energy, r * energy + (1 - r**2) ** 0.5 * column))
    return 0.0, of_correlations(found, 0.95)


def cover(situation: Any, chance: str, seeds: int, count: int, simulations: int) -> float:
    """The share of simulations with the truth between the ends. Of one seed the truth is that seed's: it has no chance of its own."""
    rng = np.random.default_rng([count, seeds])
    images, seed, own = CHANCE[chance]
    known = (images, seed if seeds > 1 else 0.0, own)
    found = [situation(rng, count, known, seeds) for _ in range(simulations)]
    return sum(row["low"] <= truth <= row["high"] for truth, row in found) / simulations


SHARED = pytest.mark.parametrize("situation", [a_mean, a_bin, a_correlation])


@SHARED
@pytest.mark.parametrize("chance", CHANCE)
@pytest.mark.parametrize("seeds", [1, 3])
def test_coverage_of_seeds_that_share_images(situation, chance, seeds):
    assert cover(situation, chance, seeds, 300, 200) > stats.binom.ppf(1e-4, 200, 0.93) / 200


@pytest.mark.slow
@SHARED
@pytest.mark.parametrize("chance", CHANCE)
@pytest.mark.parametrize(("seeds", "count"), [(1, 1000), (2, 1000), (3, 200), (3, 1000), (5, 1000)])
def test_coverage_of_seeds_that_share_images_closely(situation, chance, seeds, count):
    found = cover(situation, chance, seeds, count, 1000)
    least = 0.92 if situation is a_bin and count == 200 else 0.94  # twenty skewed numbers, whatever the seeds
    assert stats.binom.ppf(1e-4, 1000, least) / 1000 < found < 0.999


def test_students_interval_of_seeds_alone_does_not_cover():
    """What `across_seeds` is for: with images that all share, three seeds look surer than they are."""
    rng = np.random.default_rng(0)
    found = [across_seeds(numbers(shared(rng, 200, CHANCE["images"], 3).mean(axis=1))) for _ in range(200)]
    assert np.mean([each.low <= 0 <= each.high for each in found]) < 0.6


@pytest.mark.slow
def test_the_textbooks_interval_does_not_cover_where_spread_depends():
    rng = np.random.default_rng(0)
    values = np.array([of_spreads(rng, 200)[1].value for _ in range(1000)])
    outside = np.abs(np.arctanh(values)) > stats.norm.ppf(0.975) * np.sqrt((1 + values**2 / 2) / 197)
    assert outside.mean() > 0.1


@pytest.mark.slow
def test_departure_finds_too_much_no_more_often_than_it_says():
    rng = np.random.default_rng(0)
    found = [departure(rng.normal(size=8), np.ones(8), draws=199).p_value <= 0.05 for _ in range(400)]
    assert stats.binom.ppf(1e-4, 400, 0.05) <= sum(found) <= stats.binom.isf(1e-4, 400, 0.05)


# Bad input

ten = np.arange(10.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Bootstrap(10), "resamples=10 .* use at least 40"),
        (lambda: Bootstrap(level=1.0), "level=1.0 .* between 0 and 1"),
        (lambda: Bootstrap()(np.ones(1)), r"values has shape \(1,\): need .* at least 2"),
        (lambda: Bootstrap()(np.array([1.0, np.nan])), "values of sample 1 is nan, not finite: leave"),
        (lambda: bin_edges(ten, 0), "bins=0: use at least one"),
        (lambda: bin_edges(np.ones(10), 2), "energy takes 1 values, ties too many for 2 bins .* use fewer"),
        (lambda: bin_of(ten, np.array([0.0, 9.0, 5.0])), "edges are .* increase"),
        (lambda: bin_of(ten, np.array([0.0, 5.0])), r"energies lie in \[0, 9\], edges in \[0, 5\]: widen"),
        (lambda: bin_means(ten, ten, 6), "bin 1 holds 1 samples.* use fewer"),
        (lambda: bin_means(ten, ten[:9], 2), "energy has 9 samples, values has 10: give both"),
        (lambda: groups(ten, 0.6), "fraction=0.6 .* at most 0.5"),
        (lambda: groups(np.ones(10)), "share the value 1: use a smaller"),
        (lambda: mean_of(ten, ten < 1), r"values has shape \(1,\): need .* at least 2"),
        (lambda: across_seeds([]), "seeds have no samples: give the same"),
        (lambda: across_seeds([mean_of(ten), mean_of(ten[1:])]), "seeds have 10, 9 samples: give the same"),
        (lambda: across_seeds(numbers([1.0, np.nan])), "values of sample 1 is nan"),
        (lambda: across_seeds(numbers(ten), level=0.0), "level=0.0"),
        (lambda: rank_correlation(ten[:5], ten[:5], [ten[:5]]), r"first has shape \(5,\): need .* at least 6"),
        (lambda: rank_correlation(ten, ten, [ten[:9]]), r"given\[0\] has 9 samples, first has 10"),
        (lambda: rank_correlation(ten, ten, level=2.0), "level=2.0"),
        (lambda: rank_correlation(ten, np.full(10, np.inf)), "second of sample 0 is inf"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
