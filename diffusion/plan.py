"""What a run will take: counted, compiled and measured before it begins."""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion.consolidation import Penalty
from diffusion.layout import sharded_batch, state_shardings
from diffusion.run import Task, abstract_of, feed_of, params_of, program_of
from diffusion.settings import Settings
from diffusion.train import Program
from diffusion.unet import parameter_count
from hopjax.cli.progress import duration, speed

# Steps that are timed, after one that is not.
TIMED = 3


class Plan(NamedTuple):
    """What `plan` found out; bytes are those of one device.

    Attributes:
        parameters: their number.
        bytes: by kind; "gradients" as if all were there at once, and "step" what the compiler takes for them, activations and all else.
        steps: of the optimiser.
        epoch_batches: steps in an epoch.
        images: of the task, and replayed in an epoch.
        compile_seconds: of the step.
        step_seconds: median of a few steps; NaN if none was taken.
    """

    parameters: int
    bytes: dict[str, int]
    steps: int
    epoch_batches: int
    images: tuple[int, int]
    batch_size: int
    compile_seconds: float
    step_seconds: float

    def lines(self) -> Iterator[str]:
        """To be read."""
        new, replayed = self.images
        yield f"images: {new:,} in an epoch" + (f", and {replayed:,} replayed" if replayed else "")
        yield f"steps: {self.steps:,} of {self.batch_size} images: {self.steps / self.epoch_batches:,.1f} epochs of {self.epoch_batches:,}"
        yield f"parameters: {self.parameters:,}"
        yield self.memory()
        yield f"compilation: {self.compile_seconds:.1f} s (kept for the next time)"
        if not math.isnan(self.step_seconds):
            yield f"a step: {self.step_seconds:.3g} s, {speed(self.batch_size / self.step_seconds, 'images')}"
            yield f"training: about {duration(self.steps * self.step_seconds)}, besides samples and checkpoints"

    def memory(self) -> str:
        """A line of it."""
        words = {kind: f"{kind} {count / 2**20:,.1f} MiB" for kind, count in self.bytes.items()}
        step = words.pop("step", None)
        held = "memory of a device: " + ", ".join(words.values())
        return held if step is None else f"{held} (if all at once); a {step} for them, activations and all else"


def memory_of(program: Program, params: Any, batch: Any) -> tuple[dict[str, int], jax.stages.Compiled]:
    """Bytes on a device by kind, and the compiled step; nothing is allocated, and all arrays may be abstract.

    What the compiler takes for a step is known where the backend tells (`memory_analysis`).
    """
    state = program.abstract(params)
    compiled = program.lower(state, batch).compile()
    kinds = {
        "parameters": state.params,
        "average": state.ema,
        "optimiser": state.opt_state,
        "penalty": program.penalty,
        "frozen": program.space,
    }
    parts = {kind: _bytes(program, tree) for kind, tree in kinds.items()}
    parts = {kind: count for kind, count in parts.items() if count} | {"gradients": parts["parameters"]}
    analysis = compiled.memory_analysis()
    if analysis is not None:  # not every backend tells
        parts["step"] = analysis.temp_size_in_bytes
    return parts, compiled


def _bytes(program: Program, tree: Any) -> int:
    """Of a tree, real or abstract, on one device."""
    shardings = jax.tree.leaves(state_shardings(program.mesh, tree))
    shares = [(sharding.shard_shape(leaf.shape), leaf) for leaf, sharding in zip(jax.tree.leaves(tree), shardings, strict=True)]
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in shares)


def plan(task: Task, settings: Settings, *, timed: bool = True) -> Plan:
    """Compile the step of a run and, if asked, time a few; nothing is written but latents.

    Args:
        timed: if not, no parameter is allocated: the network may be larger than the memory, and that of the task's `start` abstract.
    """
    model = abstract_of(task, settings)
    feed = feed_of(task, model, settings)
    program, params = program_of(model, settings)
    if task.consolidation is not None:
        program = dataclasses.replace(program, penalty=Penalty(jax.ShapeDtypeStruct((), jnp.float32), params, params))
    start = time.perf_counter()
    parts, compiled = memory_of(program, params, feed.batch(0))
    seconds = time.perf_counter() - start
    return Plan(
        parameter_count(model.unet),
        parts,
        settings.length.steps,
        feed.epoch_batches,
        (feed.new, feed.replayed),
        feed.batch_size,
        seconds,
        _step_seconds(program, compiled, feed, task, settings) if timed else math.nan,
    )


def _step_seconds(program: Program, compiled: jax.stages.Compiled, feed: Any, task: Task, settings: Settings) -> float:
    """The median."""
    if program.penalty is not None:  # the numbers in it take no time
        program = dataclasses.replace(program, penalty=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), program.penalty))
    step, state, seconds = program.bound(compiled), program.initial(params_of(task, settings)), []
    for number in range(TIMED + 1):
        start = time.perf_counter()
        state, measured = step(state, sharded_batch(program.mesh, feed.batch(number)), settings.key("training"))
        jax.block_until_ready(measured)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
