r"""Replay buffers: which of Task 1's samples to keep, to be replayed while Task 2 is learnt.

A policy answers `choose(candidates, size)` with places in the candidates, most wanted first and among equals the lowest place first. All
policies here are nested: a larger buffer begins with the smaller one.

Each replayed sample is one more term in the energy's sum, so with $\pi_B = \sum_{z\in B} e^{\beta z\cdot x}/Z_1(x)$ the exact gain of one
sample is that of a buffer B as well. The buffer is worth its sum over the targets x, averaged over draws of the rise ΔE:

$$F(B) = \sum_x \langle G(x)\rangle, \qquad G = \beta^{-1}\log\frac{1 + \pi_B e^{\beta\Delta E}}{1 + \pi_B} \quad\text{or}\quad
G_\mathrm{raw} = \beta^{-1}\log(1 + \pi_B e^{\beta\Delta E}).$$

In π_B, which is a sum over B, $G_\mathrm{raw}$ is increasing and concave, and for ΔE ≥ 0 so is G. Then F is monotone and submodular, and
the greedy buffer has at least (1 − 1/e) of the largest F of its size (Nemhauser, Wolsey and Fisher, 1978). For ΔE < 0, G is decreasing and
convex: with such targets the guarantee is lost.

What z adds to B is again a gain, that of z when both tasks have been extended by B (for $G_\mathrm{raw}$ only Task 2): its weight is then
π_z/(1 + π_B) and the rise ΔE − G, itself minus the gain of a weight 1/π_B under −ΔE. No two sums are subtracted.
Source: arXiv:2605.27975, Eqs. (86)-(93).
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int64, Integer, Real

from hopjax import tiled
from hopjax.energy import _matmul, _positive
from hopjax.replay import gain, raw_gain


@dataclass(frozen=True, eq=False)
class Candidates:
    """Samples of Task 1, by what is known of them: give what the policy goes by.

    Attributes:
        scores: their energies, or what orders them alike: −log_leakage of `hopjax.tiled` still tells stored samples apart where β is so
            large that their energies agree in all digits.
        labels: their classes.
        rows: the samples themselves, in memory or mapped from a file.

    Raises: ValueError for no samples, different numbers of them, or a score that is NaN.
    """

    scores: Float[Array | np.ndarray, " n"] | None = None
    labels: Integer[Array | np.ndarray, " n"] | None = None
    rows: Float[Array | np.ndarray, "n d"] | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(value) for name, value in vars(self).items() if value is not None}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"candidates need scores, labels or rows, one for each of at least one sample: got {lengths}")
        if self.scores is not None and (bad := np.flatnonzero(np.isnan(self.scores))).size:
            raise ValueError(f"score {bad[0]} is NaN, so the sample has no place in an order: leave it out")

    def __len__(self) -> int:
        return next(len(value) for value in vars(self).values() if value is not None)


def _known(candidates: Candidates, name: str) -> np.ndarray | Array:
    if (value := getattr(candidates, name)) is None:
        raise ValueError(f"this policy goes by the candidates' {name}: give Candidates({name}=...)")
    return value


def _check_size(size: int, count: int) -> None:
    if not 1 <= size <= count:
        raise ValueError(f"size={size}: need 1 ≤ size ≤ {count}, the number of candidates")


@runtime_checkable
class Policy(Protocol):
    """A way of filling a buffer. Raises ValueError for a size outside 1 … n and for candidates that lack what it goes by."""

    def choose(self, candidates: Candidates, size: int) -> Int64[np.ndarray, " size"]: ...


# ---- By what is known of each sample -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HighestEnergy:
    """The highest scores: outliers before members of a cluster."""

    def choose(self, candidates: Candidates, size: int) -> Int64[np.ndarray, " size"]:
        return _first(size, np.argsort(-np.asarray(_known(candidates, "scores")), kind="stable"))


@dataclass(frozen=True)
class LowestEnergy:
    """The lowest scores: typical samples."""

    def choose(self, candidates: Candidates, size: int) -> Int64[np.ndarray, " size"]:
        return _first(size, np.argsort(np.asarray(_known(candidates, "scores")), kind="stable"))


@dataclass(frozen=True)
class Random:
    """Uniformly without replacement, what the others are compared with; the same seed chooses the same places."""

    seed: int = 0

    def choose(self, candidates: Candidates, size: int) -> Int64[np.ndarray, " size"]:
        return _first(size, np.random.default_rng(self.seed).permutation(len(candidates)))


@dataclass(frozen=True)
class Stratified:
    """As many from each quantile bin of the scores, to within one while a bin lasts; inside a bin at random.

    Attributes:
        bins: the number of bins; each holds n/bins candidates, to within one.
        seed: as in `Random`; decides also the bins that an uneven share goes to.

    Raises: ValueError (by `choose`) for `bins` below one.
    """

    bins: int = 10
    seed: int = 0

    def choose(self, candidates: Candidates, size: int) -> Int64[np.ndarray, " size"]:
        if self.bins < 1:
            raise ValueError(f"bins={self.bins}: need at least 1 bin")
        count = len(candidates)
        bins = np.empty(count, np.int64)
        bins[LowestEnergy().choose(candidates, count)] = np.arange(count) * self.bins // count
        return _first(size, _in_turn(Random(self.seed).choose(candidates, count), bins))


@dataclass(frozen=True)
class ClassBalanced:
    """As many from each class, to within one while a class lasts; what small classes leave goes to the others, again evenly.

    Attributes:
        within: the nested policy for a class, by default the highest energy; decides also the classes that an uneven share goes to.
    """

    within: Policy = HighestEnergy()

    def choose(self, candidates: Candidates, size: int) -> Int64[np.ndarray, " size"]:
        labels = np.asarray(_known(candidates, "labels"))
        return _first(size, _in_turn(self.within.choose(candidates, len(candidates)), labels))


def _first(size: int, order: np.ndarray) -> np.ndarray:
    _check_size(size, len(order))
    return order[:size].astype(np.int64)


def _in_turn(order: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """`order` such that the k-th of every group comes before the (k+1)-th of any."""
    groups = groups[order]
    by_group = np.argsort(groups, kind="stable")
    turn = np.empty(len(order), np.int64)
    turn[by_group] = np.arange(len(order)) - np.searchsorted(groups[by_group], groups[by_group])
    return order[np.argsort(turn, kind="stable")]


# ---- By what the buffer as a whole is worth ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GreedyCoverage:
    """Again and again the sample that adds most to F; the module's introduction says how near this comes to the largest F.

    The buffer is that of plain greedy search, found lazily (Minoux, 1978): the more is in B, the less a sample adds, so what it added
    once bounds what it adds now, and few are evaluated again. That fails for targets with ΔE < 0, which add at most 0 however: the bound
    leaves them out, and holds for any rises. Every place is filled, even if with such targets all samples do harm.

    Cost: t·n products for the first place, usually t·batch for another. Every evaluation needs all targets, so they stay on the device,
    the candidates on the host: with r rows of rises it holds (t + batch)·d + t·(2r + 8) + 6·t·batch numbers at most, 4 bytes each in
    single precision. Where that is too much, a smaller `batch` chooses the same buffer.
    Accuracy: relative errors of a few eps·(βR² + β|ΔE|) in what samples add, and eps·√t of their sums; R is the largest norm.

    Attributes:
        targets: the states to be remembered, often the candidates themselves.
        log_sums: log Z₁(x) = log Σ_μ exp(β ξ_μ·x) of each target over all of Task 1, see `hopjax.tiled.log_sums`.
        rises: ΔE(x) = E(x; X₂) − E(x; X₁) of each target; or more of them, one row for each draw of Task 2.
        subtract_baseline: whether the gain is G or G_raw.
        batch: candidates evaluated at a time.
        progress: called after each batch with the numbers of samples chosen and of evaluations so far.

    Raises: ValueError (by `choose`) for shapes or dtypes that do not fit, numbers that are not finite, β ≤ 0, or `batch` below one.
    """

    targets: Float[Array | np.ndarray, "t d"]
    log_sums: Float[Array | np.ndarray, " t"]
    rises: Float[Array | np.ndarray, "*r t"]
    beta: float
    subtract_baseline: bool = True
    batch: int = 64
    progress: Callable[[int, int], None] = lambda chosen, evaluations: None

    def choose(self, candidates: Candidates, size: int) -> Int64[np.ndarray, " size"]:
        rows = _known(candidates, "rows")
        _check_size(size, len(rows))
        targets, log_sums, rises = _on_device(self.targets, self.log_sums, self.rises, rows)
        largest = 1 + float(np.max(np.abs(log_sums))) + self.beta * float(np.max(np.abs(rises)))
        if not (self.beta > 0 and self.batch > 0 and math.isfinite(largest)):
            raise ValueError(f"beta={self.beta}, batch={self.batch}: need both positive, and beta, log_sums and rises finite")
        # Rounding may lift a gain over its bound, by a few eps of the largest exponent in it.
        slack = 1 + 16 * float(jnp.finfo(targets.dtype).eps) * largest

        chosen, evaluations = np.empty(size, np.int64), 0
        log_weight = jnp.full_like(log_sums, -jnp.inf)
        waiting = [(-math.inf, place) for place in range(len(rows))]  # a heap of (−bound, place)
        for count in range(size):
            best, evaluated = (math.inf, len(rows), 0.0), []  # (−gain, place, −bound)
            while waiting and waiting[0][0] * slack < best[0]:
                places = [heapq.heappop(waiting)[1] for _ in range(min(self.batch, len(waiting)))]
                batch = jnp.asarray(rows[np.resize(places, self.batch)])  # filled up by repetition: one compiled shape
                gains, bounds = _marginal_gains(batch, targets, log_sums, rises, log_weight, self.beta, raw=not self.subtract_baseline)
                for place, value, bound in zip(places, gains.tolist(), bounds.tolist(), strict=False):
                    if not math.isfinite(value):
                        raise ValueError(f"candidate {place} would gain {value}: its row and the targets must be finite and not huge")
                    evaluated.append((-value, place, -bound))
                    best = min(best, evaluated[-1])
                evaluations += len(places)
                self.progress(count, evaluations)
            chosen[count] = best[1]
            log_weight = _extended(log_weight, jnp.asarray(rows[best[1]]), targets, log_sums, self.beta)
            for _, place, bound in evaluated:
                if place != best[1]:
                    heapq.heappush(waiting, (bound, place))
        return chosen


def buffer_gains(
    targets: Float[Array | np.ndarray, "t d"],
    replayed: Float[Array | np.ndarray, "z d"],
    log_sums: Float[Array | np.ndarray, " t"],
    rises: Float[Array | np.ndarray, "*r t"],
    beta: Real[ArrayLike, ""],
    *,
    subtract_baseline: bool = True,
) -> Float[Array, "*r t"]:
    """Exact gain of each target from replaying a whole buffer, for each draw of its rise; F is the sum over targets of the mean over draws.

    Args:
        replayed: the buffer's samples.
        targets, log_sums, rises, subtract_baseline: as in `GreedyCoverage`.

    Memory: (t + z)·d + t·(5r + 8) numbers and tiles of the default size, on the device; a part of the targets at a time gives the same.
    Raises: ValueError for shapes or dtypes that do not fit.
    Accuracy: that of `hopjax.gain` and `hopjax.raw_gain` at a log π_B good to a few eps·βR², R the largest norm.
    """
    states, numbers, draws = _on_device(targets, log_sums, rises, replayed)
    return _buffer_gains(states, jnp.asarray(replayed), numbers, draws, beta, raw=not subtract_baseline).reshape(rises.shape)


def _on_device(targets: ArrayLike, log_sums: ArrayLike, rises: ArrayLike, rows: np.ndarray | Array) -> tuple[Array, Array, Array]:
    """The targets, and in their dtype log_sums and rises, the latter with one axis for draws."""
    states = jnp.asarray(targets)
    numbers, draws = jnp.asarray(log_sums, states.dtype), jnp.asarray(rises, states.dtype)
    if states.ndim != 2 or len(states) == 0 or states.shape[1:] != rows.shape[1:] or states.dtype != rows.dtype:
        raise ValueError(f"targets are {states.dtype} {states.shape}, samples {rows.dtype} {rows.shape}: need rows of one length and dtype")
    if numbers.shape != states.shape[:1] or draws.shape[-1:] != states.shape[:1]:
        raise ValueError(f"log_sums are {numbers.shape}, rises {draws.shape}: need ({len(states)},), and for rises any axes before")
    return states, numbers, draws.reshape(-1, len(states))


@partial(jax.jit, static_argnames="raw")
def _buffer_gains(targets: Array, replayed: Array, log_sums: Array, rises: Array, beta: ArrayLike, *, raw: bool) -> Array:
    log_weight = tiled.log_sums(targets, replayed, beta) - log_sums
    return (raw_gain if raw else gain)(jnp.broadcast_to(log_weight[None], rises.shape), rises, beta)


@jax.jit
def _extended(log_weight: Array, row: Array, targets: Array, log_sums: Array, beta: ArrayLike) -> Array:
    """log π of the buffer with one more sample."""
    return jnp.logaddexp(log_weight, _positive(beta, targets) * _matmul(targets, row) - log_sums)


@partial(jax.jit, static_argnames="raw")
def _marginal_gains(
    rows: Array, targets: Array, log_sums: Array, rises: Array, log_weight: Array, beta: ArrayLike, *, raw: bool
) -> tuple[Array, Array]:
    """What each row adds to the F of a buffer with this log π_B, and a bound on what it adds to any larger buffer."""
    beta = _positive(beta, targets)
    grown = log_sums if raw else log_sums + jax.nn.softplus(log_weight)  # log Z₁ with B in Task 1
    log_pi = beta * _matmul(targets, rows.T) - grown[:, None]

    def add(totals: tuple[Array, Array], rise: Array) -> tuple[tuple[Array, Array], None]:
        rest = -jnp.logaddexp(log_weight, -beta * rise) / beta if raw else -gain(-log_weight, -rise, beta)  # ΔE − G
        terms = (raw_gain if raw else gain)(log_pi, jnp.broadcast_to(rest[:, None], log_pi.shape), beta)
        return (totals[0] + jnp.sum(terms, axis=0), totals[1] + jnp.sum(jnp.maximum(terms, 0), axis=0)), None

    (gains, bounds), _ = lax.scan(add, (jnp.zeros_like(log_pi[0]),) * 2, rises)
    return gains / rises.shape[0], bounds / rises.shape[0]
