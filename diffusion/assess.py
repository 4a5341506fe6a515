"""Trained models measured on images: bits that they spend, and what a change of the model makes them forget."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Key, Shaped, UInt8

from diffusion.likelihood import Draws, InBatches, LogDensity, bits_per_dimension, clean_log_density, intrinsic_forgetting
from diffusion.pipeline import Pipeline
from diffusion.pixels import to_model
from diffusion.samplers import noise_function

Progress = Callable[[int, int], None] | None


def to_8_bits(pixels: UInt8[np.ndarray, "*shape"] | Float32[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Bytes as they are; numbers in [0, 1] to the nearest byte."""
    return pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8)


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
    """Bits per dimension of 8-bit images (see `bits_per_dimension`); image i depends on the key and i alone."""
    graphdef, params = nnx.split(model.unet, nnx.Param)
    schedule, prediction = model.objective.schedule, model.objective.prediction

    def measure(params: Any, images: Shaped[Array, "n h w c"], keys: Key[Array, " n"]) -> Draws:
        epsilon = noise_function(nnx.merge(graphdef, params), schedule, prediction)
        return bits_per_dimension(log_density, epsilon, images, schedule, keys, timestep=timestep, draws=draws)

    return InBatches(measure, min(batch, len(pixels)))(params, pixels, key=key, progress=progress)


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
    (graphdef, params), (other, changed) = (nnx.split(model.unet, nnx.Param) for model in (before, after))
    if graphdef != other or before.objective != after.objective:
        raise ValueError("the two models differ in more than their parameters: their densities are of different noise")
    schedule, prediction = before.objective.schedule, before.objective.prediction

    def measure(params: Any, images: Shaped[Array, "n h w c"], keys: Key[Array, " n"]) -> Draws:
        epsilon = noise_function(nnx.merge(graphdef, params), schedule, prediction)
        return clean_log_density(log_density, epsilon, to_model(jnp.asarray(images)), schedule, keys, timestep=timestep)

    over = InBatches(measure, min(batch, len(pixels)))
    total = 2 * len(pixels)

    def second(done: int, count: int) -> None:
        if progress is not None:
            progress(count + done, total)

    first = None if progress is None else lambda done, _: progress(done, total)
    return intrinsic_forgetting(
        over(params, pixels, key=key, progress=first), over(changed, pixels, key=key, progress=second), schedule, timestep=timestep
    )
