r"""Stable Diffusion v1 as a whole: images from texts, from images and texts, and from images that noise was added to.

A folder of diffusers' StableDiffusionPipeline is read and written:

model_index.json
scheduler/scheduler_config.json
text_encoder/, unet/, vae/: config.json and safetensors
tokenizer/vocab.json, tokenizer/merges.txt and its settings

The process runs on latents of the autoencoder, `scaling_factor` · z, with the noise that is guided by a text:
$\varepsilon = \varepsilon_\text{negative} + g\,(\varepsilon_\text{prompt} - \varepsilon_\text{negative})$ (Ho and Salimans 2022, with
$g = 1 + w$). Each network is one compiled program for each shape, with the parameters for arguments; Python takes the steps between, so
that samplers, numbers of steps, guidance and prompts share it, and progress is told after each.
"""

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, Real, Shaped, UInt8

from diffusion.backend import compiler_options
from diffusion.feed import filled_batches
from diffusion.layers import at_least_float32
from diffusion.objective import Denoising
from diffusion.pipeline import INDEX, SCHEDULER
from diffusion.pixels import to_bytes
from diffusion.reconstruct import reconstructions, reverse_process
from diffusion.samplers import Network, Samples, noise_function, stepwise
from diffusion.stable.autoencoder import AutoencoderKL, AutoencoderKLConfig, check_channels, image_encoder
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.hub import resolve
from diffusion.stable.scheduling import Scheduler, methods_for, noise
from diffusion.stable.text_encoder import WEIGHTS as TEXT_WEIGHTS
from diffusion.stable.text_encoder import TextEncoder, encode_texts, read_text_encoder
from diffusion.stable.tokenizer import Tokenizer, read_tokenizer, refuse_added_tokens
from diffusion.stable.unet import UNet2DCondition
from diffusion.weights import CONFIG, new_folder, read_json, read_network, refuse_single_file, write_bytes, write_json, write_network

Latents: TypeAlias = Float[Array, "n h w z"]
Pixels: TypeAlias = Shaped[np.ndarray, "n h w c"] | Shaped[Array, "n h w c"] | Sequence[Any]
Places: TypeAlias = Int[np.ndarray, " b"]
Run: TypeAlias = Callable[[Network, Places], Samples]
Progress: TypeAlias = Callable[[int, int], None]

CLASS_NAME = "StableDiffusionPipeline"
# The parts, and the classes that model_index.json may give them; the scheduler's are for `Scheduler` to say.
_PARTS: dict[str, tuple[str, ...]] = {
    "scheduler": (),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# Parts that a published folder may name, and without which images are the same.
_PASSED_OVER = ("safety_checker", "feature_extractor")
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Pictures(NamedTuple):
    """Images, and the latents that they were decoded from."""

    pixels: Float[np.ndarray, "n h w c"]
    """From −1 to 1; float32 at least."""
    latents: Float[np.ndarray, "n _ _ z"]
    """`scaling_factor` · z."""

    @property
    def images(self) -> UInt8[np.ndarray, "n h w c"]:
        """The images as bytes."""
        return to_bytes(self.pixels)


class _Asked(NamedTuple):
    ids: Int[np.ndarray, "n l"]
    negative_ids: Int[np.ndarray, "n l"]
    guidance: float | int


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
    """The networks, and what they are called with. `dataclasses.replace` exchanges one, say for a network that was trained further.

    Images that are given are bytes, or numbers from 0 to 1: an array, or a list of arrays or pictures of Pillow of one size. Image i of a
    call depends on the key and i alone, whatever the batch, to the rounding of a program for another batch.

    Raises: ValueError in one line for parts that do not fit each other.
    """

    unet: UNet2DCondition
    vae: AutoencoderKL
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    tokenizer_files: Mapping[str, bytes] = dataclasses.field(repr=False)
    """By name, as they were read and will be written."""
    scheduler_config: Mapping[str, Any]
    """The fields of scheduler_config.json, as they were read and will be written."""

    def __post_init__(self) -> None:
        """Refuse parts that do not fit."""
        noise(self.scheduler_config)
        unet, text = self.unet.config, self.text_encoder.config
        # The token that ends every prompt is the last of the vocabulary.
        tokens = int(self.tokenizer([""]).ids[0, -1]) + 1
        for what, one, here, other, there in (
            ("latent channels", "the autoencoder", self.vae.config.latent_channels, "the U-Net's input", unet.in_channels),
            ("latent channels", "the U-Net's input", unet.in_channels, "its output", unet.out_channels),
            ("features a token", "the text encoder", text.hidden_size, "the U-Net", unet.cross_attention_dim),
            ("tokens", "the tokenizer", tokens, "the text encoder", text.vocab_size),
            ("tokens a prompt", "the tokenizer", self.tokenizer.length, "the text encoder", text.max_position_embeddings),
        ):
            if here != there:
                raise ValueError(f"parts of different pipelines: {one} has {here} {what}, {other} {there}")

    @classmethod
    def from_folder(
        cls, place: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, abstract_unet: bool = False
    ) -> "StableDiffusion":
        """The pipeline in a folder of diffusers, or in the repository of that name on the Hugging Face hub (see `diffusion.stable.hub`).

        Args:
            dtype: of the computation in all three networks; parameters and latents are float32 whatever it is.
            abstract_unet: the U-Net is the shapes of its parameters alone, and its weights are not read: enough to plan a run.

        Raises: ValueError in one line if a file is missing, damaged, or describes something else.
        """
        folder = resolve(place)
        method = _checked_index(folder)
        # The largest last: what is wrong with the others is said at once.
        scheduler_config = read_json(folder / "scheduler" / SCHEDULER) | {"_class_name": method}
        try:
            noise(scheduler_config)
        except ValueError as error:  # which begins with the name of the file
            raise ValueError(f"{folder / 'scheduler'}{os.sep}{error}") from error
        refuse_added_tokens(folder / "tokenizer")  # before what follows from them
        text_encoder = read_text_encoder(folder / "text_encoder", dtype=dtype)
        tokenizer = read_tokenizer(folder / "tokenizer", length=text_encoder.config.max_position_embeddings)
        vae = read_network(
            folder / "vae", AutoencoderKLConfig.from_json, lambda config: AutoencoderKL(config, dtype=dtype, rngs=nnx.Rngs(0))
        )

        def make(config: UNet2DConditionConfig) -> UNet2DCondition:
            return UNet2DCondition(config, dtype=dtype, rngs=nnx.Rngs(0))

        if abstract_unet:
            unet = nnx.eval_shape(lambda: make(UNet2DConditionConfig.from_json(read_json(folder / "unet" / CONFIG))))
        else:
            unet = read_network(folder / "unet", UNet2DConditionConfig.from_json, make)
        files = [folder / "tokenizer" / name for name in _TOKENIZER_FILES]
        tokenizer_files = {file.name: file.read_bytes() for file in files if file.is_file()}
        return cls(unet, vae, text_encoder, tokenizer, tokenizer_files, scheduler_config)

    def save_folder(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `from_folder` and diffusers' `StableDiffusionPipeline.from_pretrained` take. It appears whole or not at all.

        Raises: ValueError if `folder` exists and is not empty: nothing is overwritten.
        """
        with new_folder(folder) as partial:
            index: dict[str, Any] = {"_class_name": CLASS_NAME, "requires_safety_checker": False}
            kinds = {part: allowed[0] if allowed else self.scheduler_config["_class_name"] for part, allowed in _PARTS.items()}
            index |= {part: ["transformers" if kind.startswith("CLIP") else "diffusers", kind] for part, kind in kinds.items()}
            index |= {part: [None, None] for part in _PASSED_OVER}
            write_json(partial / INDEX, index)
            for part, network in (("unet", self.unet), ("vae", self.vae)):
                (partial / part).mkdir()
                write_network(partial / part, network.config.to_json(), network)
            (partial / "text_encoder").mkdir()
            write_network(partial / "text_encoder", self.text_encoder.config.to_json(), self.text_encoder, weights=TEXT_WEIGHTS)
            (partial / "tokenizer").mkdir()
            for name, content in self.tokenizer_files.items():
                write_bytes(partial / "tokenizer" / name, content)
            (partial / "scheduler").mkdir()
            write_json(partial / "scheduler" / SCHEDULER, self.scheduler_config)

    @functools.cached_property
    def objective(self) -> Denoising:
        """The noise that the U-Net was trained on, and what it predicts, as the scheduler's configuration says."""
        return noise(self.scheduler_config)

    def scheduler(self, method: str | None = None) -> Scheduler:
        """The folder's, or another of diffusers' schedulers with the folder's settings.

        Raises: ValueError for what `diffusion.stable.scheduling` does not know, naming what it does.
        """
        try:
            return Scheduler.from_json(self.scheduler_config, method)
        except ValueError as error:
            # The class is that in the index, whatever else the configuration says.
            message = str(error).replace(f"{SCHEDULER}: _class_name", f"{INDEX}: scheduler")
            others = methods_for(self.scheduler_config) if method is None else []
            hint = " or ".join(f'scheduler="{other}"' for other in others)
            raise ValueError(f"{message}: give {hint}" if hint else message) from error

    def encode(self, images: Pixels, *, batch: int = 4) -> Float[Array, "n _ _ z"]:
        """The most likely latents of images, × `scaling_factor`.

        Rows and columns at the end of an image that fill no latent have no part in it.

        Args:
            batch: images at once; the last batch is filled up.

        Raises: ValueError for images that cannot be encoded, or pixels that are neither bytes nor from 0 to 1.
        """
        pixels = _array("images", images)
        self.vae.config.latent_size(*pixels.shape[1:3])
        check_channels("images", pixels, self.vae.config.in_channels)
        if pixels.dtype != np.uint8:
            low, high = float(pixels.min()), float(pixels.max())
            if not (low >= 0 and high <= 1):
                raise ValueError(f"pixels lie between {low:g} and {high:g}: give bytes, or numbers from 0 to 1")
        graphdef, params = nnx.split(self.vae, nnx.Param)
        found = []
        for places in filled_batches(len(pixels), _whole_number("batch", batch)):
            found.append(image_encoder(graphdef)(params, jnp.asarray(pixels[places])).mean)
        return self.vae.config.scaling_factor * jnp.concatenate(found)[: len(pixels)]

    def decode(self, latents: Latents | Float[np.ndarray, "n h w z"], *, batch: int = 4) -> Float[np.ndarray, "n _ _ c"]:
        """The pixels of latents that were × `scaling_factor`, clipped to −1 … 1; `batch` as for `encode`.

        Raises: ValueError for what is no array of latents, and naming the first, from 1, that are decoded to what is no number.
        """
        latents = jnp.asarray(_array("latents", latents))
        graphdef, params = nnx.split(self.vae, nnx.Param)
        found = []
        for places in filled_batches(len(latents), _whole_number("batch", batch)):
            found.append(np.asarray(_decoder(graphdef)(params, latents[places] / self.vae.config.scaling_factor)))
        pixels = np.concatenate(found)[: len(latents)]
        finite = np.isfinite(pixels).all(axis=(1, 2, 3))
        if not finite.all():
            raise ValueError(f"latents {np.argmin(finite) + 1} are decoded to pixels that are not finite: {_advice(self.vae.dtype)}")
        return np.clip(pixels, -1, 1)

    def text_to_image(
        self,
        prompts: Sequence[str],
        *,
        key: Key[Array, ""],
        negative_prompts: Sequence[str] | None = None,
        guidance: float | int = 7.5,
        steps: int = 50,
        size: int | tuple[int, int] | None = None,
        scheduler: str | None = None,
        batch: int = 4,
        progress: Progress = lambda done, total: None,
    ) -> Pictures:
        """An image for each prompt.

        A prompt longer than the text encoder takes is cut, and a warning says what was.

        Args:
            key: the noise of image i is a normal draw with `jax.random.fold_in(key, i)`.
            negative_prompts: what `guidance` leads away from, one for each prompt; empty texts by default.
            guidance: g above; with 1, and only then, the network is evaluated for the prompts alone.
            steps: of the scheduler.
            size: height and width in pixels, or both at once; by default what the network was trained on.
            scheduler: another one of diffusers' that `diffusion.stable.scheduling` knows, with the folder's settings.
            batch: images at once; the last batch is filled up.
            progress: told after each evaluation how many there have been, and of how many.

        Raises: ValueError in one line for what is out of range, and for latents that are not finite, naming the step.
        """
        _check_key(key)
        shape = (*self._latent_size(size), self.unet.config.in_channels)
        sampling = self.scheduler(scheduler).sampling(_whole_number("steps", steps), scan=stepwise)

        def run(epsilon: Network, places: Places) -> Samples:
            return sampling(epsilon, self._noise(key, places, shape), self.objective.schedule)

        return self._generate(self._ask(prompts, negative_prompts, guidance), run, sampling.evaluations, batch, progress)

    def image_to_image(
        self,
        images: Pixels,
        prompts: Sequence[str],
        *,
        key: Key[Array, ""],
        strength: float | int = 0.8,
        negative_prompts: Sequence[str] | None = None,
        guidance: float | int = 7.5,
        steps: int = 50,
        scheduler: str | None = None,
        batch: int = 4,
        progress: Progress = lambda done, total: None,
    ) -> Pictures:
        """Each image changed to fit its prompt: the last ⌊strength · steps⌋ steps, from the image's latents with the noise of the first.

        Latents are the most likely ones. PNDM begins these steps as it begins all steps; diffusers has it begin one step earlier, and from
        the third evaluation on ask the network at the timestep after the right one. Other arguments and errors are as for
        `text_to_image`.

        Args:
            strength: above 0 and at most 1.

        Raises: ValueError besides for images that cannot be encoded, or as many prompts as there are not images.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength = {strength} is out of range: need 0 < strength ≤ 1")
        _check_key(key)
        steps, pixels = _whole_number("steps", steps), _array("images", images)
        self.vae.config.whole_latent_size(*pixels.shape[1:3])
        last = int(steps * strength)
        if last < 1 <= steps:
            raise ValueError(f"strength = {strength} leaves none of {steps} steps: need strength ≥ {1 / steps:g}")
        sampling = self.scheduler(scheduler).sampling(steps, last=last, scan=stepwise)
        schedule = self.objective.schedule
        asked = self._ask(prompts, negative_prompts, guidance)
        _same_number("prompts", asked.ids, "images", pixels)
        clean = self.encode(pixels, batch=batch)

        def run(epsilon: Network, places: Places) -> Samples:
            noise = self._noise(key, places, clean.shape[1:])
            return sampling(epsilon, schedule.add_noise(clean[places], noise, jnp.full(len(places), sampling.start)), schedule)

        return self._generate(asked, run, sampling.evaluations, batch, progress)

    def reconstruct(
        self,
        images: Pixels,
        timestep: int = 500,
        *,
        key: Key[Array, ""],
        prompts: Sequence[str] | None = None,
        guidance: float | int = 1,
        batch: int = 4,
        progress: Progress = lambda done, total: None,
    ) -> Pictures:
        """The ends of the reverse process that starts at the images' latents with the noise of `timestep` (arXiv:2605.27975, Eq. (12)).

        The process is that of `diffusion.reconstruct`, DDIM with 50 evaluations for the whole schedule, and so is the noise: of image i
        the draw number 0 with `jax.random.fold_in(key, i)`. Latents are the most likely ones. Prompts are empty by default.

        Raises: ValueError as for `text_to_image`, and for a timestep that is not in the schedule.
        """
        schedule = self.objective.schedule
        _check_key(key)
        timestep, pixels = _whole_number("timestep", timestep), _array("images", images)
        self.vae.config.whole_latent_size(*pixels.shape[1:3])
        if not 0 < timestep < schedule.timesteps:
            raise ValueError(f"timestep = {timestep} is out of range: need 0 < timestep < {schedule.timesteps}")
        sampler = dataclasses.replace(reverse_process(schedule, timestep), scan=stepwise)
        asked = self._ask([""] * len(pixels) if prompts is None else prompts, None, guidance)
        _same_number("prompts", asked.ids, "images", pixels)
        clean = self.encode(pixels, batch=batch)

        def run(epsilon: Network, places: Places) -> Samples:
            return reconstructions(epsilon, clean[places], schedule, _keys(key, places), timestep=timestep, sampler=sampler, clip=None)

        return self._generate(asked, run, sampler.steps, batch, progress)

    def _latent_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        if size is not None:
            return self.vae.config.whole_latent_size(*_sides(size))
        usual = self.unet.config.sample_size
        if usual is None:
            raise ValueError("size must be given: the U-Net's config.json has no sample_size")
        return (usual, usual) if isinstance(usual, int) else usual

    def _noise(self, key: Key[Array, ""], places: Places, shape: tuple[int, ...]) -> Latents:
        return _normal(key, places, shape).astype(at_least_float32(self.unet.dtype))

    def _ask(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None, guidance: float | int) -> _Asked:
        if not (math.isfinite(guidance) and guidance >= 0):
            raise ValueError(f"guidance = {guidance} is out of range: it must be finite, and 0 or more")
        tokens = self.tokenizer(prompts)
        negative = self.tokenizer([""] * len(tokens.cut) if negative_prompts is None else negative_prompts)
        _same_number("negative prompts", negative.cut, "prompts", tokens.cut)
        for line in (*tokens.warnings, *(f"negative {line}" for line in negative.warnings)):
            warnings.warn(line, stacklevel=3)
        return _Asked(tokens.ids, negative.ids, guidance)

    def _generate(self, asked: _Asked, run: Run, evaluations: int, batch: int, progress: Progress) -> Pictures:
        """The images of what `run` makes of the noise function and the numbers of the images in each batch."""
        graphdef, params = nnx.split(self.unet, nnx.Param)
        guided = _guided_noise(graphdef, self.objective)
        guidance = None if asked.guidance == 1 else jnp.asarray(asked.guidance, at_least_float32(self.unet.dtype))
        batches = filled_batches(len(asked.ids), _whole_number("batch", batch))
        done = 0

        def noise_function(places: Places) -> Network:
            ids = asked.ids[places] if guidance is None else np.concatenate([asked.negative_ids[places], asked.ids[places]])
            text = encode_texts(self.text_encoder, ids)

            def epsilon(noisy: Latents, timestep: Real[Array, " n"]) -> Latents:
                nonlocal done
                noise, finite = guided(params, noisy, timestep, text, guidance)
                finite = np.asarray(finite)  # which waits for the network: what is told next is done
                if not finite.all():
                    raise ValueError(
                        f"image {places[np.argmin(finite)] + 1} is not finite at step {done % evaluations + 1} of {evaluations} "
                        f"(timestep {float(timestep[0]):g}): {_advice(self.unet.dtype)}"
                    )
                done += 1
                progress(done, len(batches) * evaluations)
                return noise

            return epsilon

        found = jnp.concatenate([run(noise_function(places), places).images for places in batches])[: len(asked.ids)]
        return Pictures(self.decode(found, batch=batch), np.asarray(found))


# One program for all networks that differ in their parameters alone.


@functools.lru_cache
def _decoder(graphdef: Any) -> Callable[..., Any]:
    def decode_image(params: Any, latents: Latents) -> Float[Array, "n _ _ c"]:
        return nnx.merge(graphdef, params).decode(latents)

    return jax.jit(decode_image, compiler_options=compiler_options())


@functools.lru_cache
def _guided_noise(graphdef: Any, objective: Denoising) -> Callable[..., Any]:
    """The noise in latents, and whether each image's is finite; without guidance, `text` is the prompts' alone."""

    def guided_noise(
        params: Any, noisy: Latents, timestep: Real[Array, " n"], text: Float[Array, "m l f"], guidance: Float[Array, ""] | None
    ) -> tuple[Latents, Bool[Array, " n"]]:
        unet = nnx.merge(graphdef, params)

        def network(x: Latents, t: Real[Array, " n"]) -> Latents:
            if guidance is None:
                return unet(x, t, text)
            negative, prompt = jnp.split(unet(jnp.concatenate([x, x]), jnp.concatenate([t, t]), text), 2)
            return negative + guidance * (prompt - negative)

        noise = noise_function(network, objective.schedule, objective.prediction)(noisy, timestep)
        return noise, jnp.isfinite(noise).all(axis=(1, 2, 3))

    return jax.jit(guided_noise, compiler_options=compiler_options())


@functools.partial(jax.jit, static_argnames="shape")
def _normal(key: Key[Array, ""], places: Int[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
    return jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key, place), shape, jnp.float32))(places)


@jax.jit
def _keys(key: Key[Array, ""], places: Int[Array, " b"]) -> Key[Array, " b"]:
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(places)


def _array(what: str, given: Any) -> Any:
    """Arrays or pictures as one array of images or latents."""
    if isinstance(given, Sequence):
        arrays = [np.asarray(one) for one in given]
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) > 1:
            raise ValueError(f"{what} are of shapes {' and '.join(map(str, shapes))}: give those of one shape at once")
        given = np.stack(arrays) if arrays else np.zeros((0, 0, 0, 0))
    if not hasattr(given, "ndim"):
        raise ValueError(f"{what} are of type {type(given).__name__}: give an array, or a list of arrays")
    if given.ndim != 4:
        raise ValueError(f"{what} are an array of {given.ndim} axes: need 4, (number, height, width, channels)")
    if not len(given):
        raise ValueError(f"there are no {what}: give one or more")
    return given


def _sides(size: Any) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Iterable) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) for side in sides):
        raise ValueError(f"size = {size!r} must be a whole number of pixels, or two of them: height and width")
    return int(sides[0]), int(sides[1])


def _whole_number(name: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} = {value!r} must be a whole number")
    return int(value)


def _check_key(key: Any) -> None:
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise ValueError(f"key is of type {type(key).__name__}, not one random key: give jax.random.key(SEED)")


def _same_number(what: str, one: Sized, whose: str, other: Sized) -> None:
    if len(one) != len(other):
        raise ValueError(f"{len(one)} {what} for {len(other)} {whose}: give one for each")


def _advice(dtype: DTypeLike) -> str:
    wide = at_least_float32(dtype)
    return "are the weights whole?" if dtype == wide else f"compute in {wide.name}, not in {jnp.dtype(dtype).name}"


def _checked_index(folder: Path) -> str:
    """The scheduler's class in model_index.json, if that is a pipeline of this kind."""
    if not (folder / INDEX).is_file() and (folder / CONFIG).is_file():
        kind = read_json(folder / CONFIG).get("_class_name", "network")
        raise ValueError(f"{folder} is the folder of a {kind}, not of a pipeline: give the one with {INDEX}")
    if not (folder / INDEX).is_file():
        refuse_single_file(folder)
    index = read_json(folder / INDEX)
    if (kind := index.get("_class_name")) != CLASS_NAME:
        raise ValueError(f"{folder / INDEX} describes a {kind}, not a {CLASS_NAME}")
    classes = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1] is not None}
    for part, allowed in _PARTS.items():
        if part not in classes:
            raise ValueError(f"{folder / INDEX} names no {part}")
        if allowed and classes[part] not in allowed:
            raise ValueError(f"{folder / INDEX}: {part} = {classes[part]!r} is not supported; what is: {', '.join(allowed)}")
        if not isinstance(classes[part], str):
            raise ValueError(f"{folder / INDEX}: {part} = {classes[part]!r} must be the name of a class")
    unknown = sorted(classes.keys() - _PARTS.keys() - set(_PASSED_OVER))
    if unknown:
        raise ValueError(f"{folder / INDEX}: {unknown[0]} = {classes[unknown[0]]!r} is not supported: images would be others without it")
    return classes["scheduler"]
