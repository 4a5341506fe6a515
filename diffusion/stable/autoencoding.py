r"""An autoencoder from scratch, on images as small as a diffusion model of a few minutes is trained on.

The loss of an image is the mean of $|\hat x - x| + (\hat x - x)^2$ over its pixels, decoded from latents that are drawn from their
distribution, and `kl` times the mean of $\tfrac12(\mu^2 + s^2 - 1 - \log s^2)$ over its latents (Kingma and Welling 2013, Eq. (10)). There
is no perceptual loss and no discriminator: images are as sharp as that lets them be. In the end `scaling_factor` becomes one over the
standard deviation of all latents, as Rombach et al. 2022, Appendix G, have it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, Shaped

from diffusion.backend import compiler_options
from diffusion.feed import Feed, filled_batches
from diffusion.layers import initialise
from diffusion.layout import Layout
from diffusion.optimiser import AdamW, Optimiser
from diffusion.pixels import checked, to_model
from diffusion.stable.autoencoder import AutoencoderKL, AutoencoderKLConfig, check_channels
from diffusion.train import PARTS, Measured, TrainState, train
from hopjax.data import Images

# For images of 32 × 32, of which it makes latents of 8 × 8.
SMALL = AutoencoderKLConfig(
    block_out_channels=(32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=8,
    sample_size=32,
)


@dataclasses.dataclass(frozen=True)
class Autoencoding:
    """How an autoencoder is trained.

    Attributes:
        steps: of the optimiser.
        batch_size: images in a step.
        kl: weight of the distance of a latent's distribution from N(0, 1).
        seed: of parameters, the order of images, and latents.
        optimiser: see `diffusion.optimiser`.

    Raises: ValueError naming the value and its bound.
    """

    steps: int = 2000
    batch_size: int = 16
    kl: float = 1e-3
    seed: int = 0
    optimiser: Optimiser = AdamW(1e-3, warmup=50, decay=0.3, weight_decay=0.0)

    def __post_init__(self) -> None:
        """Refuse what gives no autoencoder."""
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)} is out of range: need {name} ≥ {least}")
        if not 0 <= self.kl < float("inf"):
            raise ValueError(f"kl = {self.kl} is out of range: need 0 ≤ kl < ∞")


def loss(autoencoder: AutoencoderKL, images: Float[Array, "n h w c"], kl: float, key: Key[Array, ""]) -> Float[Array, ""]:
    """Mean of the images' losses; pixels from −1 to 1."""
    latents = autoencoder.encode(images)
    error = autoencoder.decode(latents.sample(key)) - images
    return jnp.mean(jnp.abs(error) + jnp.square(error)) + kl * jnp.mean(latents.divergence)


def train_autoencoder(
    images: Images,
    config: AutoencoderKLConfig = SMALL,
    how: Autoencoding = Autoencoding(),
    *,
    watch: Callable[[int, float], None] = lambda done, loss: None,
) -> AutoencoderKL:
    """An autoencoder of these images, on one device.

    Args:
        watch: told every few steps how many are done, and their mean loss.

    Raises: DataError for images that no model is trained on; ValueError for those that the autoencoder does not take whole; Diverged.
    """
    pixels = checked(images).pixels
    check_channels(f"{images.source}: images", pixels, config.in_channels)
    config.whole_latent_size(*pixels.shape[1:3])
    parameters_key, key = jax.random.split(jax.random.key(how.seed))
    graphdef, params = nnx.split(initialise(lambda rngs: AutoencoderKL(config, rngs=rngs), parameters_key), nnx.Param)
    transformation = how.optimiser.transformation(how.steps)

    def step(state: TrainState, batch: Shaped[Array, "n h w c"], key: Key[Array, ""]) -> tuple[TrainState, Measured]:
        own, clean = jax.random.fold_in(key, state.step), to_model(batch)
        found, gradients = jax.value_and_grad(lambda params: loss(nnx.merge(graphdef, params), clean, how.kl, own))(state.params)
        updates, opt_state = transformation.update(gradients, state.opt_state, state.params)
        nothing = jnp.zeros(PARTS, jnp.float32)  # there are no timesteps
        measured = Measured(found, optax.tree.norm(gradients), nothing, nothing)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), None, opt_state), measured

    feed = Feed(pixels, how.batch_size, how.seed)
    compiled = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), None, transformation.init(params))
    mesh = jax.make_mesh((1, 1), ("replicas", "fsdp"), devices=jax.local_devices()[:1], axis_types=Layout().mesh().axis_types)
    for pause in train(state, compiled, feed, key=key, mesh=mesh, steps=how.steps, pauses=[10]):
        state = pause.state
        watch(pause.step, float(np.mean([one.loss for one in pause.measured])))
    return _scaled(graphdef, state.params, pixels, config)


class Fidelity(NamedTuple):
    """What an autoencoder keeps of images, and how much that is.

    Attributes:
        error: mean squared difference of pixels from −1 to 1, decoded from the most likely latents.
        bits: by which a latent's distribution differs from N(0, 1), for an image: what its latents say of it, at most.
    """

    error: float
    bits: float


def fidelity(autoencoder: AutoencoderKL, images: Images) -> Fidelity:
    """Means over images."""
    graphdef, params = nnx.split(autoencoder, nnx.Param)

    @jax.jit
    def of(params: Any, pixels: Shaped[Array, "n h w c"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        made, clean = nnx.merge(graphdef, params), to_model(pixels)
        latents = made.encode(clean)
        error = jnp.mean(jnp.square(made.decode(latents.mean) - clean), axis=(1, 2, 3))
        return error, jnp.sum(latents.divergence, axis=(1, 2, 3)) / jnp.log(2.0)

    pixels = checked(images).pixels
    found = [np.array(of(params, jnp.asarray(pixels[places])), np.float64) for places in filled_batches(len(pixels), 32)]
    error, bits = np.concatenate(found, axis=1)[:, : len(pixels)]
    return Fidelity(float(error.mean()), float(bits.mean()))


def _scaled(graphdef: Any, params: Any, pixels: Shaped[np.ndarray, "n h w c"], config: AutoencoderKLConfig) -> AutoencoderKL:
    """With the `scaling_factor` of the latents of these images: their variance is that of the means and what is drawn about them."""

    @jax.jit
    def moments(params: Any, pixels: Shaped[Array, "n h w c"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        latents = nnx.merge(graphdef, params).encode(to_model(pixels))
        return jnp.mean(latents.mean), jnp.mean(jnp.square(latents.mean) + jnp.exp(latents.log_variance))

    size = min(32, len(pixels))
    found = np.array([moments(params, jnp.asarray(pixels[i : i + size])) for i in range(0, len(pixels) - size + 1, size)], np.float64)
    mean, square = found.mean(axis=0)
    scaled = dataclasses.replace(config, scaling_factor=float((square - mean**2) ** -0.5))
    made = nnx.eval_shape(lambda: AutoencoderKL(scaled, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(made), params)
