"""What a run will take: counted, compiled and measured before it begins."""

import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

from diffusion.layout import sharded_batch
from diffusion.run import Task, feed_of, model_of, program_of
from diffusion.settings import Settings
from diffusion.unet import parameter_count
from hopjax.cli.progress import duration, speed

# Steps that are timed, after one that is not.
TIMED = 3


class Plan(NamedTuple):
    """What `plan` found out; bytes are those of one device.

    Attributes:
        parameters: their number.
        bytes: by kind.
        steps: of the optimiser.
        epoch_batches: steps in an epoch.
        images: of the task, and replayed in an epoch.
        compile_seconds: of the step.
        step_seconds: median of a few steps.
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
        yield "memory of a device: " + ", ".join(f"{kind} {count / 2**20:,.1f} MiB" for kind, count in self.bytes.items())
        yield f"compilation: {self.compile_seconds:.1f} s (kept for the next time)"
        yield f"a step: {self.step_seconds:.3g} s, {speed(self.batch_size / self.step_seconds, 'images')}"
        yield f"training: about {duration(self.steps * self.step_seconds)}, besides samples and checkpoints"


def plan(task: Task, settings: Settings) -> Plan:
    """Compile the step of a run and time a few; nothing is written."""
    feed, model = feed_of(task, settings), model_of(task, settings)
    program, params = program_of(model, settings)
    state = program.initial(params)
    start = time.perf_counter()
    step = program.compile(state, feed.batch(0))
    compiled = time.perf_counter() - start
    parts = {
        kind: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        for kind, tree in (("parameters", state.params), ("average", state.ema), ("optimiser", state.opt_state))
    }
    parts["gradients"] = parts["parameters"]
    memory = step.memory_analysis()
    if memory is not None:  # not every backend tells
        parts["activations and all else"] = max(0, memory.temp_size_in_bytes - parts["gradients"])
    seconds = []
    for number in range(TIMED + 1):
        start = time.perf_counter()
        batch = sharded_batch(program.mesh, feed.batch(number))
        state, measured = step(state, batch, settings.key("training"))
        jax.block_until_ready(measured)
        seconds.append(time.perf_counter() - start)
    return Plan(
        parameter_count(model),
        parts,
        settings.length.steps,
        feed.epoch_batches,
        (len(feed.images), feed.replayed),
        feed.batch_size,
        compiled,
        statistics.median(seconds[1:]),
    )
