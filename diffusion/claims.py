"""What the paper claims of energy, forgetting and replay (its sections 4.3 and 5.3), held against the errors of every sample.

A claim is a list of contrasts that must lie above zero. It *holds* if all their intervals do, *fails* if one lies below, and is
*inconclusive* otherwise. All must hold, so that none needs a correction for their number; one of two intervals of 95 % is wrongly
below zero at most 5 % of the time. Where nothing was forgotten there was nothing to protect: then every claim is inconclusive.

"Only" is such a contrast too. That replay saves nothing elsewhere no sample can show, and that noise hides it is no sign that it does not:
what is saved elsewhere must lie below a share of what is saved where it should be, `ELSEWHERE`, the same for all experiments.

Intervals are for other seeds and other samples. Of one seed they say nothing about another training, and the verdict says so.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Real

from diffusion.over_seeds import mean
from diffusion.statistics import (
    Bootstrap,
    Departure,
    Estimate,
    Reach,
    Sampled,
    across_seeds,
    bin_means,
    correlation_across_seeds,
    departure,
    groups,
    mean_of,
    reach,
    trend,
)

# The policy to which the others are compared: no sample is replayed.
NONE = "none"
# What low-energy replay may save of a sample of high energy, as a share of what it saves of one of low energy: no more than a quarter, so
# that of what the two groups, equally large, are saved together four fifths are where they should be.
ELSEWHERE = 0.25


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


def judge(claim: str, contrasts: Mapping[str, Estimate]) -> Verdict:
    """The verdict on contrasts that must lie above zero."""
    against, unclear = ([name for name, found in contrasts.items() if found.sign == sign] for sign in (-1, 0))
    decisive = contrasts[[*against, *unclear, *contrasts][0]]
    word, holds = ("fails", False) if against else ("inconclusive", None) if unclear else ("holds", True)
    reason = f"{word}: " + "; ".join(f"{name} {found}" for name, found in contrasts.items())
    return Verdict(claim, decisive.value, (decisive.low, decisive.high), holds, reason)


def _noted(found: Estimate, seeds: Sequence[object]) -> Estimate:
    return found._replace(note="one seed: of its samples") if len(seeds) == 1 else found


def _monotone(claim: str, trends: Sequence[Sampled], departures: Sequence[Departure], level: float) -> Verdict:
    """A rank correlation above zero, unless bin means fall somewhere: in each seed significantly (it fails), or in any (it is open)."""
    found = judge(claim, {"rank correlation of bin and rise": _noted(correlation_across_seeds(trends, level=level), trends)})
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
    """Of one seed they are not judged: noise raises peaks and reaches, and other seeds alone show by how much it differs."""
    if len(high) < 2:
        return Verdict(claim, None, None, None, "inconclusive: one seed gives peak and reach no interval, run more")
    higher = across_seeds([a.peak - b.peak for a, b in zip(high, low, strict=True)], level=level)
    wider = across_seeds([b.bins - a.bins for a, b in zip(high, low, strict=True)], level=level)
    return judge(claim, {"peak, high − low": higher, "effective bins, low − high": wider, **means})


def verdicts(seeds: Sequence[Errors], *, bins: int = 20, fraction: float = 0.2, interval: Bootstrap = Bootstrap()) -> tuple[Verdict, ...]:
    """The paper's claims, in its order:

    0. forgetting is monotone in energy: without replay, errors rise the more the higher the bin;
    1. (i) replay of high energies saves images of high energy;
    2. (ii) replay of low energies saves images of low energy, and of high energy less than `ELSEWHERE` of that;
    3. (iii) over all images high saves more than random, and random more than low;
    4. the mean-range trade-off: both save something, high with the higher peak over bins, low over more effective bins.

    Args:
        seeds: of the same samples, in one order.
        fraction: of the samples that is of "high" energy, and of "low".
        interval: of means of one seed's samples; its level is that of all intervals.

    What is saved is a difference of errors, not a share of what was forgotten: shares have no variance where that may be zero.

    Raises: ValueError without seeds, for seeds whose samples have different energies, and as `statistics` does for columns that do not fit.
    """
    if not seeds:
        raise ValueError("there are 0 seeds to judge claims by: give one at least")
    level, energy = interval.level, seeds[0].energy
    for i, seed in enumerate(seeds):
        if not np.array_equal(seed.energy, energy):
            raise ValueError(f"samples of seeds 0 and {i} have different energies: give the same ones, in one order")
    masks = groups(energy, fraction)
    rises = [seed.after[NONE] - seed.before for seed in seeds]
    forgotten = _noted(mean(rises, interval), seeds)
    policies = set.intersection(*(set(seed.after) for seed in seeds))

    def saved(policy: str, than: str = NONE) -> list[Real[np.ndarray, " n"]]:
        return [seed.after[than] - seed.after[policy] for seed in seeds]

    def of_group(columns: Sequence[Real[np.ndarray, " n"]], group: str) -> Estimate:
        return _noted(mean([column[masks[group]] for column in columns], interval), seeds)

    def monotone(claim: str) -> Verdict:
        departures = []
        for rise in rises:
            means = bin_means(rise, energy, bins)
            values, errors = np.array([[each.value, each.error] for each in means]).T
            departures.append(departure(values, errors, seed=interval.seed))
        return _monotone(claim, [trend(rise, energy, bins) for rise in rises], departures, level)

    def high_protects(claim: str) -> Verdict:
        return judge(claim, {"high saves at high energy": of_group(saved("high"), "high")})

    def low_protects_low(claim: str) -> Verdict:
        low, high = ([mean_of(column, masks[group]) for column in saved("low")] for group in ("low", "high"))
        less = across_seeds([one * ELSEWHERE - other for one, other in zip(low, high, strict=True)], level=level)
        contrasts = {"low saves at low energy": of_group(saved("low"), "low")}
        return judge(claim, contrasts | {f"{ELSEWHERE:g} of that, less what it saves at high energy,": _noted(less, seeds)})

    def aggregate(claim: str) -> Verdict:
        pairs = (("high", "random"), ("random", "low"))
        return judge(claim, {f"{one} − {other}": of_group(saved(one, other), "all") for one, other in pairs})

    def trade_off(claim: str) -> Verdict:
        high, low = ([reach(bin_means(column, energy, bins)) for column in saved(policy)] for policy in ("high", "low"))
        means = {f"{policy} saves": of_group(saved(policy), "all") for policy in ("high", "low")}
        return _trade_off(claim, high, low, means, level)

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
