"""Asymptotic claims along a ladder: the order at which a remainder vanishes, with a confidence interval.

A claim "the remainder is O(h^p)" says nothing at a single h. It is evaluated on a ladder of steps (ε, a leakage, 1/log K: whatever tends to
zero), a power law is fitted, and the whole interval of the fitted order must lie close to p.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from theory_checks.claim import Measurement
from theory_checks.figures import NEUTRAL

# An interval within this distance of p leaves out every other integer and half-integer order.
ORDER_TOLERANCE = 0.25
CONFIDENCE = 0.95


class Order(NamedTuple):
    """Fitted exponent p of |remainder| ∝ step^p.

    Attributes:
        slope: the exponent on the finer half of the ladder.
        half_width: half the width of its confidence interval: how far the exponent still drifts along the ladder, plus its scatter.
    """

    slope: float
    half_width: float


def fit_order(steps: ArrayLike, remainders: ArrayLike) -> Order:
    """Fits |remainder| ∝ step^p as step → 0.

    The finer half of the ladder gives the exponent. Its drift against the exponent of the whole ladder bounds what the next order still
    adds (that contribution shrinks with the step); Student's 95 % interval covers scatter about the line.

    Args:
        steps: at least 6 positive steps, of any spacing.
        remainders: one for each step; or rows of them from independent random replicas with the same mean, whose jackknife error is added.

    Returns: the order; NaN where a remainder is zero or not finite: a ladder that rounding has swallowed shows nothing.
    Raises: ValueError for fewer than 6 steps, or remainders that do not fit them.
    """
    rungs = np.asarray(steps, dtype=float)
    rows = np.atleast_2d(np.asarray(remainders, dtype=float))
    if rungs.ndim != 1 or len(rungs) < 6 or rows.shape[1] != len(rungs):
        raise ValueError(f"need at least 6 steps and as many remainders, got shapes {rungs.shape} and {rows.shape}")
    finest_first = np.argsort(rungs)
    rungs, rows = rungs[finest_first], rows[:, finest_first]
    mean = np.mean(rows, axis=0)
    if not (np.all(rungs > 0) and np.all(np.isfinite(mean)) and np.all(mean != 0)):
        return Order(float("nan"), float("nan"))
    slope, half_width = _finer_half(rungs, mean)
    if (count := len(rows)) > 1:
        left_out = np.array([_finer_half(rungs, (count * mean - row) / (count - 1))[0] for row in rows])
        jackknife = float(np.sqrt((count - 1) / count * np.sum((left_out - np.mean(left_out)) ** 2)))
        half_width += float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * jackknife
    return Order(slope, half_width)


def _finer_half(steps: NDArray[np.float64], remainders: NDArray[np.float64]) -> tuple[float, float]:
    """Exponent on the finer half of an ascending ladder, and drift plus scatter."""
    x, y = np.log(steps), np.log(np.abs(remainders))
    count = len(x) // 2 + 1
    line = stats.linregress(x[:count], y[:count])
    drift = abs(line.slope - stats.linregress(x, y).slope)
    return float(line.slope), float(drift + stats.t.ppf(0.5 + CONFIDENCE / 2, count - 2) * line.stderr)


def order_is(what: str, order: Order, expected: float) -> Measurement:
    """The interval of the fitted order must lie within a quarter of `expected`: an equivalence test, so a wide interval fails too."""
    return Measurement(
        f"order of {what}: {order.slope:.3f} ± {order.half_width:.3f}, distance from {expected:g}",
        abs(order.slope - expected) + order.half_width,
        "<=",
        ORDER_TOLERANCE,
    )


def order_at_least(what: str, order: Order, expected: float) -> Measurement:
    """The interval of the fitted order must lie above `expected` less a quarter: for O(·), which a faster decay satisfies as well."""
    return Measurement(
        f"order of {what}: {order.slope:.3f} ± {order.half_width:.3f}, lower end",
        order.slope - order.half_width,
        ">=",
        expected - ORDER_TOLERANCE,
    )


# ---- Ladders of the model in β -----------------------------------------------------------------------------------------

# (K, c, d): few and many members, loose and tight clusters, the smallest possible and a large dimension.
LADDERS = ((2, 0.5, 3), (10, 0.2, 64), (10, 0.8, 64), (100, 0.5, 1000), (1000, 0.3, 1001))
# β(1−c) or β less log K: leakages of e^{−6} … e^{−13}, where a float64 difference still has 4 digits of a remainder of relative order βℓ.
EXCESS = np.linspace(6.0, 13.0, 8)


class Ladder(NamedTuple):
    """Exact and asymptotic values along a ladder of β; `leak` is βℓ, the step in which the remainder must be of first order."""

    leak: NDArray[np.float64]
    exact: NDArray[np.float64]
    asymptotic: NDArray[np.float64]

    def order(self, trivial: float = 0.0) -> Order:
        """Fitted order of the remainder relative to what the asymptotic form says beyond the trivial part of the value."""
        return fit_order(self.leak, (self.exact - self.asymptotic) / (self.asymptotic - trivial))


def draw_ladders(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    """One panel a quantity: relative remainder against βℓ for every ladder."""
    (values,) = series.values()
    panels = values["panels"]
    for axes, (name, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels.items(), strict=True):
        for label, line in lines.items():
            axes.loglog(line["leak"], np.abs(line["remainder"]), "o-", markersize=3, linewidth=1, label=label)
        ends = np.array([min(min(line["leak"]) for line in lines.values()), max(max(line["leak"]) for line in lines.values())])
        axes.loglog(ends, ends, "--", color=NEUTRAL, linewidth=1, label="βℓ")
        axes.set(title=name, xlabel="βℓ")
    figure.axes[0].set_ylabel("relative remainder")
    figure.axes[-1].legend(fontsize=7, loc="lower right")


def ladder_panels(panels: Mapping[str, Mapping[str, tuple[Ladder, float]]]) -> dict[str, Any]:
    """The series of `draw_ladders`: {quantity: {ladder: (values, trivial part)}}."""

    def line(ladder: Ladder, trivial: float) -> dict[str, list[float]]:
        remainder = (ladder.exact - ladder.asymptotic) / (ladder.asymptotic - trivial)
        return {"leak": [float(f"{x:.5g}") for x in ladder.leak], "remainder": [float(f"{x:.5g}") for x in remainder]}

    return {"panels": {name: {label: line(*entry) for label, entry in lines.items()} for name, lines in panels.items()}}
