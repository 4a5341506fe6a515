"""Energies of many states against as many memories, streamed: against a plain product, exponentials alone, PyTorch, NumPy and KeOps."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax import lax
from numpy.typing import NDArray

from benchmarks.row import Bench, Goal, Row
from hopjax import data, normalisation, tiled

Rows = NDArray[np.float32]
BETA = 20.0


class Bounds(NamedTuple):
    """Smallest ratios peer/ours that are aimed at in one dimension; None where there is no aim."""

    product: float | None = None
    torch: float | None = None
    numpy: float | None = None
    keops: float | None = None
    exponentials: float | None = None
    curvature: float | None = 0.5  # energy, T and tr H in twice the time of the energy


AIMS = {
    3072: Bounds(product=0.95, torch=1.3),
    784: Bounds(product=0.9, torch=1.8),
    64: Bounds(torch=3.0, numpy=2.5),
    8: Bounds(torch=3.0, numpy=3.0, keops=8.0, exponentials=1 / 1.4, curvature=None),
    2: Bounds(torch=3.0, numpy=3.0, keops=8.0, exponentials=1 / 1.4, curvature=None),
}
NAMES = {"product": "a plain product", "torch": "PyTorch", "numpy": "NumPy", "keops": "KeOps", "exponentials": "n·m exponentials alone"}


def _unit(count: int, dim: int) -> Rows:
    rows = np.random.default_rng(0).standard_normal((count, dim), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _numpy(rows: Rows, block: int = 1024) -> Rows:
    def of(states: Rows) -> Rows:
        logits = np.float32(BETA) * (states @ rows.T)
        top = logits.max(axis=1, keepdims=True)
        return 0.5 * np.sum(states**2, axis=1) - (top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))) / BETA

    return np.concatenate([of(rows[start : start + block]) for start in range(0, len(rows), block)])


def _torch(rows: Rows, block: int = 1024) -> Callable[[], Any]:
    import torch

    memories = torch.from_numpy(rows)

    def run() -> Any:
        parts = memories.split(block)
        return torch.cat([0.5 * (part**2).sum(1) - torch.logsumexp(BETA * (part @ memories.T), 1) / BETA for part in parts])

    return run


def _keops(rows: Rows) -> Callable[[], Any]:
    import pykeops
    from pykeops.numpy import LazyTensor

    pykeops.set_verbose(False)
    states, memories = LazyTensor(rows[:, None]), LazyTensor(rows[None])
    return lambda: 0.5 * np.sum(rows**2, axis=1) - (BETA * (states | memories)).logsumexp(1)[:, 0] / BETA


def _exponentials(rows: Rows) -> Callable[[], Any]:
    """As many exponentials, summed, of numbers that stay in memory: a quarter of the states at a time."""
    quarter = jnp.asarray(np.random.default_rng(0).standard_normal((len(rows) // 4, len(rows)), dtype=np.float32))
    zero = jnp.zeros(len(quarter), jnp.float32)

    @jax.jit
    def run(numbers: jax.Array) -> jax.Array:
        # What is added keeps the compiler from computing one turn for all four.
        return lax.fori_loop(0, 4, lambda _, total: total + jnp.sum(jnp.exp(numbers - 1e-20 * total[0]), axis=1), zero)

    return lambda: run(quarter)


def _peers(rows: Rows, aims: Bounds) -> dict[str, Callable[[], Any]]:
    device = jnp.asarray(rows)
    product = jax.jit(lambda x: x @ x.T)
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "product": lambda: lambda: product(device),
        "torch": lambda: _torch(rows),
        "numpy": lambda: lambda: _numpy(rows),
        "keops": lambda: _keops(rows),
        "exponentials": lambda: _exponentials(rows),
    }
    module = {"torch": "torch", "keops": "pykeops"}
    wanted = [name for name in makers if getattr(aims, name) is not None]
    return {name: makers[name]() for name in wanted if name not in module or importlib.util.find_spec(module[name])}


def _by_dimension(bench: Bench, dim: int, aims: Bounds) -> Iterator[Row]:
    count = bench.size(8192 if dim > 100 else 16_384, 4096)
    rows = _unit(count, dim)
    device = jnp.asarray(rows)
    peers = _peers(rows, aims)

    def ours(*names: str) -> dict[str, np.ndarray]:
        return tiled.summarise(device, device, BETA, names)

    what = f"energies, n = m = {count:,}, d = {dim}"
    extra = [lambda: ours("energy", "update", "hessian_trace")] if aims.curvature else []
    energy, *others = bench.medians(what, bench.size(7 if dim < 1000 else 5, 3), lambda: ours("energy"), *peers.values(), *extra)
    few = rows[:: count // 64].astype(float)
    exact = 0.5 * np.sum(few**2, axis=1) - np.logaddexp.reduce(BETA * (few @ rows.T.astype(float)), axis=1) / BETA
    error = float(np.max(np.abs(ours("energy")["energy"][:: count // 64] - exact)))
    for (name, _), seconds in zip(peers.items(), others, strict=False):
        goal = Goal("ratio", "≥", getattr(aims, name))
        yield Row(f"{what}, against {NAMES[name]}", energy, seconds, goals=(goal,), error=error, error_of="largest, against float64")
    missing = [NAMES[name] for name in NAMES if getattr(aims, name) is not None and name not in peers]
    if missing:
        yield Row(f"{what}, against {' and '.join(missing)}", None, note="not installed: pip install 'hopjax[peers]'")
    if aims.curvature:
        goal = Goal("ratio", "≥", aims.curvature)
        yield Row(f"energy, T and tr H, d = {dim}, against the energy alone", others[-1], energy, goals=(goal,))


def _flat(bench: Bench) -> Iterator[Row]:
    """The cost of a pair must not depend on how many there are."""
    base = None
    for count in (1000, 4000, 16_000, 60_000):
        rows = jnp.asarray(_unit(count, 64))
        (seconds,) = bench.medians(f"n = m = {count:,}", bench.size(3, 1), partial(tiled.summarise, rows, rows, BETA, ["energy"]))
        pair = seconds / count**2
        if base is None:
            yield Row(f"a pair of n = m = {count:,}, d = 64", pair, note=f"{seconds:.3g} s in all")
        else:
            yield Row(
                f"a pair of n = m = {count:,}, against 4,000", pair, base, goals=(Goal("ratio", "≥", 0.8),), note=f"{seconds:.3g} s in all"
            )
        base = pair if count == 4000 or base is None else base


_SHARDED = """
    import statistics, sys, time
    import jax, numpy as np
    devices = int(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", devices)
    from hopjax import mesh
    rows = np.random.default_rng(0).standard_normal((8192, 784), dtype=np.float32)
    over = jax.make_mesh((devices, 1), ("states", "memories"))
    x, y = mesh.distribute(over, rows, "states"), mesh.distribute(over, rows, "memories")
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(mesh.summarise(over, x, y, 1.0, ["energy"]))
        times.append(time.perf_counter() - start)
    print(statistics.median(times[1:]))
"""

_PEAK = """
    import re
    import jax, numpy as np
    from hopjax import tiled
    rows = np.random.default_rng(0).standard_normal((60_000, 784), dtype=np.float32)
    def own():
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
    tiled.summarise(rows[:4096], rows[:4096], 0.1, ["energy", "hessian_trace"])
    before, most = own(), 0
    for block in tiled.stream(rows, rows, 0.1, ["energy", "hessian_trace"]):
        most = max(most, own() - before)
    print(most)
"""


def _alone(script: str, *arguments: object) -> float:
    """What a script prints that runs in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout)


def _sharded(bench: Bench) -> Iterator[Row]:
    pairs = []
    for turn in range(bench.size(3, 1)):
        bench.progress(f"one device and two, turn {turn + 1}")
        pairs.append((_alone(_SHARDED, 1), _alone(_SHARDED, 2)))
    one, two = np.median(pairs, axis=0)
    yield Row(
        "states over 2 devices, against 1 device with all threads", float(two), float(one), goals=(Goal("ratio", "≥", 0.9),), note="d = 784"
    )


def _peak(bench: Bench) -> Iterator[Row]:
    if bench.quick:
        return
    bench.progress("peak memory at n = m = 60,000, d = 784: minutes")
    goal = Goal("ours", "≤", tiled.MEMORY_LIMIT)
    yield Row("memory beyond inputs, n = m = 60,000, d = 784, energy and tr H", _alone(_PEAK), unit="B", goals=(goal,))


def _accuracy(bench: Bench) -> Iterator[Row]:
    """float32 against float64 on real images: the excess and the order that it gives."""
    images = data.read("mnist-5k", limit=bench.size(5000, 1000)).vectors()
    own = np.arange(len(images))
    for name in normalisation.NORMALISATIONS:
        normalise = normalisation.fit(name, images)
        rows = normalise(images)
        radius = float(np.max(np.sum(rows.astype(float) ** 2, axis=1)))
        for beta in (1.0, 10.0, 100.0, 1000.0):
            bench.progress(f"accuracy, {name}, β = {beta:g}")
            b = beta / radius if name == "none" else beta
            single, double = (tiled.summarise(part, part, b, ["log_odds"], own=own)["log_odds"] for part in (rows, rows.astype(float)))
            rank = float(scipy.stats.spearmanr(single, double).statistic)
            error = float(
                np.max(np.abs(single - double)) / (np.finfo(np.float32).eps * (8 * b * radius + 4 * (2 + np.log(len(rows)) + 5)) * 2)
            )
            yield Row(
                f"1 − Spearman of the excess in float32 and float64, {name}, β = {b:.3g}",
                1 - rank,
                unit="",
                goals=(Goal("ours", "≤", 1e-4), Goal("error", "≤", 1.0)),
                error=error,
                error_of="of the log odds' bound",
            )


def measure(bench: Bench) -> Iterator[Row]:
    for dim, aims in AIMS.items():
        yield from _by_dimension(bench, dim, aims)
    yield from _flat(bench)
    yield from _sharded(bench)
    yield from _accuracy(bench)
    yield from _peak(bench)
