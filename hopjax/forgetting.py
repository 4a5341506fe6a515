r"""Intrinsic forgetting: how far the energy of a state rises when the memories change, and its average over rotations.

$$\Delta E(x) = E(x; X_2) - E(x; X_1), \qquad
\langle\Delta E\rangle = \tfrac12\varepsilon^2\sigma^2\,[S(x) - (d-1)\,x\cdot\nabla E(x)] + O(\varepsilon^4)$$

The second term vanishes at a fixed point, where the formula is the paper's; off one, for an image as it is, it does not.
The average is exact at second order for any memories and any β. Source: arXiv:2605.27975, Eqs. (4), (8)-(10), (55)-(59).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Key, Real

from hopjax.energy import _check_memories, _check_state, _logits, _matmul, _positive, gradient, sharpness, weights
from hopjax.rotation import Law, Moves, PlanarLaw


def energy_change(
    state: Float[Array, " d"], before: Float[Array, "m1 d"], after: Float[Array, "m2 d"], beta: Real[ArrayLike, ""]
) -> Float[Array, ""]:
    """Intrinsic forgetting ΔE(x) = E(x; after) − E(x; before), Eq. (4): positive where the state lost support.

    The numbers of memories may differ. Eq. (1) has no log M term, so m copies of every memory lower the energy by β⁻¹ log m, and a
    replayed memory counts as one more term in the sum; for equal numbers and equal norms ΔE = −β⁻¹ log p₂(x)/p₁(x).

    Accuracy: absolute error of a few eps·R² + eps·log(m)/β. For memories that move a little, `paired_energy_change` keeps the digits.
    """
    _check_memories(after)
    old, new = _logits(state, before, beta), _logits(state, after, beta)
    top = lax.stop_gradient(jnp.max(old))
    return (jax.nn.logsumexp(old - top) - jax.nn.logsumexp(new - top)) / _positive(beta, before)


def paired_energy_change(
    state: Float[Array, " d"], memories: Float[Array, "m d"], moves: Float[Array, "m d"], beta: Real[ArrayLike, ""]
) -> Float[Array, ""]:
    """ΔE(x) when every memory ξ_μ moves to ξ_μ + moves_μ: no two energies are subtracted, so small moves keep their digits."""
    p = weights(state, memories, beta)
    return energy_rise(p, _matmul(moves, state), beta)


def energy_rise(p: Float[Array, " m"], shift: Float[Array, "*n m"], beta: Real[ArrayLike, ""]) -> Float[Array, "*n"]:
    """ΔE = −β⁻¹ log Σ p_μ exp(β·shift_μ) of a state with softmax weights p when its overlap with ξ_μ changes by shift_μ.

    By log1p/expm1 where all exponents are below one, by log-sum-exp elsewhere. The state's norm must not change.
    """
    beta = _positive(beta, p)
    exponent = beta * shift
    small = jnp.all(jnp.abs(exponent) < 1, axis=-1)
    # Each branch only sees arguments that it can differentiate: a NaN in the other would poison the gradient.
    near = jnp.log1p(_matmul(jnp.expm1(jnp.where(small[..., None], exponent, 0.0)), p))

    def with_far() -> Array:
        far = jax.nn.logsumexp(jnp.where(small[..., None], 0.0, exponent), b=jnp.broadcast_to(p, exponent.shape), axis=-1)
        return jnp.where(small, near, far)

    # Rotations of interest are small: half of the work is then left undone.
    return -lax.cond(jnp.all(small), lambda: near, with_far) / beta


def second_order_rise(
    state: Float[Array, " d"],
    memories: Float[Array, "m d"],
    beta: Real[ArrayLike, ""],
    *,
    epsilon: Real[ArrayLike, ""],
    sigma: Real[ArrayLike, ""],
) -> Float[Array, ""]:
    """Rotation-averaged rise ½ε²σ²[S(x) − (d−1) x·∇E(x)], Eqs. (8)-(9) with the gradient term; drops O(ε⁴).

    At a fixed point the second term is zero. For an image as it is it is not: report the image and the fixed point that it flows
    to as two different things.
    """
    slope = _matmul(state, gradient(state, memories, beta))
    scale = jnp.square(jnp.asarray(epsilon).astype(state.dtype) * jnp.asarray(sigma).astype(state.dtype))
    return 0.5 * scale * (sharpness(state, memories, beta) - (state.shape[0] - 1) * slope)


class Estimate(NamedTuple):
    """A Monte Carlo mean.

    Attributes:
        mean: the estimate.
        standard_error: one standard deviation of `mean`.
        effective_draws: plain rotations that would give the same standard error; inf where that is zero.
    """

    mean: Float[Array, "*s"]
    standard_error: Float[Array, "*s"]
    effective_draws: Float[Array, "*s"]


@runtime_checkable
class Estimator(Protocol):
    """How draws are combined into terms whose mean is the estimate; `rotations` is what one term costs."""

    @property
    def rotations(self) -> int: ...

    def terms(self, value: Array, mirrored: Array, control: Array, control_mean: Array) -> Array: ...


@dataclass(frozen=True)
class Plain:
    """The mean over independent rotations: what Eq. (8) says, and too noisy to see Theorem 4.1."""

    rotations = 1

    def terms(self, value: Array, mirrored: Array, control: Array, control_mean: Array) -> Array:
        return value


@dataclass(frozen=True)
class Antithetic:
    """The mean over pairs A, −A: odd orders in ε cancel."""

    rotations = 2

    def terms(self, value: Array, mirrored: Array, control: Array, control_mean: Array) -> Array:
        return 0.5 * (value + mirrored)


@dataclass(frozen=True)
class ControlVariate:
    """Antithetic pairs less their second-order part, whose mean is known in closed form: the residual is O(ε⁴).

    For small rotations; at angles of order one the second order says little and `Antithetic` alone has the smaller error.
    """

    rotations = 2

    def terms(self, value: Array, mirrored: Array, control: Array, control_mean: Array) -> Array:
        return 0.5 * (value + mirrored) - (control - control_mean)


def _identity(rise: Array) -> Array:
    return rise


def rotation_average(
    key: Key[Array, ""],
    state: Float[Array, " d"],
    memories: Float[Array, "m d"],
    beta: Real[ArrayLike, ""],
    *,
    epsilon: Real[ArrayLike, ""],
    sigma: Real[ArrayLike, ""],
    draws: int = 2000,
    observable: Callable[[Array], Array] = _identity,
    estimator: Estimator = ControlVariate(),
    law: Law = PlanarLaw(),
    batch: int = 1000,
) -> Estimate:
    """Monte Carlo mean over rotations of an observable of the energy rise ΔE(x) = E(Rᵀx; X) − E(x; X).

    `jax.vmap` it over states. The random numbers depend on `key`, `law` and `batch`.

    Args:
        epsilon, sigma: the size of the rotations, see `hopjax.rotation`; traced values need `law=PlanarLaw(angle=...)`.
        draws: rotations evaluated; a multiple of `estimator.rotations`.
        observable: a smooth function of the rise (scalar → any shape); default the rise itself.
        estimator: `ControlVariate()`, `Antithetic()` or `Plain()`.
        law: `PlanarLaw()` or the reference `DenseLaw()`.
        batch: rotations held in memory at a time, about 6·batch·m numbers (and batch·d² in `DenseLaw`).

    Returns: `Estimate` in the shape of the observable.
    Raises: ValueError for a number of draws below four or no multiple of `estimator.rotations`, or d < 2.
    """
    _check_state(state, memories)
    if draws < 4 or draws % estimator.rotations:
        raise ValueError(f"draws={draws} must be at least 4 and a multiple of {estimator.rotations} for {estimator}")
    beta = _positive(beta, memories)
    p = weights(state, memories, beta)
    sample = law.sampler(state, memories, epsilon=epsilon, sigma=sigma)
    observe = jax.vmap(observable)
    # Any multiple of the second-order rise is a control; its slope at the mean follows the observable best.
    mean = second_order_rise(state, memories, beta, epsilon=epsilon, sigma=sigma)
    _, slope = jax.jvp(observable, (mean,), (jnp.ones_like(mean),))

    def evaluate(key: Array, count: int) -> tuple[Array, Array]:
        moves = sample(key, count)
        value, mirrored = observe(energy_rise(p, moves.shift, beta)), observe(energy_rise(p, moves.mirrored, beta))
        second = _second_order(p, moves, beta, epsilon).reshape((count,) + (1,) * slope.ndim)
        return value, estimator.terms(value, mirrored, slope[None] * second, (slope * mean)[None])

    pairs = draws // estimator.rotations
    count = min(batch, pairs)
    keys = jax.random.split(key, math.ceil(pairs / count))
    plain, terms = (jnp.reshape(part, (-1, *slope.shape))[:pairs] for part in lax.map(lambda key: evaluate(key, count), keys))
    variance = jnp.var(terms, axis=0, ddof=1)
    return Estimate(jnp.mean(terms, axis=0), jnp.sqrt(variance / pairs), pairs * jnp.var(plain, axis=0, ddof=1) / variance)


def _second_order(p: Array, moves: Moves, beta: Array, epsilon: ArrayLike) -> Array:
    """½ε²[(Ax)ᵀH(Ax) + (A²x)·∇E] of each draw. The identity part of H and the x of ∇E cancel: |Ax|² + x·A²x = 0."""
    mean = _matmul(moves.tangent, p)
    variance = _matmul((moves.tangent - mean[:, None]) ** 2, p)
    return -0.5 * jnp.square(jnp.asarray(epsilon).astype(p.dtype)) * (beta * variance + _matmul(moves.centripetal, p))


def sample_rises(
    key: Key[Array, ""],
    state: Float[Array, " d"],
    memories: Float[Array, "m d"],
    beta: Real[ArrayLike, ""],
    *,
    epsilon: Real[ArrayLike, ""],
    sigma: Real[ArrayLike, ""],
    draws: int,
    law: Law = PlanarLaw(),
) -> Float[Array, " draws"]:
    """The energy rises themselves under `draws` independent rotations, all held in memory: their distribution, not only its mean."""
    moves = law.sampler(state, memories, epsilon=epsilon, sigma=sigma)(key, draws)
    return energy_rise(weights(state, memories, beta), moves.shift, beta)


def average_rise(
    key: Key[Array, ""],
    state: Float[Array, " d"],
    memories: Float[Array, "m d"],
    beta: Real[ArrayLike, ""],
    *,
    epsilon: Real[ArrayLike, ""],
    sigma: Real[ArrayLike, ""],
    draws: int = 2000,
    estimator: Estimator = ControlVariate(),
    law: Law = PlanarLaw(),
    batch: int = 1000,
) -> Estimate:
    """Monte Carlo estimate of the rotation-averaged forgetting ⟨ΔE(x)⟩, Eq. (8), at all orders in ε; see `rotation_average`."""
    return rotation_average(
        key, state, memories, beta, epsilon=epsilon, sigma=sigma, draws=draws, estimator=estimator, law=law, batch=batch
    )
