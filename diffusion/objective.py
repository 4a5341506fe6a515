r"""What a diffusion model is trained to minimise.

At $x_t = \alpha_t x_0 + \sigma_t\varepsilon$ the loss of an image is the mean over its entries of (output − target)², with the target
that the parameterisation names (ε, v or x₀), at a timestep that is uniform on the schedule (Ho et al. 2020, Eq. (14)).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from diffusion.samplers import Network
from diffusion.schedules import Prediction, Schedule


class Losses(NamedTuple):
    """The loss of each image of a batch, and the timestep at which it was measured."""

    losses: Float[Array, " n"]
    timestep: Int[Array, " n"]


@dataclasses.dataclass(frozen=True)
class Denoising:
    """The denoising loss; immutable and hashable."""

    schedule: Schedule
    prediction: Prediction = Prediction.NOISE

    def losses_at(
        self,
        network: Network,
        images: Float[Array, "n *shape"],
        noise: Float[Array, "n *shape"],
        timestep: Int[Array, " n"],
    ) -> Float[Array, " n"]:
        """The loss of each image at its timestep with this noise, float32 at least."""
        alpha, sigma = self.schedule.alpha_sigma_of(timestep, images)
        output = network(alpha * images + sigma * noise, timestep)
        error = output - self.prediction.target(images, noise, alpha, sigma)
        return jnp.mean(jnp.square(error), axis=tuple(range(1, images.ndim)))

    def __call__(self, network: Network, images: Float[Array, "n *shape"], key: Key[Array, ""]) -> Losses:
        """The losses at random timesteps and noise.

        The i-th of n images draws its timestep from the i-th of n equal parts of the schedule: each timestep is as likely as with
        independent draws over batches in random order, and the batch's mean varies less.
        """
        count = images.shape[0]
        timestep_key, noise_key = jax.random.split(key)
        offsets = jax.random.uniform(timestep_key, (count,), jnp.float32)
        places = (jnp.arange(count, dtype=jnp.float32) + offsets) * (self.schedule.timesteps / count)
        # Rounding may take the last one to the end.
        timestep = jnp.minimum(places.astype(jnp.int32), self.schedule.timesteps - 1)
        noise = jax.random.normal(noise_key, images.shape, images.dtype)
        return Losses(self.losses_at(network, images, noise, timestep), timestep)
