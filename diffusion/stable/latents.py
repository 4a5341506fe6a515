"""Latents of an autoencoder: as a space that a diffusion process runs in, and on the disk.

What is kept of an image is the distribution of its latents, computed once, so that each step of training draws from it anew.
"""

import dataclasses
import fcntl
import functools
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Float32, Key, Shaped

from diffusion.feed import filled_batches
from diffusion.pixels import checked, to_model
from diffusion.samplers import Network
from diffusion.space import Space
from diffusion.stable.autoencoder import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian, check_channels, image_encoder
from diffusion.stages import fingerprint
from hopjax.cli.tasks import description
from hopjax.data import Images


class LatentCache:
    """A folder of moments, kept by what they were computed from: the autoencoder, and the images.

    A set of images has one file, latents-HASH.npy, which is whole or not there. What a computation that was cut off has done is in
    latents-HASH.partial, and is not done again. Processes may share the folder: one computes, the others wait.

    Args:
        folder: may be shared by all experiments.
        autoencoder: frozen.
        batch: images encoded at once.
    """

    def __init__(self, folder: Path, autoencoder: AutoencoderKL, *, batch: int = 32) -> None:
        if batch < 1:
            raise ValueError(f"batch = {batch} is out of range: need batch ≥ 1")
        self.folder, self.batch = Path(folder), batch
        self.config = autoencoder.config
        self._graphdef, self._params = nnx.split(autoencoder, nnx.Param)
        self._dtype = jnp.dtype(autoencoder.dtype).name

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for autoencoders that compute the same."""
        content = hashlib.sha256(repr((self.config, self._dtype)).encode())
        for leaf in jax.tree.leaves(self._params):
            content.update(np.asarray(leaf).data)
        return content.hexdigest()

    def moments(self, images: Images, *, progress: Callable[[int], None] = lambda _: None) -> Float32[np.ndarray, "n _ _ m"]:
        """Means and log variances of the latents of each image, one after the other in the last axis; mapped from the file.

        The file is not verified when it is read; one that is cut short counts as missing.

        Args:
            progress: told how many more images are encoded.

        Raises: DataError for images that no model is trained on; ValueError for those that the autoencoder does not take, or of which
            it makes numbers that are not finite.
        """
        pixels = checked(images).pixels
        check_channels(f"{images.source}: images", pixels, self.config.in_channels)
        shape = (len(images), *self.config.latent_size(*pixels.shape[1:3]), 2 * self.config.latent_channels)
        inputs = {"autoencoder": self.fingerprint, "images": description(images)["sha256"]}
        file = self.folder / f"latents-{fingerprint(inputs)}.npy"
        if jax.process_index() == 0 and _read(file, shape) is None:
            self._write(file, pixels, shape, progress)
        multihost_utils.sync_global_devices("latents are on the disk")
        found = _read(file, shape)
        if found is None:
            raise ValueError(f"{file} cannot be read: is the folder shared by all processes?")
        return found

    def _write(self, file: Path, pixels: Shaped[np.ndarray, "n h w c"], shape: tuple[int, ...], progress: Callable[[int], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        header = _header(shape)
        row = 4 * int(np.prod(shape[1:]))
        partial = file.with_suffix(".partial")
        with partial.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if _read(file, shape) is not None:  # another process was at it, and has done it
                partial.unlink(missing_ok=True)
                return
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            begun = size >= len(header) and stream.read(len(header)) == header
            # Whole batches alone: all are computed as they would have been.
            done = (size - len(header)) // row // self.batch * self.batch if begun else 0
            stream.truncate(len(header) + done * row if begun else 0)
            if not begun:
                stream.write(header)
            progress(done)
            for rows in filled_batches(len(pixels), self.batch)[done // self.batch :]:
                new = 1 + rows[-1] - rows[0]  # the last batch is filled up
                stream.write(self._encoded(pixels, rows)[:new].tobytes())
                stream.flush()
                os.fsync(stream.fileno())
                progress(int(new))
            partial.replace(file)

    def _encoded(self, pixels: Shaped[np.ndarray, "n h w c"], rows: np.ndarray) -> Float32[np.ndarray, "k _ _ m"]:
        found = np.concatenate(image_encoder(self._graphdef)(self._params, jnp.asarray(pixels[rows])), axis=-1, dtype=np.float32)
        finite = np.isfinite(found).all(axis=(1, 2, 3))
        if not finite.all():
            raise ValueError(
                f"the autoencoder makes of image {rows[np.argmin(finite)] + 1} latents that are not finite in "
                f"{self._dtype}: compute it in float32, and see that its weights are whole"
            )
        return found


def _header(shape: tuple[int, ...]) -> bytes:
    """The beginning of a .npy file of float32."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _read(file: Path, shape: tuple[int, ...]) -> Float32[np.ndarray, "n _ _ m"] | None:
    """The array in a file, not yet read; None if the file is missing or damaged."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if (found.shape, found.dtype) == (shape, np.dtype("<f4")) else None


class Latents(NamedTuple):
    """What is known of the latents of n images, arrays of n rows; None is what is not known, or not asked for.

    Attributes:
        moments: means and log variances, one after the other in the last axis; None for latents that are to be generated.
        prompt: places in the space's table of texts.
        pixels: of the images, as files hold them; for measuring alone.
    """

    moments: Any
    prompt: Any
    pixels: Any = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["texts", "autoencoder"], meta_fields=["graphdef", "config"])
@dataclasses.dataclass(frozen=True, eq=False)
class LatentSpace(Space):
    """Latents of an autoencoder, times `scaling_factor`, for a network that is called with a text too; a batch is `Latents`.

    Attributes:
        texts: encoded prompts, k × tokens × features.
        autoencoder: its parameters,
        graphdef: and the rest of it.
        config: its configuration.
    """

    texts: Any
    autoencoder: Any
    graphdef: Any
    config: AutoencoderKLConfig

    clip = None

    def clean(self, batch: Latents, key: Key[Array, ""] | None = None) -> Float[Array, "n h w z"]:
        """Drawn from their distributions with the key."""
        latents = DiagonalGaussian(*jnp.split(batch.moments, 2, axis=-1))
        return self.config.scaling_factor * (latents.mean if key is None else latents.sample(key))

    def network(self, model: Any, batch: Latents, key: Key[Array, ""] | None = None) -> Network:
        """Of a module that is called with (latents, timestep, text, dropout key)."""
        text = self.texts[batch.prompt]
        return lambda noisy, timestep: model(noisy, timestep, text, key)

    def decode(self, clean: Float[Array, "n h w z"]) -> Float[Array, "n _ _ c"]:
        """By the autoencoder."""
        return nnx.merge(self.graphdef, self.autoencoder).decode(clean / self.config.scaling_factor)

    def images(self, batch: Latents) -> Float[Array, "n _ _ c"]:
        """The images themselves, not what is decoded of their latents."""
        return to_model(batch.pixels)

    def shape(self, image: tuple[int, int, int]) -> tuple[int, int, int]:
        """A latent for each `factor` × `factor` pixels."""
        return (*self.config.latent_size(*image[:2]), self.config.latent_channels)
