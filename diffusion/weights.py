"""Weights in the layout of diffusers: a folder with config.json and diffusion_pytorch_model.safetensors.

Attributes of the modules carry diffusers' names, so one short table says where the two differ, and is read in both directions.
Nothing is ever unpickled.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffusion.config import UNetConfig
from diffusion.layers import Model
from diffusion.unet import UNet

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"

# Our attribute → the part of the name of a tensor; an empty part is left out.
_PARTS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "attention": "",
    "to_out": "to_out.0",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
}
# Names of attention's tensors in checkpoints of 2022 (google/ddpm-cifar10-32 among them) → today's.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Axes of a tensor of ours in torch's order, by the number of axes of a kernel: (h, w, in, out) → (out, in, h, w), (in, out) → (out, in).
_KERNEL_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}


class _Tensor(NamedTuple):
    variable: nnx.Variable[Array]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape[axis] for axis in self.axes)


def _tensors(model: nnx.Module) -> dict[str, _Tensor]:
    """The file's name of every parameter, and how the parameter's axes are ordered there."""
    table = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(filter(None, (_PARTS.get(part, part) if isinstance(part, str) else str(part) for part in path)))
        axes = tuple(range(len(variable.shape)))
        table[name] = _Tensor(variable, _KERNEL_AXES[len(axes)] if path[-1] == "kernel" else axes)
    return table


def _modern(name: str) -> str:
    return ".".join(_OLDER.get(part, part) for part in name.split("."))


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_tensors(file: str | os.PathLike[str], make: Callable[[], Model]) -> Model:
    """The model that `make` describes, with the parameters in `file` (memory-mapped; one tensor at a time is copied).

    Every tensor of the file must be one parameter and every parameter one tensor. `make` is traced, not run: no random weights.

    Raises: ValueError in one line with all that is missing, unexpected or of another shape or kind; or if the file is cut short.
    """
    model = nnx.eval_shape(make)
    table = _tensors(model)
    try:
        with safe_open(file, framework="numpy") as handle:
            stored: dict[str, str] = {}
            unexpected = []
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                modern = _modern(name)
                if modern in table and modern not in stored:
                    stored[modern] = name
                else:
                    unexpected.append(name)
            problems = {
                "missing": [name for name in table if name not in stored],
                "unexpected": unexpected,
                "misshapen": [],
            }
            for modern, name in stored.items():
                found = handle.get_slice(name)
                if tuple(found.get_shape()) != table[modern].shape:
                    problems["misshapen"].append(f"{name} {tuple(found.get_shape())} instead of {table[modern].shape}")
                elif found.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    problems["misshapen"].append(f"{name} is {found.get_dtype()}, not of floating point")
            if any(problems.values()):
                lines = (f"{what}: {_listing(names)}" for what, names in problems.items() if names)
                raise ValueError(f"{file} does not hold this network: " + "; ".join(lines))
            for modern, name in stored.items():
                variable, axes = table[modern]
                array = handle.get_tensor(name).astype(variable.dtype).transpose(np.argsort(axes))
                variable.set_value(jnp.asarray(np.ascontiguousarray(array)))
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    return model


def write_tensors(file: str | os.PathLike[str], model: nnx.Module) -> None:
    """Every parameter of `model` into a new safetensors file, under diffusers' names axes in torch's order; on the disk on return."""
    arrays = {name: np.ascontiguousarray(np.asarray(variable[...]).transpose(axes)) for name, (variable, axes) in _tensors(model).items()}
    save_file(arrays, file, metadata={"format": "pt"})  # diffusers refuses files without it
    _sync(Path(file))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a diffusers folder.

    Raises: ValueError in one line if there is none.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"{file.parent} is no diffusers folder: cannot read {file.name} ({reason})") from error
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must hold one JSON object, not a {type(fields).__name__}")
    return fields


def write_json(file: Path, fields: Mapping[str, Any]) -> None:
    """A JSON object as diffusers lays it out; on the disk on return."""
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _sync(file)


def read_unet(folder: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, remat: bool = False) -> UNet:
    """The network in a diffusers folder; `dtype` and `remat` as for `UNet`.

    Raises: ValueError in one line if a file is missing, damaged, or not of this architecture.
    """
    folder = Path(folder)
    fields = read_json(folder / CONFIG)
    try:
        config = UNetConfig.from_json(fields)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if not (folder / WEIGHTS).is_file():
        pickled = [path.name for path in sorted(folder.glob("*.bin"))]
        hint = f"; {pickled[0]} is a pickle, which could run code and is not read: convert it to safetensors" if pickled else ""
        raise ValueError(f"{folder} has no {WEIGHTS}{hint}")
    return read_tensors(folder / WEIGHTS, lambda: UNet(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))


def write_unet(folder: str | os.PathLike[str], model: UNet) -> None:
    """Write a diffusers folder that `read_unet` and diffusers' `UNet2DModel.from_pretrained` take. It appears whole or not at all.

    Raises: ValueError if `folder` exists and is not empty: nothing is overwritten.
    """
    with new_folder(folder) as partial:
        write_json(partial / CONFIG, model.config.to_json())
        write_tensors(partial / WEIGHTS, model)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill that takes its name when it is full: others see all of it or nothing.

    Raises: ValueError if `folder` exists and is not empty: nothing is overwritten.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that renaming it is one atomic step. mkdtemp would leave it readable by its owner alone.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as private:
        partial = Path(private) / folder.name
        partial.mkdir()
        yield partial
        _sync(partial)
        partial.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
