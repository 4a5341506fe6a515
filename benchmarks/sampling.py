"""Sampling and reconstruction with a small network, at the speed of the network alone; and what feeding a step costs."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.row import Bench, Goal, Row
from diffusion.assess import Reconstruction, assess
from diffusion.backend import compiler_options
from diffusion.feed import Feed
from diffusion.generate import _batch, generate
from diffusion.pipeline import Pipeline
from diffusion.samplers import DDIM
from diffusion.settings import PRESETS
from hopjax import data

STEPS, BATCH = 50, 50


def measure(bench: Bench) -> Iterator[Row]:
    settings = PRESETS["cpu-mnist"].settings
    model = settings.network.make(settings.network.config(28, 28, 1), settings.key("parameters"))
    graphdef, params = nnx.split(model, nnx.Param)
    objective = settings.noise.objective()
    count = bench.size(1000, 100)

    # The network alone, as often as one batch calls it, in one program.
    def evaluate(params: Any, images: jax.Array) -> jax.Array:
        network = nnx.merge(graphdef, params)

        def again(x: jax.Array, timestep: jax.Array) -> tuple[jax.Array, None]:
            return network(x, jnp.full(len(x), timestep)), None

        return jax.lax.scan(again, images, jnp.linspace(999.0, 0.0, STEPS, dtype=jnp.float32))[0]

    program = jax.jit(evaluate, compiler_options=compiler_options()).lower(params, jnp.zeros((BATCH, 28, 28, 1), jnp.float32)).compile()
    noise = jax.random.normal(jax.random.key(0), (BATCH, 28, 28, 1), jnp.float32)

    def sample() -> np.ndarray:
        found = generate(graphdef, params, objective, (28, 28, 1), count, key=jax.random.key(1), sampler=DDIM(STEPS), batch=BATCH)
        return found.images

    def alone() -> None:
        for _ in range(count // BATCH):
            jax.block_until_ready(program(params, noise))

    before = _batch._cache_size()  # type: ignore[attr-defined]
    ours, network = bench.medians(f"{count:,} digits", bench.size(3, 1), sample, alone)
    programs = _batch._cache_size() - before  # type: ignore[attr-defined]
    yield Row(
        f"{count:,} digits by {STEPS} steps of DDIM",
        ours,
        network,
        goals=(Goal("ratio", "≥", 0.95), Goal("error", "≤", 1)),
        error=programs,
        error_of="programs compiled",
        note=f"peer: the same {count * STEPS:,} evaluations of the network alone, in batches of {BATCH}",
    )

    images = data.read("mnist-5k").pixels
    yield from _reconstruction(bench, Pipeline(model, objective), images[:count], program, params, noise)
    feed = Feed(images, settings.length.batch_size, 0, images[:500], None)
    start = time.perf_counter()
    batches = 2000
    for number in range(batches):
        feed.batch(number)
    fed = (time.perf_counter() - start) / batches
    yield Row(
        "a batch of 64 digits, a tenth of them replayed",
        fed,
        ours / (count * STEPS) * settings.length.batch_size * 3,
        goals=(Goal("ratio", "≥", 50),),
        note="peer: a training step, taken as three evaluations of the network; new orders of each epoch included",
    )


def _reconstruction(bench: Bench, model: Pipeline, images: np.ndarray, program: Any, params: Any, noise: jax.Array) -> Iterator[Row]:
    """Half of the schedule takes half of the evaluations, for each of two draws: as many as one batch of samples."""
    measure = Reconstruction(timestep=model.objective.schedule.timesteps // 2, draws=2)

    def reconstruct() -> Any:
        return assess(model, images, measure, key=jax.random.key(2), batch=BATCH)

    def alone() -> None:
        for _ in range(len(images) // BATCH):
            jax.block_until_ready(program(params, noise))

    ours, network = bench.medians(f"{len(images):,} reconstructions", bench.size(3, 1), reconstruct, alone)
    evaluations = int(reconstruct().evaluations.max())
    assert evaluations == STEPS
    yield Row(
        f"{len(images):,} digits reconstructed from the middle of the schedule, two draws",
        ours,
        network,
        goals=(Goal("ratio", "≥", 0.95),),
        note=f"peer: the same {len(images) * evaluations:,} evaluations of the network alone, in batches of {BATCH}",
    )
