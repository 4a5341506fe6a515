"""How complex images are by themselves, whatever a model makes of them: what the energy of an image is confounded with."""

import io

import numpy as np
from jaxtyping import Float64, Int64, UInt8


def png_bytes(images: UInt8[np.ndarray, "n h w c"]) -> Int64[np.ndarray, " n"]:
    """The length of each image as a PNG file at the highest compression, header included. (Needs pillow; another build of zlib may
    count a few bytes differently: compare images, not machines.)"""
    from PIL import Image

    if images.ndim != 4 or not 1 <= images.shape[3] <= 4:
        raise ValueError(f"images have shape {images.shape}: PNG holds (n, height, width, 1 to 4 channels)")
    sizes = np.empty(len(images), np.int64)
    for i, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, "PNG", compress_level=9)
        sizes[i] = file.tell()
    return sizes


def total_variation(images: UInt8[np.ndarray, "n h w c"]) -> Float64[np.ndarray, " n"]:
    """The sum of |differences| of vertical and of horizontal neighbours, per pixel and channel, white being 1."""
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images have shape {images.shape}: give (n, height, width, channels), none of them 0")
    total = np.zeros(len(images))
    for one, other in ((images[:, 1:], images[:, :-1]), (images[:, :, 1:], images[:, :, :-1])):
        total += (np.maximum(one, other) - np.minimum(one, other)).sum(axis=(1, 2, 3), dtype=np.int64)  # bytes do not go below 0
    return total / (255.0 * np.prod(images.shape[1:]))
