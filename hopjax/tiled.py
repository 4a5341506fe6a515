r"""Energies of many states against many memories in bounded memory: one pass over tiles.

`summarise` and `stream` take arrays of any size, in host memory or mapped from a file, and compute what is asked for (`QUANTITIES`) and
nothing else; `log_sums`, `energies` and `quantities`, of `hopjax.tiles`, are for use inside `jax.jit` and `jax.grad`. How the digits are
kept is in `hopjax.moments`; many devices are in `hopjax.mesh`. Source: arXiv:2605.27975, Eqs. (1)-(4).

Accuracy: with R the largest norm, logits carry an error of a few eps·βR² from their products, as in the one-shot formulas, and so do
exponents and entropies; energies a few eps·(R² + (log m + number of tiles)/β); the Hessian's trace a few eps·βR²·ℓ with ℓ the weight of
the memories other than the state's own, sharpness and rise R² times that plus eps·dR². The distance is that of the memory named as
nearest, relative to a few eps: another may be nearer by a few eps·r², r the largest distance from the mean of the states of a block.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real
from numpy.typing import NDArray

from hopjax.moments import QUANTITIES, Moments, Softmax, empty, needed
from hopjax.tiles import (
    Rows,
    Tile,
    accumulate,
    check_beta,
    check_own,
    check_prior,
    check_rows,
    check_stored,
    default_tile,
    density_prior,
    energies,
    log_sums,
    quantities,
)

__all__ = [
    "MEMORY_LIMIT",
    "QUANTITIES",
    "Block",
    "Feed",
    "Sizes",
    "Tile",
    "density_prior",
    "energies",
    "energy_changes",
    "feed",
    "log_sums",
    "pieces",
    "plan",
    "quantities",
    "stream",
    "summarise",
]

MEMORY_LIMIT = 512 << 20


class Block(NamedTuple):
    """Finished states: which rows, and their quantities by name."""

    rows: slice
    values: dict[str, np.ndarray]


class Sizes(NamedTuple):
    """What keeps all buffers within the memory limit: states a block, memories a tile, memories on the device at a time."""

    states: int
    tile: int
    memories: int


def plan(count: int, memories: Rows, needs: Collection[str], memory_limit: int, tile: Tile | None, *, beside: int = 0) -> Sizes:
    """Sizes for `count` states and these memories, and so many more numbers a state.

    Raises: ValueError for a limit that even the smallest tiles exceed.
    """
    total, dim = memories.shape
    item = jax.dtypes.canonicalize_dtype(memories.dtype).itemsize
    wanted = tile or default_tile()
    states, columns = min(wanted.states, count), min(wanted.memories, total)
    on_device = isinstance(memories, Array)
    shifted = "closest" in needs  # states, memories and overlaps a second time
    # A state: itself and its results; its mean memory as it is carried, added to, scaled and handed out.
    per_state = item * (dim * (2 + 4 * ("mean" in needs) + 2 * shifted) + 24 + beside)
    per_memory = 0 if on_device else 2 * item * (dim + 1)  # one block is computed with while the next arrives

    def held(states: int, columns: int, memories: int) -> int:
        # Of a tile: overlaps, weights, and what a reduction holds in between.
        return item * columns * (states * (3 + 2 * shifted) + dim * (2 + shifted)) + states * per_state + memories * per_memory

    while tile is None and held(states, columns, columns) > memory_limit and states * columns > 64:
        states, columns = (states, -(-columns // 2)) if columns > states else (-(-states // 2), columns)
    least = held(states, columns, columns)
    if least > memory_limit:
        raise ValueError(f"memory_limit={memory_limit} is too small: tiles of {states} × {columns} of dimension {dim} need {least} bytes")
    if on_device:
        return Sizes(states, columns, total)
    return Sizes(states, columns, min(total, (memory_limit - held(states, columns, 0)) // per_memory // columns * columns))


# What runs on the device: moments over nothing, over a further piece of the memories, and the quantities' formulas.
_none = jax.jit(empty, static_argnames="needs")
_step = jax.jit(accumulate, static_argnames=("needs", "rows"), donate_argnames="moments")


@partial(jax.jit, static_argnames="names")
def _finish(moments: Moments, states: Array, beta: Array, own_log_prior: Array | None, names: tuple[str, ...]) -> dict[str, Array]:
    soft = Softmax(moments, states, beta, own_log_prior)
    return {name: QUANTITIES[name].of(soft) for name in names}


def stream(
    states: Rows,
    memories: Rows,
    beta: Real[ArrayLike, ""],
    quantities: Sequence[str],
    *,
    own: NDArray[np.integer] | None = None,
    log_prior: NDArray[np.floating] | None = None,
    memory_limit: int = MEMORY_LIMIT,
    tile: Tile | None = None,
    start: int = 0,
) -> Iterator[Block]:
    """Quantities of all states, block by block as they are finished.

    Args:
        states: n × d, on the host (a memory-mapped file, say) or on a device, in the memories' dtype.
        memories: m × d, likewise; every block of states reads all of them once.
        beta: inverse temperature.
        quantities: names from `QUANTITIES`.
        own: index of each state among the memories, if states are stored: state i must be memories[own[i]]. The weight of the other
            memories, and with it all that departs from a perfect memory, then keeps its relative accuracy.
        log_prior: log π of each memory; by default π = 1, the paper's Eq. (1).
        memory_limit: bytes that are held at most besides the inputs, the results and compiled programs.
        tile: states a block and memories a tile; by default what is fast on this platform, or smaller to keep within the limit.
        start: the state to begin with, to go on where an interrupted run stopped: the end of a block of its.

    Raises: ValueError naming what does not fit, before anything is computed; a state that is not its own memory when its turn comes.
    """
    check_rows(states, memories)
    check_beta(beta)
    needs = needed(quantities, stored=own is not None)
    if own is not None:
        own = np.asarray(own)
        check_own(own, len(states), len(memories))
    sizes = plan(len(states), memories, needs, memory_limit, tile)
    return _blocks(states, feed(memories, log_prior, sizes.memories), beta, tuple(quantities), needs, own, sizes, start)


@dataclass(frozen=True, eq=False)
class Feed:
    """Memories as they come to the device, piece by piece, all of one shape: the last one reaches back, to what no longer counts.

    Attributes:
        memories: on the host or on a device.
        prior: log π of each, in the dtype of the computation.
        rows: memories a piece; one that has them all stays on the device.
    """

    memories: Rows
    prior: NDArray[np.floating]
    rows: int

    def __iter__(self) -> Iterator[tuple[int, Array, Array]]:
        """Index of the piece's first memory, the memories' offsets, the memories."""
        return iter([self._whole]) if self.rows == len(self.memories) else map(self._piece, range(0, len(self.memories), self.rows))

    @cached_property
    def _whole(self) -> tuple[int, Array, Array]:
        return 0, jnp.asarray(self.prior), jnp.asarray(self.memories, self.prior.dtype)

    def _piece(self, begun: int) -> tuple[int, Array, Array]:
        end = min(begun + self.rows, len(self.memories))
        first = end - self.rows
        offset = np.where(np.arange(first, end) < begun, -np.inf, self.prior[first:end]).astype(self.prior.dtype)
        return first, jnp.asarray(offset), jnp.asarray(self.memories[first:end], self.prior.dtype)


def feed(memories: Rows, log_prior: NDArray[np.floating] | None, rows: int) -> Feed:
    """A feed in the dtype that JAX computes in. Raises ValueError unless there is one number per memory."""
    dtype = jax.dtypes.canonicalize_dtype(memories.dtype)
    prior = np.zeros(len(memories), dtype) if log_prior is None else np.asarray(log_prior, dtype)
    check_prior(prior, len(memories))
    return Feed(memories, prior, rows)


def pieces(count: int, rows: int, start: int = 0) -> Iterator[tuple[int, int, int]]:
    """(first, begun, end): rows `begun` … `end` in pieces of one shape, which for the last one takes those from `first` on."""
    for begun in range(start, count, rows):
        end = min(begun + rows, count)
        yield max(0, end - rows), begun, end


def _blocks(
    states: Rows,
    feed: Feed,
    beta: Real[ArrayLike, ""],
    quantities: tuple[str, ...],
    needs: tuple[str, ...],
    own: NDArray[np.integer] | None,
    sizes: Sizes,
    start: int,
) -> Iterator[Block]:
    b = np.asarray(beta, feed.prior.dtype)
    for first, begun, end in pieces(len(states), sizes.states, start):
        x = jnp.asarray(states[first:end], b.dtype)
        me = own_prior = None
        if own is not None:
            check_stored(states, feed.memories, own, begun, end)
            me, own_prior = own[first:end].astype(np.int32), feed.prior[own[first:end]]
        moments = _none(x, needs)
        for place, offset, memories in feed:
            # The step before was computed while this piece arrived; no more than two are held.
            jax.block_until_ready(moments)
            moments = _step(moments, x, memories, b, offset, me, needs=needs, rows=sizes.tile, first=place)
        values = _finish(moments, x, b, own_prior, names=quantities)
        yield Block(slice(begun, end), {name: np.asarray(value)[begun - first :] for name, value in values.items()})


def summarise(
    states: Rows,
    memories: Rows,
    beta: Real[ArrayLike, ""],
    quantities: Sequence[str],
    *,
    own: NDArray[np.integer] | None = None,
    log_prior: NDArray[np.floating] | None = None,
    memory_limit: int = MEMORY_LIMIT,
    tile: Tile | None = None,
) -> dict[str, np.ndarray]:
    """Quantities of all states by name, each an array of n numbers (n × d for "update"); see `stream` for the arguments.

    >>> import numpy as np, hopjax
    >>> images = np.eye(8, dtype=np.float32)
    >>> found = hopjax.tiled.summarise(images, images, 4.0, ["energy", "sharpness"], own=np.arange(8))
    """
    blocks = stream(states, memories, beta, quantities, own=own, log_prior=log_prior, memory_limit=memory_limit, tile=tile)
    parts = [block.values for block in blocks]
    return {name: np.concatenate([part[name] for part in parts]) for name in quantities}


def energy_changes(
    states: Rows,
    before: Rows,
    after: Rows,
    beta: Real[ArrayLike, ""],
    *,
    own: NDArray[np.integer] | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Float[np.ndarray, " n"]:
    """ΔE(x) = E(x; after) − E(x; before) of all states, Eq. (4); the numbers of memories may differ.

    Args:
        own: index of each state among the memories *before*, if it is stored there; see `stream` for the other arguments.

    Accuracy: a few eps·(R² + (log m + number of tiles)/β) absolute: |x|² and the states' own terms are never subtracted.
    """
    excess = [
        summarise(states, memories, beta, ["excess"], own=index, memory_limit=memory_limit)["excess"]
        for memories, index in ((after, None), (before, own))
    ]
    return excess[0] - excess[1]
