"""The denoising loss against its formula, and the law of its timesteps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.objective import Denoising
from diffusion.schedules import CosineSchedule, LinearSchedule, Prediction
from tests.diffusion.affine import Affine, best, expected_loss

EPS = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("prediction", Prediction)
def test_the_loss_is_the_mean_square_of_the_error(prediction, key):
    schedule = CosineSchedule(20)
    clean, noise = jax.random.normal(key, (2, 5, 3, 4, 2), jnp.float32)
    timestep = np.array([0, 3, 7, 12, 19])

    def network(x, t):
        return jnp.sin(x) + (t / 20).astype(x.dtype)[:, None, None, None]

    found = jax.jit(lambda t: Denoising(schedule, prediction).losses_at(network, clean, noise, t))(timestep)
    x0, e = np.asarray(clean, float), np.asarray(noise, float)
    envelope = np.cos(0.5 * np.pi * (np.arange(21) / 20 + 0.008) / 1.008) ** 2
    products = np.cumprod(1 - np.minimum(1 - envelope[1:] / envelope[:-1], 0.999))[timestep]
    alpha, sigma = (np.sqrt(p)[:, None, None, None] for p in (products, 1 - products))
    output = np.sin(alpha * x0 + sigma * e) + (timestep / 20)[:, None, None, None]
    target = {"epsilon": e, "v_prediction": alpha * e - sigma * x0, "sample": x0}[prediction.value]
    assert found.dtype == jnp.float32
    # Errors of order one, rounded a dozen times.
    np.testing.assert_allclose(found, np.mean((output - target) ** 2, axis=(1, 2, 3)), rtol=20 * EPS)


def test_no_network_does_better_than_the_best_affine_one(key):
    """The closed form that training is held against, against the loss itself: on normal data, where the best is affine."""
    schedule = LinearSchedule(6, beta_start=0.05, beta_end=0.5)
    pixels = 0.5 + 0.1 * np.random.default_rng(0).normal(size=(20_000, 2, 2, 1)).astype(np.float32)
    images, noise = jnp.asarray(2 * pixels - 1), jax.random.normal(key, pixels.shape, jnp.float32)
    gain, offset = best(schedule, pixels)
    graphdef, params = nnx.split(Affine(6), nnx.Param)
    _, structure = jax.tree.flatten(params)

    @jax.jit
    def measure(gain, offset, t):
        network = nnx.merge(graphdef, jax.tree.unflatten(structure, (gain, offset)))
        return Denoising(schedule).losses_at(network, images, noise, jnp.full(len(pixels), t))

    for t in range(6):
        values = []
        for change in (0.0, 0.1):
            losses = np.asarray(measure(gain.astype(np.float32), (offset + change).astype(np.float32), t))
            expected = expected_loss(gain, offset + change, schedule, pixels)[t]
            assert abs(float(losses.mean()) - expected) < 5 * float(losses.std()) / len(pixels) ** 0.5
            values.append(expected)
        alpha, sigma = schedule.alpha_sigma_float64(np.array([float(t)]))
        variance = 4 * pixels.astype(float).var()
        np.testing.assert_allclose(values[0], alpha**2 * variance / (alpha**2 * variance + sigma**2), rtol=1e-9)
        np.testing.assert_allclose(values[1], values[0] + 0.01, rtol=1e-9)


# ---- Timesteps -----------------------------------------------------------------------------------------------------------


def timestep_itself(noisy, timestep):
    return jnp.broadcast_to(timestep.astype(noisy.dtype)[:, None], noisy.shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(keys, count, timesteps):
    """Of images that are 0 the loss of this network, which should say what they are, is t²."""
    objective = Denoising(LinearSchedule(timesteps), Prediction.CLEAN)
    return jax.vmap(lambda key: objective(timestep_itself, jnp.zeros((count, 1), jnp.float32), key))(keys)


@pytest.mark.parametrize(("count", "timesteps"), [(10, 10), (30, 10), (512, 1000)])
def test_every_timestep_has_its_share_of_a_batch(count, timesteps, key):
    for timestep in np.asarray(draw(jax.random.split(key, 5), count, timesteps).timestep):
        low, high = np.arange(count) * timesteps // count, -(-(np.arange(count) + 1) * timesteps // count)
        assert np.all((low <= timestep) & (timestep < high))
        if count % timesteps == 0:
            assert np.all(np.bincount(timestep, minlength=timesteps) == count // timesteps)


@pytest.mark.parametrize(("count", "timesteps"), [(7, 10), (1, 6), (4, 30)])
def test_over_batches_timesteps_are_uniform_and_the_mean_is_that_of_independent_draws(count, timesteps, key):
    batches = 20_000
    losses, timestep = draw(jax.random.split(key, batches), count, timesteps)
    counts, each = np.bincount(np.asarray(timestep).ravel(), minlength=timesteps), count * batches / timesteps
    # Each count varies less than that of independent draws would: χ²/(T − 1) of these is 1 ± √(2/(T − 1)).
    assert np.sum((counts - each) ** 2 / each) < timesteps - 1 + 6 * (2 * (timesteps - 1)) ** 0.5
    np.testing.assert_array_equal(losses, np.asarray(timestep, np.float32) ** 2)
    squares = np.arange(timesteps) ** 2.0
    means = np.asarray(losses, float).mean(axis=1)
    assert abs(means.mean() - squares.mean()) < 5 * means.std() / batches**0.5
    if count > 1:
        # Of n independent draws the mean's variance would be σ²/n; here the parts' own variances are left, about n² times smaller.
        assert means.var() < 0.5 * squares.var() / count


def test_images_and_keys_have_noise_of_their_own(key):
    def network(noisy, timestep):
        return noisy

    losses = jax.jit(lambda k: Denoising(LinearSchedule(10), Prediction.CLEAN)(network, jnp.zeros((10, 50), jnp.float32), k).losses)
    found = [np.asarray(losses(k)) for k in (key, key, jax.random.key(1))]
    np.testing.assert_array_equal(found[0], found[1])
    assert len(set(np.concatenate([found[0], found[2]]).tolist())) == 20
