r"""The rotation ensemble that carries Task 1 into Task 2, and two ways of drawing from it.

Task 2 stores $R\xi_\mu$ with $R = e^{\varepsilon A}$, $A^\top = -A$, entries above the diagonal iid $N(0, \sigma^2)$, Eq. (6).
By the rotation identity $E(x; RX) = E(R^\top x; X)$, Eq. (17), the state is rotated instead of the memories.

`DenseLaw` draws A and exponentiates it: O(d³) a draw, the reference. `PlanarLaw` uses that A is invariant under orthogonal
conjugation: for fixed x, $R^\top x = \cos\theta\,x + \sin\theta\,|x|\,v$ with v uniform on the unit sphere of $x^\perp$,
independent of θ. Lanczos from x turns A into an antisymmetric tridiagonal matrix with independent entries
$b_i = \sigma\chi_{d-i}$ (Dumitriu and Forrester, 2002), whose exponential acts on $e_1$; its leading block suffices. The energy
sees $R^\top x$ through m inner products only, so a draw costs the same for every d, and the law is exact.

The scale σ is an argument: `unit_entries` (σ = 1), `unit_displacement` (σ = 1/√(d−1)), `half_difference` (Ω = (W − Wᵀ)/2,
σ² = ½). What decides whether a rotation is small is its typical displacement, `displacement` = ε√(d−1)σ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key, Real

from hopjax.energy import _check_state, _matmul


def unit_entries(dim: int) -> float:
    """σ = 1: the theory's scale, Lemma B.5."""
    return 1.0


def unit_displacement(dim: int) -> float:
    """σ = 1/√(d−1): a unit vector moves by ε on average, whatever the dimension."""
    if dim < 2:
        raise ValueError(f"dim={dim}: rotations need at least 2 dimensions")
    return 1 / math.sqrt(dim - 1)


def half_difference(dim: int) -> float:
    """σ = √½: the scale of Ω = (W − Wᵀ)/2 with iid standard normal W."""
    return math.sqrt(0.5)


def displacement(dim: int, epsilon: float, sigma: float) -> float:
    """Root mean square of |εAx|/|x| = ε√(d−1)σ: the rotation is small if this is well below 1."""
    return epsilon * math.sqrt(dim - 1) * sigma


def antisymmetric(
    key: Key[Array, ""], dim: int, sigma: Real[ArrayLike, ""] = 1.0, *, dtype: jnp.dtype | type = float
) -> Float[Array, "d d"]:
    """A random A with Aᵀ = −A and iid N(0, σ²) above the diagonal, Eq. (6)."""
    upper = jnp.triu(jax.random.normal(key, (dim, dim), dtype), 1)
    return (upper - upper.T) * jnp.asarray(sigma).astype(upper.dtype)


def rotation(generator: Float[Array, "d d"], epsilon: Real[ArrayLike, ""]) -> Float[Array, "d d"]:
    """R = exp(εA), a rotation for antisymmetric A, Eq. (6)."""
    return jax.scipy.linalg.expm(generator * jnp.asarray(epsilon).astype(generator.dtype))


class Planar(NamedTuple):
    """Rᵀx = cosθ·x + sinθ·|x|·v for one draw.

    Attributes:
        versine: 1 − cosθ, to full relative accuracy.
        sine: sinθ ≥ 0.
        speed: |Ax|/|x| for the same A; θ = ε·speed + O(ε³).
    """

    versine: Float[Array, "*n"]
    sine: Float[Array, "*n"]
    speed: Float[Array, "*n"]


_Number = TypeVar("_Number", float, Array)


def generator_bound(dim: int, epsilon: _Number, sigma: _Number) -> _Number:
    """εσ(2√d + 6), which bounds ε‖A‖ but for a probability of e^{−18} (Gaussian concentration of the norm about 2σ√d)."""
    return abs(epsilon) * sigma * (2 * math.sqrt(dim) + 6)


def lanczos_size(dim: int, angle: float, dtype: jnp.dtype | type = float) -> int:
    """Order m ≤ d of the tridiagonal block whose truncation error angle^{2m}/(2m)! is below rounding of the versine.

    Args:
        angle: a bound on ε‖A‖, e.g. by `generator_bound`.
    """
    size = 2
    # The versine is of order angle²/2; the block reproduces that order for every m ≥ 2.
    while size < dim and _taylor_remainder(angle, 2 * size) > float(jnp.finfo(dtype).eps):
        size += 1
    return min(size, dim)


def _taylor_remainder(angle: float, order: int) -> float:
    """angle^order/order! relative to the leading angle²/2."""
    return 2 * math.exp((order - 2) * math.log(max(angle, 1e-300)) - math.lgamma(order + 1))


def planar_rotation(
    key: Key[Array, ""],
    dim: int,
    epsilon: Real[ArrayLike, ""],
    sigma: Real[ArrayLike, ""],
    shape: tuple[int, ...] = (),
    *,
    size: int | None = None,
    angle: float | None = None,
    dtype: jnp.dtype | type = float,
) -> Planar:
    """Draws of what exp(−εA) does to one fixed vector; exact in law, at a cost that does not depend on `dim`.

    Args:
        key: a `jax.random.key`.
        dim: the dimension d ≥ 2 of the space.
        epsilon, sigma: the size of the rotation.
        shape: shape of the draws.
        size: Lanczos vectors, 2 ≤ size ≤ dim; default by `lanczos_size` for `angle`.
        angle: a bound on ε‖A‖, which fixes the number of Taylor terms; default `generator_bound(dim, epsilon, sigma)`. Give
            it where epsilon or sigma is traced; draws that it does not cover are NaN.

    Raises: ValueError for `dim < 2`, a size outside its bounds, or no `angle` where epsilon or sigma is traced.
    """
    angle, size = _block(dim, epsilon, sigma, angle, size, dtype)
    chi_squares = jax.random.chisquare(key, _freedoms(dim, size, dtype), (*shape, size - 1), dtype)
    return _planar(chi_squares, dim, epsilon, sigma, angle)


def _block(
    dim: int, epsilon: ArrayLike, sigma: ArrayLike, angle: float | None, size: int | None, dtype: jnp.dtype | type
) -> tuple[float, int]:
    """The bound on the angle and the number of Lanczos vectors, given or by default, and checked."""
    if dim < 2:
        raise ValueError(f"dim={dim}: rotations need at least 2 dimensions")
    if angle is None:
        try:
            angle = generator_bound(dim, float(cast(float, epsilon)), float(cast(float, sigma)))
        except jax.errors.ConcretizationTypeError:
            raise ValueError("epsilon or sigma is traced: give `angle`, a bound on ε‖A‖, e.g. by hopjax.generator_bound") from None
    size = lanczos_size(dim, angle, dtype) if size is None else size
    if not 2 <= size <= dim:
        raise ValueError(f"size={size} Lanczos vectors: need 2 ≤ size ≤ dim={dim}")
    return angle, size


def _freedoms(dim: int, size: int, dtype: jnp.dtype | type) -> Array:
    """Degrees of freedom d − 1, d − 2, … of the block's size − 1 entries."""
    return jnp.asarray(range(dim - 1, dim - size, -1), dtype)


def _planar(chi_squares: Array, dim: int, epsilon: ArrayLike, sigma: ArrayLike, angle: float) -> Planar:
    """The plane rotation of the tridiagonal block with squared entries σ²·chi_squares (last axis)."""
    dtype, shape, size = chi_squares.dtype, chi_squares.shape[:-1], chi_squares.shape[-1] + 1
    epsilon, sigma = (jnp.asarray(value).astype(dtype) for value in (epsilon, sigma))
    entries = sigma * jnp.sqrt(chi_squares)
    covered = generator_bound(dim, jnp.abs(epsilon), sigma) <= angle * (1 + 1e-3)
    stages = max(1, math.ceil(angle))
    terms = 2
    while _taylor_remainder(angle / stages, terms + 1) > float(jnp.finfo(dtype).eps):
        terms += 1
    below = jnp.where(covered, epsilon / stages, jnp.nan) * entries

    def generate(vector: Array) -> Array:
        """−εT/stages times a vector; T has b_i below the diagonal and −b_i above."""
        zero = jnp.zeros((*shape, 1), dtype)
        return jnp.concatenate([below * vector[..., 1:], zero], -1) - jnp.concatenate([zero, below * vector[..., :-1]], -1)

    def stage(_: object, moved: Array) -> Array:
        """One factor of exp(−εT) = exp(−εT/stages)^stages, applied to the increment so that a tiny angle keeps its digits."""
        term = first + moved
        for order in range(1, terms + 1):
            term = generate(term) / order
            moved = moved + term
        return moved

    first = jnp.zeros((*shape, size), dtype).at[..., 0].set(1.0)
    moved = jax.lax.fori_loop(0, stages, stage, jnp.zeros((*shape, size), dtype))
    return Planar(-moved[..., 0], jnp.linalg.norm(moved[..., 1:], axis=-1), entries[..., 0])


class Moves(NamedTuple):
    """n rotations of one state, as m memories see them.

    Attributes:
        shift: ξ_μ·(Rᵀx − x).
        mirrored: an antithetic twin: the same for −A in `DenseLaw`, for −v in `PlanarLaw`. Either has the law of `shift` and
            the opposite first order; their higher orders pair up differently.
        tangent: ξ_μ·(Ax), up to a sign shared by all memories.
        centripetal: ξ_μ·(A²x), or its mean given the plane of the rotation.
    """

    shift: Float[Array, "n m"]
    mirrored: Float[Array, "n m"]
    tangent: Float[Array, "n m"]
    centripetal: Float[Array, "n m"]


@runtime_checkable
class Law(Protocol):
    """A way of drawing rotations of a state: `sampler` does the work that the draws share."""

    def sampler(
        self, state: Float[Array, " d"], memories: Float[Array, "m d"], *, epsilon: Real[ArrayLike, ""], sigma: Real[ArrayLike, ""]
    ) -> Callable[[Key[Array, ""], int], Moves]: ...


@dataclass(frozen=True)
class DenseLaw:
    """A drawn in full and exponentiated: O(d³) a draw and O(nd²) memory. The reference for `PlanarLaw`."""

    def sampler(
        self, state: Float[Array, " d"], memories: Float[Array, "m d"], *, epsilon: Real[ArrayLike, ""], sigma: Real[ArrayLike, ""]
    ) -> Callable[[Key[Array, ""], int], Moves]:
        """See `Law`. Raises ValueError for shapes or dtypes that do not fit."""
        _check_state(state, memories)

        def one(key: Array) -> Moves:
            generator = antisymmetric(key, state.shape[0], sigma, dtype=state.dtype)
            turn = rotation(generator, epsilon)
            tangent = _matmul(generator, state)
            moved = (_matmul(turn.T, state) - state, _matmul(turn, state) - state, tangent, _matmul(generator, tangent))
            return Moves(*(_matmul(memories, vector) for vector in moved))

        return lambda key, count: jax.vmap(one)(jax.random.split(key, count))


@dataclass(frozen=True)
class PlanarLaw:
    """The exact law of the rotated state at O(m²) a draw in any dimension; see the module's introduction.

    Attributes:
        size: Lanczos vectors; default by `lanczos_size`.
        angle: a bound on ε‖A‖, needed where epsilon or sigma is traced, e.g. under `jax.vmap` over a ladder of ε.
    """

    size: int | None = None
    angle: float | None = None

    def sampler(
        self, state: Float[Array, " d"], memories: Float[Array, "m d"], *, epsilon: Real[ArrayLike, ""], sigma: Real[ArrayLike, ""]
    ) -> Callable[[Key[Array, ""], int], Moves]:
        """See `Law`. Raises ValueError for shapes or dtypes that do not fit, or d < 2."""
        _check_state(state, memories)
        count, dim = memories.shape
        angle, size = _block(dim, epsilon, sigma, self.angle, self.size, state.dtype)
        norm = jnp.linalg.norm(state)
        direction = state / jnp.where(norm > 0, norm, 1)
        overlaps = _matmul(memories, state)
        across = memories - _matmul(memories, direction)[:, None] * direction[None]
        # Below dimension m + 1 it is cheaper to draw v itself than its projections.
        projected = count < dim
        factor = jnp.linalg.qr(across.T, mode="r").T if projected else across

        def draw(key: Array, n: int) -> Moves:
            direction_key, chi_key = jax.random.split(key)
            gauss = jax.random.normal(direction_key, (n, factor.shape[1]), state.dtype)
            # One call for the block's entries and, where v is projected, its length outside the memories' span: each compiles for long.
            freedoms = _freedoms(dim, size, state.dtype)
            if outside := dim - 1 - count if projected else 0:
                freedoms = jnp.append(freedoms, jnp.asarray(outside, state.dtype))
            chi_squares = jax.random.chisquare(chi_key, freedoms, (n, freedoms.shape[0]), state.dtype)
            if not projected:
                gauss = gauss - _matmul(gauss, direction)[:, None] * direction[None]
            square = jnp.sum(gauss**2, axis=1) + (chi_squares[:, -1] if outside else 0.0)
            across_plane = norm * _matmul(gauss, factor.T) / jnp.sqrt(square)[:, None]  # |x| ξ_μ·v, v uniform on the sphere of x^⊥
            planar = _planar(chi_squares[:, : size - 1], dim, epsilon, sigma, angle)
            versine, sine, speed = (part[:, None] for part in planar)
            inward = versine * overlaps[None]
            return Moves(sine * across_plane - inward, -sine * across_plane - inward, speed * across_plane, -(speed**2) * overlaps[None])

        return draw
