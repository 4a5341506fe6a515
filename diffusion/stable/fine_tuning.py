"""Stable Diffusion as a model that runs go on from: its U-Net learns in the latents of its autoencoder, all else is frozen.

`diffusion.run` trains it as it trains models of pixels, `diffusion.learner` asks it what they are asked.
"""

import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from diffusion.objective import Denoising
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.latents import LatentCache, Latents, LatentSpace
from diffusion.stable.pipeline import StableDiffusion
from diffusion.stable.text_encoder import encode_texts
from diffusion.stable.unet import UNet2DCondition
from diffusion.weights import read_network
from hopjax.data import Images

# Of images of a class.
CLASS_PROMPT = "a photo of a {label}"


@dataclasses.dataclass(frozen=True, eq=False)
class LatentModel:
    """A `diffusion.pipeline.Model`. Make one with `fine_tuned`.

    Attributes:
        stable: the pipeline.
        cache: of latents.
        texts: the encoded prompts: of no words, then of each of the `classes`.
        classes: names of the classes that have a prompt of their own; none if all images have the empty one.
    """

    stable: StableDiffusion
    cache: LatentCache
    texts: Float[Array, "k l f"]
    classes: tuple[str, ...] = ()

    @property
    def unet(self) -> UNet2DCondition:
        """What is trained."""
        return self.stable.unet

    @property
    def objective(self) -> Denoising:
        """As the scheduler's configuration says."""
        return self.stable.objective

    @functools.cached_property
    def space(self) -> LatentSpace:
        """Latents."""
        graphdef, params = nnx.split(self.stable.vae, nnx.Param)
        return LatentSpace(self.texts, params, graphdef, self.stable.vae.config)

    def config_for(self, shape: tuple[int, int, int], dropout: float) -> UNet2DConditionConfig:
        """The network's configuration, for latents of such images.

        Raises: ValueError for images of other channels, or that are not decoded from latents.
        """
        height, width, channels = shape
        autoencoder = self.stable.vae.config
        if channels != autoencoder.in_channels:
            raise ValueError(f"the model to start from takes {autoencoder.in_channels} channels, the images have {channels}")
        size = autoencoder.whole_latent_size(height, width)
        return dataclasses.replace(self.unet.config, dropout=dropout, sample_size=size[0] if size[0] == size[1] else size)

    def batch(self, images: Images, *, pixels: bool, progress: Callable[[int], None] = lambda _: None) -> Latents:
        """Moments from the cache, and prompts; images without labels have the empty one.

        Raises: ValueError for a class that has no prompt, and as `LatentCache.moments`.
        """
        prompt = self._prompts(images)
        return Latents(self.cache.moments(images, progress=progress), prompt, images.pixels if pixels else None)

    def _prompts(self, images: Images) -> Int32[np.ndarray, " n"]:
        if not self.classes or images.labels is None:
            return np.zeros(len(images), np.int32)
        found, inverse = np.unique(images.labels, return_inverse=True)
        names = list(map(images.class_name, found.tolist()))
        for name in names:
            if name not in self.classes:
                raise ValueError(f"{images.source}: class {name!r} has no prompt: the model was made for {', '.join(self.classes)}")
        return np.array([1 + self.classes.index(name) for name in names], np.int32)[inverse]

    def asked(self, count: int) -> Latents:
        """As many of each class, in turn; of no words if there are none."""
        prompt = 1 + np.arange(count) % len(self.classes) if self.classes else np.zeros(count)
        return Latents(None, prompt.astype(np.int32))

    def fingerprint(self) -> str:
        """A hash of what it computes."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        known = (self.unet.config, self.objective, self.cache.fingerprint, self.classes)
        content = hashlib.sha256(repr(known).encode())
        for leaf in jax.tree.leaves((self.texts, nnx.state(self.unet, nnx.Param))):
            content.update(np.ascontiguousarray(leaf).data)
        return content.hexdigest()

    def trained(self, unet: UNet2DCondition) -> "LatentModel":
        """The same with another network."""
        return dataclasses.replace(self, stable=dataclasses.replace(self.stable, unet=unet))

    def write(self, folder: Path) -> None:
        """The whole pipeline, see `StableDiffusion.save_folder`."""
        self.stable.save_folder(folder)

    def read(self, folder: Path) -> "LatentModel":
        """The U-Net of a folder, which computes in float32, with all else from here."""
        unet = read_network(
            Path(folder) / "unet", UNet2DConditionConfig.from_json, lambda config: UNet2DCondition(config, rngs=nnx.Rngs(0))
        )
        return self.trained(unet)


def fine_tuned(
    stable: StableDiffusion,
    cache: str | os.PathLike[str],
    *,
    classes: Sequence[str] = (),
    prompt: str = CLASS_PROMPT,
    batch: int = 32,
) -> LatentModel:
    """The pipeline as what a run goes on from.

    Args:
        cache: folder of latents, which may be shared.
        classes: names of classes whose images have prompts of their own; by default the prompt of all images is empty.
        prompt: of a class, with {label} in the place of its name.
        batch: images encoded at once.

    Raises: ValueError for a prompt without {label}, or a class that is named twice.
    """
    if "{label}" not in prompt:
        raise ValueError(f"prompt = {prompt!r} says the same of all classes: put {{label}} where the name of a class belongs")
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes = {', '.join(classes)}: each once")
    tokens = stable.tokenizer(["", *(prompt.replace("{label}", name) for name in classes)])
    for line in tokens.warnings:
        warnings.warn(line, stacklevel=2)
    texts = encode_texts(stable.text_encoder, tokens.ids)
    return LatentModel(stable, LatentCache(Path(cache), stable.vae, batch=batch), texts.astype(jnp.float32), tuple(classes))
