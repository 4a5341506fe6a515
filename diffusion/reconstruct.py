r"""How well a model still recovers an image that noise was added to: the paper's operational measure of forgetting.

$$F_t(x_0) = \frac1d\,|x_0 - \hat x_0|^2, \qquad x_t = \alpha_t x_0 + \sigma_t\varepsilon,$$

with x̂₀ the end of the reverse process that starts at x_t, averaged over draws of ε (arXiv:2605.27975, Eq. (12) and Appendix G). Pixels
lie in −1 … 1, so errors are 4 × those of pixels in 0 … 1. In a space of latents both are compared as images, x̂₀ decoded.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from diffusion.likelihood import Draws
from diffusion.samplers import DDIM, Network, Sampler, Samples
from diffusion.schedules import Schedule

# Evaluations of the reverse process from the last timestep; from an earlier one proportionally fewer.
STEPS = 50


def reverse_process(schedule: Schedule, timestep: int) -> DDIM:
    """DDIM with the paper's 50 evaluations for the whole schedule, and the same distance between timesteps from `timestep` down."""
    return DDIM(max(1, math.ceil(STEPS * timestep / schedule.timesteps)))


def reconstructions(
    epsilon: Network,
    clean: Float[Array, "n *shape"],
    schedule: Schedule,
    keys: Key[Array, " n"],
    *,
    timestep: int = 500,
    draw: Int[Array, ""] | int = 0,
    sampler: Sampler | None = None,
    clip: float | int | None = 1,
) -> Samples:
    """x̂₀ of each image, for one draw of the noise; arguments and errors as for `reconstruction_errors`."""
    if not 0 < timestep < schedule.timesteps:
        raise ValueError(f"timestep = {timestep} is out of range: need 0 < timestep < {schedule.timesteps}")
    sampler = reverse_process(schedule, timestep) if sampler is None else sampler
    pairs = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, draw)))(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:], clean.dtype))(pairs[:, 0])
    noisy = schedule.add_noise(clean, noise, jnp.full(len(clean), timestep))
    found = sampler(epsilon, noisy, schedule, key=pairs[0, 1], start=timestep)
    return found if clip is None else found._replace(images=jnp.clip(found.images, -clip, clip))


def reconstruction_errors(
    epsilon: Network,
    clean: Float[Array, "n *shape"],
    schedule: Schedule,
    keys: Key[Array, " n"],
    *,
    timestep: int = 500,
    draws: int = 2,
    sampler: Sampler | None = None,
    clip: float | int | None = 1,
    decode: Callable[[Float[Array, "n *shape"]], Float[Array, "n *image"]] = lambda clean: clean,
    images: Float[Array, "n *image"] | None = None,
) -> Draws:
    """The mean squared error of each image's reconstruction, once for each draw of the noise; NaN where the network's output is.

    Pure: jit it, or pass it to `InBatches`. The noise depends on an image's key and the draw alone: with equal keys two models see
    the same noisy images, and the error of the difference of their errors is far below that of either.

    Args:
        epsilon: the noise function.
        clean: images in the scale that the model was trained in.
        timestep: at which the noisy image lies.
        draws: noisy images for each image, one after another in the memory of one.
        sampler: the reverse process (default: `reverse_process`).
        clip: what the reconstruction is clipped to, decoded; None for nothing.
        decode: the images of reconstructions, which are compared.
        images: to which; by default, to the clean data.

    Raises: ValueError without a draw, or for a timestep that is not in the schedule.
    """
    if draws < 1:
        raise ValueError(f"draws = {draws} is out of range: need draws ≥ 1")
    images = clean if images is None else images
    axes = tuple(range(1, images.ndim))

    def draw(index: Int[Array, ""]) -> tuple[Array, Array]:
        found = reconstructions(epsilon, clean, schedule, keys, timestep=timestep, draw=index, sampler=sampler, clip=None)
        decoded = decode(found.images)
        decoded = decoded if clip is None else jnp.clip(decoded, -clip, clip)
        return jnp.mean(jnp.square(decoded - images), axis=axes), found.evaluations

    errors, evaluations = jax.lax.map(draw, jnp.arange(draws))
    return Draws(errors.T, jnp.full(len(clean), jnp.sum(evaluations)))
