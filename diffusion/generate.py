"""New images from a trained model, in batches of one compiled program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key, UInt8

from diffusion.backend import compiler_options
from diffusion.feed import filled_batches
from diffusion.objective import Denoising
from diffusion.pixels import to_bytes
from diffusion.samplers import DDIM, Sampler, Samples, noise_function
from diffusion.space import PixelSpace, Space


class Generated(NamedTuple):
    """Images as bytes, and the network's evaluations for each."""

    images: UInt8[np.ndarray, "n h w c"]
    evaluations: int


@functools.partial(jax.jit, static_argnames=("graphdef", "objective", "sampler", "shape", "clip"), compiler_options=compiler_options())
def _batch(
    params: Any,
    space: Space,
    asked: Any,
    key: Key[Array, ""],
    places: Int[Array, " n"],
    *,
    graphdef: Any,
    objective: Denoising,
    sampler: Sampler,
    shape: tuple[int, int, int],
    clip: float | None,
) -> Samples:
    size = space.shape(shape)
    noise = jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key, place), size, jnp.float32))(places)
    network = space.network(nnx.merge(graphdef, params), asked)
    epsilon = noise_function(network, objective.schedule, objective.prediction, clip=clip)
    # Beyond all places, so that the steps' noise is not the start's.
    found = sampler(epsilon, noise, objective.schedule, key=jax.random.fold_in(jax.random.fold_in(key, 2**31), places[0]))
    return found._replace(images=space.decode(found.images))


def generate(
    graphdef: Any,
    params: Any,
    objective: Denoising,
    shape: tuple[int, int, int],
    count: int,
    *,
    key: Key[Array, ""],
    sampler: Sampler = DDIM(50),
    batch: int = 64,
    clip: float | None = 1.0,
    space: Space = PixelSpace(),
    asked: Any = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Generated:
    """`count` images of `shape`, height × width × channels.

    With a deterministic sampler, image i depends on the key and i alone: a larger count begins with the same images. With an adaptive
    one that is so within its tolerance: the worst image of a batch decides on the steps of all.

    Args:
        batch: images at once; the last batch is filled up and cut.
        clip: what estimates of the clean data are clipped to on the way; None for nothing.
        space: in which the network works.
        asked: what the space is to know of the images, a tree of `count` rows; None for nothing.
        progress: told how many more images there are.

    Raises: ValueError if `count` or `batch` is not positive.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count = {count} and batch = {batch} must be at least 1")
    images, evaluations = [], 0
    for rows in filled_batches(count, batch):
        found = _batch(
            params,
            space,
            jax.tree.map(lambda array, rows=rows: jnp.asarray(array[rows]), asked),
            key,
            jnp.asarray(rows),
            graphdef=graphdef,
            objective=objective,
            sampler=sampler,
            shape=shape,
            clip=clip,
        )
        images.append(to_bytes(found.images)[: count - rows[0]])
        evaluations = max(evaluations, int(found.evaluations))
        progress(len(images[-1]))
    return Generated(np.concatenate(images), evaluations)
