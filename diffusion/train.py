"""The training loop, the only one: a functional state, one donated jitted step, and checkpoints from which a run goes on bit for bit.

Everything random in step s is drawn from `fold_in(key, s)`, and its batch is a function of the seed and s (`diffusion.feed`), so a
state and its step number are all that a run is.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from diffusion.backend import compiler_options
from diffusion.consolidation import Penalty
from diffusion.feed import Feed
from diffusion.layout import sharded_batch, state_shardings
from diffusion.objective import Denoising
from diffusion.optimiser import Optimiser, averaged
from diffusion.space import PixelSpace, Space

# Equal parts of the schedule whose losses are reported one by one.
PARTS = 10


class TrainState(NamedTuple):
    """All that changes: arrays alone; without an average `ema` is None."""

    step: Int[Array, ""]
    params: Any
    ema: Any
    opt_state: Any


class Measured(NamedTuple):
    """What a step says of itself, before its update."""

    loss: Float[Array, ""]
    """Of the images, without a penalty,"""
    gradient_norm: Float[Array, ""]
    """and the norm of the gradient, with it."""
    part_losses: Float[Array, " parts"]
    """Sum of the losses at the timesteps of each tenth of the schedule,"""
    part_counts: Int[Array, " parts"]
    """and how many images they are of."""


class Diverged(Exception):
    """The loss or its gradient is not finite."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What is trained, and how: all that the compiled step depends on.

    Attributes:
        graphdef: of the network.
        objective: its loss.
        optimiser: for a run of `steps` steps.
        ema: decay of the average of the parameters; 0 for none, which takes no memory.
        mesh: the devices.
        penalty: whose gradient is added to the loss's; None for none.
        space: what of a batch is noised, and how the network is called.
    """

    graphdef: Any
    objective: Denoising
    optimiser: Optimiser
    steps: int
    ema: float
    mesh: Mesh
    penalty: Penalty | None = None
    space: Space = PixelSpace()

    def initial(self, params: Any) -> TrainState:
        """The state before the first step, on the devices; the arrays of `params` are not given away."""
        make = jax.jit(self._initial, out_shardings=state_shardings(self.mesh, jax.eval_shape(self._initial, params)))
        return make(params)

    def _initial(self, params: Any) -> TrainState:
        transformation = self.optimiser.transformation(self.steps)
        ema = jax.tree.map(jnp.copy, params) if self.ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, ema, transformation.init(params))

    def averaged(self, state: TrainState) -> Any:
        """The average of the parameters; without one, the parameters."""
        return state.ema if self.ema else state.params

    def abstract(self, params: Any) -> TrainState:
        """Shapes, dtypes and places of the state, for restoring a checkpoint."""
        state = jax.eval_shape(self._initial, params)

        def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(place, state, state_shardings(self.mesh, state))

    def gathered(self, tree: Any) -> Any:
        """A part of the state, whole, on the host of every process; all processes must ask for it."""
        return jax.device_get(_gather(self.mesh)(tree))

    def compile(self, state: TrainState, batch: Any) -> Any:
        """The compiled step (state, batch, key) → (state, Measured), which takes the state's memory over; `state` may be abstract.

        Raises: ValueError for a penalty on the parameters of another network.
        """
        return self.bound(self.lower(state, batch).compile())

    def bound(self, compiled: jax.stages.Compiled) -> Callable[[TrainState, Any, Key[Array, ""]], tuple[TrainState, Measured]]:
        """The step, from what `lower` gave, compiled."""
        # Arguments: as constants they would be a part of the program, larger than all else.
        held = jax.device_put(self._held, state_shardings(self.mesh, self._held))
        return lambda state, batch, key: compiled(state, batch, key, *held)

    @property
    def _held(self) -> tuple[Penalty | None, Space]:
        """What a step takes that never changes."""
        return self.penalty, self.space

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """The step before it is compiled; all arrays may be abstract, those of the penalty and the space too."""
        if self.penalty is not None:
            self.penalty.check(state.params)
        shardings, held_shardings = state_shardings(self.mesh, (state, self._held))
        split = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        whole = NamedSharding(self.mesh, PartitionSpec())
        step = jax.jit(
            self._step,
            donate_argnums=0,
            in_shardings=(shardings, split, whole, *held_shardings),
            out_shardings=(shardings, whole),
            compiler_options=compiler_options(),
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        return step.lower(state, _abstract(batch), key, *_abstract(self._held))

    def _step(
        self, state: TrainState, batch: Any, key: Key[Array, ""], penalty: Penalty | None = None, space: Space = PixelSpace()
    ) -> tuple[TrainState, Measured]:
        loss_key, dropout_key, clean_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
        clean = space.clean(batch, clean_key)

        def loss(params: Any) -> tuple[Float[Array, ""], Any]:
            network = space.network(nnx.merge(self.graphdef, params), batch, dropout_key)
            found = self.objective(network, clean, loss_key)
            return jnp.mean(found.losses), found

        (mean, found), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        if penalty is not None:
            gradients = jax.tree.map(jnp.add, gradients, jax.grad(penalty.value)(state.params))
        updates, opt_state = self.optimiser.transformation(self.steps).update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        part = found.timestep * PARTS // self.objective.schedule.timesteps
        sums, counts = (jnp.zeros(PARTS, x.dtype).at[part].add(x) for x in (found.losses, jnp.ones_like(part)))
        measured = Measured(mean, optax.tree.norm(gradients), sums, counts)
        ema = averaged(state.ema, params, step, self.ema) if self.ema else None
        return TrainState(step, params, ema, opt_state), measured


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    """One program for all that is gathered in a run."""
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


class Record(NamedTuple):
    """What some steps measured.

    Attributes:
        step: steps done.
        epoch: epochs done, with the fraction of this one.
        loss: mean over the images of these steps.
        gradient_norm: mean, before clipping.
        part_losses: mean losses of equal parts of the schedule, low noise first; NaN where no timestep fell.
        rate: images a second.
    """

    step: int
    epoch: float
    loss: float
    gradient_norm: float
    part_losses: list[float]
    rate: float


class Pause(NamedTuple):
    """A point at which a run can be looked at and saved.

    Attributes:
        step: steps done.
        state: after them; its memory is taken over when the run goes on.
        measured: what the steps since the last pause measured, all of it finite.
        seconds: that they took.
    """

    step: int
    state: TrainState
    measured: list[Measured]
    seconds: float


def train(
    state: TrainState,
    step: Callable[[TrainState, Array, Key[Array, ""]], tuple[TrainState, Measured]],
    feed: Feed,
    *,
    key: Key[Array, ""],
    mesh: Mesh,
    steps: int,
    pauses: Sequence[int],
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Pause]:
    """Train from where `state` is until `steps`, or until `stop` says so, with a pause there and at each multiple of the `pauses`.

    Args:
        state: its memory is taken over.
        step: from `Program.compile`.

    Raises: Diverged naming the step and batch, when a loss or gradient is not finite.
    """
    number = int(state.step)
    measured: list[Measured] = []
    clock = time.perf_counter()
    while number < steps:
        state, latest = step(state, sharded_batch(mesh, feed.batch(number)), key)
        # The one before is waited for while this one runs, so that reading a batch and Python's own work cost nothing.
        measured[-1:] = [_finite(one, number - 1, feed) for one in measured[-1:]]
        measured.append(latest)
        number += 1
        stopping = stop()
        if stopping or number == steps or any(number % every == 0 for every in pauses):
            measured[-1] = _finite(latest, number - 1, feed)
            yield Pause(number, state, measured, time.perf_counter() - clock)
            measured, clock = [], time.perf_counter()
        if stopping:
            return


def _finite(measured: Measured, number: int, feed: Feed) -> Measured:
    """The numbers of step `number`, waited for."""
    measured = jax.device_get(measured)
    if np.isfinite(measured.loss) and np.isfinite(measured.gradient_norm):
        return measured
    epoch, batch = divmod(number, feed.epoch_batches)
    what = f"loss {measured.loss:g}, gradient norm {measured.gradient_norm:g}"
    raise Diverged(f"{what} at step {number + 1:,} (epoch {epoch + 1}, batch {batch + 1} of {feed.epoch_batches})")


def record(pauses: Sequence[Pause], feed: Feed) -> Record:
    """What the steps of these pauses measured."""
    measured = [one for pause in pauses for one in pause.measured]
    counts = np.sum([one.part_counts for one in measured], axis=0)
    sums = np.sum([one.part_losses for one in measured], axis=0)
    number = pauses[-1].step
    return Record(
        number,
        number / feed.epoch_batches,
        float(np.mean([one.loss for one in measured])),
        float(np.mean([one.gradient_norm for one in measured])),
        np.divide(sums, counts, where=counts > 0, out=np.full(PARTS, np.nan)).tolist(),
        len(measured) * feed.batch_size / sum(pause.seconds for pause in pauses),
    )
