"""Diffusion's marginals, scores and implicit energies against quadrature, derivatives and the Hopfield energy."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf
from scipy import special

import hopjax
from hopjax import correspondence
from tests import oracles
from tests.strategies import SMALL, landscapes, powers

EPS = float(np.finfo(float).eps)


@jax.jit
def observe(state, memories, scale, variance):
    return {
        "density": correspondence.mixture_log_density(state, memories, scale, variance),
        "mean": correspondence.posterior_mean(state, memories, scale, variance),
        "score": correspondence.mixture_score(state, memories, scale, variance),
        "slope": jax.grad(correspondence.mixture_log_density)(state, memories, scale, variance),
        "kernel": correspondence.kernel_energy(state, memories, variance),
    }


@hypothesis.given(landscapes(tuple(case for case in SMALL if case[2] == "float64")), powers(-2, 0))
@hypothesis.settings(max_examples=40)
def test_mixtures_agree_with_fifty_digits(landscape, scale):
    variance = 1 / float(landscape.beta)
    values = observe(landscape.state, landscape.memories, scale, variance)
    count, dim = landscape.memories.shape
    with mp.workdps(50):
        x, rows = oracles.exact(landscape.state), oracles.exact(landscape.memories)
        a, v = mpf(scale), mpf(variance)
        exponents = [-mp.fsum((s - a * r) ** 2 for s, r in zip(x, row, strict=True)) / (2 * v) for row in rows]
        total = oracles.log_sum_exp(exponents)
        density = float(total - mp.log(count) - mpf(dim) / 2 * mp.log(2 * mp.pi * v))
        mean = np.array(oracles.moved([mp.exp(e - total) for e in exponents], rows), float)
        kernel = float(-oracles.log_sum_exp([-v / 2 * mp.fsum((s - r) ** 2 for s, r in zip(x, row, strict=True)) for row in rows]) / v)
    # Squares of at most 2R rounded relatively, d of them added.
    steep = (8 + math.sqrt(dim)) * EPS * 4 * landscape.steepness
    assert abs(float(values["density"]) - density) <= 2 * steep + 8 * EPS * (abs(density) + dim * abs(math.log(2 * math.pi * variance)) + 1)
    share = min(1.0, math.expm1(min(1.0, 4 * steep)))
    away = 2 * landscape.radius * (share + count * 4 * EPS)
    assert np.linalg.norm(values["mean"] - mean) <= away
    state = np.asarray(landscape.state)
    assert np.linalg.norm(values["score"] - (scale * mean - state) / variance) <= (away + 8 * EPS * landscape.radius) / variance
    assert np.linalg.norm(values["score"] - values["slope"]) <= (away + 64 * (count + dim) * EPS * landscape.radius) / variance
    assert abs(float(values["kernel"]) - kernel) <= (8 + math.sqrt(dim)) * EPS * 4 * (landscape.radius**2 + math.log(count) / variance)


def test_the_mixture_integrates_to_one():
    memories = np.array([[1.0, 0.2], [-0.5, 0.9], [0.1, -1.2]])
    grid = np.arange(-6, 6, 0.1)  # σ = 0.5: the trapezoidal rule is exact to rounding
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    log_density = jax.jit(jax.vmap(correspondence.mixture_log_density, (0, None, None, None)))(points, memories, 0.8, 0.25)
    assert abs(special.logsumexp(np.asarray(log_density)) + 2 * math.log(0.1)) <= 1e-12


@jax.jit
def energies(state, memories, beta):
    return (
        hopjax.energy(state, memories, beta),
        correspondence.kernel_energy(state, memories, beta),
        correspondence.ve_implicit_energy(state, memories, 1 / jnp.sqrt(beta)),
        hopjax.gradient(state, memories, beta),
        correspondence.mixture_score(state, memories, 1.0, 1 / beta),
    )


@hypothesis.given(landscapes(tuple(case for case in SMALL if case[2] == "float64")))
def test_for_equal_norms_it_is_the_hopfield_energy(landscape):
    """Kernel energy = E + ½ρ²; −σ² log p_t = the same plus constants; the score is (T(x) − x)/σ²."""
    norm = float(np.linalg.norm(landscape.memories[0]))
    memories = landscape.memories / np.linalg.norm(landscape.memories, axis=1, keepdims=True) * norm
    beta, (count, dim) = float(landscape.beta), memories.shape
    energy, kernel, exploding, gradient, score = (np.asarray(value) for value in energies(landscape.state, memories, beta))
    rounding = (8 + math.sqrt(dim)) * EPS * 8 * (landscape.radius**2 + (math.log(count) + 1) / beta)
    assert abs(kernel - energy - norm**2 / 2) <= rounding
    constant = math.log(count) / beta + dim / (2 * beta) * math.log(2 * math.pi / beta)
    assert abs(exploding - kernel - constant) <= rounding + 8 * EPS * abs(constant)
    weight = min(1.0, 8 * (8 + math.sqrt(dim)) * EPS * (1 + 2 * landscape.steepness))
    assert np.linalg.norm(score / beta + gradient) <= 4 * landscape.radius * (weight + count * EPS)


def test_kernel_energy_is_invariant_under_translation_and_the_hopfield_energy_is_not():
    rng = np.random.default_rng(0)
    memories, state, shift = rng.standard_normal((4, 3)), rng.standard_normal(3), rng.standard_normal(3)
    here, there = energies(state, memories, 2.0), energies(state + shift, memories + shift, 2.0)
    assert abs(float(here[1]) - float(there[1])) <= 64 * EPS
    assert abs(float(here[0]) - float(there[0])) > 0.01


def test_variance_preserving_energy_tends_to_the_hopfield_energy():
    """v·u/β(t) − E loses its dependence on the state as v → 0, at the rate v."""
    rng = np.random.default_rng(1)
    memories = rng.standard_normal((4, 3))
    memories /= np.linalg.norm(memories, axis=1, keepdims=True)
    states = 0.3 * rng.standard_normal((6, 3))
    implicit = jax.jit(jax.vmap(correspondence.vp_implicit_energy, (0, None, None)))
    hopfield = jax.jit(jax.vmap(hopjax.energy, (0, None, None)))
    spreads = []
    for variance in (0.02, 0.01):
        difference = variance * np.asarray(implicit(states, memories, math.sqrt(1 - variance))) - np.asarray(
            hopfield(states, memories, 1 / variance)
        )
        spreads.append(np.ptp(difference))
    assert spreads[0] < 0.02
    assert 1.6 < spreads[0] / spreads[1] < 2.4


def test_variance_preserving_energy_is_its_formula():
    """u/β(t) = −log Σ exp((α/v)ξ·y) + |y|²(1/(2v) − ¼) + const for unit memories."""
    memories, alpha = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]), 0.9
    variance = 1 - alpha**2
    states = np.random.default_rng(2).standard_normal((5, 2))
    values = np.asarray(jax.jit(jax.vmap(correspondence.vp_implicit_energy, (0, None, None)))(states, memories, alpha))
    formula = -special.logsumexp(alpha / variance * states @ memories.T, axis=1) + np.sum(states**2, axis=1) * (0.5 / variance - 0.25)
    constant = math.log(3) + math.log(2 * math.pi * variance) + alpha**2 / (2 * variance)
    np.testing.assert_allclose(values, formula + constant, rtol=0, atol=1e-13)


def test_the_linear_schedule():
    schedule = np.asarray(jax.jit(correspondence.linear_alphas_cumprod)())
    betas = [mpf(0.0001) + (mpf(0.02) - mpf(0.0001)) * i / 999 for i in range(1000)]
    with mp.workdps(40):
        exact, product = [], mpf(1)
        for beta in betas:
            product *= 1 - beta
            exact.append(float(product))
    np.testing.assert_allclose(schedule, exact, rtol=1000 * EPS)  # a sum of 1000 rounded logarithms
    ratio = np.asarray(jax.jit(correspondence.signal_to_noise)(schedule))
    np.testing.assert_allclose(ratio, schedule / (1 - schedule), rtol=4 * EPS)
    assert abs(float(ratio[500]) - 0.084) < 1e-3  # and not the 0.302 of α/v


def test_timesteps_and_temperatures_are_inverses():
    schedule = jax.jit(correspondence.linear_alphas_cumprod)()
    steps = np.array([0.0, 0.25, 500.0, 731.7, 999.0])
    beta = jax.jit(correspondence.beta_at_timestep)(steps, schedule)
    np.testing.assert_allclose(jax.jit(correspondence.timestep_at_beta)(beta, schedule), steps, rtol=0, atol=1e-8)  # slope of log β: 0.01
    np.testing.assert_allclose(beta[2], jax.jit(correspondence.signal_to_noise)(schedule)[500], rtol=16 * EPS)
    between = np.sqrt(np.prod(np.asarray(jax.jit(correspondence.beta_at_timestep)(np.array([3.0, 4.0]), schedule))))
    np.testing.assert_allclose(jax.jit(correspondence.beta_at_timestep)(np.array([3.5]), schedule)[0], between, rtol=16 * EPS)
    assert np.isnan(jax.jit(correspondence.beta_at_timestep)(np.array([-0.1, 999.1, math.nan]), schedule)).all()
    assert np.isnan(jax.jit(correspondence.timestep_at_beta)(np.array([1e9, 1e-9, -1.0]), schedule)).all()


@pytest.mark.parametrize(
    "options", [{"timesteps": 0}, {"beta_start": 0.0}, {"beta_end": 1.0}, {"beta_start": 0.1, "beta_end": 0.05}, {"beta_start": math.nan}]
)
def test_impossible_schedules_raise(options):
    with pytest.raises(ValueError, match="need timesteps ≥ 1 and 0 < beta_start ≤ beta_end < 1, got") as caught:
        correspondence.linear_alphas_cumprod(**options)
    assert str(next(iter(options.values()))) in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_variance_that_is_none_gives_nan(value):
    rows = np.eye(3)
    assert np.isnan(np.concatenate([np.ravel(part) for part in observe(rows[0], rows, 1.0, value).values()])).all()
    assert np.isnan(jax.jit(correspondence.ve_implicit_energy)(rows[0], rows, value))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5, math.nan])
def test_an_alpha_outside_its_range_gives_nan(alpha):
    assert np.isnan(jax.jit(correspondence.vp_implicit_energy)(np.ones(3), np.eye(3), alpha))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_memory_that_is_not_finite_gives_nan(value):
    rows = np.eye(3)
    rows[1, 2] = value
    values = observe(np.full(3, 0.5), rows, 1.0, 0.5)
    for name in ("density", "mean", "score", "kernel"):
        assert np.isnan(values[name]).all(), name


@pytest.mark.usefixtures("unchecked")
def test_static_mistakes_raise():
    with pytest.raises(ValueError, match=r"need \(3,\)"):
        correspondence.mixture_score(jnp.ones(4), jnp.eye(3), 1.0, 1.0)
    with pytest.raises(ValueError, match="at least one memory"):
        correspondence.kernel_energy(jnp.ones(3), jnp.ones((0, 3)), 1.0)
