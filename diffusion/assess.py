"""Trained models measured on any number of images: bits that they spend, reconstruction errors, and what a change makes them forget.

The random numbers of image i depend on the key and i alone: two models asked with equal keys see the same. So does what is measured,
whatever the batch, but for the probability flow, whose steps are those that the worst image of a batch needs: within its tolerance.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Key, PyTree, Shaped, UInt8

from diffusion.likelihood import Draws, InBatches, LogDensity, bits_per_dimension, clean_log_density, intrinsic_forgetting
from diffusion.objective import Denoising
from diffusion.pipeline import Model
from diffusion.reconstruct import reconstruction_errors
from diffusion.samplers import Network, noise_function
from diffusion.schedules import Schedule
from diffusion.space import PixelSpace, Space


def to_8_bits(pixels: UInt8[np.ndarray, "*shape"] | Float32[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Bytes as they are; numbers in [0, 1] to the nearest byte."""
    return pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Measure(abc.ABC):
    """What is measured of a batch of images; equal ones share a compiled program."""

    @abc.abstractmethod
    def __call__(self, epsilon: Network, batch: Any, keys: Key[Array, " n"], schedule: Schedule, space: Space) -> Draws:
        """Of images as the space knows them, with their pixels."""


@dataclasses.dataclass(frozen=True)
class Bits(Measure):
    """Bits per dimension of 8-bit images (see `bits_per_dimension`)."""

    log_density: LogDensity
    draws: int = 2
    timestep: int | float = 0

    def __call__(self, epsilon: Network, batch: Any, keys: Key[Array, " n"], schedule: Schedule, space: Space) -> Draws:
        """Of bytes.

        Raises: ValueError in another space than that of pixels.
        """
        if not isinstance(space, PixelSpace):
            raise ValueError("bits are spent on pixels, and this model knows the density of latents: measure that (CleanDensity)")
        return bits_per_dimension(self.log_density, epsilon, batch, schedule, keys, timestep=self.timestep, draws=self.draws)


@dataclasses.dataclass(frozen=True)
class CleanDensity(Measure):
    """log of the density of clean data at a timestep (see `clean_log_density`): of pixels, or of the most likely latents."""

    log_density: LogDensity
    timestep: int | float

    def __call__(self, epsilon: Network, batch: Any, keys: Key[Array, " n"], schedule: Schedule, space: Space) -> Draws:
        """In nats."""
        return clean_log_density(self.log_density, epsilon, space.clean(batch), schedule, keys, timestep=self.timestep)


@dataclasses.dataclass(frozen=True)
class Reconstruction(Measure):
    """Errors of reconstruction from a timestep, squared pixels from −1 to 1 (see `reconstruction_errors`).

    In a space of latents noise is added to the most likely ones; the error of the autoencoder itself is in all errors alike.
    """

    timestep: int
    draws: int = 2

    def __call__(self, epsilon: Network, batch: Any, keys: Key[Array, " n"], schedule: Schedule, space: Space) -> Draws:
        """A column for each draw."""
        return reconstruction_errors(
            epsilon,
            space.clean(batch),
            schedule,
            keys,
            timestep=self.timestep,
            draws=self.draws,
            decode=space.decode,
            images=space.images(batch),
        )


@functools.lru_cache
def _program(graphdef: Any, objective: Denoising, measure: Measure, batch: int) -> InBatches[Any]:
    """One for all models that differ in their parameters alone."""

    def of_batch(known: tuple[Any, Space], batch: Any, keys: Key[Array, " n"]) -> Draws:
        params, space = known
        network = space.network(nnx.merge(graphdef, params), batch)
        epsilon = noise_function(network, objective.schedule, objective.prediction)
        return measure(epsilon, batch, keys, objective.schedule, space)

    return InBatches(of_batch, batch)


def assess(
    model: Model,
    images: PyTree[Shaped[np.ndarray, "n ..."]],
    measure: Measure,
    *,
    key: Key[Array, ""],
    batch: int = 32,
    progress: Callable[[int], None] = lambda _: None,
) -> Draws:
    """A measure of all images, batch by batch through one program.

    Args:
        images: what the model's space knows of them (`Model.batch`): in that of pixels, as files hold them.
        progress: told after each batch how many more images are done.
    """
    graphdef, params = nnx.split(model.unet, nnx.Param)
    size = min(batch, len(jax.tree.leaves(images)[0]))
    return _program(graphdef, model.objective, measure, size)((params, model.space), images, key=key, progress=progress)


def forgetting(
    before: Model,
    after: Model,
    images: PyTree[Shaped[np.ndarray, "n ..."]],
    log_density: LogDensity,
    *,
    timestep: int | float,
    key: Key[Array, ""],
    batch: int = 32,
    progress: Callable[[int], None] = lambda _: None,
) -> Draws:
    """ΔE of images between two models at a timestep (see `intrinsic_forgetting`), with common random numbers, by one program.

    Raises: ValueError if the models differ in more than their parameters.
    """
    if nnx.graphdef(before.unet) != nnx.graphdef(after.unet) or before.objective != after.objective:
        raise ValueError("the two models differ in more than their parameters: their densities are of different noise")
    measure = CleanDensity(log_density, timestep)
    first, second = (assess(model, images, measure, key=key, batch=batch, progress=progress) for model in (before, after))
    return intrinsic_forgetting(first, second, before.objective.schedule, timestep=timestep)
