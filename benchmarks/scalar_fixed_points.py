"""Both symmetric fixed points at 100,000 parameter points, against mpmath and a loop of scipy.optimize."""

import math
from collections.abc import Iterator

import jax
import mpmath
import numpy as np
from scipy import optimize

from benchmarks.row import Bench, Goal, Row, compiled
from hopjax import cluster

POINTS = 100_000


def _parameters(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(K, c, β) over the whole range: K in 2 … 200, c in [−1/(K−1), 1), β in 1 … 10⁴ evenly in its logarithm."""
    rng = np.random.default_rng(0)
    members = rng.integers(2, 201, count).astype(float)
    lowest = -1 / (members - 1)
    return members, lowest + (1 - lowest) * rng.uniform(size=count), 10 ** rng.uniform(0, 4, count)


def _outlier_map(members, cosine, beta, y, exp):
    """log(q/p) → −β[p − q(1+(K−1)c)]."""
    ratio = exp(y)
    return -beta * (1 - (1 + (members - 1) * cosine) * ratio) / (1 + members * ratio)


def _cluster_map(members, cosine, beta, y, exp):
    """(log(b/a), log(r/a)) → −β[(1−c)(a−b), a + (K−1)bc − r]."""
    other, outlier = exp(y[0]), exp(y[1])
    pull = beta / (1 + (members - 1) * other + outlier)
    return -pull * (1 - cosine) * (1 - other), -pull * (1 + (members - 1) * cosine * other - outlier)


def _scipy_loop(members: np.ndarray, cosine: np.ndarray, beta: np.ndarray) -> None:
    """One point after the other, with the solvers that one reaches for."""
    for k, c, b in zip(members, cosine, beta, strict=True):

        def outlier(y, k=k, c=c, b=b):
            return y - _outlier_map(k, c, b, y, math.exp)

        def pair(y, k=k, c=c, b=b):
            return np.subtract(y, _cluster_map(k, c, b, y, np.exp))

        if outlier(-math.log(k)) > 0:  # a sign change, so a localised root
            optimize.brentq(outlier, -2 * b, -math.log(k), xtol=1e-13)
        with np.errstate(over="ignore", invalid="ignore"):
            optimize.root(pair, [-b * (1 - c), -b], tol=1e-13)


def _exact_log_weights(k: float, c: float, b: float) -> tuple[list[mpmath.mpf], list[mpmath.mpf]]:
    """(log p, log q) and (log a, log b, log r) to 50 digits: the map iterated from β = ∞, then Newton's method."""
    y, pair = -b, (-b * (1 - c), -b)
    for _ in range(500):
        y, pair = _outlier_map(k, c, b, y, math.exp), _cluster_map(k, c, b, pair, math.exp)
    k, c, b = mpmath.mpf(k), mpmath.mpf(c), mpmath.mpf(b)
    y = mpmath.findroot(lambda y: y - _outlier_map(k, c, b, y, mpmath.exp), y)
    v, w = mpmath.findroot(
        lambda v, w: [left - right for left, right in zip((v, w), _cluster_map(k, c, b, (v, w), mpmath.exp), strict=True)], pair
    )
    log_p = -mpmath.log1p(k * mpmath.exp(y))
    log_a = -mpmath.log1p((k - 1) * mpmath.exp(v) + mpmath.exp(w))
    return [log_p, y + log_p], [log_a, v + log_a, w + log_a]


def measure(bench: Bench) -> Iterator[Row]:
    parameters = _parameters(POINTS)

    def both(k: jax.Array, c: jax.Array, b: jax.Array) -> tuple[cluster.OutlierPoint, cluster.ClusterPoint]:
        return cluster.outlier_point(k, c, b), cluster.cluster_point(k, c, b)

    bench.progress("compiling")
    program, compilation = compiled(jax.vmap(both), *parameters)
    subset = bench.size(200, 50)
    few = tuple(values[:subset] for values in parameters)
    ours, peer = bench.medians("solving", bench.size(9, 3), lambda: program(*parameters), lambda: _scipy_loop(*few))

    outlier, member = jax.tree.map(np.asarray, program(*parameters))
    checked = np.flatnonzero(outlier.exists & member.exists)[: bench.size(300, 50)]
    worst, eps = 0.0, float(np.finfo(float).eps)
    with mpmath.workdps(50):
        for count, index in enumerate(checked):
            bench.progress(f"accuracy, {count} of {checked.size} points in 50 digits")
            exact = _exact_log_weights(*(float(values[index]) for values in parameters))
            found = (outlier.log_self, outlier.log_member), (member.log_self, member.log_other, member.log_outlier)
            for point, logs, references in zip((outlier, member), found, exact, strict=True):
                for log, reference in zip(logs, references, strict=True):
                    unit = eps * max(1.0, abs(float(reference))) * float(point.condition[index])
                    worst = max(worst, abs(float(mpmath.mpf(float(log[index])) - reference)) / unit)
    yield Row(
        f"{POINTS:,} parameter points, both fixed points",
        ours,
        peer * POINTS / subset,
        goals=(Goal("ours", "≤", 2.0), Goal("error", "≤", 8.0)),
        error=worst,
        error_of="eps·max(1, |log weight|)·condition",
        note=f"compiled in {compilation:.1f} s; peer: brentq and root, extrapolated from {subset} points; "
        f"accuracy: worst of {checked.size} points where both exist, against mpmath",
    )
