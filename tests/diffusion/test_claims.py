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
    found, order = [], np.random.default_rng(seed).permutation(COUNT)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        size = 1 + 0.05 * (i - (count - 1) / 2)
        before = rng.exponential(size=COUNT)
        after = before + size * rise + noise * rng.normal(size=COUNT)
        policies = {name: after - size * what + 0.01 * rng.normal(size=COUNT) for name, what in saved.items()}
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


@pytest.mark.parametrize(("share", "holds"), [(0.0, True), (-0.5, True), (0.2, True), (0.3, False), (1.0, False)])
@pytest.mark.parametrize("count", [1, 3])
def test_low_energies_are_protected_only_where_others_get_less_than_a_quarter(share, holds, count):
    assert verdicts(seeds(low=0.05 * np.where(PLACE < 0.5, 1, share), count=count), interval=QUICK)[2].holds is holds


def test_only_is_not_said_because_noise_hides_what_is_saved_elsewhere():
    """0.3 is saved of each sample at high energy against 1 at low, in noise that mostly hides the former: "holds" would be wrong."""
    found = []
    for i in range(40):
        rng = np.random.default_rng(i)
        energy, none = np.arange(100.0), rng.normal(10, 1, 100)
        noise = rng.normal(size=100)  # of images
        after = [none - np.where(energy < 50, 1, 0.3) + noise + rng.normal(0, 0.3, 100) for _ in range(3)]
        found.append(verdicts([Errors(energy, none - 2, {"none": none, "low": low}) for low in after], interval=QUICK, bins=5)[2].holds)
    assert found.count(True) <= 2
    assert found.count(None) > 20


def test_low_energies_that_save_all_do_not_save_only_low_ones():
    everywhere = verdicts(seeds(low=EVEN), interval=QUICK)[2]
    assert everywhere.holds is False
    # Insignificant at the top, and no less than a quarter of that at the bottom: the one does not make the other.
    unsure = seeds(low=EVEN, count=1)[0]
    top = unsure.energy >= np.quantile(unsure.energy, 0.8)
    noise = 5 * np.random.default_rng(0).normal(size=COUNT)
    noisy = unsure.after["low"] + np.where(top, noise - noise[top].mean(), 0)
    found = verdicts([Errors(unsure.energy, unsure.before, {**unsure.after, "low": noisy})], interval=QUICK)[2]
    assert found.holds is None
    parts = [(unsure.after["none"] - noisy)[part] for part in (unsure.energy <= np.quantile(unsure.energy, 0.2), top)]
    width = stats.t.ppf(0.975, len(parts[1]) - 1) * np.hypot(stats.sem(parts[0]) / 4, stats.sem(parts[1]))
    assert found.statistic is not None
    assert found.statistic == pytest.approx(parts[0].mean() / 4 - parts[1].mean(), rel=1e-9)
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


def test_verdicts_are_no_surer_than_their_images():
    """Of noise that all seeds share nothing is concluded more often than from one of them; of seeds alone it would be in most cases."""
    found = []
    for i in range(40):
        rng = np.random.default_rng(i)
        none, noise = rng.normal(1, 0.1, 200), rng.normal(size=200)
        after = [none - noise + 0.01 * rng.normal(size=200) for _ in range(3)]
        errors = [Errors(np.arange(200.0), none - 1, {"none": none, "high": high}) for high in after]
        found.append(verdicts(errors, interval=QUICK, bins=5)[1].holds)
    assert found.count(None) >= stats.binom.ppf(1e-4, 40, 0.95)


def test_bad_input_is_one_clear_line():
    with pytest.raises(ValueError, match=r"there are 0 seeds .* give one"):
        verdicts([])
    with pytest.raises(ValueError, match=r"samples of seeds 0 and 1 have different energies: give the same"):
        verdicts([Errors(energy, PLACE, {"none": PLACE}) for energy in (PLACE, PLACE[::-1])])
    with pytest.raises(ValueError, match=r"errors after are of high: .*'none', run it too"):
        Errors(PLACE, PLACE, {"high": PLACE})
