"""Walks the U-Net of a folder in diffusers and here on one input, layer by layer, and shows where the two part.

    .venv-parity/bin/python -m tests.diffusion.stable.walk FOLDER [--size 8] [--tolerance 1e-4]

FOLDER is a pipeline's, or that of its U-Net. Layers have diffusers' names, in the order in which they are done: what a layer is made of
comes before it. The difference is the largest of all entries, over the root mean square of diffusers' output. The first layer beyond the
tolerance is where to look: what it was given agrees.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.unet import UNet2DCondition
from diffusion.weights import _PARTS, CONFIG, read_network


class Layer(NamedTuple):
    name: str
    difference: float


@contextlib.contextmanager
def outputs_of(model: nnx.Module) -> Iterator[dict[str, Any]]:
    """What each module of `model` returns while the context is open, by its name in diffusers."""
    names = {}
    for path, module in nnx.iter_modules(model):
        names[id(module)] = ".".join(filter(None, (_PARTS.get(part, part) if isinstance(part, str) else str(part) for part in path)))
    found: dict[str, Any] = {}

    def recording(call: Any) -> Any:
        def recorded(module: nnx.Module, *args: Any, **options: Any) -> Any:
            out = call(module, *args, **options)
            if id(module) in names:
                found[names[id(module)]] = out[0] if isinstance(out, tuple) else out
            return out

        return recorded

    with contextlib.ExitStack() as stack:
        for kind in {type(module) for _, module in nnx.iter_modules(model) if "__call__" in vars(type(module))}:
            stack.callback(setattr, kind, "__call__", vars(kind)["__call__"])
            kind.__call__ = recording(vars(kind)["__call__"])  # type: ignore[method-assign]
        yield found


def walk(ours: nnx.Module, theirs: torch.nn.Module, latents: Any, timestep: Any, text: Any) -> list[Layer]:
    """How far every layer that both networks have is from diffusers', in diffusers' order; latents are channels last."""
    expected: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def keep(_: Any, __: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
            expected[name] = out.numpy().transpose(0, 2, 3, 1) if out.ndim == 4 else out.numpy()

        return keep

    hooks = [module.register_forward_hook(hook(name)) for name, module in theirs.named_modules()]
    with torch.no_grad():
        theirs(torch.from_numpy(np.moveaxis(latents, 3, 1).copy()), torch.from_numpy(timestep), torch.from_numpy(text))
    for one in hooks:
        one.remove()

    graphdef, params = nnx.split(ours, nnx.Param)

    @jax.jit
    def run(params: Any, *arguments: Any) -> dict[str, Any]:
        model = nnx.merge(graphdef, params)
        with outputs_of(model) as found:
            model(*arguments)
        return found

    with jax.default_matmul_precision("highest"):
        found = run(params, *map(jnp.asarray, (latents, timestep, text)))
    layers = []
    for name, there in expected.items():
        if name in found:
            here = np.asarray(found[name], float)
            # Another shape is as far as can be; a NaN too, by comparison.
            difference = np.abs(here - there).max() / np.sqrt(np.mean(np.square(there))) if here.shape == there.shape else np.inf
            layers.append(Layer(name, float(difference)))
    return layers


def first_beyond(layers: list[Layer], tolerance: float) -> Layer | None:
    """The first layer that differs by more than the tolerance, or is no number."""
    return next((layer for layer in layers if not layer.difference <= tolerance), None)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=8, help="of the latents")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    asked = parser.parse_args()
    folder = asked.folder if (asked.folder / CONFIG).is_file() else asked.folder / "unet"
    ours = read_network(folder, UNet2DConditionConfig.from_json, lambda config: UNet2DCondition(config, rngs=nnx.Rngs(0)))
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((2, asked.size, asked.size, ours.config.in_channels), np.float32)
    text = generator.standard_normal((2, 77, ours.config.cross_attention_dim), np.float32)
    layers = walk(ours, theirs, latents, np.array([981, 1]), text)
    first = first_beyond(layers, asked.tolerance)
    for layer in layers:
        print(f"{layer.difference:9.1e}  {layer.name or '(the whole network)'}{'   <- the first to differ' if layer is first else ''}")
    print(
        f"{len(layers)} layers; "
        + ("all agree" if first is None else f"the first to differ by more than {asked.tolerance:g}: {first.name}")
    )


if __name__ == "__main__":
    main()
