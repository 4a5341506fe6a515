r"""The Boltzmann machine of the modern Hopfield network: memories W learned from samples by maximum likelihood.

$$p(x) = e^{-\beta E(x; W)}/Z(W), \qquad \nabla_{\xi_\mu}\log p(x) = \beta\,[\gamma_\mu(x)\,x - \pi_\mu\xi_\mu], \qquad
\gamma = \mathrm{softmax}(\beta W x), \quad \pi_\mu \propto e^{\beta|\xi_\mu|^2/2}$$

One β stands in loss, update and energy. The density is a Gaussian mixture whose weights π are tied to the memories' norms; its log Z, its
density at one state and exact samples are `hopjax.log_partition`, `hopjax.log_density` and `hopjax.sample_boltzmann`.

An E-step needs the moments $s_\mu = \langle\gamma_\mu x\rangle$ alone. The M-step maximises $\beta\sum_\mu s_\mu\cdot\xi_\mu -
\log\sum_\mu e^{\beta|\xi_\mu|^2/2}$: each memory lies along its moment, and stationarity of its length t, $|s_\mu| = \pi_\mu t_\mu$, reads
$w + \log w = 2A + \log\beta|s_\mu|^2$ in $w = \beta t^2$, with A the logarithm of the normalising sum (w is Wright's ω function). That the
weights $|s_\mu|/t_\mu$ sum to one is then one equation for A, convex and decreasing, whose root is the only stationary point: no closed
form, but an exact M-step. With all norms fixed it has one, ξ ∝ s. Source: arXiv:2605.27975, Eq. (3).
"""

import enum
import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, Real

from hopjax.energy import _matmul, _positive, log_partition
from hopjax.tiles import Tile, check_rows, default_tile, density_prior, log_sums

# ---- Likelihood ----------------------------------------------------------------------------------------------------------


def log_likelihoods(
    samples: Float[Array, "n d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""], *, tile: Tile | None = None
) -> Float[Array, " n"]:
    """log p(x) of many samples, in O(tile) memory and with first derivatives that stream too; `hopjax.log_density` is that of one.

    Accuracy: a few eps·βR² absolute, R the largest norm: −βE and log Z are subtracted.
    """
    exponents = log_sums(samples, memories, beta, tile=tile) - 0.5 * _positive(beta, memories) * jnp.sum(samples**2, axis=1)
    return exponents - log_partition(memories, beta)


def log_likelihood(
    samples: Float[Array, "n d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""], *, tile: Tile | None = None
) -> Float[Array, ""]:
    """Mean log p(x) of the samples, which all fits maximise; its gradient by the memories is β(s_μ − π_μ ξ_μ)."""
    return jnp.mean(log_likelihoods(samples, memories, beta, tile=tile))


def responsibilities(samples: Float[Array, "n d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, "n m"]:
    """γ_μ(x), the posterior weight of every memory at every sample: `hopjax.weights` of many states, all held in memory."""
    check_rows(samples, memories)
    return jax.nn.softmax(_positive(beta, memories) * _matmul(samples, memories.T), axis=1)


class Moments(NamedTuple):
    """What an E-step leaves of the samples.

    Attributes:
        log_likelihood: mean log p(x).
        mean: s_μ = ⟨γ_μ x⟩.
    """

    log_likelihood: Float[Array, ""]
    mean: Float[Array, "m d"]


def expectation(
    samples: Float[Array, "n d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""], *, rows: int | None = None
) -> Moments:
    """E-step: the moments of the samples under these memories, in one pass.

    Args:
        rows: samples held against all memories at a time; by default what is fast on the platform.
    """
    check_rows(samples, memories)
    beta = _positive(beta, memories)
    log_sum, mean = _pass(samples, memories, beta, jnp.zeros(memories.shape[0], memories.dtype), rows)
    return Moments(log_sum - _radial(samples, beta) - log_partition(memories, beta), mean)


def _radial(samples: Array, beta: Array) -> Array:
    return 0.5 * beta * jnp.mean(jnp.sum(samples**2, axis=1))


def _pass(samples: Array, memories: Array, beta: Array, offset: Array, rows: int | None = None) -> tuple[Array, Array]:
    """⟨log Σ exp(l)⟩ and ⟨softmax(l)_μ x⟩ over the samples, l = β ξ_μ·x + offset_μ."""
    count = samples.shape[0]
    rows = min(rows or default_tile().states, count)

    def add(place: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(place * rows, count - rows)
        x = lax.dynamic_slice_in_dim(samples, start, rows)
        fresh = start + lax.iota(jnp.int32, rows) >= place * rows  # the last rows reach back
        # Few memories come first: a softmax along the longer axis is several times as fast. For the barrier see `hopjax.moments`.
        logits = beta * lax.optimization_barrier(_matmul(memories, x.T)) + offset[:, None]
        top = jnp.max(logits, axis=0)
        w = jnp.exp(logits - top[None])
        weight = jnp.sum(w, axis=0)
        log_sum, mean = sums
        return (
            log_sum + jnp.sum(jnp.where(fresh, top + jnp.log(weight), 0.0)),
            mean + _matmul(w * jnp.where(fresh, 1 / weight, 0.0)[None], x),
        )

    log_sum, mean = lax.fori_loop(0, -(-count // rows), add, (jnp.zeros((), samples.dtype), jnp.zeros_like(memories)))
    return log_sum / count, mean / count


def _log_omega(y: Array) -> Array:
    """log w where w + log w = y: six of Newton's steps for e^v + v = y, from the right of a convex function, reach rounding for every y."""

    def newton(_: object, v: Array) -> Array:
        w = jnp.exp(v)
        return v - (w + v - y) / (1 + w)

    return lax.fori_loop(0, 6, newton, jnp.where(y > 1, jnp.log(jnp.maximum(y, 1.0)), y))


def maximisation(mean: Float[Array, "m d"], beta: Real[ArrayLike, ""], *, norm: Real[ArrayLike, ""] | None = None) -> Float[Array, "m d"]:
    """M-step: the memories of largest likelihood given the moments s; exact, see the module's introduction.

    Args:
        norm: the norm of all memories; by default norms are free and the mixture's weights tied to them.

    A memory whose moment is zero goes to the origin.
    """
    beta = _positive(beta, mean)
    if norm is not None:
        return _along(mean, jnp.broadcast_to(_positive(norm, mean), mean.shape[:1]))
    length = jnp.linalg.norm(mean, axis=1)
    present = length > 0
    log_length = jnp.log(jnp.where(present, length, 1.0))

    def log_square(log_sum: Array) -> Array:
        """log t² of all memories that have a moment."""
        return _log_omega(2 * log_sum + 2 * log_length + jnp.log(beta)) - jnp.log(beta)

    def newton(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, log_sum, count = carry
        log_t2 = log_square(log_sum)
        log_weights = jnp.where(present, log_length - 0.5 * log_t2, -log_sum)  # without a moment t = 0 and π = e^{−A}
        slope = jnp.sum(jax.nn.softmax(log_weights) / (1 + beta * jnp.where(present, jnp.exp(log_t2), 0.0)))
        return log_sum, log_sum + jax.nn.logsumexp(log_weights) / slope, count + 1

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        before, now, count = carry
        return (now - before > 4 * jnp.finfo(mean.dtype).eps * now) & (count < 50)

    # Two lower bounds on the root, from which the iterates rise: A ≥ log M, and the largest t is at least Σ π t = Σ|s|.
    start = jnp.maximum(0.5 * beta * jnp.sum(length) ** 2, math.log(mean.shape[0]))
    _, root, _ = lax.while_loop(unfinished, newton, (-jnp.ones_like(start), start, jnp.int32(0)))
    return _along(mean, jnp.where(present, jnp.exp(0.5 * log_square(root)), 0.0))


def _along(rows: Array, length: Array) -> Array:
    """Vectors of these lengths in the directions of the rows."""
    norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return length[:, None] * rows / jnp.where(norm == 0, 1.0, norm)


# ---- Fits ----------------------------------------------------------------------------------------------------------------


class Reason(enum.IntEnum):
    """Why a fit stopped; `str(reason)` says it in a line."""

    CONVERGED = 0
    STEPS = 1
    NOT_FINITE = 2

    def __str__(self) -> str:
        return (
            "the memories are within the tolerance of a maximum",
            "all steps were taken before the memories came within the tolerance of a maximum: take more, or loosen it",
            "the likelihood is not finite: samples or starting memories are not, or beta or the norm is not positive",
        )[self]


class Fit(NamedTuple):
    """Learned memories and how far to trust them.

    Attributes:
        memories: W.
        log_likelihood: mean log p of all samples at `memories`.
        residual: how far the farthest memory is from a stationary point of the likelihood, in units of the samples' root mean square
            norm: the sum of all further EM steps, estimated from two of them; infinite where these do not shrink.
        steps: steps taken.
        converged: whether the residual is within the tolerance.
        reason: a `Reason`.
        trace: log-likelihood before each step, NaN after the last: of all samples for `EM`, of the step's batch for `Adam`.
    """

    memories: Float[Array, "m d"]
    log_likelihood: Float[Array, ""]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    reason: Int[Array, ""]
    trace: Float[Array, " t"]


class _Problem(NamedTuple):
    """What a method maximises: the samples' likelihood under memories of this norm, or of any.

    Attributes:
        size: the samples' root mean square norm, in units of which memories move.
    """

    beta: Array
    norm: ArrayLike | None
    size: Array

    def maximise(self, mean: Array) -> Array:
        return maximisation(mean, self.beta, norm=self.norm)

    def project(self, memories: Array) -> Array:
        """Back to the norm that is asked for."""
        return memories if self.norm is None else self.maximise(memories)


class _Climb(NamedTuple):
    """Where a climb has come to; what is not an attribute of `Fit`:

    Attributes:
        following: where one EM step takes the memories.
        move: how far it takes the farthest one, in units of the samples' size.
        ratio: how much of its length a step keeps: EM converges linearly, so all further ones add up to move/(1 − ratio).
    """

    memories: Array
    following: Array
    log_likelihood: Array
    move: Array
    ratio: Array
    steps: Array
    trace: Array

    @property
    def residual(self) -> Array:
        return self.move / (1 - self.ratio)


def _begin(start: Array, steps: int) -> _Climb:
    """About to arrive at the start, with room for so many steps."""
    zero = jnp.zeros((), start.dtype)
    return _Climb(start, start, zero, zero, zero, jnp.int32(-1), jnp.full(steps, jnp.nan, start.dtype))


def _advance(climb: _Climb, moments: Moments, problem: _Problem) -> _Climb:
    """One step on; the moments are those at `climb.following`."""
    memories, following = climb.following, problem.maximise(moments.mean)
    size = jnp.where(problem.size == 0, 1.0, problem.size)
    move = jnp.max(jnp.linalg.norm(following - memories, axis=1)) / size
    ratio = jnp.where(move >= climb.move, 1.0, move / climb.move)
    # At rounding steps shrink no further: what they did before still holds.
    ratio = jnp.where(move > 8 * jnp.finfo(move.dtype).eps, ratio, jnp.minimum(ratio, climb.ratio))
    steps = climb.steps + 1
    trace = climb.trace.at[steps].set(moments.log_likelihood, mode="drop")
    return _Climb(memories, following, moments.log_likelihood, move, ratio, steps, trace)


def _result(climb: _Climb, tolerance: float) -> Fit:
    converged = climb.residual <= tolerance
    finite = jnp.isfinite(climb.log_likelihood) & jnp.isfinite(climb.move)
    reason = jnp.where(converged, Reason.CONVERGED.value, jnp.where(finite, Reason.STEPS.value, Reason.NOT_FINITE.value))
    trace = jnp.where(lax.iota(jnp.int32, climb.trace.shape[0]) < climb.steps, climb.trace, jnp.nan)
    return Fit(climb.memories, climb.log_likelihood, climb.residual, climb.steps, converged, reason, trace)


@runtime_checkable
class Method(Protocol):
    """A way to climb the likelihood."""

    def climb(self, key: Array, samples: Array, problem: _Problem, start: Array) -> Fit: ...


def _tolerance(given: float | None, dtype: jnp.dtype) -> float:
    return float(jnp.finfo(dtype).eps) ** 0.5 if given is None else given


def _check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance={tolerance} must be positive: None takes √eps")


@dataclass(frozen=True)
class EM:
    """Expectation and exact maximisation in turns: the likelihood never falls, and tens of steps reach its maximum.

    Attributes:
        max_steps: steps after which it gives up.
        tolerance: bound on `Fit.residual`, the estimated distance from the maximum, however slowly it is approached; default √eps.
    """

    max_steps: int = 500
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1")
        _check_tolerance(self.tolerance)

    def unfinished(self, climb: _Climb) -> Array:
        """Whether another step is due."""
        return (climb.residual > _tolerance(self.tolerance, climb.move.dtype)) & (climb.steps < self.max_steps) | (climb.steps < 0)

    def climb(self, key: Array, samples: Array, problem: _Problem, start: Array) -> Fit:
        """See `fit`."""

        def advance(climb: _Climb) -> _Climb:
            return _advance(climb, expectation(samples, climb.following, problem.beta), problem)

        climb = lax.while_loop(self.unfinished, advance, _begin(start, self.max_steps))
        return _result(climb, _tolerance(self.tolerance, start.dtype))


@dataclass(frozen=True)
class Adam:
    """Stochastic gradient ascent with Adam's steps, the paper's way; a constant rate leaves the memories with a noise of their own.

    Attributes:
        steps: how many, all of which are taken.
        rate: learning rate, in the samples' unit.
        batch: samples a step, drawn with replacement.
        tolerance: bound on `Fit.residual` for the fit to count as converged; default √eps, which noise does not allow.
    """

    steps: int = 3000
    rate: float = 1e-2
    batch: int = 256
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 < self.rate < math.inf:
            raise ValueError(f"{self}: need steps ≥ 1, batch ≥ 1 and 0 < rate < ∞")
        _check_tolerance(self.tolerance)

    def climb(self, key: Array, samples: Array, problem: _Problem, start: Array) -> Fit:
        """See `fit`."""
        count = samples.shape[0]
        slow, fast, tiny = 0.9, 0.999, 1e-8  # Kingma and Ba's

        def loss(memories: Array, batch: Array) -> Array:
            log_sum = jax.nn.logsumexp(problem.beta * _matmul(memories, batch.T), axis=0)
            return log_partition(memories, problem.beta) - jnp.mean(log_sum)

        def advance(carry: tuple[Array, Array, Array], step: Array) -> tuple[tuple[Array, Array, Array], Array]:
            memories, first, second = carry
            batch = samples[jax.random.randint(jax.random.fold_in(key, step), (self.batch,), 0, count)]
            value, slope = jax.value_and_grad(loss)(memories, batch)
            first, second = slow * first + (1 - slow) * slope, fast * second + (1 - fast) * slope**2
            taken = step.astype(slope.dtype) + 1
            mean, square = first / (1 - slow**taken), second / (1 - fast**taken)
            following = problem.project(memories - self.rate * mean / (jnp.sqrt(square) + tiny))
            return (following, first, second), -value - _radial(batch, problem.beta)

        nothing = jnp.zeros_like(start)
        (memories, _, _), trace = lax.scan(advance, (start, nothing, nothing), jnp.arange(self.steps))
        here = _advance(_begin(memories, 1), expectation(samples, memories, problem.beta), problem)
        further = _advance(here, expectation(samples, here.following, problem.beta), problem)
        end = here._replace(ratio=further.ratio, steps=jnp.int32(self.steps), trace=trace)
        return _result(end, _tolerance(self.tolerance, start.dtype))


def starting_memories(
    key: Key[Array, ""], samples: Float[Array, "n d"], count: int, beta: Real[ArrayLike, ""], *, candidates: int = 4, pool: int = 8192
) -> Float[Array, "m d"]:
    """Memories to start a fit from: greedy k-means++ seeds in the samples' principal subspace, then one EM step from equal weights.

    The second moment is ⟨xxᵀ⟩ = I/β + Σ π ξξᵀ, so the memories lie in the span of its leading vectors, where their noise is least.

    Args:
        candidates: seeds drawn for each memory, of which the best is kept.
        pool: samples that the seeds are drawn from.
    """
    chosen, draw = jax.random.split(key)
    drawn = samples[jax.random.randint(chosen, (pool,), 0, samples.shape[0])]
    # Subspace iteration: the eigenvectors themselves are not needed.
    basis = drawn[: min(count, samples.shape[1])].T
    basis = lax.fori_loop(0, 4, lambda _, basis: jnp.linalg.qr(_matmul(samples.T, _matmul(samples, basis)))[0], basis)
    inside = _matmul(drawn, basis)

    def add(place: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        nearest, seeds = carry
        # All alike at the first seed, and where there are fewer different samples than memories.
        weights = jnp.where((nearest < jnp.inf) & (jnp.max(nearest) > 0), nearest, 1.0)
        tried = inside[jax.random.categorical(jax.random.fold_in(draw, place), jnp.log(weights), shape=(candidates,))]
        distances = jnp.minimum(jnp.sum((tried[:, None] - inside[None]) ** 2, axis=2), nearest[None])
        best = jnp.argmin(jnp.sum(distances, axis=1))
        return distances[best], seeds.at[place].set(tried[best])

    nothing = (jnp.full(pool, jnp.inf, samples.dtype), jnp.zeros((count, basis.shape[1]), samples.dtype))
    _, seeds = lax.fori_loop(0, count, add, nothing)
    memories = _matmul(seeds, basis.T)
    _, mean = _pass(samples, memories, _positive(beta, samples), density_prior(memories, beta))
    return maximisation(mean, beta)


def fit(
    key: Key[Array, ""],
    samples: Float[Array, "n d"],
    count: int,
    beta: Real[ArrayLike, ""],
    *,
    method: Method = EM(),
    norm: Real[ArrayLike, ""] | None = None,
    start: Float[Array, "m d"] | None = None,
) -> Fit:
    """Memories of largest likelihood; `jax.vmap` it over keys and samples.

    Args:
        key: for the start and for `Adam`'s batches.
        samples: the data, all held on the device.
        count: how many memories to learn, at most n.
        beta: inverse temperature, in the inverse square of the samples' unit.
        method: `EM()`, which was measured to be best, or `Adam()`.
        norm: the norm of all memories; by default norms are learned, and with them the mixture's weights.
        start: memories to start from, e.g. those of an earlier task; default `starting_memories`.

    Returns: `Fit`; whether it converged, and why not, is data.
    Raises: ValueError for fewer samples than memories, or shapes and dtypes that do not fit.
    """
    if not 1 <= count <= samples.shape[0]:
        raise ValueError(f"count={count}: need at least one memory, and no more than the {samples.shape[0]} samples")
    begin, climb = jax.random.split(key)
    if start is None:
        start = starting_memories(begin, samples, count, beta)
    check_rows(samples, start)
    if start.shape[0] != count:
        raise ValueError(f"start holds {start.shape[0]} memories and count={count}: need the same")
    problem = _Problem(_positive(beta, samples), norm, jnp.sqrt(jnp.mean(jnp.sum(samples**2, axis=1))))
    return method.climb(climb, samples, problem, problem.project(start))
