"""Estimates over seeds, as JSON. Intervals are for other seeds and other samples than these; of one seed, for other samples.

A number that cannot be had is null, and so are the ends of an interval that cannot.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64
from scipy.special import stdtrit

from diffusion.statistics import Bootstrap, Estimate, Sampled, across_seeds, bin_of, correlation_across_seeds, mean_of

Column = Float[np.ndarray, " n"]
NOTHING = Estimate(math.nan, math.nan, math.nan, math.nan)


def plain(found: Estimate, seeds: Sequence[float]) -> dict[str, Any]:
    """An estimate and what it is made of."""
    return {name: number(getattr(found, name)) for name in ("value", "error", "low", "high")} | {
        "seeds": [number(value) for value in seeds]
    }


def number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def mean(columns: Sequence[Column], interval: Bootstrap) -> Estimate:
    """The mean of one column for each seed, of the same samples: of one seed with the bootstrap's interval."""
    return interval(columns[0]) if len(columns) == 1 else across_seeds([mean_of(column) for column in columns], level=interval.level)


def of_samples(columns: Sequence[Column], interval: Bootstrap) -> dict[str, Any]:
    """The mean of one column for each seed."""
    return plain(mean(columns, interval), [float(column.mean()) for column in columns])


def of_numbers(values: Sequence[float], level: float) -> dict[str, Any]:
    """The mean of one number for each seed, of which nothing more is known: for other seeds alone, and of one it has no interval."""
    if not np.isfinite(values).all():
        return plain(NOTHING, values)
    found = NOTHING._replace(value=values[0]) if len(values) == 1 else across_seeds([Sampled(value) for value in values], level=level)
    return plain(found, values)


def of_shares(hits: Sequence[int], counts: Sequence[int], level: float) -> dict[str, Any]:
    """The mean share of hits, each seed's of as many images: Wilson's interval, never a point, and never beyond 0 or 1. Its variance is
    the seeds', by Student's t, or that of one seed's images, which all may share, where that is larger."""
    shares = [hit / count for hit, count in zip(hits, counts, strict=True)]
    share = float(np.mean(shares))
    between = float(np.var(shares, ddof=1)) / len(shares) if len(set(shares)) > 1 else 0.0
    about = (share * counts[0] + 0.5) / (counts[0] + 1)  # an error of what was never, or always, hit is not 0
    # The squared quantile over the number of images that would leave as much to chance.
    wide = float(stdtrit(math.inf, (1 + level) / 2)) ** 2 / counts[0]
    if between:
        wide = max(wide, float(stdtrit(len(shares) - 1, (1 + level) / 2)) ** 2 * between / (share * (1 - share)))
    centre, reach = (share + wide / 2) / (1 + wide), math.sqrt(wide * (share * (1 - share) + wide / 4)) / (1 + wide)
    low = 0.0 if share == 0 else centre - reach
    high = 1.0 if share == 1 else centre + reach
    return plain(Estimate(share, math.sqrt(max(between, about * (1 - about) / counts[0])), low, high), shares)


def of_ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The ratio of two shares, as `of_shares` has them, its ends recovered from theirs (MOVER-R: Donner and Zou, Stat. Methods Med. Res.
    21, 347 (2012)): never below 0, and of a share that is 0 no point either. Null where the other share is 0."""
    seeds = [p / q if q else math.nan for p, q in zip(one["seeds"], other["seeds"], strict=True)]
    p, q = one["value"], other["value"]
    if not q:
        return plain(NOTHING, seeds)

    def end(own: float, its: float) -> tuple[float, float]:
        """The product of the shares, and the root by which the end is off it."""
        return p * q, math.sqrt(max((p * q) ** 2 - own * (2 * p - own) * its * (2 * q - its), 0.0))

    product, root = end(one["low"], other["high"])
    low = one["low"] * (2 * p - one["low"]) / (product + root) if p else 0.0  # as printed it is 0/0 where the other's high is twice it
    product, root = end(one["high"], other["low"])
    high = (product + root) / (other["low"] * (2 * q - other["low"]))
    error = math.hypot(one["error"], p / q * other["error"]) / q
    return plain(Estimate(p / q, error, low, high), seeds)


def of_correlations(seeds: Sequence[Sampled], level: float) -> dict[str, Any]:
    """The mean rank correlation."""
    return plain(correlation_across_seeds(seeds, level=level), [seed.value for seed in seeds])


class Bins(NamedTuple):
    """Means over bins of energy, or sums. Bin i holds edges[i] ≤ energy < edges[i + 1]; the last one its upper edge too."""

    edges: Float64[np.ndarray, " k+1"]
    counts: Int64[np.ndarray, " k"]
    values: Float64[np.ndarray, " k"]
    errors: Float64[np.ndarray, " k"]
    low: Float64[np.ndarray, " k"]
    high: Float64[np.ndarray, " k"]

    def sums(self) -> "Bins":
        """Sums in place of means. Samples are drawn anew within bins, whose counts are therefore fixed, as those of quantiles are."""
        return self._replace(**{name: self.counts * getattr(self, name) for name in ("values", "errors", "low", "high")})


def binned(columns: Sequence[Column], by: Column, edges: Float[np.ndarray, " k"], interval: Bootstrap) -> Bins:
    """Means of one column for each seed between edges of `by`, each interval of its bin alone; NaN in bins of fewer than two samples."""
    where = bin_of(by, edges)
    counts = np.bincount(where, minlength=len(edges) - 1).astype(np.int64)
    found = [mean([column[where == i] for column in columns], interval) if counts[i] > 1 else NOTHING for i in range(len(counts))]
    return Bins(edges, counts, *np.array([each[:4] for each in found]).T)


def of_bins(bins: Bins) -> dict[str, Any]:
    """Values, ends of intervals and counts."""
    return {name: [number(value) for value in getattr(bins, name)] for name in ("values", "low", "high")} | {"counts": bins.counts.tolist()}
