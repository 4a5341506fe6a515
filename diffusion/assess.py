"""Trained models measured on any number of images: bits that they spend, reconstruction errors, and what a change makes them forget.

Image i depends on the key and i alone: two models asked with equal keys see the same random numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Key, Shaped, UInt8

from diffusion.likelihood import Draws, InBatches, LogDensity, bits_per_dimension, clean_log_density, intrinsic_forgetting
from diffusion.pipeline import Pipeline
from diffusion.pixels import to_model
from diffusion.reconstruct import reconstruction_errors
from diffusion.samplers import Network, noise_function

Progress = Callable[[int, int], None] | None
# What is measured of a batch of images as files hold them, by a noise function.
Measure = Callable[[Network, Shaped[Array, "n h w c"], Key[Array, " n"]], Draws]


def to_8_bits(pixels: UInt8[np.ndarray, "*shape"] | Float32[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Bytes as they are; numbers in [0, 1] to the nearest byte."""
    return pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8)


def _program(model: Pipeline, measure: Measure, batch: int) -> InBatches[Any]:
    """One compiled program for all models that differ from this one in their parameters alone."""
    graphdef = nnx.graphdef(model.unet)
    schedule, prediction = model.objective.schedule, model.objective.prediction

    def of_batch(params: Any, images: Shaped[Array, "n h w c"], keys: Key[Array, " n"]) -> Draws:
        return measure(noise_function(nnx.merge(graphdef, params), schedule, prediction), images, keys)

    return InBatches(of_batch, batch)


def _params(model: Pipeline) -> Any:
    return nnx.state(model.unet, nnx.Param)


def bits(
    model: Pipeline,
    pixels: UInt8[np.ndarray, "n h w c"],
    log_density: LogDensity,
    *,
    key: Key[Array, ""],
    draws: int = 2,
    timestep: int | float = 0,
    batch: int = 32,
    progress: Progress = None,
) -> Draws:
    """Bits per dimension of 8-bit images (see `bits_per_dimension`)."""

    def measure(epsilon: Network, images: Shaped[Array, "n h w c"], keys: Key[Array, " n"]) -> Draws:
        return bits_per_dimension(log_density, epsilon, images, model.objective.schedule, keys, timestep=timestep, draws=draws)

    return _program(model, measure, min(batch, len(pixels)))(_params(model), pixels, key=key, progress=progress)


def reconstructions(
    model: Pipeline,
    pixels: UInt8[np.ndarray, "n h w c"] | Float32[np.ndarray, "n h w c"],
    *,
    timestep: int,
    key: Key[Array, ""],
    draws: int = 2,
    batch: int = 32,
    progress: Progress = None,
) -> Draws:
    """Errors of reconstruction from a timestep, squared pixels from −1 to 1 (see `reconstruction_errors`)."""

    def measure(epsilon: Network, images: Shaped[Array, "n h w c"], keys: Key[Array, " n"]) -> Draws:
        return reconstruction_errors(epsilon, to_model(images), model.objective.schedule, keys, timestep=timestep, draws=draws)

    return _program(model, measure, min(batch, len(pixels)))(_params(model), pixels, key=key, progress=progress)


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
    schedule, count = before.objective.schedule, len(pixels)

    def measure(epsilon: Network, images: Shaped[Array, "n h w c"], keys: Key[Array, " n"]) -> Draws:
        return clean_log_density(log_density, epsilon, to_model(images), schedule, keys, timestep=timestep)

    program = _program(before, measure, min(batch, count))
    found = []
    for i, model in enumerate((before, after)):
        told = None if progress is None else lambda done, _, i=i: progress(i * count + done, 2 * count)
        found.append(program(_params(model), pixels, key=key, progress=told))
    return intrinsic_forgetting(found[0], found[1], schedule, timestep=timestep)
