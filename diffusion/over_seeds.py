"""Estimates over seeds, as JSON: Student's intervals, of the spread from training to training; of one seed, intervals of its samples.

A number that cannot be had is null, and so are the ends of an interval that cannot.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest

from diffusion.statistics import Bins, Bootstrap, Estimate, across_seeds, bin_of

Column = Float[np.ndarray, " n"]
EPS = np.finfo(np.float64).eps
NOTHING = Estimate(math.nan, math.nan, math.nan, math.nan)


def plain(found: Estimate, seeds: Sequence[float]) -> dict[str, Any]:
    """An estimate and what it is made of."""
    return {name: number(getattr(found, name)) for name in ("value", "error", "low", "high")} | {
        "seeds": [number(value) for value in seeds]
    }


def number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def of_samples(columns: Sequence[Column], interval: Bootstrap) -> dict[str, Any]:
    """The mean of one column for each seed."""
    return plain(_mean(columns, interval), [float(column.mean()) for column in columns])


def _mean(columns: Sequence[Column], interval: Bootstrap) -> Estimate:
    if len(columns) == 1:
        return interval(columns[0])
    return across_seeds(np.array([column.mean() for column in columns]), level=interval.level)


def of_numbers(values: Sequence[float], level: float) -> dict[str, Any]:
    """The mean of one number for each seed, of which nothing more is known: of one seed it has no interval."""
    if not np.isfinite(values).all():
        return plain(NOTHING, values)
    found = NOTHING._replace(value=values[0]) if len(values) == 1 else across_seeds(np.array(values), level=level)
    return plain(found, values)


def of_shares(hits: Sequence[int], counts: Sequence[int], level: float) -> dict[str, Any]:
    """The mean share of hits. Where seeds agree, as on images that all of them share, Student's interval would be a point: then, and of
    one seed, it is Wilson's for the images of one."""
    shares = [hit / count for hit, count in zip(hits, counts, strict=True)]
    if len(set(shares)) > 1:
        found = across_seeds(np.array(shares), level=level)
        return plain(found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0)), shares)
    ends = binomtest(hits[0], counts[0]).proportion_ci(level, "wilson")
    return plain(Estimate(shares[0], math.sqrt(shares[0] * (1 - shares[0]) / counts[0]), ends.low, ends.high), shares)


def of_correlations(values: Sequence[Estimate], level: float, *, few: bool = False) -> dict[str, Any]:
    """The mean correlation, in Fisher's z, so that intervals stay between −1 and 1.

    Args:
        few: of few samples, which all seeds share: their own uncertainty is added, in quadrature.
    """
    found = values[0]
    if any(each[:4] != found[:4] for each in values):  # else all seeds have the same two columns: the interval is of samples
        z = across_seeds(_fisher([each.value for each in values]), level=level)
        own = float(np.mean(_fisher([each.high for each in values]) - _fisher([each.low for each in values]))) / 2
        reach = math.hypot(z.high - z.value, own if few else 0.0)
        found = Estimate(float(np.tanh(z.value)), math.nan, float(np.tanh(z.value - reach)), float(np.tanh(z.value + reach)))
    row = plain(found, [each.value for each in values])
    return {name: row[name] for name in ("value", "low", "high", "seeds")}  # over seeds the error is one of z


def _fisher(correlations: Sequence[float]) -> Float[np.ndarray, " s"]:
    return np.arctanh(np.clip(np.array(correlations), -1 + EPS, 1 - EPS))


def binned(columns: Sequence[Column], by: Column, edges: Float[np.ndarray, " k"], interval: Bootstrap) -> Bins:
    """Means of one column for each seed between edges of `by`; NaN in bins that hold fewer than two samples."""
    where = bin_of(by, edges)
    counts = np.bincount(where, minlength=len(edges) - 1).astype(np.int64)
    found = [_mean([column[where == i] for column in columns], interval) if counts[i] > 1 else NOTHING for i in range(len(counts))]
    return Bins(edges, counts, *np.array([each[:4] for each in found]).T)


def of_bins(bins: Bins) -> dict[str, Any]:
    """Values, ends of intervals and counts."""
    return {name: [number(value) for value in getattr(bins, name)] for name in ("values", "low", "high")} | {"counts": bins.counts.tolist()}
