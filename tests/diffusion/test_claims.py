"""Verdicts on errors that were made to bear a claim out, to contradict it, and to leave it open."""

import numpy as np
import pytest
from scipy import stats

from diffusion.claims import Errors, Verdict, judge, verdicts
from diffusion.statistics import Bootstrap, Estimate

COUNT = 2000
QUICK = Bootstrap(100)
PLACE = np.linspace(0, 1, COUNT)  # of a sample among energies
HIGH, LOW, EVEN = PLACE**8, 0.02 * (PLACE < 0.5), np.full(COUNT, 0.08)


def seeds(*, rise=PLACE, count=3, noise=0.2, seed=0, **saved) -> list[Errors]:
    """Errors that rise without replay, and that policies lower by what each saves; seeds differ by a tenth."""
    found = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        size = 1 + 0.05 * (i - (count - 1) / 2)
        before = rng.exponential(size=COUNT)
        after = before + size * rise + noise * rng.normal(size=COUNT)
        policies = {name: after - size * what + 0.01 * rng.normal(size=COUNT) for name, what in saved.items()}
        order = rng.permutation(COUNT)
        columns = {name: column[order] for name, column in {"none": after, **policies}.items()}
        found.append(Errors(PLACE[order] - 3, before[order], columns))
    return found


def told(found: tuple[Verdict, ...]) -> list[bool | None]:
    for verdict in found:
        word = {True: "holds", False: "fails", None: "inconclusive"}[verdict.holds]
        assert verdict.reason.startswith(word + ":")
    return [verdict.holds for verdict in found]


def contrast(low: float, high: float) -> Estimate:
    low, high = float(low), float(high)
    return Estimate((low + high) / 2, (high - low) / 4, low, high)


def test_what_shows_holds():
    found = verdicts(seeds(high=HIGH, random=EVEN, low=LOW), interval=QUICK)
    assert told(found) == [True] * 5
    for verdict in found:
        assert verdict.statistic is not None
        assert verdict.interval is not None
        assert 0 < verdict.interval[0] <= verdict.statistic <= verdict.interval[1]


def test_what_is_the_other_way_round_fails():
    found = verdicts(seeds(rise=1 - PLACE, high=0.02 - 0.2 * HIGH, random=EVEN, low=HIGH), interval=QUICK)
    assert told(found) == [False] * 5


def test_of_one_seed_intervals_are_of_its_samples():
    found = verdicts(seeds(count=1, high=HIGH, random=EVEN, low=LOW), interval=QUICK)
    assert told(found) == [True, True, True, True, None]
    assert all("one seed" in verdict.reason for verdict in found)
    assert found[4].statistic is None


def test_where_nothing_was_forgotten_everything_is_inconclusive():
    found = verdicts(seeds(rise=0 * PLACE, high=HIGH, random=EVEN, low=LOW), interval=QUICK)
    assert told(found) == [None] * 5
    assert all("without replay errors rise by" in verdict.reason for verdict in found)
    assert told(verdicts(seeds(rise=-PLACE, high=HIGH, random=EVEN, low=LOW), interval=QUICK)) == [None] * 5


def test_seeds_that_disagree_leave_it_open():
    mixed = seeds(high=HIGH, random=EVEN, low=LOW)[:2] + seeds(high=-HIGH, random=EVEN, low=LOW)[2:]
    assert told(verdicts(mixed, interval=QUICK))[1] is None


def test_policies_that_were_not_run_are_named():
    found = verdicts(seeds(high=HIGH), interval=QUICK)
    assert told(found) == [True, True, None, None, None]
    assert "random, low" in found[3].reason


def test_low_energies_that_save_all_do_not_save_only_low_ones():
    everywhere = verdicts(seeds(low=EVEN), interval=QUICK)[2]
    assert everywhere.holds is False
    # Insignificant at the top, and no less than at the bottom: the one does not make the other.
    unsure = seeds(low=EVEN, count=1)[0]
    top = unsure.energy >= np.quantile(unsure.energy, 0.8)
    noise = 5 * np.random.default_rng(0).normal(size=COUNT)
    noisy = unsure.after["low"] + np.where(top, noise - noise[top].mean(), 0)
    found = verdicts([Errors(unsure.energy, unsure.before, {**unsure.after, "low": noisy})], interval=QUICK)[2]
    assert found.holds is None
    parts = [(unsure.after["none"] - noisy)[part] for part in (unsure.energy <= np.quantile(unsure.energy, 0.2), top)]
    width = stats.norm.ppf(0.975) * np.hypot(*(stats.sem(part) for part in parts))
    assert found.statistic is not None
    assert found.statistic == pytest.approx(parts[0].mean() - parts[1].mean(), rel=1e-9)
    assert found.interval == pytest.approx((found.statistic - width, found.statistic + width), rel=1e-9)


@pytest.mark.parametrize(("dips", "holds"), [([0, 0, 0], True), ([1, 0, 0], None), ([1, 1, 1], False)])
def test_a_rise_with_a_dip_is_not_monotone(dips, holds):
    dipped = PLACE - 0.5 * ((PLACE > 0.6) & (PLACE < 0.8))
    found = [seeds(rise=dipped if dip else PLACE)[i] for i, dip in enumerate(dips)]
    verdict = verdicts(found, interval=QUICK)[0]
    assert told((verdict,)) == [holds]
    assert (verdict.statistic or 0) > 0


def test_only_the_right_share_of_order_is_told_by_energy():
    assert verdicts(seeds(rise=EVEN), interval=QUICK)[0].holds is None


def test_judging_contrasts():
    above, below, around = contrast(1, 3), contrast(-3, -1), contrast(-1, 2)
    assert judge("c", {"a": above}) == Verdict("c", 2.0, (1.0, 3.0), True, "holds: a 2 [1, 3]")
    assert judge("c", {"a": above, "b": around, "c": below}).interval == (-3, -1)
    assert judge("c", {"a": above, "b": around}).interval == (-1, 2)
    assert judge("c", {"a": above, "b": around}).holds is None
    assert judge("c", {"a": around, "b": below}).holds is False
    assert judge("c", {"a": above}, {"b": above}).holds is False
    assert judge("c", {"a": above}, {"b": around}).holds is True
    assert judge("c", {"a": above}, {"b": below}).holds is True


def test_bad_input_is_one_clear_line():
    with pytest.raises(ValueError, match=r"there are 0 seeds .* give one"):
        verdicts([])
    with pytest.raises(ValueError, match=r"errors after are of high: .*'none', run it too"):
        Errors(PLACE, PLACE, {"high": PLACE})
