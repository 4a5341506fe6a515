r"""Energies of many states against many memories in bounded memory: one pass over tiles.

`summarise` and `stream` take arrays of any size, in host memory or mapped from a file, and compute what is asked for (`QUANTITIES`) and
nothing else; `log_sums` and `energies` are for use inside `jax.jit` and `jax.grad`, with a derivative that streams too. How the digits
are kept is in `hopjax.moments`; many devices are in `hopjax.mesh`. Source: arXiv:2605.27975, Eqs. (1)-(4).

Accuracy: with R the largest norm, logits carry an error of a few eps·βR² from their products, as in the one-shot formulas, and so do
exponents and entropies; energies a few eps·(R² + (log m + number of tiles)/β); the Hessian's trace a few eps·βR²·ℓ with ℓ the weight of
the memories other than the state's own, sharpness and rise R² times that plus eps·dR².
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Real
from numpy.typing import NDArray

from hopjax.energy import _check_memories, _matmul, _positive
from hopjax.moments import QUANTITIES, Moments, Softmax, empty, merge, of_tile

MEMORY_LIMIT = 512 << 20

# Arrays on the host, in memory or mapped from a file, or on a device.
Rows = NDArray[np.floating] | Array


class Tile(NamedTuple):
    """How many states meet how many memories at a time."""

    states: int
    memories: int


def default_tile() -> Tile:
    """What was measured to be fast on CPUs, where a tile stays in the cache; accelerators want more to do at a time."""
    return Tile(2048, 1024) if jax.default_backend() == "cpu" else Tile(8192, 4096)


# ---- Traceable -----------------------------------------------------------------------------------------------------------


def accumulate(
    moments: Moments,
    states: Float[Array, "n d"],
    memories: Float[Array, "m d"],
    beta: Float[Array, ""],
    offset: Float[Array, " m"],
    own: Int[Array, " n"] | None,
    needs: Collection[str],
    *,
    rows: int,
    first: Int[Array, ""] | int = 0,
) -> Moments:
    """`moments` and those of these memories together, `rows` memories at a time.

    Args:
        offset, own, first: as in `hopjax.moments.of_tile`, for all of these memories.
    """

    def add(place: Array, moments: Moments) -> Moments:
        start, offset_rows = tile_rows(place, offset, rows)
        part = lax.dynamic_slice_in_dim(memories, start, offset_rows.shape[0])
        return merge(moments, of_tile(states, part, beta, offset_rows, own, needs, first=first + start, floor=moments.top))

    return lax.fori_loop(0, -(-memories.shape[0] // rows), add, moments)


def tile_rows(place: Array, offset: Array, rows: int) -> tuple[Array, Array]:
    """Where a tile starts and the offsets of its memories: the last one reaches back, and what was seen before does not count again."""
    count = offset.shape[0]
    rows = min(rows, count)
    start = jnp.minimum(place * rows, count - rows)
    seen = start + lax.iota(jnp.int32, rows) < place * rows
    return start, jnp.where(seen, -jnp.inf, lax.dynamic_slice_in_dim(offset, start, rows))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _log_sums(states: Array, memories: Array, beta: Array, offset: Array, own: Array | None, tile: Tile) -> Array:
    def of_rows(states: Array, own: Array | None) -> Array:
        moments = accumulate(empty(states, ()), states, memories, beta, offset, own, (), rows=tile.memories)
        return moments.top + jnp.log(moments.weight)

    return by_rows(of_rows, states.shape[0], tile.states, states, own)


def by_rows(function: Callable[..., Any], count: int, rows: int, *arrays: Array | None) -> Any:
    """`function` of so many rows of the arrays at a time; the last piece reaches back."""
    rows = min(rows, count)
    starts = np.minimum(np.arange(-(-count // rows)) * rows, count - rows)
    pieces = lax.map(lambda start: function(*jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, rows), arrays)), jnp.asarray(starts))
    fresh = (len(starts) - 1) * rows

    def join(parts: Array) -> Array:
        return jnp.concatenate([parts[:-1].reshape(fresh, *parts.shape[2:]), parts[-1][rows - (count - fresh) :]])

    return jax.tree.map(join, pieces)


_Kept = tuple[Array, Array, Array, Array, Array | None, Array]


def _forward(states: Array, memories: Array, beta: Array, offset: Array, own: Array | None, tile: Tile) -> tuple[Array, _Kept]:
    log_sums = _log_sums(states, memories, beta, offset, own, tile)
    return log_sums, (states, memories, beta, offset, own, log_sums)


def _backward(tile: Tile, kept: _Kept, cotangent: Array) -> tuple[Array, Array, Array, Array, None]:
    """With p the softmax and c the cotangent: β(cp)ξ for states, β(cp)ᵀx for memories, Σ cp ξ·x for β, Σ cp for the offsets."""
    states, memories, beta, offset, own, log_sums = kept
    count, rows = states.shape[0], min(tile.states, states.shape[0])

    def of_states(place: Array, grads: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        start = jnp.minimum(place * rows, count - rows)
        x, log_sum, c, me = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, rows), (states, log_sums, cotangent, own))
        c = jnp.where(start + lax.iota(jnp.int32, rows) < place * rows, 0.0, c)  # the last rows reach back

        def of_memories(place: Array, grads: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            by_x, by_memories, by_beta, by_offset = grads
            first, offsets = tile_rows(place, offset, tile.memories)
            part = lax.dynamic_slice_in_dim(memories, first, offsets.shape[0])
            overlaps = lax.optimization_barrier(_matmul(x, part.T))
            logits = beta * overlaps + offsets[None]
            if me is not None:
                logits = jnp.where(first + lax.iota(jnp.int32, part.shape[0])[None] == me[:, None], -jnp.inf, logits)
            p = c[:, None] * jnp.exp(logits - log_sum[:, None])

            def added(total: Array, term: Array) -> Array:
                return lax.dynamic_update_slice_in_dim(total, lax.dynamic_slice_in_dim(total, first, part.shape[0]) + term, first, 0)

            return (
                by_x + beta * _matmul(p, part),
                added(by_memories, beta * _matmul(p.T, x)),
                by_beta + jnp.sum(p * overlaps),
                added(by_offset, jnp.sum(p, axis=0)),
            )

        by_states, *others = grads
        by_x, *others = lax.fori_loop(0, -(-memories.shape[0] // tile.memories), of_memories, (jnp.zeros_like(x), *others))
        by_states = lax.dynamic_update_slice_in_dim(by_states, lax.dynamic_slice_in_dim(by_states, start, rows) + by_x, start, 0)
        return by_states, *others

    nothing = tuple(jnp.zeros_like(array) for array in (states, memories, beta, offset))
    return *lax.fori_loop(0, -(-count // rows), of_states, nothing), None


_log_sums.defvjp(_forward, _backward)


def _checked(states: Array, memories: Array, own: Any, log_prior: Any) -> tuple[Array | None, Array]:
    """The states' own indices, if any, and the memories' offsets; raises ValueError for what does not fit."""
    check_rows(states, memories)
    count = memories.shape[0]
    offset = jnp.zeros(count, memories.dtype) if log_prior is None else jnp.asarray(log_prior, memories.dtype)
    _check_prior(offset, count)
    if own is None:
        return None, offset
    own = jnp.asarray(own, jnp.int32)
    if own.shape != states.shape[:1]:
        raise ValueError(f"own has shape {own.shape}: need ({states.shape[0]},), one index per state")
    return own, offset


def _check_prior(log_prior: Rows, count: int) -> None:
    if log_prior.shape != (count,):
        raise ValueError(f"log_prior has shape {log_prior.shape}: need ({count},), one number per memory")


def check_rows(states: Rows, memories: Rows) -> None:
    """Raises ValueError naming what does not fit."""
    for name, array in (("states", states), ("memories", memories)):
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"{name} have shape {array.shape}: need (rows, dimension), neither of them 0")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {array.dtype}: convert them, e.g. {name}.astype(np.float32)")
    if states.shape[1] != memories.shape[1]:
        raise ValueError(f"states have dimension {states.shape[1]} and memories {memories.shape[1]}: need the same")
    if states.dtype != memories.dtype:
        raise ValueError(f"states are {states.dtype} and memories are {memories.dtype}: convert one of them")


def check_beta(beta: Real[ArrayLike, ""]) -> None:
    """Raises ValueError unless 0 < beta < ∞: where the value is known it is checked, not poisoned."""
    if not 0 < float(cast(float, beta)) < math.inf:
        raise ValueError(f"beta={beta}: need 0 < beta < ∞")


def log_sums(
    states: Float[Array, "n d"],
    memories: Float[Array, "m d"],
    beta: Real[ArrayLike, ""],
    *,
    own: Int[ArrayLike, " n"] | None = None,
    log_prior: Float[ArrayLike, " m"] | None = None,
    tile: Tile | None = None,
) -> Float[Array, " n"]:
    """log Σ_μ π_μ exp(β ξ_μ·x) of many states, traceable, in O(tile) memory, with a first derivative by all arguments that streams too.

    Args:
        own: index of each state's own memory, which the sum then leaves out; negative for a state without one.
        log_prior: log π of each memory; by default π = 1, the paper's Eq. (1).
        tile: by default what is fast on the platform for this dimension.
    """
    own_index, offset = _checked(states, memories, own, log_prior)
    return _log_sums(states, memories, _positive(beta, memories), offset, own_index, tile or default_tile())


def energies(
    states: Float[Array, "n d"],
    memories: Float[Array, "m d"],
    beta: Real[ArrayLike, ""],
    *,
    log_prior: Float[ArrayLike, " m"] | None = None,
    tile: Tile | None = None,
) -> Float[Array, " n"]:
    """E(x; X) of many states, Eq. (1), traceable and differentiable; see `log_sums`.

    A prior of −log m for all memories makes it the log M-normalised variant, `density_prior` that of the kernel density.
    """
    return 0.5 * jnp.sum(states**2, axis=1) - log_sums(states, memories, beta, log_prior=log_prior, tile=tile) / _positive(beta, memories)


def density_prior(memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, " m"]:
    """log π = −½β|ξ|², with which E is −β⁻¹ log Σ exp(−½β|x − ξ|²): all memories weigh alike, whatever their norms."""
    _check_memories(memories)
    return -0.5 * _positive(beta, memories) * jnp.sum(memories**2, axis=1)


# ---- Host ----------------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Finished states: which rows, and their quantities by name."""

    rows: slice
    values: dict[str, np.ndarray]


class Sizes(NamedTuple):
    """What keeps all buffers within the memory limit: states a block, memories a tile, memories on the device at a time."""

    states: int
    tile: int
    memories: int


def plan(count: int, memories: Rows, needs: Collection[str], memory_limit: int, tile: Tile | None) -> Sizes:
    """Sizes for `count` states and these memories. Raises ValueError for a limit that even the smallest tiles exceed."""
    total, dim = memories.shape
    item = jax.dtypes.canonicalize_dtype(memories.dtype).itemsize
    wanted = tile or default_tile()
    states, columns = min(wanted.states, count), min(wanted.memories, total)
    on_device = isinstance(memories, Array)
    # A state: itself and its results; its mean memory as it is carried, added to, scaled and handed out.
    per_state = item * (dim * (6 if "mean" in needs else 2) + 24)
    per_memory = 0 if on_device else 2 * item * (dim + 1)  # one block is computed with while the next arrives

    def held(states: int, columns: int, memories: int) -> int:
        # Of a tile: overlaps, weights, and what a reduction holds in between.
        return 3 * item * states * columns + 2 * item * columns * dim + states * per_state + memories * per_memory

    while tile is None and held(states, columns, columns) > memory_limit and states * columns > 64:
        states, columns = (states, -(-columns // 2)) if columns > states else (-(-states // 2), columns)
    least = held(states, columns, columns)
    if least > memory_limit:
        raise ValueError(f"memory_limit={memory_limit} is too small: tiles of {states} × {columns} of dimension {dim} need {least} bytes")
    if on_device:
        return Sizes(states, columns, total)
    return Sizes(states, columns, min(total, (memory_limit - held(states, columns, 0)) // per_memory // columns * columns))


class _Programs(NamedTuple):
    """What runs on the device: moments over nothing, over a further piece of the memories, and the quantities' formulas."""

    none: Callable[..., Moments]
    step: Callable[..., Moments]
    finish: Callable[..., dict[str, Array]]


@cache
def _programs() -> _Programs:
    def finish(moments: Moments, states: Array, beta: Array, own_log_prior: Array | None, names: tuple[str, ...]) -> dict[str, Array]:
        soft = Softmax(moments, states, beta, own_log_prior)
        return {name: QUANTITIES[name].of(soft) for name in names}

    return _Programs(
        jax.jit(empty, static_argnums=1),
        jax.jit(accumulate, static_argnames=("needs", "rows"), donate_argnames="moments"),
        jax.jit(finish, static_argnames="names"),
    )


def needed(quantities: Sequence[str], stored: bool) -> tuple[str, ...]:
    """The moments that these quantities are made from. Raises ValueError for a name that is none, or needs states to be stored."""
    for name in quantities:
        if name not in QUANTITIES:
            raise ValueError(f"no quantity is named {name!r}: choose from {', '.join(QUANTITIES)}")
        if QUANTITIES[name].stored and not stored:
            raise ValueError(f"{name!r} is defined for stored states only: give `own`, each state's index among the memories")
    return tuple(sorted(frozenset().union(*(QUANTITIES[name].needs for name in quantities))))


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
        if own.shape != states.shape[:1] or own.min() < 0 or own.max() >= len(memories):
            raise ValueError(
                f"own must hold one index per state, 0 … {len(memories) - 1}: got shape {own.shape}, {own.min()} … {own.max()}"
            )
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
    _check_prior(prior, len(memories))
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
    none, step, finish = _programs()
    b = np.asarray(beta, feed.prior.dtype)
    for first, begun, end in pieces(len(states), sizes.states, start):
        x = jnp.asarray(states[first:end], b.dtype)
        me = own_prior = None
        if own is not None:
            _check_stored(states, feed.memories, own, begun, end)
            me, own_prior = own[first:end].astype(np.int32), feed.prior[own[first:end]]
        moments = none(x, needs)
        for place, offset, memories in feed:
            # The step before was computed while this piece arrived; no more than two are held.
            jax.block_until_ready(moments)
            moments = step(moments, x, memories, b, offset, me, needs=needs, rows=sizes.tile, first=place)
        values = finish(moments, x, b, own_prior, names=quantities)
        yield Block(slice(begun, end), {name: np.asarray(value)[begun - first :] for name, value in values.items()})


def _check_stored(states: Rows, memories: Rows, own: NDArray[np.integer], begun: int, end: int) -> None:
    different = np.any(np.asarray(states[begun:end]) != np.asarray(memories[own[begun:end]]), axis=1)
    if different.any():
        row = begun + int(np.argmax(different))
        raise ValueError(f"state {row} is not its own memory {own[row]}: they must be equal number for number (or NaN is among them)")


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
