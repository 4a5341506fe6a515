r"""Sums over many memories inside one program: a tile of states meets a tile of memories, in bounded memory.

`log_sums`, `energies` and `quantities` are for use inside `jax.jit` and `jax.grad`, with a derivative that streams too; `accumulate`
gathers the moments that quantities are made from. How the digits are kept is in `hopjax.moments`. Source: arXiv:2605.27975,
Eqs. (1)-(4).

Accuracy: with R the largest norm, logits carry an error of a few eps·βR² from their products, as in the one-shot formulas; energies a few
eps·(R² + (log m + number of tiles)/β).
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, Real
from numpy.typing import NDArray

from hopjax.energy import _check_memories, _positive
from hopjax.moments import QUANTITIES, SMOOTH, Moments, Softmax, empty, merge, needed, of_tile

# Arrays on the host, in memory or mapped from a file, or on a device.
Rows = NDArray[np.floating] | Array


class Tile(NamedTuple):
    """How many states meet how many memories at a time."""

    states: int
    memories: int


def default_tile(platform: str | None = None) -> Tile:
    """What was measured to be fast on CPUs, where a tile stays in the cache; accelerators want more to do at a time.

    Args:
        platform: "cpu" or another; by default the one in use.
    """
    return Tile(2048, 1024) if (platform or jax.default_backend()) == "cpu" else Tile(8192, 4096)


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


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _moments(states: Array, memories: Array, beta: Array, offset: Array, own: Array | None, needs: tuple[str, ...], tile: Tile) -> Moments:
    def of_rows(states: Array, own: Array | None) -> Moments:
        return accumulate(empty(states, needs), states, memories, beta, offset, own, needs, rows=tile.memories)

    return cast(Moments, by_rows(of_rows, states.shape[0], tile.states, states, own))


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


def _forward(
    states: Array, memories: Array, beta: Array, offset: Array, own: Array | None, needs: tuple[str, ...], tile: Tile
) -> tuple[Moments, _Kept]:
    moments = _moments(states, memories, beta, offset, own, needs, tile)
    return moments, (states, memories, beta, offset, own, moments.top)


def _backward(needs: tuple[str, ...], tile: Tile, kept: _Kept, cotangent: Moments) -> tuple[Array, Array, Array, Array, None]:
    """Tile by tile, with the weights computed again.

    `top` is a constant here, on which nothing that is made from the moments depends: they then are plain sums over the tiles.
    """
    states, memories, beta, offset, own, top = kept
    count, rows = states.shape[0], min(tile.states, states.shape[0])

    def of_states(place: Array, grads: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        start = jnp.minimum(place * rows, count - rows)
        x, high, c, me = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, rows), (states, top, cotangent, own))
        fresh = start + lax.iota(jnp.int32, rows) >= place * rows  # the last rows reach back
        c = jax.tree.map(lambda a: jnp.where(fresh.reshape(-1, *(1,) * (a.ndim - 1)), a, 0.0), c)

        def of_memories(place: Array, grads: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            first, offsets = tile_rows(place, offset, tile.memories)
            part = lax.dynamic_slice_in_dim(memories, first, offsets.shape[0])

            def sums(x: Array, part: Array, beta: Array, offsets: Array) -> Moments:
                return of_tile(x, part, beta, offsets, me, needs, first=first, top=high)

            here, there, by_beta, by_offset = jax.vjp(sums, x, part, beta, offsets)[1](c)
            return grads[0] + here, _added(grads[1], there, first), grads[2] + by_beta, _added(grads[3], by_offset, first)

        by_states, *others = grads
        by_x, *others = lax.fori_loop(0, -(-memories.shape[0] // tile.memories), of_memories, (jnp.zeros_like(x), *others))
        return _added(by_states, by_x, start), *others

    nothing = tuple(jnp.zeros_like(array) for array in (states, memories, beta, offset))
    return *lax.fori_loop(0, -(-count // rows), of_states, nothing), None


_moments.defvjp(_forward, _backward)


def _added(total: Array, term: Array, first: Array) -> Array:
    """`total` with `term` added to the rows from `first` on."""
    return lax.dynamic_update_slice_in_dim(total, lax.dynamic_slice_in_dim(total, first, term.shape[0]) + term, first, 0)


def _checked(states: Array, memories: Array, own: Any, log_prior: Any, *, least: int | None) -> tuple[Array | None, Array]:
    """The states' own indices, if any, and the memories' offsets; raises ValueError for what does not fit."""
    check_rows(states, memories)
    count = memories.shape[0]
    offset = jnp.zeros(count, memories.dtype) if log_prior is None else jnp.asarray(log_prior, memories.dtype)
    check_prior(offset, count)
    if own is None:
        return None, offset
    check_own(own, states.shape[0], count, least=least)
    return jnp.asarray(own, jnp.int32), offset


def _is_known(*arrays: Any) -> bool:
    """Whether their numbers are at hand, here and now: those of a program's arguments are not, nor those that other processes hold."""
    return not any(isinstance(a, jax.core.Tracer) or (isinstance(a, Array) and not a.is_fully_addressable) for a in arrays)


def check_own(own: Any, states: int, memories: int, *, least: int | None = 0) -> None:
    """Raises ValueError unless there is one index per state, in range where it is known; with `least` None negative ones mean no memory."""
    if np.shape(own) != (states,):
        raise ValueError(f"own has shape {np.shape(own)}: need ({states},), one index per state")
    if _is_known(own):
        low, high = np.min(index := np.asarray(own)), np.max(index)
        if high >= memories or (least is not None and low < least):
            raise ValueError(f"own holds {low} … {high}: need indices of memories, 0 … {memories - 1}")


def check_stored(states: Rows, memories: Rows, own: Any, begun: int, end: int) -> None:
    """Raises ValueError unless these states, if they are known, are the memories that `own` says."""
    if not _is_known(states, memories, own):
        return
    mine = np.asarray(own)[begun:end]
    with jax.ensure_compile_time_eval():  # the caller may be traced although these are not
        different = np.any(np.asarray(states[begun:end]) != np.asarray(memories[mine]), axis=1)
    if different.any():
        row = int(np.argmax(different))
        raise ValueError(
            f"state {begun + row} is not its own memory {mine[row]}: they must be equal number for number (or NaN is among them)"
        )


def check_prior(log_prior: Rows, count: int) -> None:
    """Raises ValueError unless there is one number per memory."""
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
    own_index, offset = _checked(states, memories, own, log_prior, least=None)
    moments = _moments(states, memories, _positive(beta, memories), offset, own_index, (), tile or default_tile())
    return moments.top + jnp.log(moments.weight)


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


def quantities(
    states: Float[Array, "n d"],
    memories: Float[Array, "m d"],
    beta: Real[ArrayLike, ""],
    names: Sequence[str],
    *,
    own: Int[ArrayLike, " n"] | None = None,
    log_prior: Float[ArrayLike, " m"] | None = None,
    tile: Tile | None = None,
) -> dict[str, Float[Array, "n *_"]]:
    """Quantities of many states by name, curvature included: `hopjax.tiled.summarise` inside a program, differentiable like `log_sums`.

    Args:
        names: from `QUANTITIES`, but for those that are indices or distances.
        own: index of each state among the memories, if all states are stored. A state is then its own memory, and the derivative of that
            memory's term is by the state; the memory's own row gets none of it.

    Raises: ValueError for a name that is none, or of something that has no derivative; for `own` out of range, or states that are not
        their own memories, where these are known and not a program's arguments.
    """
    needs = needed(names, stored=own is not None)
    rough = [name for name in names if not QUANTITIES[name].needs <= SMOOTH]
    if rough:
        raise ValueError(f"{rough[0]!r} has no derivative: ask `hopjax.tiled.summarise` for it")
    own_index, offset = _checked(states, memories, own, log_prior, least=0)
    if own is not None:
        check_stored(states, memories, own, 0, len(states))
    b = _positive(beta, memories)
    moments = _moments(states, memories, b, offset, own_index, needs, tile or default_tile())
    soft = Softmax(moments, states, b, None if own_index is None else offset[own_index])
    return {name: QUANTITIES[name].of(soft) for name in names}


def density_prior(memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, " m"]:
    """log π = −½β|ξ|², with which E is −β⁻¹ log Σ exp(−½β|x − ξ|²): all memories weigh alike, whatever their norms."""
    _check_memories(memories)
    return -0.5 * _positive(beta, memories) * jnp.sum(memories**2, axis=1)
