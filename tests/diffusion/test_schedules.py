"""Schedules against their published formulas, and the three parameterisations against each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.schedules import CosineSchedule, LinearSchedule, Prediction, ScaledLinearSchedule, Schedule
from hopjax import correspondence

SCHEDULES = (LinearSchedule(), ScaledLinearSchedule(), CosineSchedule(), LinearSchedule(50, beta_end=0.3))
# 1,000 products, each rounded: the worst that rounding can do to ᾱ in float64, relative.
ROUNDING = 1000 * float(np.finfo(float).eps)


def published(schedule: Schedule) -> np.ndarray:
    """ᾱ by the recursion of the papers, one factor after another."""
    match schedule:
        case CosineSchedule(steps, shift, max_beta):

            def envelope(u: float) -> float:
                return math.cos((u + shift) / (1 + shift) * math.pi / 2) ** 2

            betas = [min(1 - envelope((t + 1) / steps) / envelope(t / steps), max_beta) for t in range(steps)]
        case ScaledLinearSchedule(steps, low, high):
            betas = [(math.sqrt(low) + (math.sqrt(high) - math.sqrt(low)) * t / (steps - 1)) ** 2 for t in range(steps)]
        case LinearSchedule(steps, low, high):
            betas = [low + (high - low) * t / (steps - 1) for t in range(steps)]
    return np.cumprod(1 - np.array(betas))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_are_the_published_ones(schedule):
    # The cosine's last factors are 1 − max_beta or near it: the subtraction that gives β loses 1/(1 − β) in them.
    rounding = ROUNDING * (1000 if isinstance(schedule, CosineSchedule) else 1)
    np.testing.assert_allclose(schedule.alphas_cumprod(jnp.float64), published(schedule), rtol=rounding)
    single = schedule.alphas_cumprod()
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, published(schedule), rtol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_log_snr_is_the_inverse_temperature_of_the_theory_and_inverts(schedule):
    timesteps = jnp.concatenate([jnp.arange(schedule.timesteps, dtype=float), jnp.linspace(0, schedule.timesteps - 1, 77)])
    products = schedule.alphas_cumprod(jnp.float64)
    log_snr = schedule.log_snr(timesteps)
    np.testing.assert_allclose(jnp.exp(log_snr), correspondence.beta_at_timestep(timesteps, products), rtol=1e-11)
    np.testing.assert_allclose(schedule.timestep_at(log_snr), timesteps, atol=1e-8)
    assert jnp.isnan(schedule.log_snr(jnp.array([-0.5, schedule.timesteps - 0.5]))).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_alpha_and_sigma_keep_their_digits_in_float32(schedule):
    timesteps = np.arange(schedule.timesteps, dtype=float)
    exact = schedule.alpha_sigma_float64(timesteps)
    np.testing.assert_allclose(exact[0], np.sqrt(published(schedule)), rtol=1e-11)
    np.testing.assert_allclose(exact[0] ** 2 + exact[1] ** 2, 1, rtol=1e-15)
    # A logarithm up to 20 is rounded to 1e-6 in float32, so β to 1e-6 and its root to half of that; √(1 − ᾱ) would be off by 3e-4.
    for single, double in zip(schedule.alpha_sigma(jnp.asarray(timesteps, jnp.float32)), exact, strict=True):
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single, double, rtol=2e-6)


def test_schedules_are_made_under_a_tracer_and_without_double_precision():
    schedule = LinearSchedule(37, beta_start=2e-4)
    with jax.enable_x64(False):
        traced = jax.jit(lambda: schedule.alpha_sigma(jnp.array([0])))()
    np.testing.assert_allclose(traced[1], math.sqrt(2e-4), rtol=2e-6)


@pytest.mark.parametrize("prediction", Prediction)
def test_parameterisations_round_trip_and_noise_is_added_per_image(prediction, key):
    schedule = LinearSchedule()
    clean, noise = jax.random.normal(key, (2, 4, 3, 2, 1))
    timestep = jnp.array([0, 10, 500, 999])
    noisy = schedule.add_noise(clean, noise, timestep)
    for i, t in enumerate(timestep):
        product = float(schedule.alphas_cumprod(jnp.float64)[t])
        np.testing.assert_allclose(noisy[i], math.sqrt(product) * clean[i] + math.sqrt(1 - product) * noise[i], atol=1e-5)
    alpha, sigma = schedule.alpha_sigma_of(timestep.astype(float), clean)
    noisy = alpha * clean + sigma * noise
    found = prediction.split(prediction.target(clean, noise, alpha, sigma), noisy, alpha, sigma)
    # The division by α (0.006 at the end) or σ (0.01 at the start) amplifies rounding.
    np.testing.assert_allclose(found[0], clean, atol=1e-12)
    np.testing.assert_allclose(found[1], noise, atol=1e-12)


def test_velocity_is_the_derivative_of_the_noisy_image_by_the_angle(key):
    clean, noise = jax.random.normal(key, (2, 5))
    angle = jnp.float64(0.7)
    path = jax.jacfwd(lambda a: jnp.cos(a) * clean + jnp.sin(a) * noise)(angle)
    np.testing.assert_allclose(Prediction.VELOCITY.target(clean, noise, jnp.cos(angle), jnp.sin(angle)), path, rtol=1e-14)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearSchedule(1), "at least 2 timesteps, got 1"),
        (lambda: LinearSchedule(beta_end=1.5).alphas_cumprod(), "beta_end < 1"),
        (lambda: ScaledLinearSchedule(beta_start=0.0), "0 < beta_start"),
        (lambda: CosineSchedule(max_beta=1.0), "max_beta < 1"),
        (lambda: LinearSchedule().alpha_sigma_float64(np.array([1000.0])), "0 … 999"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
