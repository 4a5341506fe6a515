"""Pixels as files hold them, and as models see them: bytes 0 … 255 or numbers in [0, 1] against [−1, 1]."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from hopjax.data import DataError, Images


def checked(images: Images) -> Images:
    """The images, if a model can be trained on them.

    Raises: DataError for rows of numbers, and for numbers outside [0, 1].
    """
    _, height, width, _ = images.pixels.shape
    if height == 1 < width:
        raise DataError(f"{images.source}: holds rows of numbers, not images")
    if images.pixels.dtype == np.float32:
        low, high = float(images.pixels.min()), float(images.pixels.max())
        if not (low >= 0 and high <= 1):
            raise DataError(f"{images.source}: pixels lie between {low:g} and {high:g}: give bytes, or numbers from 0 to 1")
    return images


def to_model(pixels: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """From a file's range to [−1, 1], float32 at least."""
    if pixels.dtype == jnp.uint8:
        return pixels.astype(jnp.float32) / 127.5 - 1
    return 2 * pixels - 1


def to_bytes(images: Float[Array, "*shape"] | Float32[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """From [−1, 1] to bytes; what lies outside is clipped, and NaN becomes 0."""
    return np.rint(np.nan_to_num(127.5 * (np.clip(np.asarray(images, np.float32), -1, 1) + 1))).astype(np.uint8)


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int, *, scale: int = 1) -> UInt8[np.ndarray, "_ _ k"]:
    """Images side by side in rows of `columns`, a pixel apart, every pixel `scale` times in both directions."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)
