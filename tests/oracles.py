"""Reference computations that share no code with hopjax: the printed equations in mpmath, to as many digits as asked for.

Floats are taken as the exact binary numbers that they are, so only the kernel's rounding is measured.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mpmath
import numpy as np
from mpmath import mp, mpf

Number = Any  # an mpmath number


def exact(array: Any) -> list:
    """A numpy or jax array of floats as nested lists of mpf, digit for digit."""
    return [exact(row) if np.ndim(row) else mpf(float(row)) for row in np.asarray(array)]


def dot(a: Sequence, b: Sequence) -> Number:
    return mp.fdot(a, b)


def log_sum_exp(values: Sequence) -> Number:
    top = max(values)
    return top + mp.log(mp.fsum(mp.exp(value - top) for value in values))


def energy(state: Sequence, memories: Sequence[Sequence], beta: Number) -> Number:
    """Eq. (1)."""
    return dot(state, state) / 2 - log_sum_exp([beta * dot(row, state) for row in memories]) / beta


def weights(state: Sequence, memories: Sequence[Sequence], beta: Number) -> list:
    logits = [beta * dot(row, state) for row in memories]
    total = log_sum_exp(logits)
    return [mp.exp(logit - total) for logit in logits]


def moved(p: Sequence, memories: Sequence[Sequence]) -> list:
    """T(x) of Eq. (2) for weights p."""
    return [dot(p, column) for column in zip(*memories, strict=True)]


def hessian(state: Sequence, memories: Sequence[Sequence], beta: Number) -> list[list]:
    """Eq. (56), entry by entry."""
    p = weights(state, memories, beta)
    mean, dim = moved(p, memories), len(state)
    return [
        [
            (i == j) - beta * (mp.fsum(w * row[i] * row[j] for w, row in zip(p, memories, strict=True)) - mean[i] * mean[j])
            for j in range(dim)
        ]
        for i in range(dim)
    ]


def sharpness(state: Sequence, memories: Sequence[Sequence], beta: Number) -> Number:
    """|x|² tr H − xᵀHx, Eq. (74), from the Hessian's entries."""
    h = hessian(state, memories, beta)
    trace = mp.fsum(h[i][i] for i in range(len(state)))
    return dot(state, state) * trace - dot(state, [dot(row, state) for row in h])


# ---- The cluster-plus-outlier model, Eqs. (20)-(34) ---------------------------------------------------------------------


def _bisect(function: Callable[[Number], Number], low: Number, high: Number, halvings: int) -> tuple[Number, Number]:
    """Brackets the one sign change from negative at `low` to positive at `high`."""
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return low, high


def outlier_fold(members: float, cosine: float) -> tuple[Number, Number] | None:
    """(y, β) where the outlier's branch y = log(q/p) ends, or None where it goes on to β = 0.

    Eq. (22) solved for β: β(y) = −y (1 + K e^y)/(1 − A e^y), A = 1 + (K−1)c, falls from y = −∞ to its first turning point.
    """
    k, c = mpf(members), mpf(cosine)
    total = 1 + (k - 1) * c

    def turning(y: Number) -> Number:
        """d log β/dy, negative on the branch."""
        e = mp.exp(y)
        return 1 / y + k * e / (1 + k * e) + total * e / (1 - total * e)

    # Beyond y = −2 log K − 60 the other two terms are below 1e-20; up to the pole or to y = 0, where β(0) = 0.
    end = -mp.log(total) if total > 1 else mpf(0)
    grid = float(end) - (float(end) + 2 * float(mp.log(k)) + 60) * np.linspace(1, 0, 8000, endpoint=False)
    e = np.exp(grid)
    rising = 1 / grid + float(k) * e / (1 + float(k) * e) + float(total) * e / (1 - float(total) * e) > 0
    if not rising.any() and total <= 1:
        return None
    first = int(np.argmax(rising)) if rising.any() else len(grid)
    low, _ = _bisect(turning, mpf(grid[first - 1]), mpf(grid[first]) if rising.any() else end - 10 * mp.eps, 4 * mp.dps)
    return low, -low * (1 + k * mp.exp(low)) / (1 - total * mp.exp(low))


class Weights(NamedTuple):
    """Log-weights at a symmetric fixed point, in mpmath numbers."""

    log_self: Number
    log_other: Number
    log_outlier: Number | None = None


def outlier_weights(members: float, cosine: float, beta: float) -> Weights | None:
    """(log p, log q) of Eqs. (20)-(22) on the branch from β = ∞, by bisection along it; None below its fold."""
    fold = outlier_fold(members, cosine)
    if fold is not None and mpf(beta) < fold[1]:
        return None
    k, total = mpf(members), 1 + (mpf(members) - 1) * mpf(cosine)

    def residual(y: Number) -> Number:
        e = mp.exp(y)
        return y + mpf(beta) * (1 - total * e) / (1 + k * e)

    low, high = _bisect(residual, -mpf(beta), fold[0] if fold else mpf(0), 60)
    y = _polish(residual, (low + high) / 2)
    log_self = -mp.log1p(k * mp.exp(y))
    return Weights(log_self, log_self + y)


def _polish(residual: Callable[[Number], Number], y: Number) -> Number:
    for _ in range(60):
        step = residual(y) / mp.diff(residual, y)
        y -= step
        if abs(step) <= mpf(10) ** (-mp.dps + 8) * max(1, abs(y)):
            return y
    raise ArithmeticError("Newton's iteration did not settle")


def outlier_weights_near(members: float, cosine: float, beta: float, log_ratio: float) -> Weights:
    """The root of Eq. (22) that the given y = log(q/p) belongs to, at the current precision."""
    k, b, total = mpf(members), mpf(beta), 1 + (mpf(members) - 1) * mpf(cosine)
    y = mpf(log_ratio)
    for _ in range(60):
        e = mp.exp(y)
        value = y + b * (1 - total * e) / (1 + k * e)
        slope = 1 - b * e * (total + k) / (1 + k * e) ** 2
        y -= value / slope
        if abs(value / slope) <= mpf(10) ** (-mp.dps + 8) * max(1, abs(y)):
            break
    log_self = -mp.log1p(k * mp.exp(y))
    return Weights(log_self, log_self + y)


def _cluster_system(v: Number, w: Number, beta: Number, members: Number, cosine: Number, functions: Any) -> tuple:
    """Eqs. (25) in v = log(a/b), w = log(r/a), with the trivial root v = 0 divided out, and their Jacobian."""
    near, far = functions.exp(-v), functions.exp(w)
    a = 1 / (1 + (members - 1) * near + far)
    a_v, a_w = a * a * (members - 1) * near, -a * a * far
    bracket, bracket_v = -functions.expm1(-v) / v, (near * (v + 1) - 1) / v**2
    pull = beta * (1 - cosine)
    align = 1 + (members - 1) * cosine * near - far
    values = (1 - pull * a * bracket, w + beta * a * align)
    jacobian = (
        (-pull * (a_v * bracket + a * bracket_v), -pull * a_w * bracket),
        (beta * (a_v * align - a * (members - 1) * cosine * near), 1 + beta * (a_w * align - a * far)),
    )
    return values, jacobian


def _newton_pair(v: Number, w: Number, beta: Number, members: Number, cosine: Number, functions: Any, steps: int, small: Number) -> tuple:
    """(v, w, determinant, converged)."""
    for _ in range(steps):
        (f, g), ((fv, fw), (gv, gw)) = _cluster_system(v, w, beta, members, cosine, functions)
        determinant = fv * gw - fw * gv
        dv, dw = (f * gw - fw * g) / determinant, (fv * g - gv * f) / determinant
        v, w = v - dv, w - dw
        if not v > 0 or not abs(v) + abs(w) < 1e300:
            return v, w, determinant, False
        if abs(dv) <= small * max(1, abs(v)) and abs(dw) <= small * max(1, abs(w)):
            return v, w, determinant, True
    return v, w, determinant, False


def cluster_fold(members: float, cosine: float) -> Number:
    """β where the branch of ξ₁ ends: followed down from large β step by step, then polished with the determinant's zero."""
    with np.errstate(all="ignore"):
        beta = 60 * (2 + np.log(members)) / (1 - cosine)
        v, w, factor = beta * (1 - cosine), -beta, 0.05
        while factor > 1e-7:
            lower = beta * (1 - factor)
            candidate = _newton_pair(v, w, lower, members, cosine, np, 30, 1e-13)
            # The determinant of these two equations is positive along the branch and zero at its end.
            if candidate[3] and candidate[2] > 0 and abs(candidate[0] - v) < 0.2 * v + 0.02 and abs(candidate[1] - w) < 0.2 * abs(w) + 0.02:
                beta, v, w = lower, candidate[0], candidate[1]
            else:
                factor /= 2

    def system(v: Number, w: Number, beta: Number) -> list:
        values, jacobian = _cluster_system(v, w, beta, mpf(members), mpf(cosine), mp)
        return [*values, jacobian[0][0] * jacobian[1][1] - jacobian[0][1] * jacobian[1][0]]

    return mp.findroot(system, (mpf(v), mpf(w), mpf(beta)), tol=mpf(10) ** (-mp.dps // 2))[2]


def cluster_weights_near(members: float, cosine: float, beta: float, log_ratios: tuple[float, float]) -> Weights:
    """The root of Eqs. (25) that (v, w) = (log a/b, log r/a) belongs to, at the current precision."""
    k, c, b = mpf(members), mpf(cosine), mpf(beta)
    small = mpf(10) ** (-mp.dps + 8)
    v, w, _, converged = _newton_pair(mpf(log_ratios[0]), mpf(log_ratios[1]), b, k, c, mp, 60, small)
    if not converged:
        raise ArithmeticError(f"no fixed point near v, w = {log_ratios}")
    log_self = -mp.log1p((k - 1) * mp.exp(-v) + mp.exp(w))
    return Weights(log_self, log_self - v, log_self + w)


def critical_effective_beta(members: float) -> Number:
    """min over 0 < m < 1 of log[(1 + (K−1)m)/(1 − m)]/m, Eqs. (29)-(31), as printed: golden section at the current precision."""
    k = mpf(members)

    def curve(t: Number) -> Number:
        """f(m)/m with 1 − m = e^t, so that a minimum next to m = 1 is seen."""
        m = -mp.expm1(t)
        return (mp.log(1 + (k - 1) * m) - t) / m

    # Coarse first: f(m)/m is not known to be unimodal in m, and must not be assumed so.
    grid = [-(mpf(10) ** (mpf(i) / 10 - 16)) for i in range(190)]
    best = min(range(len(grid)), key=lambda i: curve(grid[i]))
    low, high = sorted((grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]))
    ratio = (mp.sqrt(5) - 1) / 2
    for _ in range(int(mp.dps * 2.6)):  # half the digits in t are all the digits of the minimum
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if curve(left) < curve(right) else (left, high)
    return curve((low + high) / 2)


class Sides(NamedTuple):
    outlier: Number
    cluster: Number


def _outlier_overlaps(members: float, cosine: float, point: Weights) -> list[tuple]:
    """(multiplicity, weight, ξ·x) of the outlier and of a member, at the outlier's point."""
    k, total = mpf(members), 1 + (mpf(members) - 1) * mpf(cosine)
    p, q = mp.exp(point.log_self), mp.exp(point.log_other)
    return [(mpf(1), p, p), (k, q, q * total)]


def _cluster_overlaps(members: float, cosine: float, point: Weights) -> list[tuple]:
    k, c = mpf(members), mpf(cosine)
    a, b, r = (mp.exp(value) for value in point)
    return [(mpf(1), a, a + (k - 1) * c * b), (k - 1, b, c * a + b * (1 + (k - 2) * c)), (mpf(1), r, r)]


def _side_energy(overlaps: list[tuple], beta: Number) -> Number:
    square = mp.fsum(n * p * s for n, p, s in overlaps)
    return square / 2 - mp.log(mp.fsum(n * mp.exp(beta * s) for n, _, s in overlaps)) / beta


def _side_sharpness(overlaps: list[tuple], beta: Number, dim: Number) -> Number:
    square = mp.fsum(n * p * s for n, p, s in overlaps)
    trace = dim - beta * (1 - square)
    quadratic = square - beta * (mp.fsum(n * p * s**2 for n, p, s in overlaps) - square**2)
    return square * trace - quadratic


def side_energies(members: float, cosine: float, beta: float, outlier: Weights, cluster: Weights) -> Sides:
    """Eq. (1) at the two points x* = Σ p_μ ξ_μ, through all K + 1 overlaps."""
    b = mpf(beta)
    return Sides(_side_energy(_outlier_overlaps(members, cosine, outlier), b), _side_energy(_cluster_overlaps(members, cosine, cluster), b))


def side_sharpnesses(members: float, cosine: float, beta: float, dim: float, outlier: Weights, cluster: Weights) -> Sides:
    """Eq. (74) at the two points, with tr H and xᵀHx from Eqs. (56)-(57)."""
    b, d = mpf(beta), mpf(dim)
    return Sides(
        _side_sharpness(_outlier_overlaps(members, cosine, outlier), b, d),
        _side_sharpness(_cluster_overlaps(members, cosine, cluster), b, d),
    )


def work_digits(digits: int) -> Any:
    return mpmath.workdps(digits)
