r"""Fixed points of the retrieval map, $x^* = T(x^*)$: the bottoms of the energy's basins.

The map descends the energy at every step (it is a concave-convex procedure), so iterating it follows a state into the basin
that it belongs to. Close to the onset of pattern fixed points it creeps; `Newton` and `Anderson` jump ahead, guarded by the
energy and the residual.

Gradients of $x^*$ with respect to memories and β come from the implicit function theorem,
$H(x^*)\,\mathrm dx^* = \partial T$, never by unrolling. Source: arXiv:2605.27975, Eq. (2).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from hopjax.energy import _centred, _check_state, _matmul, _positive, energy, gradient, update_map

_Carry = tuple[Array, tuple[Array, ...], Array, Array]


class FixedPoint(NamedTuple):
    """A fixed point and how far to trust it.

    Attributes:
        state: x*, or the last iterate if the iteration did not converge.
        residual: |x − T(x)| at `state`.
        steps: steps taken.
        converged: whether the residual is within the tolerance.
    """

    state: Float[Array, " d"]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


@runtime_checkable
class Method(Protocol):
    """A way to step towards a fixed point: `start` makes its memory, `step` returns the next state and memory."""

    def start(self, state: Array) -> tuple[Array, ...]: ...

    def step(self, state: Array, memory: tuple[Array, ...], memories: Array, beta: Array) -> tuple[Array, tuple[Array, ...]]: ...


@dataclass(frozen=True)
class Picard:
    """x ← T(x). Linear convergence at the largest eigenvalue of βC; never leaves the basin that it flows through."""

    def start(self, state: Array) -> tuple[Array, ...]:
        return ()

    def step(self, state: Array, memory: tuple[Array, ...], memories: Array, beta: Array) -> tuple[Array, tuple[Array, ...]]:
        return update_map(state, memories, beta), memory


@dataclass(frozen=True)
class Newton:
    """Newton's step where it is safe, the plain map elsewhere: quadratic convergence, also at the onset.

    The step solves a system of order min(m, d). It is taken if it goes downhill, at least quarters the residual without raising the energy,
    and is no longer than the distance at which the residual allows a root. The guard makes a jump to another basin unlikely, not
    impossible: use `Picard` where that matters.
    """

    def start(self, state: Array) -> tuple[Array, ...]:
        return ()

    def step(self, state: Array, memory: tuple[Array, ...], memories: Array, beta: Array) -> tuple[Array, tuple[Array, ...]]:
        descent = -gradient(state, memories, beta)
        newton = _hessian_solve(state, descent, memories, beta)
        return _guarded(state, state + newton, _matmul(newton, descent) > 0, memories, beta), memory


@dataclass(frozen=True)
class Anderson:
    """Anderson mixing over the last `depth` steps, guarded like `Newton`: cheaper a step when m and d are both large."""

    depth: int = 4

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} must be at least 1")

    def start(self, state: Array) -> tuple[Array, ...]:
        history = jnp.full((self.depth, *state.shape), jnp.nan, state.dtype)
        return history, history

    def step(self, state: Array, memory: tuple[Array, ...], memories: Array, beta: Array) -> tuple[Array, tuple[Array, ...]]:
        states, residuals = memory
        residual = -gradient(state, memories, beta)
        known = jnp.isfinite(residuals[:, :1])
        changes = jnp.where(known, residual[None] - residuals, 0.0)
        moves = jnp.where(known, state[None] - states, 0.0)
        gram = _matmul(changes, changes.T)
        # Tikhonov at rounding level: the differences become parallel as the iteration converges.
        ridge = (jnp.finfo(state.dtype).eps * jnp.trace(gram) + jnp.finfo(state.dtype).tiny) * jnp.eye(self.depth, dtype=state.dtype)
        mix = jnp.linalg.solve(gram + ridge, _matmul(changes, residual))
        candidate = state + residual - _matmul(mix, moves + changes)
        following = _guarded(state, candidate, jnp.bool_(True), memories, beta)
        return following, (jnp.roll(states, 1, 0).at[0].set(state), jnp.roll(residuals, 1, 0).at[0].set(residual))


def _guarded(state: Array, candidate: Array, admissible: Array, memories: Array, beta: Array) -> Array:
    """`candidate` if it quarters the residual, does not climb and is not far; otherwise one step of the map.

    A root is within the order of the residual, and even where two roots merge within that of its square root, in units of the
    state's size: what lies farther is another fixed point.
    """
    plain = update_map(state, memories, beta)
    residual, candidate_residual = jnp.linalg.norm(plain - state), jnp.linalg.norm(gradient(candidate, memories, beta))
    now = energy(state, memories, beta)
    rounding = 8 * jnp.finfo(state.dtype).eps * (jnp.abs(now) + _matmul(state, state))
    descends = energy(candidate, memories, beta) <= now + rounding
    close = jnp.sum((candidate - state) ** 2) <= residual * jnp.maximum(jnp.linalg.norm(plain), jnp.linalg.norm(state))
    return jnp.where(admissible & descends & close & (candidate_residual <= 0.25 * residual), candidate, plain)


def _hessian_solve(state: Array, right: Array, memories: Array, beta: ArrayLike) -> Array:
    """H⁻¹ right, through the smaller of a d × d and an m × m system (Woodbury)."""
    p, centred = _centred(state, memories, beta)
    beta = _positive(beta, memories)
    count, dim = memories.shape
    scaled = centred * jnp.sqrt(beta * p)[:, None]  # H = I − scaledᵀ scaled
    if dim <= count:
        return jnp.linalg.solve(jnp.eye(dim, dtype=state.dtype) - _matmul(scaled.T, scaled), right)
    inner = jnp.eye(count, dtype=state.dtype) - _matmul(scaled, scaled.T)
    return right + _matmul(jnp.linalg.solve(inner, _matmul(scaled, right)), scaled)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _solve(memories: Array, beta: Array, start: Array, method: Method, tolerance: float, max_steps: int) -> FixedPoint:
    bound = tolerance * jnp.sqrt(jnp.max(jnp.sum(memories**2, axis=1)))

    def unfinished(carry: _Carry) -> Array:
        _, _, residual, steps = carry
        return (residual > bound) & (steps < max_steps)

    def advance(carry: _Carry) -> _Carry:
        state, memory, _, steps = carry
        state, memory = method.step(state, memory, memories, beta)
        return state, memory, jnp.linalg.norm(gradient(state, memories, beta)), steps + 1

    residual = jnp.linalg.norm(gradient(start, memories, beta))
    state, _, residual, steps = lax.while_loop(unfinished, advance, (start, method.start(start), residual, jnp.int32(0)))
    return FixedPoint(state, residual, steps, residual <= bound)


@_solve.defjvp
def _solve_jvp(
    method: Method, tolerance: float, max_steps: int, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[FixedPoint, FixedPoint]:
    memories, beta, start = primals
    result = _solve(memories, beta, start, method, tolerance, max_steps)
    # x = T(x; X, β) gives H dx = ∂T at x held fixed; where the solver stopped and what it started from carry no derivative.
    _, moved = jax.jvp(lambda m, b: update_map(result.state, m, b), (memories, beta), tangents[:2])
    tangent = _hessian_solve(result.state, moved, memories, beta)
    no_tangent: Any = np.zeros((), dtype=jax.dtypes.float0)
    return result, FixedPoint(tangent, jnp.zeros_like(result.residual), no_tangent, no_tangent)


def fixed_point(
    start: Float[Array, " d"],
    memories: Float[Array, "m d"],
    beta: Real[ArrayLike, ""],
    *,
    method: Method = Newton(),
    tolerance: float | None = None,
    max_steps: int = 10_000,
) -> FixedPoint:
    """The fixed point that `start` flows to.

    Args:
        start: initial state, e.g. a stored memory.
        method: `Newton()` (default), `Anderson()` or `Picard()`.
        tolerance: bound on |x − T(x)| in units of the largest memory norm; default 450 eps, which is 1e-13 in float64.
        max_steps: steps after which the iteration gives up; the result then has `converged = False`.

    Returns: `FixedPoint`; `state` is differentiable in `memories` and `beta` (not in `start`) by the implicit function theorem.
    Raises: ValueError at trace time for shapes and dtypes that do not fit, or `max_steps < 1`.
    """
    _check_state(start, memories)
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps} must be at least 1")
    if tolerance is None:
        tolerance = 450 * float(jnp.finfo(memories.dtype).eps)
    return _solve(memories, _positive(beta, memories), start, method, tolerance, max_steps)
