"""A network whose best parameters are known: out = gain_t · x + offset_t, for any data set.

At x = α x₀ + σ ε the best affine estimate of ε has gain σ/(α²V + σ²) and offset −gain·α·m, with m and V mean and variance of all pixels;
its loss is α²V/(α²V + σ²).
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx


class Affine(nnx.Module):
    def __init__(self, timesteps):
        self.gain = nnx.Param(jnp.zeros(timesteps, jnp.float32))
        self.offset = nnx.Param(jnp.zeros(timesteps, jnp.float32))

    def __call__(self, image, timestep, key=None):
        gain, offset = (p[...][timestep][:, None, None, None] for p in (self.gain, self.offset))
        return gain * image + offset


def moments(images):
    """Mean and variance of all pixels, as models see them."""
    pixels = np.asarray(images, float) / 127.5 - 1 if images.dtype == np.uint8 else 2 * np.asarray(images, float) - 1
    return pixels.mean(), pixels.var()


def expected_loss(gain, offset, schedule, images):
    """E[(gain x + offset − ε)²] over x₀ in `images` and ε, at each timestep."""
    mean, variance = moments(images)
    alpha, sigma = schedule.alpha_sigma_float64(np.arange(schedule.timesteps, dtype=float))
    gain, offset = np.asarray(gain, float), np.asarray(offset, float)
    return (gain * alpha) ** 2 * variance + (gain * sigma - 1) ** 2 + (gain * alpha * mean + offset) ** 2


def best(schedule, images):
    """(gain, offset) of the least loss."""
    mean, variance = moments(images)
    alpha, sigma = schedule.alpha_sigma_float64(np.arange(schedule.timesteps, dtype=float))
    gain = sigma / (alpha**2 * variance + sigma**2)
    return gain, -gain * alpha * mean
