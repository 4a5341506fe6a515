"""What is found in tables whose truth is known."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from diffusion import findings
from diffusion.claims import NONE, Errors, verdicts
from diffusion.over_seeds import of_ratio, of_shares, plain
from diffusion.statistics import Bootstrap, correlation_across_seeds, rank_correlation, rank_order
from hopjax.cli.table import Table
from tests.diffusion import made_up

SAMPLES, SEEDS = 200, 3
INTERVAL = Bootstrap(resamples=200)


def only(table, seed):
    rows = table["seed"] == seed
    return Table({name: table[name][rows] for name in table.columns}, table.settings)


def student(values):
    """Mean and ends, by scipy."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return np.mean(values), low, high


def crossed(columns, level=0.95):
    """Mean and ends for other seeds and other samples, by the mean squares of an analysis of variance."""
    table = np.array(columns)
    seeds, count = table.shape
    left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    left = np.sum(left**2) / ((seeds - 1) * (count - 1))
    of_seeds, of_samples = count * table.mean(axis=1).var(ddof=1), seeds * table.mean(axis=0).var(ddof=1)
    quantiles = stats.t.ppf((1 + level) / 2, [seeds - 1, count - 1])
    reach = np.sqrt((quantiles[0] ** 2 * of_seeds + quantiles[1] ** 2 * max(of_samples - left, 0)) / table.size)
    return table.mean(), table.mean() - reach, table.mean() + reach


def wilson(hits, count, wide=stats.norm.ppf(0.975) ** 2):
    """Share and ends; wide: the squared quantile."""
    p, z = hits / count, np.sqrt(wide)
    centre, reach = (
        (p + z**2 / (2 * count)) / (1 + z**2 / count),
        z / (1 + z**2 / count) * np.sqrt(p * (1 - p) / count + (z / count / 2) ** 2),
    )
    return p, centre - reach, centre + reach


def ends(row):
    return row["value"], row["low"], row["high"]


@pytest.fixture(scope="module")
def table():
    return made_up.samples(SAMPLES, SEEDS, densities=50)


@pytest.fixture(scope="module")
def found(table):
    return findings.findings(table, tasks=made_up.tasks(), generated=made_up.generated(), bins=10, interval=INTERVAL)


@pytest.fixture(scope="module")
def alone(table):
    """One seed's."""
    return findings.findings(only(table, 0), tasks=made_up.tasks(1), generated=made_up.generated(1), bins=5, interval=INTERVAL)


def test_numbers_are_those_of_the_table(table, found):
    main = found["timesteps"]["500"]
    assert (found["samples"], found["seeds"]) == (SAMPLES, SEEDS)
    seeds = findings.seeds_of(table, 500)
    rises = [float(np.mean(seed.after[NONE] - seed.before)) for seed in seeds]
    assert main["rise"][NONE]["seeds"] == pytest.approx(rises, rel=1e-12)
    assert ends(main["rise"][NONE]) == pytest.approx(crossed([seed.rise() for seed in seeds]), rel=1e-9)
    assert main["saved"]["high"]["high"]["value"] == pytest.approx(0.4, abs=0.01)
    assert main["saved"]["high"]["low"]["value"] == pytest.approx(0, abs=0.01)
    each = [stats.spearmanr(seed.energy, seed.rise()).statistic for seed in seeds]
    correlation = main["correlations"]["energy and rise"]
    assert correlation["seeds"] == pytest.approx(each, rel=1e-9)
    assert correlation["value"] == pytest.approx(np.tanh(np.mean(np.arctanh(each))), rel=1e-9)
    assert ends(correlation) == ends(plain(correlation_across_seeds([rank_order(seed.energy, seed.rise()) for seed in seeds]), []))
    assert found["predictors"]["energy"] == correlation
    assert abs(main["correlations"]["energy and error before"]["value"]) < 0.2
    bins = main["bins"]["rise"][NONE]
    assert bins["counts"] == [20] * 10
    third = crossed([seed.rise()[40:60] for seed in seeds])  # samples lie in order of energy
    assert [bins[end][2] for end in ("values", "low", "high")] == pytest.approx(third, rel=1e-9)


def test_correlations_given_difficulty_use_the_control(table, found):
    rows = found["timesteps"]["500"]["correlations"]
    assert list(rows) == [
        "energy and error before",
        "energy and error after (the paper's)",
        "energy and rise",
        "energy and rise, given error before",
        "energy and rise, given error before and complexity",
    ]
    seeds = findings.seeds_of(table, 500)
    for name, of, given in (
        ("energy and error before", lambda seed: seed.before, lambda _: []),
        ("energy and error after (the paper's)", lambda seed: seed.after[NONE], lambda _: []),
        ("energy and rise, given error before", lambda seed: seed.rise(), lambda seed: [seed.control]),
        ("energy and rise, given error before and complexity", lambda seed: seed.rise(), lambda seed: [seed.control, *seed.complexity]),
    ):
        each = [rank_correlation(seed.energy, of(seed), given(seed)).value for seed in seeds]
        assert rows[name]["seeds"] == pytest.approx(each, rel=1e-12)
    same = Table({**table.columns, "control@500": table["before@500"]}, table.settings)
    with pytest.raises(ValueError, match="control holds the same errors as before"):
        findings.findings(same, interval=INTERVAL)


def test_a_level_is_that_of_all_intervals(table):
    found = findings.findings(table, tasks=made_up.tasks(), bins=5, interval=Bootstrap(level=0.5))
    rise = crossed([seed.rise() for seed in findings.seeds_of(table, 500)], 0.5)
    assert ends(found["timesteps"]["500"]["rise"][NONE]) == pytest.approx(rise, rel=1e-9)
    row = found["tasks"]["policies"][NONE]["matrix"][2][0]
    assert row["high"] - row["value"] == pytest.approx(stats.t.ppf(0.75, SEEDS - 1) * stats.sem(row["seeds"]), rel=1e-9)


def test_verdicts_follow_from_what_was_put_in(found):
    holds = [row["holds"] for row in found["timesteps"]["500"]["verdicts"]]
    assert holds[:3] == [True, True, True]
    assert len(holds) == 5


def test_verdicts_are_those_of_the_errors(table, found):
    whole = verdicts([Errors(seed.energy, seed.before, seed.after) for seed in findings.seeds_of(table, 500)], bins=10, interval=INTERVAL)
    assert [(row["holds"], row["reason"]) for row in found["timesteps"]["500"]["verdicts"]] == [(each.holds, each.reason) for each in whole]


def test_findings_are_json(found, alone):
    for each in (found, alone):
        assert json.loads(json.dumps(each, allow_nan=False)) == each
    assert found["conclusive"] is True
    assert found["reasons"] == []


def test_of_one_seed_intervals_are_of_samples(table, alone):
    (seed,), main = findings.seeds_of(only(table, 0), 500), alone["timesteps"]["500"]
    rise = INTERVAL(seed.rise())
    assert ends(main["rise"][NONE]) == pytest.approx((rise.value, rise.low, rise.high), rel=1e-12)
    means = [INTERVAL(part) for part in np.split(seed.rise("high"), 5)]
    for end, name in (("values", "value"), ("low", "low"), ("high", "high")):
        assert main["bins"]["rise"]["high"][end] == pytest.approx([getattr(each, name) for each in means], rel=1e-12)
    ranks = rank_correlation(seed.energy, seed.rise())
    assert ends(main["correlations"]["energy and rise"]) == pytest.approx((ranks.value, ranks.low, ranks.high), rel=1e-12)
    cell = alone["tasks"]["policies"][NONE]["matrix"][0][0]  # of one number for a seed there is none
    assert ends(cell) == (0.2, None, None)


def test_bins_of_equal_width_are_the_papers(found):
    widths = found["timesteps"]["500"]["widths"]
    assert widths["axis"] == "energy"
    assert widths["edges"] == pytest.approx(np.linspace(-2, -1, 11), rel=1e-12)
    assert widths["counts"] == [20] * 10
    for policy, row in widths["sums"].items():
        means = widths["means"][policy]
        for end in ("values", "low", "high"):
            assert row[end] == pytest.approx(20 * np.array(means[end]), rel=1e-12)
        total = found["timesteps"]["500"]["saved"][policy]["all"]["value"]
        assert sum(row["values"]) == pytest.approx(SAMPLES * total, rel=1e-9)


def test_bins_with_too_few_samples_are_left_out(table):
    energy = table["energy"].copy()
    energy[table["index"] == 7] = -7  # bins are 0.6 wide now: one sample, then none, then all others
    odds = np.where(energy == -7, 7.0, table["odds"])
    widths = findings.findings(Table({**table.columns, "energy": energy, "odds": odds}, table.settings), interval=INTERVAL)["timesteps"][
        "500"
    ]["widths"]
    assert widths["counts"] == [1, 0, 0, 0, 0, 0, 0, 0, 79, 120]
    assert widths["left_out"] == 1
    for rows in (widths["sums"]["high"], widths["after"][NONE]):
        for end in ("values", "low", "high"):
            assert rows[end][:8] == [None] * 8
            assert None not in rows[end][8:]


def test_energies_that_agree_in_all_their_digits_are_told_apart_by_their_odds(table):
    flat = Table({**table.columns, "energy": np.full(len(table), -0.5)}, table.settings)
    widths = findings.findings(flat, interval=INTERVAL)["timesteps"]["500"]["widths"]
    assert widths["axis"].startswith("log odds")
    assert widths["counts"] == [20] * 10


def test_sharpness_is_binned_by_energy_and_the_rise_by_sharpness(table, found):
    seed = findings.seeds_of(table, 500)[0]
    sharpness = seed.columns["perturbation"]
    row = found["sharpness"]["sharpness"]
    expected = [INTERVAL(part).low for part in np.split(sharpness, 10)]  # of samples: there is nothing that a seed could change
    assert row["low"] == pytest.approx(expected, rel=1e-12)
    assert row["places"] == pytest.approx([-2 + (20 * i + 9.5) / 199 for i in range(10)], rel=1e-9)
    order = np.argsort(sharpness)
    rises = crossed([each.rise()[order[:20]] for each in findings.seeds_of(table, 500)])
    assert [found["sharpness"]["rise"][end][0] for end in ("values", "low", "high")] == pytest.approx(rises, rel=1e-9)
    correlations = found["sharpness"]["correlations"]
    fixed = rank_correlation(seed.energy, sharpness)
    assert ends(correlations["energy and perturbation sharpness"]) == pytest.approx((fixed.value, fixed.low, fixed.high), rel=1e-9)
    assert correlations["perturbation sharpness and rise"]["value"] > 0.9


def test_sharpnesses_that_tie_share_bins(table):
    ranks = np.arange(len(table))
    tied = Table({**table.columns, "perturbation": np.maximum(ranks % 200, 90).astype(float)}, table.settings)
    assert len(findings.findings(tied, interval=INTERVAL)["sharpness"]["rise"]["places"]) == 6
    alike = Table({**table.columns, "perturbation": np.ones(len(table))}, table.settings)
    assert "sharpness" not in findings.findings(alike, interval=INTERVAL)


def test_measures_of_forgetting_are_compared_where_all_are_there(table, found):
    intrinsic, seeds = found["intrinsic"], findings.seeds_of(table, 500)
    assert (intrinsic["samples"], intrinsic["timestep"], intrinsic["measures"]) == (50, 300, ["rise", "bound", "flow"])
    rows = np.isfinite(seeds[0].columns["flow.none@300"])
    for first, second in itertools.combinations(("rise", "bound", "flow"), 2):
        pairs = [
            [seed.rise()[rows] if name == "rise" else seed.columns[f"{name}.none@300"][rows] for name in (first, second)] for seed in seeds
        ]
        each = [stats.spearmanr(*pair).statistic for pair in pairs]
        assert intrinsic["among"][f"{first} and {second}"]["seeds"] == pytest.approx(each, rel=1e-9)
    assert intrinsic["noise"]["bound"]["value"] == 0
    flow = [seed.columns["flow.none@300"][rows] for seed in seeds]
    shares = [np.mean(seed.columns["flow.none.error@300"][rows] ** 2) / x.var(ddof=1) for seed, x in zip(seeds, flow, strict=True)]
    assert 0.3 < np.mean(shares) < 0.7
    assert ends(intrinsic["noise"]["flow"]) == pytest.approx(student(shares), rel=1e-9)
    assert intrinsic["saved"]["high"]["bound"]["value"] == pytest.approx(1, rel=1e-9)
    assert set(intrinsic["forgotten"]) == {NONE, "high"}
    assert len(intrinsic["bins"]["flow"]["values"]) == 5


def test_predictors_are_held_against_every_measure(table, found):
    intrinsic, seeds = found["intrinsic"], findings.seeds_of(table, 500)
    assert set(found["predictors"]) | {"energy, given error before and complexity"} == set(intrinsic["predictors"])
    assert {"energy", "predicted rise", "perturbation sharpness", "energy at β = 10", "error before Task 2"} < set(found["predictors"])
    assert found["predictors"]["predicted rise"]["value"] == pytest.approx(-found["predictors"]["energy"]["value"], rel=1e-9)
    rows = np.isfinite(seeds[0].columns["flow.none@300"])
    each = [rank_order(seed.columns["energy@10"][rows], seed.columns["flow.none@300"][rows]) for seed in seeds]
    row = intrinsic["predictors"]["energy at β = 10"]["flow"]
    assert ends(row) == ends(plain(correlation_across_seeds(each), []))


def test_few_densities_have_means_and_no_correlations():
    intrinsic = findings.findings(made_up.samples(100, 2, densities=5), interval=INTERVAL)["intrinsic"]
    assert intrinsic["predictors"] == intrinsic["among"] == {}
    assert intrinsic["forgotten"][NONE]["bound"]["value"] > 0


def test_forgetting_of_tasks_is_that_of_the_definitions(found):
    """By hand, from `made_up.LEARNT`: transfer (0.9 − 0.2 + 0.6 − 0.3)/2, forgetting (0.9 − 0.1 + 0.6 − 0.3)/2, 0.01 more each seed."""
    tasks = found["tasks"]
    assert tasks["count"] == 3
    row = tasks["policies"][NONE]
    assert row["backward transfer"]["seeds"] == pytest.approx([0.5, 0.51, 0.52])
    assert ends(row["backward transfer"]) == pytest.approx(student([0.5, 0.51, 0.52]))
    assert row["forgetting"]["seeds"] == pytest.approx([0.55, 0.56, 0.57])
    assert tasks["policies"]["high"]["forgetting"]["seeds"] == pytest.approx([0.075, 0.085, 0.095])
    assert row["matrix"][0][1:] == [None, None]
    assert [cell["value"] for cell in row["matrix"][2]] == pytest.approx([0.91, 0.61, 0.41])


def test_a_task_that_was_not_measured_leaves_gaps():
    whole = made_up.tasks()
    rows = ~((whole["policy"] == "high") & (whole["after"] == 3))
    policies = findings.findings(
        made_up.samples(), tasks=Table({name: whole[name][rows] for name in whole.columns}, whole.settings), interval=INTERVAL
    )["tasks"]["policies"]
    assert policies["high"]["matrix"][2][0]["value"] is None
    assert policies["high"]["forgetting"]["value"] is policies["high"]["backward transfer"]["value"] is None
    assert policies[NONE]["forgetting"]["value"] == pytest.approx(0.56)


def test_generated_images_are_counted(found):
    generated = found["generated"]
    rows = generated["policies"]
    assert list(rows) == ["real", "before", NONE, "high"]
    assert rows[NONE]["accepted"]["seeds"] == pytest.approx([30 / 60, 31 / 60, 32 / 60])  # a confidence of 0.9 is not above 0.9
    # Seeds agree better than three times 60 images would by chance: Wilson's interval of those of one.
    assert ends(rows[NONE]["accepted"]) == pytest.approx(wilson(31, 60))
    assert [row["value"] for row in rows[NONE]["shares"]] == [1, 0, 0]
    assert [row["low"] for row in rows[NONE]["shares"]] == [pytest.approx(wilson(60, 60)[1]), 0, 0]
    assert [row["value"] for row in rows["high"]["recognised"]] == pytest.approx([14 / 60, 13 / 60, 13 / 60])
    assert rows[NONE]["relative"]["seeds"] == pytest.approx([0.6, 0.62, 0.64])
    assert ends(rows["real"]["accepted"]) == pytest.approx(wilson(50, 60))
    assert [check["passes"] for check in generated["checks"]] == [True] * 3


def test_shares_of_seeds_that_differ_have_their_spread():
    found = of_shares([10, 50, 90], [100] * 3, 0.95)
    p, sem = 0.5, stats.sem([0.1, 0.5, 0.9])
    images = p * (1 - p) / sem**2  # that would leave as much to chance
    assert ends(found) == pytest.approx(wilson(p * images, images, stats.t.ppf(0.975, 2) ** 2))
    assert found["error"] == pytest.approx(sem)


def test_ratios_are_never_points_nor_below_zero():
    """Ends by solving for the ratio at which the difference of the one share and so much of the other is zero."""
    for hits, real in (
        ([0], [50]),
        ([0, 0, 0], [50] * 3),
        ([1, 0, 0], [50] * 3),
        ([60], [60]),
        ([45], [50]),
        ([3, 55, 20], [50] * 3),
        ([7], [1]),
    ):
        one, other = of_shares(hits, [60] * len(hits), 0.95), of_shares(real, [60] * len(real), 0.95)
        found = of_ratio(one, other)
        ratio, low, high = ends(found)
        assert ratio == pytest.approx(one["value"] / other["value"])
        assert 0 <= low <= ratio <= high
        assert low < high
        assert found["error"] > 0
        for end, own, its in ((low, "low", "high"), (high, "high", "low")):
            far = np.hypot(one[own] - one["value"], end * (other[its] - other["value"]))
            assert abs(one["value"] - end * other["value"]) == pytest.approx(far, abs=1e-9)
    assert of_ratio(one, of_shares([0], [60], 0.95)) == {"value": None, "error": None, "low": None, "high": None, "seeds": [None]}


def test_the_interval_of_a_ratio_covers():
    """Of counts from a few hits up; the classifier's rate of real images is by chance too."""
    rng = np.random.default_rng(0)
    for rate, real in ((0.004, 0.6), (0.05, 0.5), (0.5, 0.9)):
        found = [
            of_ratio(of_shares([int(hits)], [200], 0.95), of_shares([int(reals)], [300], 0.95))
            for hits, reals in zip(*rng.binomial([[200], [300]], [[rate], [real]], (2, 400)), strict=True)
        ]
        covered = np.mean([row["low"] <= rate / real <= row["high"] for row in found])
        assert covered >= stats.binom.ppf(1e-4, 400, 0.94) / 400


def test_a_model_that_did_not_learn_task_1_makes_all_inconclusive(table):
    found = findings.findings(table, generated=made_up.generated(before=[45, 20, 2]), interval=INTERVAL)
    assert found["conclusive"] is False
    assert [check["passes"] for check in found["generated"]["checks"]] == [True, False, False]
    assert [reason.partition(":")[0] for reason in found["reasons"]] == ["seed 1", "seed 2", "seed 2"]
    assert "at 0.40 [0.27, 0.57] of the rate" in found["reasons"][0]
    assert found["reasons"][2].endswith("of class 2")  # two images are recognised: of classes 0 and 1
    half = made_up.generated(before=[25, 25, 25])  # exactly half of the rate of real ones
    half.settings["required"] = 0.5
    just = findings.findings(table, generated=half, interval=INTERVAL)
    assert just["conclusive"] is True
    assert [check["passes"] for check in just["generated"]["checks"]] == [True] * 3


def test_a_classifier_that_knows_no_real_image_judges_none(table):
    images = made_up.generated()
    confidence = np.where(images["policy"] == "real", 0.5, images["confidence"])
    found = findings.findings(table, generated=Table({**images.columns, "confidence": confidence}, images.settings), interval=INTERVAL)
    assert found["conclusive"] is False
    assert found["generated"]["policies"][NONE]["relative"]["value"] is None
    assert "recognises no real image" in found["reasons"][0]


def test_generated_images_of_all_seeds_are_needed(table):
    images = made_up.generated()
    rows = ~((images["policy"] == "high") & (images["seed"] == 1))
    with pytest.raises(ValueError, match="'high' are not there for every seed 0, 1, 2"):
        findings.findings(table, generated=Table({name: images[name][rows] for name in images.columns}, images.settings), interval=INTERVAL)


@pytest.mark.parametrize("seeds", [1, 3])
def test_without_forgetting_there_is_nothing_to_conclude(seeds):
    found = findings.findings(made_up.samples(seeds=seeds, forgotten=0), interval=INTERVAL)
    assert found["conclusive"] is False
    assert "not significantly" in found["reasons"][0]
