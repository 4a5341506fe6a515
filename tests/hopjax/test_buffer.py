"""Replay buffers: laws of all policies, counts, and greedy coverage against energies, many digits and exhaustive search."""

import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from mpmath import mp, mpf

import hopjax
from hopjax import buffer
from hopjax.buffer import Candidates, ClassBalanced, GreedyCoverage, HighestEnergy, LowestEnergy, Policy, Random, Stratified
from hopjax.tiles import default_tile
from tests.strategies import powers, seeds

EPS = float(np.finfo(float).eps)
SIGNED = st.tuples(st.sampled_from((-1.0, 1.0)), powers(-12, 2)).map(lambda pair: pair[0] * pair[1])
LOG_WEIGHTS = st.one_of(st.floats(-1500, 30), st.floats(-30, 30))


class Problem(NamedTuple):
    """Samples, targets and what Task 2 does to them."""

    rows: np.ndarray
    targets: np.ndarray
    log_sums: np.ndarray
    rises: np.ndarray
    beta: float

    def policy(self, **options) -> GreedyCoverage:
        return GreedyCoverage(self.targets, self.log_sums, self.rises, self.beta, **options)


def problem(rng, shape, beta, size_of_rise, signs, norm=1.0) -> Problem:
    """(targets, candidates, dimension, draws) in clusters of unequal size; Task 1 is the candidates."""
    count, samples, dim, draws = shape
    centres = rng.standard_normal((4, dim))
    rows = centres[rng.choice(4, samples, p=(0.6, 0.2, 0.15, 0.05))] + 0.5 * rng.standard_normal((samples, dim))
    targets = np.concatenate([rows, rows])[:count] + 0.3 * rng.standard_normal((count, dim))
    rows, targets = norm * rows / math.sqrt(dim), norm * targets / math.sqrt(dim)
    log_sums = np.logaddexp.reduce(beta * targets @ rows.T, axis=1)
    rises = size_of_rise * rng.standard_normal((draws, count) if draws else (count,))
    return Problem(rows, targets, log_sums, rises if signs else np.abs(rises), beta)


@st.composite
def problems(draw, signs=False, shapes=((5, 8, 3, 0), (9, 7, 2, 3))) -> Problem:
    """Few shapes, so that an example costs no compilation."""
    rng = np.random.default_rng(draw(seeds()))
    return problem(rng, draw(st.sampled_from(shapes)), draw(powers(-1, 3)), draw(powers(-3, 1)), signs)


def worth(problem, chosen, raw):
    """F of a buffer from its definition, in logarithms; `chosen` has shape (..., size)."""
    log_pi = problem.beta * problem.targets @ problem.rows.T - problem.log_sums[:, None]
    log_weight = np.logaddexp.reduce(log_pi[:, chosen], axis=-1)  # (t, ...)
    log_weight = np.moveaxis(log_weight, 0, -1)[..., None, :]
    boosted = np.logaddexp(0, log_weight + problem.beta * np.atleast_2d(problem.rises))
    baseline = 0 if raw else np.logaddexp(0, log_weight)
    return ((boosted - baseline) / problem.beta).mean(axis=-2).sum(axis=-1)


def rounding(problem):
    """What an exponent's rounding leaves of digits in F, of which a target's share is at most |ΔE| or the largest raw gain."""
    exponent = np.abs(problem.log_sums).max() + problem.beta * np.abs(problem.rises).max() + 40
    return 64 * EPS * exponent / problem.beta * len(problem.targets)


RNG = np.random.default_rng(7)
EXAMPLE = problem(RNG, (30, 23, 5, 2), 20.0, 0.3, signs=True)
SCORES, LABELS = RNG.standard_normal(23), RNG.choice(3, 23, p=(0.7, 0.2, 0.1))
CANDIDATES = Candidates(SCORES, LABELS, EXAMPLE.rows)
POLICIES: dict[str, Policy] = {
    "highest energy": HighestEnergy(),
    "lowest energy": LowestEnergy(),
    "random": Random(seed=5),
    "stratified": Stratified(bins=4, seed=2),
    "class balanced": ClassBalanced(),
    "class balanced, random": ClassBalanced(within=Random(1)),
    "greedy coverage": EXAMPLE.policy(batch=4),
    "greedy coverage, raw": EXAMPLE.policy(batch=4, subtract_baseline=False),
}
every_policy = pytest.mark.parametrize("policy", list(POLICIES.values()), ids=list(POLICIES))


# ---- Laws of all policies ------------------------------------------------------------------------------------------------


@every_policy
def test_buffers_are_nested_orders_of_distinct_places(policy):
    assert isinstance(policy, Policy)
    everything = policy.choose(CANDIDATES, 23)
    assert sorted(everything) == list(range(23))
    assert (policy.choose(CANDIDATES, 23) == everything).all()
    for size in (1, 2, 3, 7, 11, 22):
        chosen = policy.choose(CANDIDATES, size)
        assert chosen.dtype == np.int64
        assert (chosen == everything[:size]).all()


@pytest.mark.parametrize("name", [name for name in POLICIES if "random" not in name and name != "stratified"])
def test_renumbered_samples_are_chosen_alike(name):
    order = np.random.default_rng(3).permutation(23)
    shuffled = Candidates(SCORES[order], LABELS[order], EXAMPLE.rows[order])
    assert (order[POLICIES[name].choose(shuffled, 23)] == POLICIES[name].choose(CANDIDATES, 23)).all()


@pytest.mark.usefixtures("unchecked")
@every_policy
@pytest.mark.parametrize("size", [-1, 0, 24])
def test_a_budget_has_bounds(policy, size):
    with pytest.raises(ValueError, match=f"size={size}: need 1 ≤ size ≤ 23"):
        policy.choose(CANDIDATES, size)


@every_policy
def test_one_candidate_is_chosen(policy):
    one = Candidates(SCORES[:1], LABELS[:1], EXAMPLE.rows[:1])
    assert policy.choose(one, 1).tolist() == [0]


# ---- Scores and labels ---------------------------------------------------------------------------------------------------


def test_equals_are_taken_in_turn_of_their_places():
    scores = np.array([2.0, -math.inf, 2.0, 5.0, -1.0, 5.0, math.inf, -0.0, 0.0, 2.0])
    candidates = Candidates(scores, np.array([0, 0, 1, 1, 0, 0, 1, 1, 0, 0]))
    assert HighestEnergy().choose(candidates, 10).tolist() == [6, 3, 5, 0, 2, 9, 7, 8, 4, 1]
    assert LowestEnergy().choose(candidates, 10).tolist() == [1, 4, 7, 8, 0, 2, 9, 3, 5, 6]
    # Class 1 in order 6 3 2 7, class 0 in order 5 0 9 8 4 1, the higher of the two first.
    assert ClassBalanced().choose(candidates, 10).tolist() == [6, 5, 3, 0, 2, 9, 7, 8, 4, 1]
    assert ClassBalanced(within=LowestEnergy()).choose(candidates, 4).tolist() == [1, 7, 4, 2]


def test_order_survives_a_beta_at_which_energies_do_not():
    """E + ½ = −log1p(e^Λ)/β of unit memories is −0.5 in all digits below e^Λ = 1e-17; −Λ is not."""
    log_leakage = -np.array([700.0, 40.0, 3000.0, 41.0])
    energies = -0.5 - np.log1p(np.exp(log_leakage)) / 100
    assert len(set(energies)) == 1
    assert HighestEnergy().choose(Candidates(-log_leakage), 4).tolist() == [2, 0, 3, 1]
    assert HighestEnergy().choose(Candidates(jnp.asarray(-log_leakage, jnp.float32)), 4).tolist() == [2, 0, 3, 1]


def test_random_buffers_hold_every_sample_alike():
    """Frequencies over 2,000 seeds: the largest of 23 z-scores stays below 5, or one false alarm in 8e4."""
    for policy, share in ((Random, 6 / 23), (lambda seed: Stratified(1, seed), 6 / 23), (lambda seed: Stratified(23, seed), 6 / 23)):
        counts = sum(np.bincount(policy(seed=seed).choose(CANDIDATES, 6), minlength=23) for seed in range(2000))
        assert np.abs((counts - 2000 * share) / math.sqrt(2000 * share * (1 - share))).max() < 5


@pytest.mark.parametrize("bins", [1, 2, 4, 7, 23, 40])
def test_strata_have_equal_shares(bins):
    rank = np.argsort(np.argsort(SCORES))
    sizes = np.bincount(rank * bins // 23, minlength=bins)
    assert sizes.max() - sizes.min() <= 1
    for size in range(1, 24):
        chosen = Stratified(bins, seed=size).choose(CANDIDATES, size)
        counts = np.bincount(rank[chosen] * bins // 23, minlength=bins)
        assert all(count >= counts.max() - 1 for count, held in zip(counts, sizes, strict=True) if count < held)


def test_strata_are_sampled_at_random():
    """Two bins of four: a pair from each, all 36 of which occur in 1,000 seeds (one is missing with probability 36·e^{−28})."""
    candidates = Candidates(np.arange(8.0))
    seen = {tuple(sorted(Stratified(2, seed).choose(candidates, 4))) for seed in range(1000)}
    assert seen == {(*low, *high) for low in itertools.combinations(range(4), 2) for high in itertools.combinations(range(4, 8), 2)}


@hypothesis.given(st.lists(st.integers(-2, 4), min_size=1, max_size=30), st.data())
def test_classes_have_equal_shares_as_far_as_they_go(labels, data):
    size = data.draw(st.integers(1, len(labels)))
    scores = np.random.default_rng(data.draw(seeds())).integers(0, 5, len(labels)).astype(float)
    chosen = ClassBalanced().choose(Candidates(scores, np.array(labels)), size)
    held = {label: labels.count(label) for label in labels}
    counts = {label: sum(labels[place] == label for place in chosen) for label in held}
    assert all(count >= max(counts.values()) - 1 for label, count in counts.items() if count < held[label])
    for label in held:  # inside a class: the highest, in order
        members = [place for place in range(len(labels)) if labels[place] == label]
        best = sorted(members, key=lambda place: (-scores[place], place))
        assert [place for place in chosen if labels[place] == label] == best[: counts[label]]


# ---- What a buffer is worth ----------------------------------------------------------------------------------------------


@jax.jit
def energy_gains(targets, replayed, before, after, beta):
    def falls(memories):
        with_buffer = jnp.concatenate([memories, replayed])
        return jax.vmap(lambda x: hopjax.energy(x, memories, beta) - hopjax.energy(x, with_buffer, beta))(targets)

    log_sums = jax.vmap(lambda x: jax.nn.logsumexp(beta * before @ x))(targets)
    rises = jax.vmap(lambda x: hopjax.energy_change(x, before, after, beta))(targets)
    return log_sums, rises, falls(after), falls(before)


@hypothesis.given(seeds(), powers(-2, 4), powers(-2, 1))
@hypothesis.settings(max_examples=30)
def test_gains_are_changes_of_energies(seed, beta, norm):
    """G_raw = E(x; X₂) − E(x; X₂ ∪ B), and the baseline is the same for Task 1; B need not have been stored."""
    rng = np.random.default_rng(seed)
    before, after = norm * rng.standard_normal((2, 12, 5))
    targets, replayed = norm * rng.standard_normal((6, 5)), np.concatenate([before[:3], norm * rng.standard_normal((1, 5))])
    log_sums, rises, raw, baseline = (np.asarray(part) for part in energy_gains(targets, replayed, before, after, beta))
    radius = max(np.linalg.norm(rows, axis=1).max() for rows in (before, after, targets, replayed))
    tolerance = 64 * EPS * (radius**2 + 3 / beta)  # each energy a few eps·(R² + log m/β)
    for name, expected in ((False, raw), (True, raw - baseline)):
        gains = buffer.buffer_gains(targets, replayed, log_sums, rises, beta, subtract_baseline=name)
        assert gains.shape == (6,)
        assert np.abs(gains - expected).max() <= tolerance
        two = buffer.buffer_gains(targets, replayed, log_sums, np.stack([rises, -rises]), beta, subtract_baseline=name)
        assert two.shape == (2, 6)
        assert np.abs(two[0] - gains).max() <= tolerance


def marginal(log_pi, log_weight, rise, beta, raw):
    """One target, one sample, with these logarithms of π_z and π_B as they are."""
    one = np.ones((1, 1))
    return buffer._marginal_gains(0 * one, one, np.array([-log_pi]), rise * one, np.array([log_weight]), beta, raw=raw)


@hypothesis.given(LOG_WEIGHTS, st.one_of(st.just(-math.inf), LOG_WEIGHTS), SIGNED, powers(-3, 4), st.booleans())
@hypothesis.settings(max_examples=200)
def test_marginal_gains_agree_with_many_digits(log_pi, log_weight, rise, beta, raw):
    """β⁻¹ log of [1 + (π_B + π_z)e^{βΔE}]/[1 + π_B e^{βΔE}], over the same at ΔE = 0: as printed, with the digits that its sums need."""
    gain, bound = (float(value[0]) for value in marginal(log_pi, log_weight, rise, beta, raw))
    exponent = beta * rise
    hypothesis.assume(abs(exponent) < 1e4)
    with mp.workdps(int((abs(log_pi) + 2 * abs(exponent) + (abs(log_weight) if log_weight > -math.inf else 0)) / 2) + 60):
        held = mp.exp(mpf(log_weight)) if log_weight > -math.inf else mpf(0)
        both, boost = held + mp.exp(mpf(log_pi)), mp.exp(mpf(beta) * mpf(rise))
        exact = mp.log1p(both * boost) - mp.log1p(held * boost)
        if not raw:
            exact -= mp.log1p(both) - mp.log1p(held)
        exact = float(exact / beta)
    # Of each exponent s, eps·s is lost; a sum of two terms loses half a digit more where |βΔE| is just above one.
    size = 1 + abs(log_pi) + abs(exponent) + (abs(log_weight) if log_weight > -math.inf else 0)
    assert abs(gain - exact) <= 16 * EPS * size * abs(exact) + 1e-307 / min(beta, 1)
    assert bound == max(gain, 0)


@hypothesis.given(st.floats(-40, 5), st.floats(-40, 5), powers(-3, 1), st.booleans())
def test_bounds_are_of_the_nonnegative_rises(log_pi, log_weight, rise, raw):
    """Two draws of opposite sign: the bound is the gain of the first alone, halved; both are means over draws."""
    one = np.ones((1, 1))
    held, log_sums = np.array([log_weight]), np.array([-log_pi])
    rises = np.array([[rise], [-rise]])
    gain, bound = (float(v[0]) for v in buffer._marginal_gains(0 * one, one, log_sums, rises, held, 2.0, raw=raw))
    up, down = (float(marginal(log_pi, log_weight, sign * rise, 2.0, raw)[0][0]) for sign in (1, -1))
    np.testing.assert_allclose(gain, (up + down) / 2, rtol=8 * EPS, atol=8 * EPS * abs(up))
    np.testing.assert_allclose(bound, (up + max(down, 0)) / 2, rtol=8 * EPS)


# ---- Greedy search -------------------------------------------------------------------------------------------------------


def plain_greedy(problem, size, raw):
    """Every candidate evaluated every time, F from its definition; and by how much each place was decided."""
    chosen: list[int] = []
    margins = []
    for _ in range(size):
        left = [place for place in range(len(problem.rows)) if place not in chosen]
        values = worth(problem, np.array([[*chosen, place] for place in left]), raw)
        ranked = sorted(zip(-values, left, strict=True))
        margins.append(ranked[1][0] - ranked[0][0] if len(left) > 1 else math.inf)
        chosen.append(ranked[0][1])
    return chosen, margins


@hypothesis.given(st.booleans().flatmap(problems), st.booleans(), st.sampled_from((1, 3, 64)))
@hypothesis.settings(max_examples=60)
def test_lazy_is_plain_greedy(problem, raw, batch):
    """Whatever the signs of the rises, up to where two candidates differ by rounding only."""
    chosen, margins = plain_greedy(problem, 5, raw)
    lazy = problem.policy(subtract_baseline=not raw, batch=batch).choose(Candidates(rows=problem.rows), 5)
    for ours, theirs, margin in zip(lazy, chosen, margins, strict=True):
        if margin <= rounding(problem):
            break
        assert ours == theirs


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lazy_is_plain_greedy_bit_for_bit(raw, signs, dtype):
    """The same programs with and without bounds, on four copies of each sample: a copy may gain by rounding, and then goes first."""
    beta, batch, size = 300.0, 8, 40
    some = problem(np.random.default_rng(18), (120, 60, 6, 0), beta, 0.2, signs)
    rows, targets = np.concatenate([some.rows] * 4).astype(dtype), some.targets.astype(dtype)
    counts: list[tuple[int, int]] = []
    policy = some._replace(targets=targets).policy(subtract_baseline=not raw, batch=batch, progress=lambda *count: counts.append(count))
    lazy = policy.choose(Candidates(rows=rows), size)

    states, log_sums, rises = buffer._on_device(targets, some.log_sums, some.rises, rows)
    log_weight = jnp.full_like(log_sums, -jnp.inf)
    plain: list[int] = []
    for _ in range(size):
        parts = [
            buffer._marginal_gains(rows[start : start + batch], states, log_sums, rises, log_weight, beta, raw=raw)[0]
            for start in range(0, len(rows), batch)
        ]
        gains = np.concatenate(parts)
        gains[plain] = -math.inf
        plain.append(int(np.argmax(gains)))
        log_weight = buffer._extended(log_weight, rows[plain[-1]], states, log_sums, beta)
    assert lazy.tolist() == plain
    assert counts == sorted(counts)
    assert counts[0] == (0, batch)
    assert counts[-1][0] == size - 1
    if not signs:  # bounds are of use
        assert counts[-1][1] < size * (len(rows) - size / 2) / 4


@hypothesis.given(problems(), st.booleans(), st.integers(1, 3))
@hypothesis.settings(max_examples=60)
def test_greedy_is_near_the_best_of_all_buffers(problem, raw, size):
    """Nemhauser, Wolsey and Fisher's bound, 1 − (1 − 1/k)^k for k places, for the raw gain and for ΔE ≥ 0."""
    everything = np.array(list(itertools.combinations(range(len(problem.rows)), size)))
    optimum = worth(problem, everything, raw).max()
    chosen = problem.policy(subtract_baseline=not raw, batch=3).choose(Candidates(rows=problem.rows), size)
    assert worth(problem, chosen, raw) >= (1 - (1 - 1 / size) ** size) * optimum - rounding(problem)


def test_negative_rises_lose_submodularity_and_the_guarantee():
    # One target with ΔE = −2 and two samples with π = 1: alone each does more harm than after the other.
    gains = [float(buffer.buffer_gains(np.ones((1, 1)), np.zeros((count, 1)), np.zeros(1), np.array([-2.0]), 1.0)[0]) for count in (1, 2)]
    np.testing.assert_allclose(gains, [math.log((1 + math.exp(-2)) / 2), math.log((1 + 2 * math.exp(-2)) / 3)], rtol=8 * EPS)
    assert gains[1] - gains[0] > gains[0] + 0.2
    # Three targets with ΔE = 3, −2, −4, four samples with these log π: greedy has a fifth of the largest F, submodularity grants 3/4.
    log_pi = np.array([[2.0, 0.0, -3.0, 0.0], [-3.0, 0.0, -3.0, 1.0], [2.0, 1.0, 1.0, -1.0]])
    odd = Problem(log_pi.T.copy(), np.eye(3), np.zeros(3), np.array([3.0, -2.0, -4.0]), 1.0)
    pairs = np.array(list(itertools.combinations(range(4), 2)))
    chosen = odd.policy().choose(Candidates(rows=odd.rows), 2)
    assert chosen.tolist() == plain_greedy(odd, 2, raw=False)[0] == [3, 1]
    assert 0 < worth(odd, chosen, raw=False) < 0.22 * worth(odd, pairs, raw=False).max()
    # The raw gain keeps both.
    assert (
        worth(odd, odd.policy(subtract_baseline=False).choose(Candidates(rows=odd.rows), 2), raw=True)
        >= 0.75 * worth(odd, pairs, raw=True).max()
    )


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_duplicates_are_taken_lowest_place_first(batch):
    """And late: a sample's second copy adds less than the sample did."""
    rows = np.concatenate([EXAMPLE.rows, EXAMPLE.rows[::-1], EXAMPLE.rows])
    order = np.argsort(EXAMPLE._replace(rises=np.abs(EXAMPLE.rises)).policy(batch=batch).choose(Candidates(rows=rows), 69))
    first, second, third = order[:23], order[23:46][::-1], order[46:]
    assert (first < second).all()
    assert (second < third).all()
    assert first.mean() < second.mean() < third.mean()


def test_no_rise_is_a_tie_of_all():
    evaluations = []
    policy = EXAMPLE._replace(rises=0 * EXAMPLE.rises).policy(batch=4, progress=lambda _, count: evaluations.append(count))
    assert policy.choose(Candidates(rows=EXAMPLE.rows), 23).tolist() == list(range(23))
    assert evaluations[-1] <= 23 + 22 * 4


def test_greedy_covers_what_the_highest_energy_repeats(key):
    """Two tight pairs and a single: three places cover all, as no score of single samples can."""
    rows = np.asarray(jax.random.orthogonal(key, 6))[:3].repeat([3, 2, 1], axis=0)
    some = Problem(rows, rows, np.logaddexp.reduce(50.0 * rows @ rows.T, axis=1), np.full(6, 0.5), 50.0)
    chosen = some.policy().choose(Candidates(rows=rows), 6)
    assert chosen.tolist() == [0, 3, 5, 1, 4, 2]
    gains = np.asarray(buffer.buffer_gains(rows, rows[chosen[:3]], some.log_sums, some.rises, 50.0))
    assert gains.min() > 0.45
    np.testing.assert_allclose(gains.sum(), worth(some, chosen[:3], raw=False), rtol=1e-12)


def test_huge_betas_and_single_precision():
    """β = 1e4, weights of e^{−10⁴}: the greedy buffers of both precisions are worth the same, to eps·β in the exponents."""
    some = problem(np.random.default_rng(5), (90, 70, 8, 0), 1e4, 0.5, signs=False)
    single = some._replace(targets=some.targets.astype(np.float32), rows=some.rows.astype(np.float32))
    values = []
    for one in (some, single):
        chosen = one.policy().choose(Candidates(rows=one.rows), 20)
        gains = buffer.buffer_gains(one.targets, one.rows[chosen], one.log_sums, one.rises, 1e4)
        assert gains.dtype == one.rows.dtype
        values.append(float(np.sum(gains, dtype=float)))
        assert values[-1] > 1
        np.testing.assert_allclose(values[-1], worth(some, chosen, raw=False), rtol=8 * float(np.finfo(one.rows.dtype).eps) * 1e4 * 2)
    np.testing.assert_allclose(values[1], values[0], rtol=64 * float(np.finfo(np.float32).eps) * 1e4)


# ---- Cost ----------------------------------------------------------------------------------------------------------------


def test_memory_is_a_batch_of_candidates():
    """Temporary arrays: a few t × batch, no t × n, none that grows with the dimension or the number of draws."""

    def temporary(targets, dim, draws, batch):
        shapes = ((batch, dim), (targets, dim), (targets,), (draws, targets), (targets,), ())
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        analysis = buffer._marginal_gains.lower(*arguments, raw=False).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    base = temporary(3000, 64, 1, 64)
    assert base <= 6 * 4 * 3000 * 64
    assert temporary(3000, 2048, 50, 64) <= base + 8 * 4 * (3000 + 64 * 2048)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("targets", "dim", "draws", "batch"), [(3000, 64, 1, 64), (3000, 784, 50, 64), (20_000, 32, 3, 8)])
def test_memory_is_what_the_documentation_counts(targets, dim, draws, batch, raw):
    def held(program, *shapes):
        analysis = program.lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes), raw=raw).compile().memory_analysis()
        return (analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes) / 4

    greedy = held(buffer._marginal_gains, (batch, dim), (targets, dim), (targets,), (draws, targets), (targets,), ())
    assert greedy <= (targets + batch) * dim + targets * (2 * draws + 8) + 6 * targets * batch
    gains = held(buffer._buffer_gains, (targets, dim), (500, dim), (targets,), (draws, targets), ())
    tile = default_tile()
    tiles = 4 * tile.states * min(tile.memories, 500) + 2 * (tile.states + tile.memories) * dim
    assert gains <= (targets + 500) * dim + targets * (5 * draws + 8) + tiles


def test_one_program_for_all_batches(tmp_path):
    """23 candidates by fours and a rest of three; rows of the device or of a file are the same samples."""
    expected = EXAMPLE.policy(batch=4).choose(CANDIDATES, 9)
    kernel: Any = buffer._marginal_gains
    kernel.clear_cache()
    np.save(tmp_path / "rows.npy", EXAMPLE.rows)
    for rows in (jnp.asarray(EXAMPLE.rows), np.load(tmp_path / "rows.npy", mmap_mode="r")):
        assert (EXAMPLE.policy(batch=4).choose(Candidates(rows=rows), 9) == expected).all()
    assert kernel._cache_size() == 1


# ---- Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_candidates_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got \{\}"):
        Candidates()
    with pytest.raises(ValueError, match="at least one sample"):
        Candidates(np.zeros(0))
    with pytest.raises(ValueError, match=r"'scores': 3, 'rows': 2"):
        Candidates(np.zeros(3), rows=np.zeros((2, 4)))
    with pytest.raises(ValueError, match="score 1 is NaN"):
        Candidates(np.array([0.0, math.nan, math.inf]))
    only = {"scores": Candidates(rows=np.zeros((2, 3))), "labels": Candidates(np.zeros(2)), "rows": Candidates(np.zeros(2))}
    policies = {"scores": (HighestEnergy(), LowestEnergy(), Stratified()), "labels": (ClassBalanced(),), "rows": (EXAMPLE.policy(),)}
    for name, candidates in only.items():
        for policy in policies[name]:
            with pytest.raises(ValueError, match=f"goes by the candidates' {name}"):
                policy.choose(candidates, 1)
    with pytest.raises(ValueError, match="bins=0: need at least 1"):
        Stratified(bins=0).choose(CANDIDATES, 3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": EXAMPLE.targets[:, :4]}, r"targets are float64 \(30, 4\), samples float64 \(23, 5\)"),
        ({"targets": EXAMPLE.targets.astype(np.float32)}, r"targets are float32"),
        ({"targets": EXAMPLE.targets[:0]}, r"targets are float64 \(0, 5\)"),
        ({"log_sums": EXAMPLE.log_sums[:3]}, r"log_sums are \(3,\), .* need \(30,\)"),
        ({"rises": EXAMPLE.rises[:, :3]}, r"rises \(2, 3\): need \(30,\)"),
        ({"rises": EXAMPLE.rises * math.nan}, "rises finite"),
        ({"log_sums": EXAMPLE.log_sums * math.inf}, "log_sums and rises finite"),
        ({"beta": 0.0}, r"beta=0.0.* need both positive"),
        ({"beta": math.inf}, r"beta=inf.* finite"),
        ({"beta": math.nan}, r"beta=nan.* need both positive"),
        ({"batch": 0}, "batch=0: need both positive"),
        ({"targets": EXAMPLE.targets * math.nan}, "candidate 0 would gain nan"),
    ],
)
def test_coverage_that_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        replace(EXAMPLE.policy(), **change).choose(CANDIDATES, 2)


def test_a_row_that_is_not_finite_is_named():
    rows = EXAMPLE.rows.copy()
    rows[17, 2] = math.nan
    with pytest.raises(ValueError, match="candidate 17 would gain nan"):
        EXAMPLE.policy(batch=4).choose(Candidates(rows=rows), 1)
