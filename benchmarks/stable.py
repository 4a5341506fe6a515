"""Stable Diffusion v1.5 at its published shapes against diffusers in eager PyTorch: time, memory, loading, compilation, accuracy."""

import contextlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from diffusion.optimiser import Adafactor
from diffusion.stable.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.text_encoder import WEIGHTS as TEXT_WEIGHTS
from diffusion.stable.text_encoder import CLIPTextConfig, TextEncoder
from diffusion.stable.unet import UNet2DCondition
from diffusion.stable.v1 import AUTOENCODER, TEXT, UNET
from diffusion.unet import parameter_count
from diffusion.weights import WEIGHTS, read_network, write_network

BATCH, TOKENS = 2, 77
RATE = 1e-5
# Rounding of float32 in a hundred layers, of the deviation of the output.
ACCURACY = Goal("error", "≤", 1e-4)


class Pair(NamedTuple):
    """The same function twice: ours of arrays channels last, and the peer's; both give NumPy arrays channels last, if asked."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None

    def difference(self) -> float | None:
        """The largest of the outputs, over the deviation of the peer's."""
        if self.theirs is None:
            return None
        found, expected = np.asarray(self.ours(), np.float64), self.theirs().numpy().astype(np.float64)
        expected = expected.transpose(0, 2, 3, 1) if expected.ndim == 4 else expected
        return float(np.abs(found - expected).max() / expected.std())


def _denoiser(config: UNet2DConditionConfig) -> UNet2DCondition:
    return UNet2DCondition(config, rngs=nnx.Rngs(0))


def _autoencoder(config: AutoencoderKLConfig) -> AutoencoderKL:
    return AutoencoderKL(config, rngs=nnx.Rngs(0))


def _text_encoder(config: CLIPTextConfig) -> TextEncoder:
    return TextEncoder(config, rngs=nnx.Rngs(0))


def _write(folder: Path, config: Mapping[str, Any], model: nnx.Module, weights: str = WEIGHTS) -> Path:
    """A folder with random weights of variance 1/fan_in, norms and biases random too; `model` is abstract, and is filled."""
    generator = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        draw = generator.standard_normal(variable.shape, np.float32)
        if path[-1] == "kernel":
            draw *= np.prod(variable.shape[:-1]) ** -0.5
        else:
            draw = np.float32(path[-1] == "scale") + np.float32(0.1) * draw
        variable.set_value(jnp.asarray(draw))
    folder.mkdir()
    write_network(folder, config, model, weights=weights)
    return folder


def _images(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def _to_torch(array: NDArray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array))


def _torch(load: Callable[[], Any]) -> Any:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    return load().eval()


def _without_gradients(call: Callable[..., Any], *arrays: NDArray) -> Callable[[], Any]:
    import torch

    arguments = [_to_torch(array) for array in arrays]

    @torch.no_grad()
    def run() -> Any:
        return call(*arguments)

    return run


def _compiled(model: nnx.Module, call: Callable[..., Any], *arrays: NDArray) -> Callable[[], Any]:
    """`call(model, *arrays)`, of which parameters are arguments and not constants."""
    graphdef, params = nnx.split(model, nnx.Param)
    program = jax.jit(lambda params, *x: call(nnx.merge(graphdef, params), *x), compiler_options=backend.compiler_options())
    arguments = tuple(map(jnp.asarray, arrays))
    return lambda: program(params, *arguments)


def _both(values: Sequence[float]) -> tuple[float, float | None]:
    """Ours, and the peer's if there is one."""
    return values[0], values[1] if len(values) > 1 else None


def _row(bench: Bench, what: str, pair: Pair, least: float, runs: int) -> Row:
    ours, theirs = _both(bench.medians(what, runs, pair.ours, *([] if pair.theirs is None else [pair.theirs])))
    return Row(
        what,
        ours,
        theirs,
        goals=() if pair.theirs is None else (Goal("ratio", "≥", least), ACCURACY),
        error=pair.difference(),
        error_of="of the output's deviation",
        note="" if theirs else "no peer: pip install 'hopjax[parity]'",
    )


def _denoising(bench: Bench, folder: Path, peer: bool) -> Iterator[Row]:
    bench.progress("reading the U-Net")
    model = read_network(folder, UNet2DConditionConfig.from_json, _denoiser)
    network = None
    if peer:
        import diffusers

        network = _torch(lambda: diffusers.UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False))
    text, timestep = _images(BATCH, TOKENS, UNET.cross_attention_dim), np.array([981, 21], np.int32)

    parts: list[tuple[str, float, int, Any, Any, tuple[NDArray, ...]]] = []
    for side, least, runs in ((64, 1.0, bench.size(5, 1)), (4, 1.2, bench.size(15, 3))):
        latents = _images(BATCH, side, side, 4)
        parts.append(
            (
                f"U-Net, forward, {BATCH} latents of {side} × {side}",
                least,
                runs,
                lambda m, *x: m(*x),
                lambda n, *x: n(*x).sample,
                (latents, timestep, text),
            )
        )
    parts.append(
        (
            f"transformer of 320 channels at 64 × 64, batch {BATCH}",
            1.1,
            bench.size(9, 3),
            lambda m, *x: m.down_blocks[0].attentions[0](*x),
            lambda n, x, text: n.down_blocks[0].attentions[0](x, encoder_hidden_states=text, return_dict=False)[0],
            (_images(BATCH, 64, 64, 320), text),
        )
    )
    parts.append(
        (
            f"ResNet block of 1,280 channels at 8 × 8, batch {BATCH}",
            2.0,
            bench.size(15, 3),
            lambda m, *x: m.down_blocks[3].resnets[0](*x),
            lambda n, *x: n.down_blocks[3].resnets[0](*x),
            (_images(BATCH, 8, 8, 1280), _images(BATCH, 1280)),
        )
    )
    for what, least, runs, ours, theirs, arrays in parts:
        other = None if network is None else _without_gradients(lambda *x, call=theirs: call(network, *x), *arrays)
        yield _row(bench, what, Pair(_compiled(model, ours, *arrays), other), least, runs)


def _around(bench: Bench, autoencoder: Path, text_encoder: Path, peer: bool) -> Iterator[Row]:
    latents = _images(1, 64, 64, 4)
    ids = np.random.default_rng(2).integers(0, 49406, (BATCH, TOKENS), np.int32)
    ids[:, 0], ids[:, 20:] = 49406, 49407
    decode = encode = None
    if peer:
        import diffusers
        import transformers

        decoder = _torch(lambda: diffusers.AutoencoderKL.from_pretrained(autoencoder, low_cpu_mem_usage=False))
        encoder = _torch(lambda: transformers.CLIPTextModel.from_pretrained(text_encoder))
        decode = _without_gradients(lambda z: decoder.decode(z).sample, latents)
        encode = _without_gradients(lambda ids: encoder(ids).last_hidden_state, ids.astype(np.int64))
    model = read_network(autoencoder, AutoencoderKLConfig.from_json, _autoencoder)
    pair = Pair(_compiled(model, lambda m, z: m.decode(z), latents), decode)
    yield _row(bench, "autoencoder, an image of 512 × 512 decoded", pair, 0.9, bench.size(5, 1))
    reader = read_network(text_encoder, CLIPTextConfig.from_json, _text_encoder, weights=TEXT_WEIGHTS)
    pair = Pair(_compiled(reader, lambda m, ids: m(ids).last_hidden_state, ids), encode)
    yield _row(bench, f"text encoder, {BATCH} prompts", pair, 1.0, bench.size(15, 3))


# --- in processes of their own, of which memory is measured ---


def _anonymous() -> int:
    """Bytes of memory that are this process's own, files it looks at left out."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class _Peak:
    """The largest memory from now on, beyond what there is now, looked at a hundred times a second."""

    def __init__(self) -> None:
        self._before = self._most = _anonymous()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, _anonymous())
            time.sleep(0.01)

    def __call__(self) -> int:
        return max(self._most, _anonymous()) - self._before


def _latents(side: int) -> tuple[NDArray, NDArray, NDArray]:
    return _images(BATCH, side, side, 4), np.array([981, 21], np.int32), _images(BATCH, TOKENS, UNET.cross_attention_dim)


def _our_step(folder: Path) -> Callable[[], float]:
    graphdef, params = nnx.split(read_network(folder, UNet2DConditionConfig.from_json, _denoiser), nnx.Param)
    optimiser = Adafactor(learning_rate=RATE, warmup=0).transformation(1000)
    latents, timestep, text = map(jnp.asarray, _latents(4))
    noise = jnp.asarray(np.random.default_rng(3).standard_normal(latents.shape, np.float32))

    def loss(params: Any, latents: jax.Array, timestep: jax.Array, text: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(latents, timestep, text) - noise))

    def step(params: Any, moments: Any, *arguments: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, *arguments)
        updates, moments = optimiser.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    program = jax.jit(step, donate_argnums=(0, 1), compiler_options=backend.compiler_options())
    moments = jax.jit(optimiser.init)(params)

    def run() -> float:
        nonlocal params, moments
        params, moments, value = program(params, moments, latents, timestep, text)
        return float(value)

    return run


def _torch_step(folder: Path) -> Callable[[], float]:
    import diffusers
    import torch

    network = _torch(lambda: diffusers.UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False)).train()
    optimiser = torch.optim.Adafactor(network.parameters(), lr=RATE, weight_decay=0.01)
    latents, timestep, text = map(_to_torch, _latents(4))
    noise = _to_torch(np.random.default_rng(3).standard_normal((BATCH, 4, 4, 4), np.float32))

    def run() -> float:
        value = torch.nn.functional.mse_loss(network(latents, timestep, text).sample, noise)
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(value)

    return run


def _our_first(folder: Path) -> Callable[[], float]:
    def run() -> float:
        model = read_network(folder, UNet2DConditionConfig.from_json, _denoiser)
        return float(jnp.sum(_compiled(model, lambda m, *x: m(*x), *_latents(4))()))

    return run


def _torch_first(folder: Path) -> Callable[[], float]:
    import diffusers

    def run() -> float:
        network = _torch(lambda: diffusers.UNet2DConditionModel.from_pretrained(folder))
        return float(_without_gradients(lambda *x: network(*x).sample, *_latents(4))().sum())

    return run


_TASKS = {"our step": _our_step, "torch step": _torch_step, "our first": _our_first, "torch first": _torch_first}


def serve(task: str, folder: str) -> None:
    """For each line that comes in, do the task once, and say how long it took, its value, and the most memory so far."""
    jnp.zeros(()).block_until_ready()
    peak = _Peak()
    run = _TASKS[task](Path(folder))
    for _ in sys.stdin:
        start = time.perf_counter()
        value = run()
        print(json.dumps({"seconds": time.perf_counter() - start, "value": value, "bytes": peak()}), flush=True)


def compile_unet() -> None:
    """Print how long the network takes to trace and compile for latents of 64 × 64, of which nothing needs to be there."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: _denoiser(UNET)), nnx.Param)
    start = time.perf_counter()
    jax.jit(lambda params, *x: nnx.merge(graphdef, params)(*x), compiler_options=backend.compiler_options()).lower(
        params, *_latents(64)
    ).compile()
    print(json.dumps({"seconds": time.perf_counter() - start}))


def temporary_bytes() -> int:
    """What the network needs beside its parameters for latents of 4 × 4, as the compiler has it."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: _denoiser(UNET)), nnx.Param)
    program = jax.jit(lambda params, *x: nnx.merge(graphdef, params)(*x), compiler_options=backend.compiler_options())
    analysis = program.lower(params, *_latents(4)).compile().memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)


class Worker:
    """A process that does a task when it is told to."""

    def __init__(self, task: str, folder: Path, **environment: str) -> None:
        command = [sys.executable, "-c", f"from benchmarks import stable; stable.serve({task!r}, {str(folder)!r})"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment},
        )
        self.answers: list[dict[str, float]] = []

    def __call__(self) -> None:
        """Do it once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args[-1]!r} ended without an answer")  # type: ignore[index]
        self.answers.append(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def _cache(folder: Path) -> dict[str, str]:
    """Programs kept as `python -m diffusion` keeps them, in a folder."""
    return {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def _fine_tuning(bench: Bench, folder: Path, peer: bool) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        workers = [Worker(task, folder) for task in ("our step", *(["torch step"] if peer else []))]
        for worker in workers:
            stack.callback(worker.close)
        seconds = bench.medians("a step of fine-tuning", bench.size(7, 2), *workers)
        first = [worker.answers[0]["value"] for worker in workers]
        most = [worker.answers[-1]["bytes"] for worker in workers]
    yield Row(
        f"a step of fine-tuning, {BATCH} latents of 4 × 4, float32",
        *_both(seconds),
        goals=(Goal("ratio", "≥", 1.0), ACCURACY) if peer else (),
        error=abs(first[0] - first[1]) / first[1] if peer else None,
        error_of="of the first loss",
        note="ε-loss, gradient, Adafactor; peer: torch.optim.Adafactor",
    )
    goals = (Goal("ratio", "≥", 1.0),) if peer else ()
    yield Row("its peak memory", *_both(most), unit="B", goals=goals, note="anonymous memory of a process of its own, reading included")


def _loading(bench: Bench, folder: Path, cache: Path, peer: bool) -> Iterator[Row]:
    """Each time in a new process; the first fills the cache of programs, and of files."""
    found: dict[str, list[dict[str, float]]] = {"our first": [], "torch first": []}
    runs = bench.size(3, 1)
    for run in range(runs + 1):
        for task in found if peer else ["our first"]:
            bench.progress(f"loading, {task}, {run} of {runs}")
            worker = Worker(task, folder, **_cache(cache))
            try:
                worker()
            finally:
                worker.close()
            found[task] += worker.answers
    seconds = [statistics.median(answer["seconds"] for answer in answers[1:]) for answers in found.values() if answers]
    yield Row(
        "U-Net, from its file to the first output, latents of 4 × 4",
        *_both(seconds),
        goals=(Goal("ours", "≤", seconds[1] + 10),) if peer else (),
        error=abs(found["our first"][0]["value"] / found["torch first"][0]["value"] - 1) if peer else None,
        error_of="of the sum of the output",
        note="imports left out, compiled program from the cache",
    )
    parameters = 4 * parameter_count(nnx.eval_shape(lambda: _denoiser(UNET)))
    temporary = temporary_bytes()
    yield Row(
        "its peak memory",
        *_both([statistics.median(answer["bytes"] for answer in answers[1:]) for answers in found.values() if answers]),
        unit="B",
        goals=(Goal("ours", "≤", 1.15 * parameters + temporary),),
        note=f"parameters: {parameters / 2**30:.2f} GiB, activations: {temporary / 2**30:.2f} GiB",
    )


def _compilation(bench: Bench, cache: Path) -> Iterator[Row]:
    for what, bound in (("cold", 60), ("from the cache", 10)):
        bench.progress(f"compilation, {what}")
        done = subprocess.run(
            [sys.executable, "-c", "from benchmarks import stable; stable.compile_unet()"],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, **_cache(cache)},
        )
        seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
        yield Row(f"U-Net compiled for latents of 64 × 64, {what}", seconds, goals=(Goal("ours", "≤", bound),), note="tracing included")


def measure(bench: Bench) -> Iterator[Row]:
    peer = all(importlib.util.find_spec(module) for module in ("torch", "diffusers", "transformers"))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        yield from _compilation(bench, root / "programs")
        bench.progress("writing random weights")
        text_encoder = _write(root / "text_encoder", TEXT.to_json(), nnx.eval_shape(lambda: _text_encoder(TEXT)), TEXT_WEIGHTS)
        autoencoder = _write(root / "vae", AUTOENCODER.to_json(), nnx.eval_shape(lambda: _autoencoder(AUTOENCODER)))
        yield from _around(bench, autoencoder, text_encoder, peer)
        unet = _write(root / "unet", UNET.to_json(), nnx.eval_shape(lambda: _denoiser(UNET)))
        yield from _loading(bench, unet, root / "programs", peer)
        yield from _fine_tuning(bench, unet, peer)
        yield from _denoising(bench, unet, peer)
