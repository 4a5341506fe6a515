"""Learned memories: the likelihood against quadrature and scikit-learn, the M-step against its definition, fits against the truth."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hopjax
from hopjax import boltzmann, cluster
from hopjax.boltzmann import EM, Adam, Reason
from hopjax.estimator import BoltzmannMachine
from tests.strategies import powers, seeds

EPS = float(np.finfo(float).eps)
BETA = 8.0


@jax.jit
def draw(key, memories, beta):
    return hopjax.sample_boltzmann(key, memories, beta, (4000,))


fit = jax.jit(boltzmann.fit, static_argnames=("count", "method"))
log_likelihoods, responsibilities = jax.jit(boltzmann.log_likelihoods), jax.jit(boltzmann.responsibilities)
expectation, maximisation = jax.jit(boltzmann.expectation, static_argnames="rows"), jax.jit(boltzmann.maximisation)
log_density = jax.jit(hopjax.log_density)
mean_slope = jax.jit(jax.grad(lambda memories, samples: boltzmann.log_likelihood(samples, memories, BETA)))


def memories_of(count, dim, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal((count, dim)) / np.sqrt(dim)


def mixture(memories, beta):
    """scikit-learn's Gaussian mixture with exactly these parameters, unfitted."""
    count, dim = memories.shape
    log_weights = 0.5 * beta * np.sum(memories**2, axis=1)
    peer = GaussianMixture(count, covariance_type="spherical")
    peer.weights_ = np.exp(log_weights - scipy.special.logsumexp(log_weights))
    peer.means_, peer.covariances_ = memories, np.full(count, 1 / beta)
    peer.precisions_, peer.precisions_cholesky_ = np.full(count, beta), np.full(count, np.sqrt(beta))
    peer.n_features_in_ = dim
    return peer


def matched(found, true):
    """`found` in the order that lies nearest to `true`."""
    _, order = scipy.optimize.linear_sum_assignment(np.sum((true[:, None] - found[None]) ** 2, axis=2))
    return found[order]


# ---- Likelihood ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("beta", [0.7, 6.0])
def test_the_density_integrates_to_one_and_its_mean_log_is_the_entropy(dim, beta):
    """By the trapezoidal rule, which is exact to rounding for Gaussians at a step of 0.4 of their width and out to nine of it."""
    memories = memories_of(4, dim, scale=1.5)
    width = beta**-0.5
    axis = np.arange(-5 - 9 * width, 5 + 9 * width, 0.4 * width)
    points = np.stack(np.meshgrid(*[axis] * dim), axis=-1).reshape(-1, dim)
    log_density = np.asarray(log_likelihoods(jnp.asarray(points), jnp.asarray(memories), beta))
    cell = (0.4 * width) ** dim
    assert np.sum(np.exp(log_density)) * cell == pytest.approx(1, rel=1e-12)
    samples = np.asarray(jax.jit(lambda key: hopjax.sample_boltzmann(key, jnp.asarray(memories), beta, (40_000,)))(jax.random.key(dim)))
    found = np.asarray(log_likelihoods(jnp.asarray(samples), jnp.asarray(memories), beta))
    expected = np.sum(np.exp(log_density) * log_density) * cell
    assert abs(found.mean() - expected) < 5 * found.std() / np.sqrt(len(found))  # four cases: a false alarm in 2e-6 of all seeds


@given(seeds(), powers(-1, 2), st.sampled_from([(1, 3), (6, 4), (5, 32)]))
@settings(max_examples=25)
def test_scores_and_responsibilities_are_those_of_scikit_learns_mixture(seed, beta, shape):
    count, dim = shape
    memories = memories_of(count, dim, seed=seed)
    samples = memories_of(57, dim, seed=seed + 1, scale=1.5)
    peer = mixture(memories, beta)
    # Both expand |x − ξ|²: rounding of βR², R² < 60 for any of these seeds, over a handful of terms.
    bound = 64 * EPS * (1 + beta * 60)
    found = log_likelihoods(jnp.asarray(samples), jnp.asarray(memories), beta)
    np.testing.assert_allclose(found, peer.score_samples(samples), rtol=0, atol=bound * (1 + dim))
    found = responsibilities(jnp.asarray(samples), jnp.asarray(memories), beta)
    np.testing.assert_allclose(found, peer.predict_proba(samples), rtol=0, atol=bound)
    one = log_density(jnp.asarray(samples[0]), jnp.asarray(memories), beta)
    np.testing.assert_allclose(log_likelihoods(jnp.asarray(samples[:1]), jnp.asarray(memories), beta)[0], one, atol=100 * bound)


@pytest.mark.parametrize("rows", [None, 1, 7, 57, 500])
def test_the_e_step_streams_to_the_moments_of_their_definition(rows):
    memories, samples = jnp.asarray(memories_of(6, 5)), jnp.asarray(memories_of(57, 5, seed=1, scale=2))
    found = expectation(samples, memories, BETA, rows=rows)
    gamma = np.asarray(responsibilities(samples, memories, BETA))
    np.testing.assert_allclose(found.mean, gamma.T @ np.asarray(samples) / 57, rtol=0, atol=64 * EPS)
    np.testing.assert_allclose(found.log_likelihood, boltzmann.log_likelihood(samples, memories, BETA), rtol=1e-13)


def test_the_gradient_is_that_of_finite_differences_and_of_the_e_step():
    memories, samples = memories_of(4, 3), jnp.asarray(memories_of(50, 3, seed=1, scale=2))
    value = jax.jit(lambda m, b: boltzmann.log_likelihood(samples, m, b))
    by_memories, by_beta = jax.jit(jax.grad(value, (0, 1)))(jnp.asarray(memories), BETA)
    moments = expectation(samples, jnp.asarray(memories), BETA)
    weights = mixture(memories, BETA).weights_
    np.testing.assert_allclose(by_memories, BETA * (moments.mean - weights[:, None] * memories), rtol=0, atol=1e-13)
    step = 1e-5  # central differences: error step²·β³ ≈ 5e-8 from curvature, eps·10/step ≈ 2e-10 from rounding
    for place in itertools.product(range(4), range(3)):
        move = np.zeros((4, 3))
        move[place] = step
        numeric = (value(jnp.asarray(memories + move), BETA) - value(jnp.asarray(memories - move), BETA)) / (2 * step)
        assert numeric == pytest.approx(float(by_memories[place]), abs=1e-7)
    numeric = (value(jnp.asarray(memories), BETA + step) - value(jnp.asarray(memories), BETA - step)) / (2 * step)
    assert numeric == pytest.approx(float(by_beta), abs=1e-7)


# ---- M-step --------------------------------------------------------------------------------------------------------------


def test_the_scalar_equation_is_wrights_omega():
    y = np.concatenate([np.linspace(-700, 40, 2000), np.geomspace(1, 1e12, 500), np.linspace(-2, 4, 500)])
    log_omega = np.asarray(boltzmann._log_omega(jnp.asarray(y)))
    np.testing.assert_allclose(log_omega, np.log(scipy.special.wrightomega(y)), rtol=8 * EPS, atol=8 * EPS)


@given(seeds(), powers(-3, 4), powers(-4, 2), st.integers(1, 9))
@settings(max_examples=60)
def test_the_m_step_is_stationary_at_every_scale(seed, beta, scale, count):
    """|s| = π t and the direction of s: the only conditions, since the root is the only stationary point."""
    mean = scale * np.random.default_rng(seed).standard_normal((count, 3)) * np.geomspace(1, 1e-3, count)[:, None]
    memories = np.asarray(maximisation(jnp.asarray(mean), beta))
    length, norm = np.linalg.norm(memories, axis=1), np.linalg.norm(mean, axis=1)
    # log π carries the rounding of βt²/2, whose two occurrences are never nearer than that.
    bound = 64 * EPS * (1 + beta * np.max(length) ** 2)
    np.testing.assert_allclose(memories, mean * (length / norm)[:, None], rtol=64 * EPS)
    log_weights = 0.5 * beta * length**2
    weights = np.exp(log_weights - scipy.special.logsumexp(log_weights))
    np.testing.assert_allclose(weights * length, norm, rtol=bound)


def test_no_other_memories_beat_the_m_step():
    rng = np.random.default_rng(0)
    mean = jnp.asarray(0.3 * rng.standard_normal((4, 3)))

    def bound(flat):
        memories = flat.reshape(4, 3)
        return -BETA * np.sum(np.asarray(mean) * memories) + scipy.special.logsumexp(0.5 * BETA * np.sum(memories**2, axis=1))

    best = bound(np.asarray(maximisation(mean, BETA)).ravel())
    for _ in range(8):
        assert scipy.optimize.minimize(bound, rng.standard_normal(12), method="BFGS").fun >= best - 1e-9


def test_one_memory_is_the_mean_and_one_without_samples_goes_to_the_origin():
    samples = jnp.asarray(memories_of(50, 3, scale=2))
    np.testing.assert_allclose(fit(jax.random.key(0), samples, 1, BETA).memories[0], np.mean(samples, axis=0), rtol=1e-12)
    mean = jnp.asarray([[0.3, 0.4, 0.0], [0.0, 0.0, 0.0]])
    memories = np.asarray(maximisation(mean, BETA))
    np.testing.assert_array_equal(memories[1], 0)
    length = np.linalg.norm(memories[0])
    assert length / (1 + np.exp(-0.5 * BETA * length**2)) == pytest.approx(0.5, rel=1e-14)


# ---- Fits ----------------------------------------------------------------------------------------------------------------


def test_em_never_falls_and_ends_where_the_gradient_vanishes(key):
    true = cluster.memories(5, 16, 0.35)
    samples = draw(key, true, BETA)
    for norm in (None, 1.0):
        found = fit(key, samples, 6, BETA, norm=norm)
        trace = np.asarray(found.trace)[: int(found.steps)]
        assert bool(found.converged)
        assert found.reason == Reason.CONVERGED
        assert np.all(np.isnan(np.asarray(found.trace)[int(found.steps) :]))
        assert np.min(np.diff(trace)) > -64 * EPS * abs(trace[0])
        assert float(found.log_likelihood) >= trace[-1] - 64 * EPS * abs(trace[0])
        size = np.sqrt(np.mean(np.sum(np.asarray(samples) ** 2, axis=1)))
        end = fit(key, samples, 6, BETA, norm=norm, method=EM(tolerance=1e-13), start=found.memories).memories
        # Of the sum of a geometric series from two of its terms: the ratio is known to within a few per cent.
        assert np.max(np.linalg.norm(end - found.memories, axis=1)) / size == pytest.approx(float(found.residual), rel=0.2)
    slope = mean_slope(fit(key, samples, 6, BETA, method=EM(tolerance=1e-12)).memories, samples)
    assert np.max(np.abs(slope)) < 1e-11 * BETA * size * 10


def test_the_exact_m_step_ends_where_a_quasi_newton_method_does(key):
    samples = draw(key, cluster.memories(5, 8, 0.35), BETA)
    found = fit(key, samples, 6, BETA, method=EM(tolerance=1e-10))
    slope = jax.jit(jax.value_and_grad(lambda m: -boltzmann.log_likelihood(samples, m, BETA)))

    def objective(flat):
        value, gradient = slope(jnp.asarray(flat.reshape(6, 8)))
        return float(value), np.asarray(gradient).ravel()

    start = np.asarray(found.memories).ravel() + 0.05 * np.random.default_rng(0).standard_normal(48)
    peer = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-10})
    assert -peer.fun == pytest.approx(float(found.log_likelihood), abs=1e-12)
    np.testing.assert_allclose(peer.x.reshape(6, 8), found.memories, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_slow_climb_ends_within_the_tolerance_of_the_maximum(key, dtype):
    """β = 1: memories overlap, a step keeps nine tenths of the last one's length, and one below the tolerance is ten of it away."""
    samples = draw(key, cluster.memories(2, 8, 0.35), 1.0).astype(dtype)
    tolerance = 1e-4
    found = fit(key, samples, 3, 1.0, method=EM(tolerance=tolerance))
    size = np.sqrt(np.mean(np.sum(np.asarray(samples) ** 2, axis=1)))
    end = fit(key, samples.astype(float), 3, 1.0, method=EM(5000, tolerance=1e-12), start=found.memories.astype(float))
    assert bool(found.converged)
    assert bool(end.converged)

    def distance(memories):
        return np.max(np.linalg.norm(np.asarray(memories) - np.asarray(end.memories), axis=1)) / size

    assert distance(found.memories) < 1.2 * tolerance
    step = maximisation(expectation(samples, found.memories, 1.0).mean, 1.0) - found.memories
    assert np.max(np.linalg.norm(step, axis=1)) / size < 0.2 * tolerance
    # One that goes on from near the maximum does not take its first short step for the end.
    again = fit(key, samples, 3, 1.0, method=EM(tolerance=tolerance / 10), start=found.memories)
    assert distance(again.memories) < 2 * tolerance / 10  # rounding of single precision adds to it, a few eps over 1 − ρ


@pytest.mark.slow
def test_memories_are_recovered_at_the_rate_of_the_square_root_of_n():
    """n(W − X)ᵀI(W − X), I Fisher's information, follows χ²(Md) to O(1/√n): twelve fits at each of three sizes, z of their means."""
    true, dim, seeds_each = cluster.memories(3, 6, 0.35), 6, 12
    freedom = true.size

    @jax.jit
    def information(samples):
        slopes = jax.vmap(lambda x: jax.grad(lambda m: hopjax.log_density(x, m, BETA))(true).ravel())(samples)
        return slopes.T @ slopes / len(samples)

    fisher = np.asarray(information(jax.jit(lambda: hopjax.sample_boltzmann(jax.random.key(7), true, BETA, (200_000,)))()))
    for size in (1000, 4000, 16_000):
        many = jax.jit(
            jax.vmap(lambda key, size=size: boltzmann.fit(key, hopjax.sample_boltzmann(key, true, BETA, (size,)), 4, BETA, start=true))
        )(jax.random.split(jax.random.key(size), seeds_each))
        errors = (np.asarray(many.memories) - np.asarray(true)[None]).reshape(seeds_each, -1)
        statistic = size * np.einsum("si,ij,sj->s", errors, fisher, errors)
        # The information itself is known to 1 %, the law to a few %: wider than the mean's standard error at the smallest n only.
        z = (statistic.mean() - freedom) / np.sqrt(2 * freedom / seeds_each)
        assert abs(z) < 5, (size, z)
        assert np.all(np.asarray(many.converged))
    assert dim == true.shape[1]


def test_the_default_start_finds_well_separated_memories(key):
    true = cluster.memories(5, 16, 0.35)
    for index, beta in enumerate((8.0, 40.0)):
        samples = draw(jax.random.fold_in(key, index), true, beta)
        many = jax.jit(jax.vmap(lambda key, x=samples, beta=beta: boltzmann.fit(key, x, 6, beta)))(jax.random.split(key, 8))
        best = np.asarray(many.memories)[np.argmax(many.log_likelihood)]
        # Each coordinate has variance 1/(nπβ) but for overlap, which at β = 8 doubles it at most: ten standard deviations.
        assert np.max(np.abs(matched(best, np.asarray(true)) - true)) < 10 * (4000 / 6 * beta) ** -0.5


@pytest.mark.slow
def test_the_estimator_keeps_the_best_of_its_starts(key):
    """Twenty separate memories: starts end in different local maxima, a tenth of a nat a sample apart."""
    samples = draw(key, cluster.memories(19, 24, 0.35), 30.0)
    starts = jax.random.split(jax.random.key(2), 6)
    reached = np.asarray(jax.jit(jax.vmap(lambda key: boltzmann.fit(key, samples, 20, 30.0).log_likelihood))(starts))
    assert np.ptp(reached) > 0.05
    machine = BoltzmannMachine(20, 30.0, n_init=6, random_state=2, method=EM(max_steps=500)).fit(np.asarray(samples))
    assert machine.log_likelihood_ == pytest.approx(reached.max(), abs=1e-9)


def test_weights_follow_norms(key):
    """Components drawn with frequencies that their norms imply, and learned from samples alone."""
    true = np.diag([1.0, 0.95, 0.9]) @ np.eye(3, 8)
    samples = draw(key, jnp.asarray(true), 20.0)
    weights = np.exp(0.5 * 20.0 * np.array([1.0, 0.95, 0.9]) ** 2)
    weights /= weights.sum()
    machine = BoltzmannMachine(3, 20.0).fit(np.asarray(samples))
    order = np.argsort(-machine.weights_)
    error = np.sqrt(weights * (1 - weights) / 4000)
    assert np.max(np.abs(machine.weights_[order] - weights) / error) < 5
    counts = np.bincount(machine.predict(np.asarray(samples)), minlength=3)[order] / 4000
    assert np.max(np.abs(counts - weights)) < 0.02  # overlaps of a percent
    fixed = BoltzmannMachine(3, 20.0, norm=0.9).fit(np.asarray(samples))
    np.testing.assert_allclose(np.linalg.norm(fixed.memories_, axis=1), 0.9, rtol=4 * EPS)
    np.testing.assert_allclose(fixed.weights_, 1 / 3, rtol=64 * EPS)
    assert fixed.log_likelihood_ < machine.log_likelihood_


def test_adam_comes_near_and_says_that_it_has_not_converged(key):
    true = cluster.memories(5, 16, 0.35)
    samples = draw(key, true, BETA)
    best = fit(key, samples, 6, BETA)
    for norm in (None, 1.0):
        found = fit(key, samples, 6, BETA, method=Adam(steps=1000), norm=norm)
        assert not bool(found.converged)
        assert found.reason == Reason.STEPS
        assert found.steps == 1000
        assert found.trace.shape == (1000,)
        assert np.all(np.isfinite(found.trace))
        # Each coordinate's stationary noise is rate·σ/(2H) ≈ 3e-4 at batch 256, which costs ½βπ of it, 96 times: 0.02 nats.
        assert -0.06 < float(found.log_likelihood - best.log_likelihood) < 0
        if norm:
            np.testing.assert_allclose(np.linalg.norm(found.memories, axis=1), 1, rtol=4 * EPS)
    again = fit(key, samples, 6, BETA, method=Adam(steps=1000), norm=1.0)
    np.testing.assert_array_equal(again.memories, found.memories)


def test_the_first_step_of_adam_is_the_learning_rate_along_the_sign_of_the_gradient(key):
    samples, start = draw(key, cluster.memories(5, 16, 0.35), BETA), jnp.asarray(memories_of(6, 16))
    found = fit(key, samples, 6, BETA, method=Adam(steps=1, rate=1e-3, batch=4000), start=start)
    slope = mean_slope(start, samples)
    sure = np.abs(slope) > 0.2  # others may change sign with the batch
    assert sure.sum() > 5
    np.testing.assert_allclose((found.memories - start)[sure], 1e-3 * np.sign(slope)[sure], rtol=1e-6)


def test_fifty_seeds_in_one_call_are_fifty_single_fits():
    true = cluster.memories(3, 8, 0.35)
    keys = jax.random.split(jax.random.key(0), 50)

    def one(key):
        return boltzmann.fit(key, hopjax.sample_boltzmann(key, true, BETA, (500,)), 4, BETA)

    many = jax.jit(jax.vmap(one))(keys)
    assert many.memories.shape == (50, 4, 8)
    assert np.all(np.asarray(many.converged))
    single = jax.jit(one)
    for index in (0, 49):
        alone = single(keys[index])
        # Both stop within the same tolerance of the same maximum; steps may differ by rounding.
        np.testing.assert_allclose(alone.memories, many.memories[index], atol=1e-6)


def test_single_precision_stays_single(key):
    true = cluster.memories(5, 16, 0.35, dtype=jnp.float32)
    samples = jax.jit(lambda key: hopjax.sample_boltzmann(key, true, BETA, (2000,)))(key)
    for method in (EM(), Adam(steps=50)):
        found = fit(key, samples, 6, BETA, method=method)
        assert found.memories.dtype == found.trace.dtype == found.log_likelihood.dtype == jnp.float32
    wide = fit(key, samples.astype(float), 6, BETA)
    assert float(fit(key, samples, 6, BETA).log_likelihood) == pytest.approx(float(wide.log_likelihood), abs=1e-4)


# ---- What goes wrong -----------------------------------------------------------------------------------------------------


def test_why_a_fit_stopped_is_data(key):
    samples = draw(key, cluster.memories(5, 16, 0.35), BETA)
    short = fit(key, samples, 6, BETA, method=EM(max_steps=2))
    assert not bool(short.converged)
    assert short.reason == Reason.STEPS
    assert short.steps == 2
    for bad, beta in ((samples.at[3, 2].set(jnp.nan), BETA), (samples.at[3, 2].set(jnp.inf), BETA), (samples, -1.0)):
        lost = fit(key, bad, 6, beta)
        assert not bool(lost.converged)
        assert lost.reason == Reason.NOT_FINITE
    for reason in Reason:
        assert "\n" not in str(reason)
        assert len(str(reason)) > 20


def test_samples_that_are_all_zero_are_fitted(key):
    found = fit(key, jnp.zeros((10, 3)), 2, 1.0)
    np.testing.assert_array_equal(found.memories, 0)
    assert found.residual == 0
    assert found.reason == Reason.CONVERGED
    assert found.log_likelihood == pytest.approx(-1.5 * np.log(2 * np.pi))


def test_bad_arguments_are_named(unchecked, key):
    samples = jnp.ones((5, 3))
    for wrong, message in (
        (lambda: boltzmann.fit(key, samples, 6, BETA), "count=6.*5 samples"),
        (lambda: boltzmann.fit(key, samples, 0, BETA), "count=0"),
        (lambda: boltzmann.fit(key, samples, 2, BETA, start=jnp.ones((2, 4))), "dimension 3 and memories 4"),
        (lambda: boltzmann.fit(key, samples, 2, BETA, start=jnp.ones((3, 3))), "3 memories and count=2"),
        (lambda: boltzmann.fit(key, samples, 2, BETA, start=jnp.ones((2, 3), jnp.float32)), "float64 and memories are float32"),
        (lambda: boltzmann.expectation(samples, jnp.ones((2, 4)), BETA), "dimension 3 and memories 4"),
        (lambda: EM(max_steps=0), "max_steps=0"),
        (lambda: EM(tolerance=0.0), "tolerance=0.0"),
        (lambda: Adam(tolerance=np.nan), "tolerance=nan"),
        (lambda: Adam(rate=-1.0), "rate=-1.0"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            wrong()
        assert "\n" not in str(caught.value)


def test_the_estimator_names_what_it_cannot_use(unchecked):
    samples = np.random.default_rng(0).standard_normal((20, 3))
    broken = samples.copy()
    broken[7, 1] = np.nan
    fitted = BoltzmannMachine(2, 1.0).fit(samples)
    for wrong, message in (
        (lambda: BoltzmannMachine(21).fit(samples), "n_memories=21.*20 samples"),
        (lambda: BoltzmannMachine(2.5).fit(samples), r"n_memories=2\.5.*whole number"),  # type: ignore[arg-type]
        (lambda: BoltzmannMachine(2, method="EM").fit(samples), r"method='EM'"),  # type: ignore[arg-type]
        (lambda: BoltzmannMachine(2, beta=0.0).fit(samples), "beta=0.0"),
        (lambda: BoltzmannMachine(2, beta=np.inf).fit(samples), "beta=inf"),
        (lambda: BoltzmannMachine(2, norm=-1.0).fit(samples), "norm=-1.0"),
        (lambda: BoltzmannMachine(2, n_init=0).fit(samples), "n_init=0"),
        (lambda: BoltzmannMachine(6.0).fit(samples), r"n_memories=6\.0.*whole number"),  # type: ignore[arg-type]
        (lambda: BoltzmannMachine(True).fit(samples), "n_memories=True.*whole number"),
        (lambda: BoltzmannMachine(2, n_init=2.5).fit(samples), r"n_init=2\.5.*whole number"),  # type: ignore[arg-type]
        (lambda: BoltzmannMachine(2, memory_limit=1e9).fit(samples), r"memory_limit=1000000000\.0.*whole"),  # type: ignore[arg-type]
        (lambda: BoltzmannMachine(2, beta="a").fit(samples), "beta='a': need a number"),  # type: ignore[arg-type]
        (lambda: BoltzmannMachine(2, beta=True).fit(samples), "beta=True: need a number"),
        (lambda: BoltzmannMachine(2, random_state="a").fit(samples), "random_state='a': need a whole number"),  # type: ignore[arg-type]
        (lambda: BoltzmannMachine(2, random_state=-1).fit(samples), "random_state=-1"),
        (lambda: BoltzmannMachine(2).fit(broken), "row 7"),
        (lambda: BoltzmannMachine(2).fit(samples[0]), r"shape \(3,\)"),
        (lambda: BoltzmannMachine(2).fit(samples[:0]), r"shape \(0, 3\)"),
        (lambda: BoltzmannMachine(2, method=Adam(), memory_limit=100).fit(samples), "memory_limit=100.*only EM"),
        (lambda: fitted.score_samples(samples[:, :2]), "2 columns and the memories 3"),
        (lambda: BoltzmannMachine(2).score_samples(samples), "call fit first"),
        (lambda: BoltzmannMachine(2).sample(3), "call fit first"),
        (lambda: fitted.sample(0), "n_samples=0"),
        (lambda: fitted.set_params(temperature=1), "'temperature'"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            wrong()
        assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=r"not converged after 1 steps: all steps were taken"):
        machine = BoltzmannMachine(2, 8.0, method=EM(max_steps=1)).fit(samples)
    assert not machine.converged_
    assert machine.reason_ == str(Reason.STEPS)


# ---- Estimator -----------------------------------------------------------------------------------------------------------


def test_the_estimator_keeps_scikit_learns_conventions(key):
    true = cluster.memories(5, 16, 0.35)
    samples = np.asarray(draw(key, true, BETA))
    machine = BoltzmannMachine(n_memories=6, beta=BETA, random_state=3)
    assert machine.get_params() == clone(machine).get_params()
    assert machine.get_params()["n_memories"] == 6
    assert clone(machine).set_params(beta=2.0).beta == 2.0
    assert repr(machine) == "BoltzmannMachine(n_memories=6, beta=8.0, random_state=3)"
    assert machine.fit(samples) is machine
    assert machine.converged_
    peer = mixture(machine.memories_, BETA)
    np.testing.assert_allclose(machine.weights_, peer.weights_, rtol=1e-13)
    np.testing.assert_allclose(machine.score_samples(samples), peer.score_samples(samples), rtol=0, atol=1e-11)
    np.testing.assert_allclose(machine.predict_proba(samples), peer.predict_proba(samples), rtol=0, atol=1e-11)
    np.testing.assert_array_equal(machine.predict(samples), peer.predict(samples))
    assert machine.score(samples) == pytest.approx(machine.log_likelihood_, abs=1e-12)
    again = machine.sample(20_000, random_state=1)
    assert again.shape == (20_000, 16)
    scores = machine.score_samples(again)
    held_out = machine.score_samples(machine.sample(20_000, random_state=2))
    assert abs(scores.mean() - held_out.mean()) < 5 * np.hypot(scores.std(), held_out.std()) / np.sqrt(20_000)
    np.testing.assert_array_equal(clone(machine).fit(samples).memories_, machine.memories_)
    assert BoltzmannMachine(1).fit([[0, 1], [1, 0], [2, 2]]).n_features_in_ == 2


def test_scikit_learns_tools_take_the_estimator(key):
    samples = np.asarray(draw(key, cluster.memories(2, 6, 0.35), BETA))[:300]
    machine = BoltzmannMachine(2, beta=4.0, n_init=1)
    scores = cross_val_score(machine, samples, cv=3)
    folds = KFold(3).split(samples)
    np.testing.assert_allclose(scores, [clone(machine).fit(samples[learn]).score(samples[test]) for learn, test in folds], rtol=1e-12)
    pipeline = make_pipeline(StandardScaler(), machine).fit(samples)
    scaled = StandardScaler().fit_transform(samples)
    assert pipeline.score(samples) == clone(machine).fit(scaled).score(scaled)
    assert pipeline.predict(samples).shape == (300,)
    search = GridSearchCV(pipeline, {"boltzmannmachine__n_memories": [1, 3]}, cv=3).fit(samples)
    assert search.best_params_ == {"boltzmannmachine__n_memories": np.argmax(search.cv_results_["mean_test_score"]) * 2 + 1}


def test_random_states_are_those_of_scikit_learn(unchecked, key):
    samples = np.asarray(draw(key, cluster.memories(2, 6, 0.35), BETA))[:300]

    def learned(random_state):
        machine = BoltzmannMachine(3, BETA, n_init=1, random_state=random_state).fit(samples)
        return machine.memories_, machine.sample(5)

    for make in (lambda: 3, lambda: np.int64(3), lambda: np.random.RandomState(0)):
        for one, again in zip(learned(make()), learned(make()), strict=True):
            np.testing.assert_array_equal(one, again)
    draws = learned(None)[1], learned(None)[1]
    assert np.all(draws[0] != draws[1])


@pytest.mark.parametrize(("given", "kept"), [(np.float16, np.float32), (np.longdouble, float), (">f8", float), (int, float)])
def test_numbers_that_jax_does_not_compute_in_are_cast(key, given, kept):
    samples = (8 * np.asarray(draw(key, cluster.memories(2, 6, 0.35), BETA))[:300]).astype(given)
    machine = BoltzmannMachine(3, BETA / 64, n_init=1).fit(samples)
    assert machine.memories_.dtype == kept
    np.testing.assert_array_equal(machine.memories_, clone(machine).fit(samples.astype(kept)).memories_)
    assert machine.score_samples(samples).dtype == kept


@pytest.mark.slow
def test_samples_mapped_from_a_file_are_streamed_to_the_same_fit(tmp_path, key):
    samples = np.asarray(draw(key, cluster.memories(5, 16, 0.35), BETA))
    np.save(tmp_path / "samples.npy", samples)
    mapped = np.load(tmp_path / "samples.npy", mmap_mode="r")
    for norm in (None, 1.0):
        whole = BoltzmannMachine(6, BETA, norm=norm).fit(samples)
        streamed = BoltzmannMachine(6, BETA, norm=norm, memory_limit=1100 * 16 * 8).fit(mapped)
        assert streamed.converged_
        assert streamed.log_likelihood_ == pytest.approx(whole.log_likelihood_, abs=1e-12)
        np.testing.assert_allclose(matched(streamed.memories_, whole.memories_), whole.memories_, atol=1e-6)
        np.testing.assert_allclose(streamed.score_samples(mapped), whole.score_samples(samples), atol=1e-6)
        gamma = responsibilities(jnp.asarray(samples), jnp.asarray(streamed.memories_), BETA)
        np.testing.assert_allclose(streamed.predict_proba(mapped), gamma, rtol=0, atol=64 * EPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = BoltzmannMachine(6, BETA, method=EM(max_steps=3), memory_limit=1100 * 16 * 8).fit(mapped)
    assert not short.converged_
    assert short.n_iter_ == 3
    assert np.all(np.diff(short.trace_) >= 0)
