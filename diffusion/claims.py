"""What the paper claims of energy, forgetting and replay (its sections 4.3 and 5.3), held against the errors of every sample.

A claim is a list of contrasts that must lie above zero. It *holds* if all their intervals do, *fails* if one lies below, and is
*inconclusive* otherwise. All must hold, so that none needs a correction for their number; one of two intervals of 95 % is wrongly
below zero at most 5 % of the time. Where nothing was forgotten there was nothing to protect: then every claim is inconclusive.

Intervals are Student's over seeds. Of one seed they are of its samples, say nothing about another training, and the verdict says so.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Real
from scipy.special import ndtri

from diffusion.statistics import Bootstrap, Departure, Estimate, Reach, across_seeds, bin_means, departure, reach, reductions, trend

# The policy to which the others are compared: no sample is replayed.
NONE = "none"


@dataclasses.dataclass(frozen=True)
class Errors:
    """One seed's errors of Task 1's samples, under noise draws common to all models."""

    energy: Real[np.ndarray, " n"]
    before: Real[np.ndarray, " n"]
    after: Mapping[str, Real[np.ndarray, " n"]]
    """By policy, "none" among them."""

    def __post_init__(self) -> None:
        if NONE not in self.after:
            raise ValueError(
                f"errors after are of {', '.join(self.after) or 'no policy'}: forgetting is measured by policy {NONE!r}, run it too"
            )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a claim shows."""

    claim: str
    statistic: float | None
    """Of the contrast that decided: the first of a claim that holds, else the first that keeps it from holding."""
    interval: tuple[float, float] | None
    holds: bool | None
    """None: inconclusive."""
    reason: str


def judge(claim: str, above: Mapping[str, Estimate], not_above: Mapping[str, Estimate] | None = None) -> Verdict:
    """The verdict on contrasts of which `above` must lie above zero, and `not_above` must not."""
    not_above = not_above or {}
    contrasts = {**above, **not_above}
    against = [name for name in above if above[name].sign < 0] + [name for name in not_above if not_above[name].sign > 0]
    unclear = [name for name in above if above[name].sign == 0]
    decisive = contrasts[[*against, *unclear, *contrasts][0]]
    word, holds = ("fails", False) if against else ("inconclusive", None) if unclear else ("holds", True)
    reason = f"{word}: " + "; ".join(f"{name} {found}" for name, found in contrasts.items())
    return Verdict(claim, decisive.value, (decisive.low, decisive.high), holds, reason)


def _over(estimates: Sequence[Estimate], level: float) -> Estimate:
    if len(estimates) == 1:
        return estimates[0]._replace(note="one seed: of its samples")
    return across_seeds(np.array([each.value for each in estimates]), level=level)


def _minus(one: Estimate, other: Estimate, level: float) -> Estimate:
    """The difference of two means of samples that have none in common."""
    value, error = one.value - other.value, float(np.hypot(one.error, other.error))
    width = float(ndtri((1 + level) / 2)) * error
    return Estimate(value, error, value - width, value + width)


def _monotone(claim: str, trends: Sequence[Estimate], departures: Sequence[Departure], level: float) -> Verdict:
    """A rank correlation above zero, unless bin means fall somewhere: in each seed significantly (it fails), or in any (it is open)."""
    found = judge(claim, {"rank correlation of bin and rise": _over(trends, level)})
    smallest, largest = (pick(each.p_value for each in departures) for pick in (min, max))
    share = max(each.share for each in departures)
    falls = f"bin means fall somewhere, p = {smallest:.2g}" + f" to {largest:.2g}" * (len(departures) > 1) + f", {share:.1%} of what varies"
    word, holds = found.reason.split(":")[0], found.holds
    if holds and largest < 1 - level:
        word, holds = "fails", False
    elif holds and smallest < (1 - level) / len(departures):  # of many seeds one would fall by chance
        word, holds = "inconclusive", None
    return dataclasses.replace(found, holds=holds, reason=f"{word}:{found.reason.split(':', 1)[1]}; {falls}")


def _trade_off(claim: str, high: Sequence[Reach], low: Sequence[Reach], means: Mapping[str, Estimate], level: float) -> Verdict:
    """Peaks and reach have no interval but over seeds: noise raises both, in every resampling again."""
    if len(high) < 2:
        return Verdict(claim, None, None, None, "inconclusive: one seed gives peak and reach no interval, run more")
    higher = across_seeds(np.array([a.peak - b.peak for a, b in zip(high, low, strict=True)]), level=level)
    wider = across_seeds(np.array([b.bins - a.bins for a, b in zip(high, low, strict=True)]), level=level)
    return judge(claim, {"peak, high − low": higher, "effective bins, low − high": wider, **means})


def verdicts(seeds: Sequence[Errors], *, bins: int = 20, fraction: float = 0.2, interval: Bootstrap = Bootstrap()) -> tuple[Verdict, ...]:
    """The paper's claims, in its order:

    0. forgetting is monotone in energy: without replay, errors rise the more the higher the bin;
    1. (i) replay of high energies saves images of high energy;
    2. (ii) replay of low energies saves images of low energy, more than those of high energy, and of those none significantly;
    3. (iii) over all images high saves more than random, and random more than low;
    4. the mean-range trade-off: both save something, high with the higher peak over bins, low over more effective bins.

    Args:
        fraction: of the samples that is of "high" energy, and of "low".
        interval: of means of samples; its level is that of all intervals.

    What is saved is a difference of errors, not a share of what was forgotten: shares have no variance where that may be zero.

    Raises: ValueError without seeds, and as `statistics` does for columns that do not fit.
    """
    if not seeds:
        raise ValueError("there are 0 seeds to judge claims by: give one at least")
    level = interval.level
    rises = [(seed.energy, seed.after[NONE] - seed.before) for seed in seeds]
    forgotten = _over([interval(rise) for _, rise in rises], level)
    policies = set.intersection(*(set(seed.after) for seed in seeds))

    def saved(policy: str, than: str = NONE) -> dict[str, Estimate]:
        each = [reductions(seed.after[than], seed.after[policy], seed.energy, fraction=fraction, interval=interval) for seed in seeds]
        each = [found | {"low − high": _minus(found["low"], found["high"], level)} for found in each]
        return {group: _over([found[group] for found in each], level) for group in each[0]}

    def monotone(claim: str) -> Verdict:
        trends = [trend(rise, energy, bins, level=level) for energy, rise in rises]
        departures = [departure(bin_means(rise, energy, bins, interval=interval), seed=interval.seed) for energy, rise in rises]
        return _monotone(claim, trends, departures, level)

    def high_protects(claim: str) -> Verdict:
        return judge(claim, {"high saves at high energy": saved("high")["high"]})

    def low_protects_low(claim: str) -> Verdict:
        low = saved("low")
        above = {"low saves at low energy": low["low"], "more than at high energy": low["low − high"]}
        return judge(claim, above, {"where it saves": low["high"]})

    def aggregate(claim: str) -> Verdict:
        return judge(claim, {"high − random": saved("high", "random")["all"], "random − low": saved("random", "low")["all"]})

    def trade_off(claim: str) -> Verdict:
        def reached(policy: str) -> list[Reach]:
            saved = [(seed.after[NONE] - seed.after[policy], seed.energy) for seed in seeds]
            return [reach(bin_means(*columns, bins, interval=interval)) for columns in saved]

        means = {f"{policy} saves": saved(policy)["all"] for policy in ("high", "low")}
        return _trade_off(claim, reached("high"), reached("low"), means, level)

    claims: tuple[tuple[str, tuple[str, ...], Callable[[str], Verdict]], ...] = (
        ("forgetting is monotone in energy", (), monotone),
        ("(i) replay of high energies protects images of high energy", ("high",), high_protects),
        ("(ii) replay of low energies protects only images of low energy", ("low",), low_protects_low),
        ("(iii) in all, high energies protect more than random ones, those more than low ones", ("high", "random", "low"), aggregate),
        ("mean-range trade-off: high energies peaked and narrow, low ones shallow and broad", ("high", "low"), trade_off),
    )
    found = []
    for claim, needed, verdict in claims:
        absent = [policy for policy in needed if policy not in policies]
        if absent:
            found.append(Verdict(claim, None, None, None, f"inconclusive: not every seed has policy {', '.join(absent)}"))
            continue
        row = verdict(claim)
        if forgotten.sign <= 0:
            reason = f"inconclusive: without replay errors rise by {forgotten}, not significantly; else {row.reason}"
            row = dataclasses.replace(row, holds=None, reason=reason)
        found.append(row)
    return tuple(found)
