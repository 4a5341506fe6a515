"""Weights in the layout of diffusers and transformers: a folder with config.json and safetensors, in one file or in shards.

Attributes of the modules carry the libraries' names, so one short table says where the two differ, and is read in both directions.
Files are memory-mapped and copied tensor by tensor, the largest first: reading takes little more memory than the parameters.
Nothing is ever unpickled.
"""

import contextlib
import json
import math
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array
from safetensors import SafetensorError, safe_open

from diffusion.config import UNetConfig
from diffusion.layers import Model
from diffusion.unet import UNet

Config = TypeVar("Config")

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
# Parts of names that differ from library to library → one spelling of them all, by which tensors are found: attention in checkpoints
# of 2022 (google/ddpm-cifar10-32 and the autoencoder of Stable Diffusion among them), and what transformers 5 leaves out.
_SPELLINGS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0", "text_model": ""}
# Axes of a tensor of ours in torch's order, by the number of axes of a kernel: (h, w, in, out) → (out, in, h, w), (in, out) → (out, in).
_KERNEL_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}
# What safetensors calls the kinds of numbers that are read and written.
_KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# How names begin in Stable Diffusion as its authors published it: all networks in one file.
_SINGLE_FILE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class _Tensor(NamedTuple):
    name: str
    variable: nnx.Variable[Array]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape[axis] for axis in self.axes)


def _tensors(model: nnx.Module) -> dict[str, _Tensor]:
    """By the common spelling of its name: every parameter, its name in a file, and how its axes are ordered there."""
    table: dict[str, _Tensor] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(filter(None, (_PARTS.get(part, part) if isinstance(part, str) else str(part) for part in path)))
        axes = tuple(range(len(variable.shape)))
        if _spelt(name) in table:
            raise ValueError(f"two parameters of {type(model).__name__} would be one tensor, {name}: rename an attribute")
        table[_spelt(name)] = _Tensor(name, variable, _KERNEL_AXES[len(axes)] if path[-1] == "kernel" else axes)
    return table


def tensor_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The name that each parameter has in a file, and its shape there; of an abstract model too (`nnx.eval_shape`)."""
    return {tensor.name: tensor.shape for tensor in _tensors(model).values()}


def _spelt(name: str) -> str:
    return ".".join(filter(None, (_SPELLINGS.get(part, part) for part in name.split("."))))


def _shown(name: str) -> str:
    """A name or a message out of a file, fit for one line."""
    short = name if len(name) <= 200 else f"{name[:200]}…"
    return short if short.isprintable() else repr(short)


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_tensors(file: str | os.PathLike[str], make: Callable[[], Model], *, ignored: Collection[str] = ()) -> Model:
    """The model that `make` describes, with the parameters in `file`, or in the shards that `file` names if it is an index (.json).

    Every tensor must be one parameter and every parameter one tensor, but for those `ignored`, which may be there and are not read.
    Numbers of 16, 32 or 64 bits are rounded to the parameters' dtype. `make` is traced, not run: no random weights.

    Raises: ValueError in one line with all that is missing, unexpected or of another shape or kind; or if a file is cut short, its
        header contradicts itself, or shards are not there.
    """
    file = Path(file)
    model = nnx.eval_shape(make)
    table = _tensors(model)
    passed_over = {_spelt(name) for name in ignored}
    with contextlib.ExitStack() as stack:
        stored: dict[str, tuple[safe_open, str]] = {}
        unexpected = []
        for part in _shards(file) if file.suffix == ".json" else [file]:
            handle = stack.enter_context(_open(part))
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                spelt = _spelt(name)
                if spelt in table and spelt not in stored:
                    stored[spelt] = handle, name
                elif spelt not in passed_over:
                    unexpected.append(name)
        if any(name.startswith(_SINGLE_FILE) for name in unexpected):
            raise ValueError(_conversion(file))
        problems = {
            "missing": [tensor.name for spelt, tensor in table.items() if spelt not in stored],
            "unexpected": [_shown(name) for name in unexpected],
            "misshapen": [],
        }
        for spelt, (handle, name) in stored.items():
            found = handle.get_slice(name)
            shape, expected = tuple(found.get_shape()), table[spelt].shape
            if shape != expected:
                problems["misshapen"].append(f"{_shown(name)} {_shown(str(shape))} instead of {expected}")
            elif found.get_dtype() not in _KINDS.values():
                problems["misshapen"].append(f"{_shown(name)} is {found.get_dtype()}, not of floating point")
        if any(problems.values()):
            lines = (f"{what}: {_listing(names)}" for what, names in problems.items() if names)
            raise ValueError(f"{file} does not hold this network: " + "; ".join(lines))
        # The largest first: its copies are gone before the memory is full of parameters.
        for spelt in sorted(stored, key=lambda spelt: -math.prod(table[spelt].shape)):
            handle, name = stored[spelt]
            _, variable, axes = table[spelt]
            try:
                with np.errstate(over="raise"):
                    array = handle.get_tensor(name).astype(variable.dtype, copy=False).transpose(np.argsort(axes))
            except FloatingPointError as error:
                raise ValueError(f"{file}: {_shown(name)} holds numbers too large for {variable.dtype}") from error
            variable.set_value(jnp.asarray(np.ascontiguousarray(array)))
    return model


def _open(file: Path) -> safe_open:
    """The file, its header checked; its tensors stay on the disk.

    safetensors itself refuses, before it allocates anything, headers of more than 100 MB or longer than the file, and offsets that
    overlap, leave holes, pass the end, or do not fit the shape. It lets a name stand twice.
    """
    try:
        handle = safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {_shown(str(error))}") from error
    except OSError as error:
        raise ValueError(f"cannot read {file}: {_shown(str(error))}") from error
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        names = json.loads(stream.read(length), object_pairs_hook=lambda pairs: [name for name, _ in pairs])
    twice = [_shown(name) for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{file} is not a safetensors file: {_listing(twice)} is in it twice")
    return handle


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of them there. What is in each is for the file itself to say."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{index} must say in weight_map which file each tensor is in")
    names = sorted(set(placed.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {_shown(name)}, which is no safetensors file beside it")
    # Not Path.is_file, which raises for a name that is too long for any file.
    lost = [_shown(name) for name in names if not os.path.isfile(index.parent / name)]
    if lost:
        raise ValueError(
            f"{index.parent} has not all shards that {index.name} names: {len(lost)} of {len(names)} missing: {_listing(lost)}"
        )
    return [index.parent / name for name in names]


def refuse_single_file(place: Path) -> None:
    """Raise a ValueError that says how to convert it if `place` is a checkpoint of all networks in one file, or a folder that holds one."""
    for file in sorted(place.iterdir()) if place.is_dir() else [place]:
        names = _open(file).keys() if file.suffix == ".safetensors" else ()
        if file.suffix == ".ckpt" or any(name.startswith(_SINGLE_FILE) for name in names):
            raise ValueError(_conversion(file))


def _conversion(file: Path) -> str:
    pickled = (
        "a pickle, which could run code, and is not read" if file.suffix in _PICKLES else "in the layout of its authors, which is not read"
    )
    return (
        f"{file} holds all networks in one file {pickled}: convert it to a folder with diffusers: "
        f'StableDiffusionPipeline.from_single_file("{file.name}").save_pretrained("FOLDER", safe_serialization=True)'
    )


def write_tensors(file: str | os.PathLike[str], model: nnx.Module) -> None:
    """Every parameter of `model` into a new safetensors file, under the libraries' names, axes in torch's order; on the disk on return.

    One tensor at a time is copied.
    """
    tensors = sorted(_tensors(model).values())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # diffusers refuses files without it
    end = 0
    for name, variable, axes in tensors:
        start, end = end, end + variable.nbytes
        shape = [variable.shape[axis] for axis in axes]
        header[name] = {"dtype": _KINDS[variable.dtype.name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, variable, axes in tensors:
            stream.write(np.ascontiguousarray(np.asarray(variable[...]).transpose(axes)).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a diffusers folder.

    Raises: ValueError in one line if there is none.
    """
    if file.parent.is_file():
        raise ValueError(_conversion(file.parent))
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
    write_bytes(file, (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(file: Path, content: bytes) -> None:
    """A small file; on the disk on return."""
    file.write_bytes(content)
    _sync(file)


def read_network(
    folder: str | os.PathLike[str],
    config: Callable[[Mapping[str, Any]], Config],
    make: Callable[[Config], Model],
    *,
    weights: str = WEIGHTS,
    ignored: Collection[str] = (),
) -> Model:
    """The network in a folder: `make` of what `config` makes of its config.json, with its weights; `ignored` as for `read_tensors`.

    Weights are in the file called `weights`, or in the shards that an index of that name lists; where neither is there, in either of
    float16 numbers.

    Raises: ValueError in one line if a file is missing, damaged, or not of this architecture.
    """
    folder = Path(folder)
    fields = read_json(folder / CONFIG)
    try:
        parsed = config(fields)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    return read_tensors(_weights_in(folder, weights), lambda: make(parsed), ignored=ignored)


def _weights_in(folder: Path, weights: str) -> Path:
    half = f"{weights.removesuffix('.safetensors')}.fp16.safetensors"
    # The last is what diffusers wrote before it wrote the one before.
    halves = (half, f"{weights}.index.fp16.json", f"{weights}.fp16.index.json")
    for names in ((weights, f"{weights}.index.json"), halves):
        found = [name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{folder} has both {' and '.join(found)}: remove the one that does not count")
        if found:
            return folder / found[0]
    others = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", *_PICKLES)]
    there = f"; what is there: {_listing(others)}" if others else ""
    hint = (
        "; pickles could run code and are never read: convert them to safetensors (from_pretrained of the library that wrote them, then "
        "save_pretrained)"
        if any(name.endswith(_PICKLES) for name in others)
        else ""
    )
    raise ValueError(f"{folder} has no {weights}{there}{hint}")


def read_unet(folder: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, remat: bool = False) -> UNet:
    """The network in a diffusers folder; `dtype` and `remat` as for `UNet`.

    Raises: ValueError in one line if a file is missing, damaged, or not of this architecture.
    """
    return read_network(folder, UNetConfig.from_json, lambda config: UNet(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))


def write_unet(folder: str | os.PathLike[str], model: UNet) -> None:
    """Write a diffusers folder that `read_unet` and diffusers' `UNet2DModel.from_pretrained` take. It appears whole or not at all.

    Raises: ValueError if `folder` exists and is not empty: nothing is overwritten.
    """
    with new_folder(folder) as partial:
        write_network(partial, model.config.to_json(), model)


def write_network(folder: Path, config: Mapping[str, Any], model: nnx.Module, *, weights: str = WEIGHTS) -> None:
    """config.json and the weights of `model`, in the file called `weights`, into a folder that exists; on the disk on return."""
    write_json(folder / CONFIG, config)
    write_tensors(folder / weights, model)


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
