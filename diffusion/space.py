"""Spaces that a diffusion process runs in, pixels or latents of them: all that a training step and a measurement need to know of it.

What is known of n images is a batch, a tree of arrays with n rows each. A space says what of a batch is noised, how a network is called
for it, and what comes of it as an image. It is a tree of arrays, too, those that are never trained, so that it may be an argument of a
compiled program.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float, Key

from diffusion.pixels import to_model
from diffusion.samplers import Network


class Space(abc.ABC):
    """See above; a pytree."""

    clip: ClassVar[float | None]
    """What the clean data lie between, ±clip; None if they have no bounds."""

    @abc.abstractmethod
    def clean(self, batch: Any, key: Key[Array, ""] | None = None) -> Float[Array, "n h w c"]:
        """The clean data x₀ of a batch; where they are random, drawn with the key, or the most likely ones without it."""

    @abc.abstractmethod
    def network(self, model: Any, batch: Any, key: Key[Array, ""] | None = None) -> Network:
        """The network as a function of noisy data and timesteps alone; a key turns dropout on."""

    @abc.abstractmethod
    def decode(self, clean: Float[Array, "n h w c"]) -> Float[Array, "n _ _ _"]:
        """The images of clean data: pixels from −1 to 1, or somewhat beyond."""

    @abc.abstractmethod
    def images(self, batch: Any) -> Float[Array, "n _ _ _"]:
        """The images of a batch itself, pixels from −1 to 1."""

    @abc.abstractmethod
    def shape(self, image: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape of the clean data of an image of this height, width and number of channels."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PixelSpace(Space):
    """Images themselves; a batch is an array of them, as files hold them."""

    clip = 1.0

    def clean(self, batch: Any, key: Key[Array, ""] | None = None) -> Float[Array, "n h w c"]:
        """From −1 to 1."""
        return to_model(batch)

    def network(self, model: Any, batch: Any, key: Key[Array, ""] | None = None) -> Network:
        """Of a module that is called with (image, timestep, dropout key)."""
        return lambda noisy, timestep: model(noisy, timestep, key)

    def decode(self, clean: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """The same."""
        return clean

    def images(self, batch: Any) -> Float[Array, "n h w c"]:
        """The clean data."""
        return to_model(batch)

    def shape(self, image: tuple[int, int, int]) -> tuple[int, int, int]:
        """The same."""
        return image
