"""A trained model on the disk: a folder that diffusers' DDPMPipeline takes, with the network and the noise that it was trained on.

model_index.json
unet/config.json, unet/diffusion_pytorch_model.safetensors
scheduler/scheduler_config.json
"""

import dataclasses
import difflib
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from diffusion.config import UNetConfig
from diffusion.objective import Denoising
from diffusion.pixels import checked
from diffusion.schedules import CosineSchedule, LinearSchedule, Prediction, ScaledLinearSchedule, Schedule
from diffusion.space import PixelSpace, Space
from diffusion.unet import UNet
from diffusion.weights import CONFIG, new_folder, read_json, read_unet, write_json, write_unet
from hopjax.data import Images

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"

# diffusers' names of schedules.
_NAMES: dict[str, type[Schedule]] = {"linear": LinearSchedule, "scaled_linear": ScaledLinearSchedule, "squaredcos_cap_v2": CosineSchedule}


@runtime_checkable
class Model(Protocol):
    """What a run goes on from and ends with: a network, its loss, and the space in which it works."""

    @property
    def unet(self) -> Any:
        """The network that is trained, a module that is made as UNet is, with a `config`."""

    @property
    def objective(self) -> Denoising:
        """The loss that it is trained to minimise."""

    @property
    def space(self) -> Space:
        """What of an image is noised, and how the network is called."""

    def config_for(self, shape: tuple[int, int, int], dropout: float) -> Any:
        """The network's configuration for images of this shape; ValueError if it does not take them."""

    def batch(self, images: Images, *, pixels: bool, progress: Callable[[int], None] = lambda _: None) -> Any:
        """What the space knows of these images, an array or a tree of them.

        Args:
            pixels: with the images themselves.
            progress: told how many more images are done.
        """

    def asked(self, count: int) -> Any:
        """What is known of so many images that there are not yet: what the network is to make them of; None for nothing."""

    def fingerprint(self) -> str:
        """A hash of what it computes."""

    def trained(self, unet: Any) -> "Model":
        """The same with another network."""

    def write(self, folder: Path) -> None:
        """As a folder of diffusers, whole or not at all; ValueError if there is one."""

    def read(self, folder: Path) -> "Model":
        """The same with the network in a folder that `write` wrote."""


class Pipeline(NamedTuple):
    """A network of pixels, and the loss that it was trained to minimise: schedule and prediction."""

    unet: UNet
    objective: Denoising

    @property
    def space(self) -> Space:
        """Pixels."""
        return PixelSpace()

    def config_for(self, shape: tuple[int, int, int], dropout: float) -> UNetConfig:
        """The network's configuration with another dropout; ValueError unless it is of images of this shape."""
        config = self.unet.config
        if config.in_channels != shape[2]:
            raise ValueError(f"the model takes {config.in_channels} channels, the images have {shape[2]}")
        size = config.sample_size
        if size is not None and ((size, size) if isinstance(size, int) else size) != shape[:2]:
            raise ValueError(f"the model draws images of {size}, these are {' × '.join(map(str, shape[:2]))}: give some of its size")
        config.check_size(*shape[:2])
        return dataclasses.replace(config, dropout=dropout)

    def batch(self, images: Images, *, pixels: bool, progress: Callable[[int], None] = lambda _: None) -> Any:
        """The images; DataError if no model is trained on them."""
        return checked(images).pixels

    def asked(self, count: int) -> None:
        """Nothing."""

    def fingerprint(self) -> str:
        """A hash of what it computes: equal for equal parameters, configurations and noise."""
        content = hashlib.sha256(repr((self.unet.config, self.objective)).encode())
        for leaf in jax.tree.leaves(nnx.state(self.unet, nnx.Param)):
            content.update(np.asarray(leaf).tobytes())
        return content.hexdigest()

    def trained(self, unet: UNet) -> "Pipeline":
        """The same with another network."""
        return self._replace(unet=unet)

    def write(self, folder: Path) -> None:
        """See `write_pipeline`."""
        write_pipeline(folder, self)

    def read(self, folder: Path) -> "Pipeline":
        """See `read_pipeline`."""
        return read_pipeline(folder)


def scheduler_config(objective: Denoising) -> dict[str, Any]:
    """The contents of scheduler_config.json.

    Raises: ValueError for a schedule that diffusers has no name for.
    """
    schedule = objective.schedule
    name = next((name for name, kind in _NAMES.items() if type(schedule) is kind), None)
    if name is None or (isinstance(schedule, CosineSchedule) and schedule != CosineSchedule(schedule.timesteps)):
        raise ValueError(f"diffusers has no name for the schedule {schedule}")
    ends = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end} if not isinstance(schedule, CosineSchedule) else {}  # type: ignore[attr-defined]
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": schedule.timesteps,
        "beta_schedule": name,
        **ends,
        "prediction_type": objective.prediction.value,
        "clip_sample": True,
    }


def objective_of(fields: Mapping[str, Any]) -> Denoising:
    """The schedule and prediction in a parsed scheduler_config.json, with diffusers' defaults for what it leaves out.

    Raises: ValueError naming a field whose value is not supported.
    """
    name = fields.get("beta_schedule", "linear")
    if not isinstance(name, str) or name not in _NAMES:
        raise ValueError(f"{SCHEDULER}: beta_schedule = {name!r} is not supported; what is: {', '.join(_NAMES)}")
    if fields.get("trained_betas") is not None:
        raise ValueError(f"{SCHEDULER}: trained_betas is not supported: a schedule must have a name")
    if fields.get("rescale_betas_zero_snr"):
        raise ValueError(f"{SCHEDULER}: rescale_betas_zero_snr is not supported: the last timestep would have no signal")
    kinds = {kind.value: kind for kind in Prediction}
    prediction = fields.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in kinds:
        raise ValueError(f"{SCHEDULER}: prediction_type = {prediction!r} is not supported; what is: {', '.join(kinds)}")
    timesteps = fields.get("num_train_timesteps", 1000)
    ends = {end: fields.get(end, default) for end, default in (("beta_start", 1e-4), ("beta_end", 0.02))}
    for field, value in {"num_train_timesteps": timesteps, **ends}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{SCHEDULER}: {field} = {value!r} is not a number")
    if isinstance(timesteps, float) and not timesteps.is_integer():
        raise ValueError(f"{SCHEDULER}: num_train_timesteps = {timesteps!r} is not a whole number")
    try:
        schedule = _NAMES[name](int(timesteps), **({} if name == "squaredcos_cap_v2" else ends))
    except ValueError as error:
        raise ValueError(f"{SCHEDULER}: {error}") from error
    return Denoising(schedule, kinds[prediction])


def write_pipeline(folder: str | os.PathLike[str], pipeline: Pipeline) -> None:
    """Write a folder that `read_pipeline` and diffusers' `DDPMPipeline.from_pretrained` take. It appears whole or not at all.

    Raises: ValueError if `folder` exists and is not empty.
    """
    with new_folder(folder) as partial:
        write_json(
            partial / INDEX,
            {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]},
        )
        (partial / "scheduler").mkdir()
        write_json(partial / "scheduler" / SCHEDULER, scheduler_config(pipeline.objective))
        write_unet(partial / "unet", pipeline.unet)


def existing_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, if it is one.

    Raises: ValueError in one line if it is not, naming the nearest one beside it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{folder} is not a folder")
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, beside, n=1)
        raise ValueError(f"{folder} does not exist" + (f"; did you mean {folder.with_name(near[0])}?" if near else ""))
    return folder


def read_pipeline(folder: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Pipeline:
    """The model in a folder of diffusers: a pipeline's, or one with the network's config.json and the scheduler's beside it.

    A folder without a scheduler has diffusers' default: the linear schedule, and a network that predicts the noise.

    Raises: ValueError in one line if a file is missing, damaged, or describes something else.
    """
    folder = existing_folder(folder)
    network = folder if (folder / CONFIG).is_file() else folder / "unet"
    scheduler = next((file for file in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER) if file.is_file()), None)
    return Pipeline(read_unet(network, dtype=dtype), objective_of({} if scheduler is None else read_json(scheduler)))
