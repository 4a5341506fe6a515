"""A training step of a U-Net and its forward pass against diffusers' in eager PyTorch; memory, compilation; steps of small networks."""

import dataclasses
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

from benchmarks.row import Bench, Goal, Row
from diffusion import backend
from diffusion.config import PRESETS, UNetConfig
from diffusion.layers import initialise
from diffusion.unet import UNet, parameter_count
from diffusion.weights import write_unet

CONFIG = UNetConfig(
    sample_size=32,
    block_out_channels=(64, 128, 128),
    layers_per_block=2,
    down_block_types=("DownBlock2D",) * 3,
    up_block_types=("UpBlock2D",) * 3,
)
BATCH = 32
RATE, DECAY, AVERAGE = 1e-4, 1e-2, 1e-3
WIDTHS = ((16, 32, 64), (16, 64, 128), (32, 64, 64), (32, 64, 128))


class Contender(NamedTuple):
    """One way to train: a step that returns its loss, and a pass forward."""

    parameters: int
    step: Callable[[], float]
    forward: Callable[[], Any]


def _batch(config: UNetConfig, batch: int) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """Images, timesteps and what the network shall say, channels last."""
    generator = np.random.default_rng(0)
    size = config.sample_size
    assert isinstance(size, int)
    image, target = generator.standard_normal((2, batch, size, size, config.in_channels), dtype=np.float32)
    return image, generator.integers(0, 1000, batch, dtype=np.int32), target


def _network(config: UNetConfig) -> UNet:
    return initialise(lambda rngs: UNet(config, rngs=rngs), jax.random.key(0))


def _ours(config: UNetConfig, batch: int, model: UNet | None = None) -> Contender:
    model = model or _network(config)
    graphdef, params = nnx.split(model, nnx.Param)
    optimiser = optax.adamw(RATE, weight_decay=DECAY)

    def loss(params: Any, image: jax.Array, timestep: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(image, timestep) - target))

    def step(state: Any, *batch: jax.Array) -> tuple[Any, jax.Array]:
        params, average, moments = state
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, moments = optimiser.update(gradient, moments, params)
        params = optax.apply_updates(params, updates)
        return (params, optax.incremental_update(params, average, AVERAGE), moments), value

    data = tuple(map(jnp.asarray, _batch(config, batch)))
    fixed = jax.tree.map(jnp.copy, params)  # the step takes the memory of its state over
    state = (params, jax.tree.map(jnp.copy, params), optimiser.init(params))
    program = jax.jit(step, donate_argnums=0, compiler_options=backend.compiler_options()).lower(state, *data).compile()
    forward = jax.jit(lambda params, *x: nnx.merge(graphdef, params)(*x), compiler_options=backend.compiler_options())

    def run() -> float:
        nonlocal state
        state, value = program(state, *data)
        return float(value)

    return Contender(parameter_count(model), run, lambda: forward(fixed, *data[:2]))


def _diffusers(config: UNetConfig, batch: int) -> Contender:
    import diffusers
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        write_unet(f"{folder}/unet", _network(config))
        network = diffusers.UNet2DModel.from_pretrained(f"{folder}/unet", low_cpu_mem_usage=False).train()
    params = list(network.parameters())
    average = [p.detach().clone() for p in params]
    optimiser = torch.optim.AdamW(params, lr=RATE, weight_decay=DECAY, fused=True)
    image, timestep, target = map(torch.from_numpy, _batch(config, batch))
    image, target = (x.permute(0, 3, 1, 2).contiguous() for x in (image, target))

    def step() -> float:
        value = torch.nn.functional.mse_loss(network(image, timestep).sample, target)
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, AVERAGE)
        return float(value)

    @torch.no_grad()
    def forward() -> Any:
        return network(image, timestep).sample

    return Contender(sum(p.numel() for p in params), step, forward)


def _most(kind: str) -> None:
    """Print the largest memory of a process that takes three steps, beyond what it had once everything was imported."""
    make = {"ours": _ours, "diffusers": _diffusers}[kind]
    make(dataclasses.replace(CONFIG, block_out_channels=(32, 32, 32)), 1).step()
    before = _peak()
    contender = make(CONFIG, BATCH)
    for _ in range(3):
        contender.step()
    print(json.dumps({"bytes": _peak() - before}))


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _compile() -> None:
    """Print how long the step takes to trace and compile, for a network that has been made."""
    model = _network(CONFIG)
    start = time.perf_counter()
    _ours(CONFIG, BATCH, model)
    print(json.dumps({"seconds": time.perf_counter() - start}))


def _alone(call: str, **environment: str) -> dict[str, float]:
    """What a function of this module prints last, in a process of its own."""
    command = [sys.executable, "-c", f"from benchmarks import training_step; training_step.{call}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    return json.loads(done.stdout.splitlines()[-1])


def _steps(bench: Bench, peer: bool) -> Iterator[Row]:
    contenders = [_ours(CONFIG, BATCH)] + ([_diffusers(CONFIG, BATCH)] if peer else [])
    losses: list[list[float]] = [[] for _ in contenders]
    runs = bench.size(7, 3)
    calls = [lambda c=c, kept=kept: kept.append(c.step()) for c, kept in zip(contenders, losses, strict=True)]
    step, *others = bench.medians("a training step", runs, *calls)
    forward, *other_forwards = bench.medians("a pass forward", runs, *(c.forward for c in contenders))
    difference = None
    if peer:
        assert contenders[0].parameters == contenders[1].parameters
        found, expected = map(np.asarray, losses)
        difference = float(np.max(np.abs(found - expected) / expected))
    name = f"U-Net {'/'.join(map(str, CONFIG.block_out_channels))}, {contenders[0].parameters:,} parameters, {BATCH} images of 32 × 32"
    note = "" if peer else "no peer: pip install 'hopjax[parity]'"
    # Rounding of float32 grows along the steps: Adam divides small gradients by their own size.
    accuracy = Goal("error", "≤", 1e-4)
    yield Row(
        f"training step, {name}",
        step,
        others[0] if peer else None,
        goals=(Goal("ratio", "≥", 1.0), accuracy) if peer else (),
        error=difference,
        error_of="of the loss, largest of all steps",
        note=note or "loss, gradient, AdamW, average of parameters",
    )
    yield Row(
        "a pass forward of the same",
        forward,
        other_forwards[0] if peer else None,
        goals=(Goal("ratio", "≥", 1.05),) if peer else (),
        note=note,
    )


def _parts(bench: Bench, peer: bool) -> Iterator[Row]:
    """Where the time goes: convolutions of the sizes that take most of it, and a normalisation with its activation."""
    for side, channels in ((32, 64), (32, 128), (16, 128)):
        generator = np.random.default_rng(0)
        image, cotangent = generator.standard_normal((2, BATCH, side, side, channels), dtype=np.float32)
        kernel = generator.standard_normal((3, 3, channels, channels), dtype=np.float32)
        scale, bias = np.ones((2, channels), np.float32)
        ours = {name: _call(part, image, kernel, scale, bias, cotangent) for name, part in _PARTS.items()}
        theirs = _torch_parts(image, kernel, cotangent) if peer else {}
        for name, call in ours.items():
            what = f"{name}, {channels} channels at {side} × {side}"
            seconds, *other = bench.medians(what, bench.size(7, 3), call, *([theirs[name]] if peer else []))
            flops = 2 * image.size * kernel[..., 0].size
            yield Row(what, seconds, other[0] if peer else None, note="" if "norm" in name else f"{flops / seconds / 1e9:.0f} GFLOP/s")


def _convolution(image: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _normalised(image: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.nn.silu(backend.normalise(image, scale, bias, groups=32, eps=1e-5))


def _with_derivatives(image: jax.Array, scale: jax.Array, bias: jax.Array, cotangent: jax.Array) -> Any:
    out, pull = jax.vjp(_normalised, image, scale, bias)
    return out, pull(cotangent)


_PARTS: dict[str, Callable[..., Any]] = {
    "3 × 3 convolution": lambda x, k, s, b, ct: _convolution(x, k),
    "its derivative in the image": lambda x, k, s, b, ct: jax.vjp(lambda x: _convolution(x, k), x)[1](ct),
    "its derivative in the kernel": lambda x, k, s, b, ct: jax.vjp(lambda k: _convolution(x, k), k)[1](ct),
    "group norm and SiLU": lambda x, k, s, b, ct: _normalised(x, s, b),
    "group norm and SiLU with derivatives": lambda x, k, s, b, ct: _with_derivatives(x, s, b, ct),
}


def _call(part: Callable[..., Any], *arrays: NDArray[np.float32]) -> Callable[[], Any]:
    held = tuple(map(jnp.asarray, arrays))
    program = jax.jit(part, compiler_options=backend.compiler_options())
    return lambda: program(*held)


def _torch_parts(image: NDArray[np.float32], kernel: NDArray[np.float32], cotangent: NDArray[np.float32]) -> dict[str, Callable[[], Any]]:
    import torch

    x, ct = (torch.from_numpy(a.transpose(0, 3, 1, 2).copy()) for a in (image, cotangent))
    k = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    scale, bias = torch.ones(2, x.shape[1])
    leaves = [a.clone().requires_grad_() for a in (x, scale, bias)]

    def derivative(*mask: bool) -> Any:
        return torch.ops.aten.convolution_backward(ct, x, k, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)

    def normalised(x: Any, scale: Any, bias: Any) -> Any:
        return torch.nn.functional.silu(torch.nn.functional.group_norm(x, 32, scale, bias, 1e-5))

    calls = (
        lambda: torch.nn.functional.conv2d(x, k, padding=1),
        lambda: derivative(True, False, False),
        lambda: derivative(False, True, False),
        lambda: normalised(x, scale, bias),
        lambda: torch.autograd.grad(normalised(*leaves), leaves, ct),
    )
    return dict(zip(_PARTS, calls, strict=True))


def _cache(folder: str) -> dict[str, str]:
    """Programs kept as `python -m diffusion` keeps them, in a folder."""
    return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def _memory(bench: Bench, peer: bool) -> Iterator[Row]:
    bench.progress("peak memory of the step")
    processes = bench.size(3, 1)
    ours, theirs = (
        statistics.median(_alone(f"_most({kind!r})")["bytes"] for _ in range(processes)) if kind == "ours" or peer else None
        for kind in ("ours", "diffusers")
    )
    goals = (Goal("ratio", "≥", 1 / 1.3),) if peer else ()
    yield Row("peak memory of three steps, in a process of their own", ours, theirs, unit="B", goals=goals, note="compilation included")


def _compilation(bench: Bench) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for what, bound in (("cold", 15), ("from the cache", 3)):
            bench.progress(f"compilation, {what}")
            seconds = _alone("_compile()", **_cache(folder))["seconds"]
            yield Row(
                f"the step compiled, {what}",
                seconds,
                goals=(Goal("ours", "≤", bound),),
                note="tracing and the state of the optimiser included",
            )


def _small(bench: Bench) -> Iterator[Row]:
    base = PRESETS["digits-small"]
    batch = 64
    contenders = {widths: _ours(dataclasses.replace(base, block_out_channels=widths), batch) for widths in WIDTHS}
    times = bench.medians("steps of small networks", bench.size(7, 3), *(c.step for c in contenders.values()))
    for (widths, contender), seconds in zip(contenders.items(), times, strict=True):
        what = f"training step, digits of 28 × 28, {'/'.join(map(str, widths))}, {contender.parameters:,} parameters"
        yield Row(what, seconds, note=f"{batch / seconds:.0f} images/s")


def measure(bench: Bench) -> Iterator[Row]:
    peer = all(importlib.util.find_spec(module) for module in ("torch", "diffusers"))
    yield from _steps(bench, peer)
    yield from _parts(bench, peer)
    yield from _compilation(bench)
    if not bench.quick:
        yield from _memory(bench, peer)
    yield from _small(bench)
