"""The variational bound against normal algebra, the density of the chain that it bounds, and the flow."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffusion.likelihood import clean_log_density, intrinsic_forgetting
from diffusion.samplers import Ancestral, uniform_log_snr, uniform_timesteps
from diffusion.schedules import LinearSchedule
from diffusion.variational import VariationalBound
from hopjax.correspondence import beta_at_timestep, kernel_energy, posterior_mean
from tests.compiled import quickly

SCHEDULE = LinearSchedule()
# At its end α = 3e-7: there N(0, I) is off by α |x| |mean| ≈ 1e-6 nats.
NOISY = LinearSchedule(beta_end=0.06)


def normal_noise(mean, width, schedule=SCHEDULE):
    """ε(x, t) = σ (x − α m)/(α² s² + σ²) of independent pixels N(m, s²)."""

    def epsilon(noisy, timestep):
        alpha, sigma = schedule.alpha_sigma_of(timestep, noisy)
        return sigma * (noisy - alpha * mean) / (alpha**2 * width**2 + sigma**2)

    return epsilon


@functools.partial(quickly, static_argnames=("bound", "start", "mean", "width", "schedule"))
def normal_bound(bound, states, keys, *, start, mean, width, schedule=SCHEDULE):
    return bound(normal_noise(mean, width, schedule), states, schedule, keys, start=start)


@functools.partial(quickly, static_argnames=("bound", "timestep", "schedule"))
def mixture_bound(bound, memories, clean, keys, *, timestep, schedule=NOISY):
    def epsilon(noisy, t):
        alpha, sigma = schedule.alpha_sigma(t)
        mean = jax.vmap(posterior_mean, in_axes=(0, None, 0, 0))(noisy, memories, alpha, sigma**2)
        return (noisy - alpha[:, None] * mean) / sigma[:, None]

    return clean_log_density(bound, epsilon, clean, schedule, keys, timestep=timestep)


class Chain(NamedTuple):
    """Ancestral sampling on normal data of one dimension, step by step from the data: x_{i−1} = slope x_i + offset + noise."""

    alphas: np.ndarray
    sigmas: np.ndarray
    slopes: np.ndarray
    offsets: np.ndarray
    variances: np.ndarray


def chain(bound, start, mean, width):
    """As `Ancestral` is defined: estimates of x₀ and ε, put together again with less noise, and fresh noise."""
    timesteps = bound.grid(SCHEDULE, 999, start, bound.steps + 1)[::-1]
    alphas, sigmas = SCHEDULE.alpha_sigma_float64(timesteps)
    added = (sigmas[1:] ** 2 - sigmas[:-1] ** 2) / alphas[:-1] ** 2
    posterior = sigmas[:-1] ** 2 / sigmas[1:] ** 2 * added
    noise = sigmas[1:] / (alphas[1:] ** 2 * width**2 + sigmas[1:] ** 2)  # ε = noise (x − α m)
    direction = np.sqrt(sigmas[:-1] ** 2 - posterior) - alphas[:-1] * sigmas[1:] / alphas[1:]
    slopes = alphas[:-1] / alphas[1:] + direction * noise
    return Chain(alphas, sigmas, slopes, -direction * noise * alphas[1:] * mean, added if bound.widest else posterior)


def chain_log_density(found, states):
    """log p(x_0) of the chain from N(0, 1)."""
    mean, variance = 0.0, 1.0
    for slope, offset, fresh in zip(found.slopes[::-1], found.offsets[::-1], found.variances[::-1], strict=True):
        mean, variance = slope * mean + offset, slope**2 * variance + fresh
    return scipy.stats.norm.logpdf(states, mean, math.sqrt(variance))


def chain_bound(found, states):
    """The bound by its definition, from means and variances of q given y = x_0."""
    states = np.asarray(states)
    kept = found.alphas / found.alphas[0]
    spread = found.sigmas**2 - kept**2 * found.sigmas[0] ** 2  # variances of q(x_i | y)
    total = -0.5 * ((kept[-1] * states) ** 2 + spread[-1] - 1 - np.log(spread[-1]))
    for i, (slope, offset, variance) in enumerate(zip(found.slopes, found.offsets, found.variances, strict=True), 1):
        step = found.alphas[i] / found.alphas[i - 1]
        if i == 1:
            residual = states - slope * kept[1] * states - offset
            total += scipy.stats.norm.logpdf(residual, 0, math.sqrt(variance)) - 0.5 * slope**2 * spread[1] / variance
            continue
        # (x_{i−1}, x_i) is normal given y, of covariance step × spread[i−1]; conditioned on x_i, and averaged over it.
        gain = step * spread[i - 1] / spread[i]
        left = spread[i - 1] - gain * step * spread[i - 1]
        shift = kept[i - 1] * states - slope * kept[i] * states - offset
        apart = shift**2 + (gain - slope) ** 2 * spread[i]
        total -= 0.5 * (left / variance - 1 - np.log(left / variance) + apart / variance)
    return total


@pytest.mark.parametrize("widest", [False, True])
@pytest.mark.parametrize(("start", "grid"), [(0, uniform_log_snr), (250.5, uniform_timesteps)], ids=["first", "between"])
def test_the_bound_is_its_definition(widest, start, grid, key):
    bound = VariationalBound(12, 512, widest, grid)
    states = jnp.linspace(-1, 1, 9)
    found = normal_bound(bound, states[:, None], jax.random.split(key, 9), start=start, mean=0.3, width=0.2)
    known = chain(bound, start, 0.3, 0.2)
    expected, ceiling = chain_bound(known, states), chain_log_density(known, np.asarray(states))
    z = (np.asarray(found.mean) - expected) / np.asarray(found.standard_error)
    # Nine states of 512 draws: five standard errors each, and their mean square, 1 ± 0.47.
    assert np.abs(z).max() < 5, z
    assert 0.05 < np.mean(z**2) < 3.4
    assert np.all(expected <= ceiling)
    assert np.all(found.mean - 5 * found.standard_error <= ceiling)
    assert np.all(found.evaluations == 2 * 12 * 512)


@pytest.mark.parametrize("widest", [False, True])
def test_the_chain_is_ancestral_sampling(widest, key):
    """Whose density is bounded is what the sampler of that name gives."""
    bound, count = VariationalBound(6, 1, widest), 100_000
    start, steps = jax.random.split(key)
    sampler = Ancestral(6, widest=widest, grid=uniform_log_snr)
    epsilon = normal_noise(0.3, 0.2)
    run = jax.jit(lambda x, k: sampler(epsilon, x, SCHEDULE, key=k, stop=100, denoise=False).images)
    images = np.asarray(run(jax.random.normal(start, (count, 1)), steps))[:, 0]
    known = chain(bound, 100, 0.3, 0.2)
    points = np.linspace(-1, 1.5, 5)
    logs = chain_log_density(known, points)
    # The normal law through three of the points' densities, against mean and variance within five standard errors.
    curvature, slope, _ = np.polyfit(points, logs, 2)
    variance, mean = -0.5 / curvature, -0.5 * slope / curvature
    assert abs(images.mean() - mean) < 5 * math.sqrt(variance / count)
    assert abs(images.var() / variance - 1) < 5 * math.sqrt(2 / count)


@pytest.mark.parametrize("start", [0, 400])
def test_one_image_has_no_gap_and_no_noise(start, key):
    """On any grid, however far the state is from it where the noise is drawn around it."""
    memory = jax.random.normal(key, (1, 5))
    (alpha,), (sigma,) = NOISY.alpha_sigma_float64(np.array([float(start)]))
    clean = jnp.broadcast_to(memory, (3, 5))
    found = mixture_bound(VariationalBound(7, 3), memory, clean, jax.random.split(key, 3), timestep=start)
    np.testing.assert_allclose(found.values, 5 * scipy.stats.norm.logpdf(0, 0, sigma / alpha), atol=1e-5)


@pytest.mark.parametrize(("widest", "width"), [(False, 0.5), (True, 0.02)])
def test_the_gap_closes_as_the_grid_is_refined(widest, width, key):
    """As 1/K, towards the exact log density: here for the choice of variances that suits the data the less."""
    (alpha,), (sigma,) = SCHEDULE.alpha_sigma_float64(np.array([0.0]))
    deviation = math.hypot(alpha * width, sigma)
    gaps = []
    for steps in (64, 128, 256):
        bound = VariationalBound(steps, 1, widest)
        states = scipy.stats.norm.ppf((np.arange(400) + 0.5) / 400, alpha * 0.3, deviation)
        exact = scipy.stats.norm.logpdf(states, alpha * 0.3, deviation)
        gaps.append(np.mean(exact - chain_bound(chain(bound, 0, 0.3, width), states)))
    assert gaps[-1] > 0
    # The next order is 1/K² with a coefficient of some tens: log(19/64) is what a step is.
    orders = np.log2(np.divide(gaps[:-1], gaps[1:]))
    assert np.all(np.abs(orders - 1) < 0.35), gaps
    assert abs(orders[1] - 1) < abs(orders[0] - 1)


def test_forgetting_by_the_bound_is_the_rise_of_the_energy(key):
    before = jax.random.normal(key, (6, 3))
    after = jnp.concatenate([before[:4], jax.random.normal(jax.random.fold_in(key, 1), (5, 3))])
    clean = before + 0.05 * jax.random.normal(jax.random.fold_in(key, 2), before.shape)
    beta = float(beta_at_timestep(200, NOISY.alphas_cumprod(jnp.float64)))
    energy = jax.vmap(kernel_energy, in_axes=(0, None, None))
    rise = energy(clean, after, beta) - energy(clean, before, beta) + math.log(9 / 6) / beta
    keys, others = (jax.random.split(k, 6) for k in (key, jax.random.fold_in(key, 3)))
    bound = VariationalBound(100, 64)
    old, new, apart = (mixture_bound(bound, data, clean, k, timestep=200) for data, k in ((before, keys), (after, keys), (after, others)))
    found, unpaired = intrinsic_forgetting(old, new, NOISY, timestep=200), intrinsic_forgetting(old, apart, NOISY, timestep=200)
    # Two gaps, of which the steps of 1/5 in log SNR leave some h²/4 a step and dimension.
    assert np.all(np.abs(found.mean - rise) < 5 * found.standard_error + 0.2 / beta)
    assert scipy.stats.spearmanr(found.mean, rise).statistic > 0.9
    assert float(jnp.mean(found.standard_error**2)) < 0.8 * float(jnp.mean(unpaired.standard_error**2))


def test_an_image_has_the_noise_of_its_key(key):
    bound = VariationalBound(9, 3)
    states, keys = jax.random.normal(key, (4, 2)), jax.random.split(key, 4)
    found = normal_bound(bound, states, keys, start=50, mean=0.3, width=0.2)
    turned = normal_bound(bound, states[::-1], keys[::-1], start=50, mean=0.3, width=0.2)
    np.testing.assert_allclose(turned.values[::-1], found.values, rtol=1e-12)
    other = normal_bound(bound, states, keys[::-1], start=50, mean=0.3, width=0.2)
    assert float(jnp.abs(other.values - found.values).min()) > 1e-6
    assert len(np.unique(found.values)) == 12


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_images_of_any_shape_and_precision(dtype, key):
    called, traced, plain = [], [], normal_noise(0.1, 0.4)

    def epsilon(x, t):
        traced.append(x.shape)
        assert x.dtype == t.dtype == dtype
        jax.debug.callback(lambda: called.append(1))
        return plain(x, t)

    bound, states, keys = VariationalBound(16, 20), jax.random.normal(key, (3, 2, 2, 1)), jax.random.split(key, 3)
    found = jax.jit(lambda x, k: bound(epsilon, x, SCHEDULE, k, start=300))(states.astype(dtype), keys)
    jax.effects_barrier()
    assert found.values.shape == (3, 20)
    assert found.values.dtype == found.mean.dtype == dtype
    assert np.all(found.evaluations == len(called))
    assert len(traced) == 1
    if dtype == jnp.float64:
        flat = normal_bound(bound, states.reshape(3, 4), keys, start=300, mean=0.1, width=0.4)
        np.testing.assert_allclose(found.values, flat.values, rtol=1e-12)
    else:  # other noise, of the same law
        double = normal_bound(bound, states.reshape(3, 4), keys, start=300, mean=0.1, width=0.4)
        z = (np.asarray(found.mean) - np.asarray(double.mean)) / np.hypot(found.standard_error, double.standard_error)
        assert np.abs(z).max() < 5


@pytest.mark.parametrize(("steps", "draws"), [(0, 4), (4, 0)])
def test_empty_bounds_are_refused(steps, draws):
    with pytest.raises(ValueError, match=f"at least 1 step and 1 draw, got {steps} and {draws}"):
        VariationalBound(steps, draws)


@pytest.mark.parametrize("start", [-0.5, 999])
def test_states_beyond_the_schedule_are_refused(start, key):
    with pytest.raises(ValueError, match="must be at least 0 and below 999"):
        VariationalBound()(lambda x, t: x, jnp.ones((2, 3)), SCHEDULE, jax.random.split(key, 2), start=start)
