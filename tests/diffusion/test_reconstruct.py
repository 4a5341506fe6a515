"""Reconstruction errors where the network is exact: one image, and normal data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.reconstruct import STEPS, reconstruction_errors, reverse_process
from diffusion.samplers import DDIM
from diffusion.schedules import CosineSchedule, LinearSchedule

SHAPE = (3, 3, 1)


def keys(key, count):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def normal(schedule, mean, deviation):
    """ε of data that are N(mean, deviation²) in every entry: σ (x − α m)/(α² s² + σ²)."""

    def epsilon(noisy, timestep):
        alpha, sigma = schedule.alpha_sigma_of(timestep, noisy)
        return sigma * (noisy - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)

    return epsilon


def test_a_model_of_one_image_gives_that_image_whatever_the_noise(key):
    schedule = LinearSchedule()
    known = jnp.linspace(-0.5, 0.5, 9).reshape(1, *SHAPE)
    shift = jnp.linspace(0, 0.4, 4)
    clean = known + shift[:, None, None, None]
    found = reconstruction_errors(normal(schedule, known, 0.0), clean, schedule, keys(key, 4), draws=3, clip=None)
    # (x − α m)/σ and back: a few units of rounding, amplified by σ/α = 3.4 at t = 500.
    np.testing.assert_allclose(found.values, np.repeat(np.square(shift)[:, None], 3, axis=1), atol=1e-12)
    assert found.values.shape == (4, 3)
    assert found.evaluations.tolist() == [75] * 4  # 25 steps from the middle of the schedule, three draws


@pytest.mark.parametrize("timestep", [100, 500])
def test_normal_data_return_along_the_flow(key, timestep):
    schedule, deviation, count = CosineSchedule(), 0.5, 4000
    clean = deviation * jax.random.normal(jax.random.fold_in(key, 9), (count, *SHAPE))
    found = reconstruction_errors(
        normal(schedule, 0.0, deviation), clean, schedule, keys(key, count), timestep=timestep, draws=1, sampler=DDIM(400), clip=None
    )
    # The flow is linear: x̂ = s x_t / √(α² s² + σ²), so the mean error is 2 s² (1 − α s/√(α² s² + σ²)).
    alpha, sigma = (float(x) for x in schedule.alpha_sigma(timestep))
    expected = 2 * deviation**2 * (1 - alpha * deviation / np.sqrt(alpha**2 * deviation**2 + sigma**2))
    errors = np.asarray(found.values[:, 0])
    assert abs(errors.mean() - expected) < 5 * errors.std() / np.sqrt(count) + 0.01 * expected  # DDIM is of order 1 in 1/400


def test_equal_keys_are_equal_noise_for_every_model_and_batch(key):
    schedule = LinearSchedule()
    clean = 0.3 * jax.random.normal(key, (6, *SHAPE))
    one, other = (
        reconstruction_errors(normal(schedule, mean, 0.4), clean, schedule, keys(key, 6), draws=2, clip=None).values for mean in (0.0, 1e-6)
    )
    assert np.abs(one - other).max() < 1e-4 * np.abs(one).max()
    part = reconstruction_errors(normal(schedule, 0.0, 0.4), clean[2:4], schedule, keys(key, 6)[2:4], draws=2, clip=None).values
    np.testing.assert_allclose(part, one[2:4], rtol=1e-12)
    assert np.abs(one[:, 0] - one[:, 1]).min() > 0


def test_reconstructions_are_clipped_to_the_range_of_pixels(key):
    schedule = LinearSchedule()
    clean = jnp.ones((2, *SHAPE))
    far = normal(schedule, 3.0, 0.0)
    assert np.asarray(reconstruction_errors(far, clean, schedule, keys(key, 2), clip=None).values).min() == pytest.approx(4.0)
    assert np.asarray(reconstruction_errors(far, clean, schedule, keys(key, 2)).values).max() == 0.0


def test_steps_keep_their_distance(unchecked):
    schedule = LinearSchedule()
    assert [reverse_process(schedule, t).steps for t in (1, 100, 500, 999)] == [1, 5, 25, STEPS]
    clean = jnp.zeros((1, *SHAPE))
    with pytest.raises(ValueError, match="draws = 0 is out of range: need draws ≥ 1"):
        reconstruction_errors(normal(schedule, 0.0, 1.0), clean, schedule, keys(jax.random.key(0), 1), draws=0)
    with pytest.raises(ValueError, match="timestep = 1000 is out of range: need 0 < timestep < 1000"):
        reconstruction_errors(normal(schedule, 0.0, 1.0), clean, schedule, keys(jax.random.key(0), 1), timestep=1000)
