r"""The streaming energies on many devices: states and memories sharded over a `jax.sharding.Mesh`.

Each device passes over its own memories in tiles; then the devices that hold other memories of the same states exchange (top, sums)
pairs, O(n) numbers (n × d where the mean memory is wanted): memories never travel. States are sharded for nothing. `layout` chooses
between the two, and counts the bytes. JAX moves the data, within a process or between processes (`jax.distributed`).
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Float, Int, Real
from numpy.typing import NDArray

from hopjax.moments import QUANTITIES, Moments, Softmax, all_reduce, empty, needed
from hopjax.tiles import (
    Rows,
    Tile,
    accumulate,
    by_rows,
    check_beta,
    check_own,
    check_prior,
    check_rows,
    check_stored,
    default_tile,
)

STATES, MEMORIES = "states", "memories"


class Layout(NamedTuple):
    """How many devices share the states, and how many the memories; their product is the number of devices.

    Attributes:
        states: shards of the states.
        memories: shards of the memories.
        resident: bytes that a device holds of states and memories.
        exchanged: bytes that a device sends in the all-reduce, by a ring: 2(k−1)/k of what is reduced over k devices.
    """

    states: int
    memories: int
    resident: int
    exchanged: int


def layout(
    count: int, total: int, dim: int, devices: int, *, device_memory: int, quantities: Sequence[str] = ("energy",), itemsize: int = 4
) -> Layout:
    """The layout for `count` states and `total` memories: the fewest shards of the memories that fit, since states are sharded for nothing.

    Args:
        device_memory: bytes of a device that inputs may take.

    Raises: ValueError if they fit in no layout: then stream them from the hosts (`hopjax.tiled.stream`) or take more devices.
    """
    needs = needed(quantities, stored=True)
    per_state = itemsize * (2 + sum(dim if name == "mean" else 1 for name in needs))

    def candidate(memories: int) -> Layout:
        states = devices // memories
        rows = -(-count // states)
        reduced = 2 * (memories - 1) / memories * rows * per_state
        return Layout(states, memories, itemsize * dim * (rows + -(-total // memories)), math.ceil(reduced))

    candidates = [candidate(memories) for memories in range(1, devices + 1) if devices % memories == 0]
    for chosen in candidates:
        if chosen.resident <= device_memory:
            return chosen
    least = min(chosen.resident for chosen in candidates)
    raise ValueError(f"device_memory={device_memory} is too small: {devices} devices need {least} bytes each for {count} + {total} rows")


def mesh(layout: Layout) -> Mesh:
    """The mesh of a layout, over all devices."""
    return jax.make_mesh((layout.states, layout.memories), (STATES, MEMORIES))


def distribute(mesh: Mesh, rows: ArrayLike, axis: str, fill: float = 0) -> Array:
    """Rows of the host in equal shards along an axis of the mesh, filled up at the end.

    Only a process that has them all can do this; between processes, use `jax.make_array_from_process_local_data`.
    """
    array = np.asarray(rows)
    missing = -len(array) % mesh.shape[axis]
    filled = np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)), constant_values=fill) if missing else array
    return jax.device_put(filled, NamedSharding(mesh, P(axis)))


def summarise(
    mesh: Mesh,
    states: Rows,
    memories: Rows,
    beta: Real[ArrayLike, ""],
    quantities: Sequence[str],
    *,
    own: Int[np.ndarray | Array, " n"] | None = None,
    log_prior: Float[np.ndarray | Array, " m"] | None = None,
    tile: Tile | None = None,
) -> dict[str, Array] | dict[str, np.ndarray]:
    """`hopjax.tiled.summarise` over all devices of a mesh: the same numbers to rounding.

    Args:
        mesh: with axes "states" and "memories", e.g. `mesh(layout(...))`.
        states, memories, own, log_prior: of the host, any number of rows; or arrays on devices, which must divide evenly among the shards
            and are moved unless they are sharded along these axes already.

    Returns: arrays of the host for states of the host, else arrays sharded along "states".
    Raises: ValueError for a mesh without those axes, and whatever does not fit; a state that is not its own memory, unless they are
        spread over processes, where nobody can tell.
    """
    if set(mesh.axis_names) != {STATES, MEMORIES}:
        raise ValueError(f'mesh has axes {mesh.axis_names}: need "{STATES}" and "{MEMORIES}", either of which may have one device')
    check_rows(states, memories)
    check_beta(beta)
    needs, count, total = needed(quantities, stored=own is not None), states.shape[0], memories.shape[0]
    prior = np.zeros(total, memories.dtype) if log_prior is None else log_prior
    check_prior(prior, total)
    if own is not None:
        check_own(own, count, total)
        for begun in range(0, count, default_tile().states):
            check_stored(states, memories, own, begun, begun + default_tile().states)
    for rows, axis in ((states, STATES), (memories, MEMORIES), (own, STATES), (prior, MEMORIES)):
        if isinstance(rows, Array) and rows.shape[0] % mesh.shape[axis]:
            raise ValueError(
                f"{rows.shape[0]} {axis} do not divide among {mesh.shape[axis]} devices: give NumPy arrays, which are filled up"
            )

    def place(rows: NDArray[Any] | Array, axis: str, dtype: Any, fill: float = 0) -> Array:
        if not isinstance(rows, Array):
            return distribute(mesh, np.asarray(rows, dtype), axis, fill)
        return jax.device_put(rows.astype(dtype), NamedSharding(mesh, P(axis)))  # nothing moves if they are there

    run = _program(mesh, tuple(quantities), needs, tile or default_tile())
    index = None if own is None else place(own, STATES, np.int32)
    # Filled-up memories have no weight; filled-up states are cut off.
    x, y = place(states, STATES, states.dtype), place(memories, MEMORIES, memories.dtype)
    values = run(x, y, np.asarray(beta, memories.dtype), place(prior, MEMORIES, memories.dtype, -np.inf), index)
    return values if isinstance(states, Array) else {name: np.asarray(value)[:count] for name, value in values.items()}


@cache
def _program(mesh: Mesh, names: tuple[str, ...], needs: tuple[str, ...], tile: Tile) -> Callable[..., dict[str, Array]]:
    def local(states: Array, memories: Array, beta: Array, offset: Array, own: Array | None) -> dict[str, Array]:
        first = lax.axis_index(MEMORIES) * memories.shape[0]

        def of_rows(states: Array, own: Array | None) -> Moments:
            return accumulate(empty(states, needs), states, memories, beta, offset, own, needs, rows=tile.memories, first=first)

        moments = all_reduce(by_rows(of_rows, states.shape[0], tile.states, states, own), MEMORIES)
        own_prior = None if own is None else lax.psum(_where_held(offset, own - first), MEMORIES)
        soft = Softmax(moments, states, beta, own_prior)
        return {name: QUANTITIES[name].of(soft) for name in names}

    specs = (P(STATES), P(MEMORIES), P(), P(MEMORIES), P(STATES))
    # Unchecked: the loops begin with moments over nothing, which are the same everywhere, and end with others.
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(STATES), check_vma=False)

    return jax.jit(sharded)


def _where_held(values: Array, index: Array) -> Array:
    """values[index] where this device holds them, else 0."""
    held = (index >= 0) & (index < values.shape[0])
    return jnp.where(held, values[jnp.where(held, index, 0)], 0.0)
