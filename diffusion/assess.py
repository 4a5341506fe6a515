"""Trained models measured on any number of images: bits that they spend, reconstruction errors, and what a change makes them forget.

Image i depends on the key and i alone: two models asked with equal keys see the same random numbers.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Key, Shaped, UInt8

from diffusion.likelihood import Draws, InBatches, LogDensity, bits_per_dimension, clean_log_density, intrinsic_forgetting
from diffusion.objective import Denoising
from diffusion.pipeline import Pipeline
from diffusion.pixels import to_model
from diffusion.reconstruct import reconstruction_errors
from diffusion.samplers import Network, noise_function
from diffusion.schedules import Schedule

Progress = Callable[[int, int], None] | None


def to_8_bits(pixels: UInt8[np.ndarray, "*shape"] | Float32[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Bytes as they are; numbers in [0, 1] to the nearest byte."""
    return pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Measure(abc.ABC):
    """What is measured of a batch of images; equal ones share a compiled program."""

    @abc.abstractmethod
    def __call__(self, epsilon: Network, images: Shaped[Array, "n h w c"], keys: Key[Array, " n"], schedule: Schedule) -> Draws:
        """Of images as files hold them."""


@dataclasses.dataclass(frozen=True)
class Bits(Measure):
    """Bits per dimension of 8-bit images (see `bits_per_dimension`)."""

    log_density: LogDensity
    draws: int = 2
    timestep: int | float = 0

    def __call__(self, epsilon: Network, images: Shaped[Array, "n h w c"], keys: Key[Array, " n"], schedule: Schedule) -> Draws:
        """Of bytes."""
        return bits_per_dimension(self.log_density, epsilon, images, schedule, keys, timestep=self.timestep, draws=self.draws)


@dataclasses.dataclass(frozen=True)
class CleanDensity(Measure):
    """log of the density of clean images at a timestep (see `clean_log_density`)."""

    log_density: LogDensity
    timestep: int | float

    def __call__(self, epsilon: Network, images: Shaped[Array, "n h w c"], keys: Key[Array, " n"], schedule: Schedule) -> Draws:
        """Of bytes, or numbers from 0 to 1."""
        return clean_log_density(self.log_density, epsilon, to_model(images), schedule, keys, timestep=self.timestep)


@dataclasses.dataclass(frozen=True)
class Reconstruction(Measure):
    """Errors of reconstruction from a timestep, squared pixels from −1 to 1 (see `reconstruction_errors`)."""

    timestep: int
    draws: int = 2

    def __call__(self, epsilon: Network, images: Shaped[Array, "n h w c"], keys: Key[Array, " n"], schedule: Schedule) -> Draws:
        """Of bytes, or numbers from 0 to 1."""
        return reconstruction_errors(epsilon, to_model(images), schedule, keys, timestep=self.timestep, draws=self.draws)


@functools.lru_cache
def _program(graphdef: Any, objective: Denoising, measure: Measure, batch: int) -> InBatches[Any]:
    """One for all models that differ in their parameters alone."""

    def of_batch(params: Any, images: Shaped[Array, "n h w c"], keys: Key[Array, " n"]) -> Draws:
        epsilon = noise_function(nnx.merge(graphdef, params), objective.schedule, objective.prediction)
        return measure(epsilon, images, keys, objective.schedule)

    return InBatches(of_batch, batch)


def assess(
    model: Pipeline,
    pixels: UInt8[np.ndarray, "n h w c"] | Float32[np.ndarray, "n h w c"],
    measure: Measure,
    *,
    key: Key[Array, ""],
    batch: int = 32,
    progress: Progress = None,
) -> Draws:
    """A measure of all images, batch by batch through one program.

    Args:
        progress: told after each batch how many images are done, of how many.
    """
    graphdef, params = nnx.split(model.unet, nnx.Param)
    return _program(graphdef, model.objective, measure, min(batch, len(pixels)))(params, pixels, key=key, progress=progress)


def forgetting(
    before: Pipeline,
    after: Pipeline,
    pixels: UInt8[np.ndarray, "n h w c"] | Float32[np.ndarray, "n h w c"],
    log_density: LogDensity,
    *,
    timestep: int | float,
    key: Key[Array, ""],
    batch: int = 32,
    progress: Progress = None,
) -> Draws:
    """ΔE of images between two models at a timestep (see `intrinsic_forgetting`), with common random numbers, by one program.

    Raises: ValueError if the models differ in more than their parameters.
    """
    if nnx.graphdef(before.unet) != nnx.graphdef(after.unet) or before.objective != after.objective:
        raise ValueError("the two models differ in more than their parameters: their densities are of different noise")
    measure, count = CleanDensity(log_density, timestep), len(pixels)
    found = []
    for i, model in enumerate((before, after)):
        told = None if progress is None else lambda done, _, i=i: progress(i * count + done, 2 * count)
        found.append(assess(model, pixels, measure, key=key, batch=batch, progress=told))
    return intrinsic_forgetting(found[0], found[1], before.objective.schedule, timestep=timestep)
