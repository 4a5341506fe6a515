"""Complexities against files made by hand and loops over pixels."""

import zlib

import numpy as np
import pytest

from diffusion.complexity import png_bytes, total_variation


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 3])  # of more than four bytes zlib's strategy matters
def test_png_of_one_pixel_is_its_chunks(channels):
    pixels = np.zeros((1, 1, 1, channels), np.uint8)
    # Signature, IHDR and IEND are 8, 25 and 12 bytes; IDAT is 12 and, compressed, the number of a filter (any will do) and the pixel.
    rows = [bytes([number]) + bytes(channels) for number in range(5)]
    assert png_bytes(pixels)[0] in [57 + len(zlib.compress(row, 9)) for row in rows]


def test_png_orders_images_by_what_they_hold():
    flat, noise = np.full((16, 16, 3), 7, np.uint8), images(16, 16, 3)
    stripes = np.repeat(images(16, 1, 3), 16, axis=1)
    sizes = png_bytes(np.stack([flat, stripes, noise]))
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[2] > noise.nbytes  # noise does not compress
    assert png_bytes(images(0, 4, 4, 3)).shape == (0,)


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (3, 1, 6, 1), (2, 4, 1, 2)])
def test_total_variation_is_the_sum_over_neighbours(shape):
    pixels = images(*shape)
    height, width, channels = shape[1:]
    for found, image in zip(total_variation(pixels), pixels.astype(int), strict=True):
        steps = [abs(image[i, j] - image[i - 1, j]) for i in range(1, height) for j in range(width)]
        steps += [abs(image[i, j] - image[i, j - 1]) for i in range(height) for j in range(1, width)]
        assert found == pytest.approx(np.sum(steps) / 255 / (height * width * channels), rel=1e-14)


def test_total_variation_knows_no_direction_and_no_sign():
    pixels = images(4, 6, 6, 3)
    for same in (255 - pixels, pixels[:, ::-1], pixels.transpose(0, 2, 1, 3)):
        np.testing.assert_array_equal(total_variation(same), total_variation(pixels))


@pytest.mark.usefixtures("unchecked")
def test_bad_images_are_one_clear_line():
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4, 5\): PNG holds"):
        png_bytes(images(2, 4, 4, 5))
    with pytest.raises(ValueError, match=r"shape \(2, 0, 4, 3\): give"):
        total_variation(images(2, 0, 4, 3))
