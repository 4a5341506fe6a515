"""What is found in tables whose truth is known."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from diffusion import findings
from diffusion.claims import NONE, Errors, verdicts
from diffusion.statistics import Bootstrap, bin_means, rank_correlation
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
    assert ends(main["rise"][NONE]) == pytest.approx(student(rises), rel=1e-12)
    assert main["saved"]["high"]["high"]["value"] == pytest.approx(0.4, abs=0.01)
    assert main["saved"]["high"]["low"]["value"] == pytest.approx(0, abs=0.01)
    each = [stats.spearmanr(seed.energy, seed.rise()).statistic for seed in seeds]
    correlation = main["correlations"]["energy and rise"]
    assert correlation["seeds"] == pytest.approx(each, rel=1e-9)
    assert ends(correlation) == pytest.approx(np.tanh(student(np.arctanh(each))), rel=1e-9)
    assert found["predictors"]["energy"] == correlation
    assert abs(main["correlations"]["energy and error before"]["value"]) < 0.2
    bins = main["bins"]["rise"][NONE]
    assert bins["counts"] == [20] * 10
    third = [seed.rise()[40:60].mean() for seed in seeds]  # samples lie in order of energy
    assert [bins[end][2] for end in ("values", "low", "high")] == pytest.approx(student(third), rel=1e-9)


def test_a_level_is_that_of_all_intervals(table):
    found = findings.findings(table, tasks=made_up.tasks(), bins=5, interval=Bootstrap(level=0.5))
    for row in (found["timesteps"]["500"]["rise"][NONE], found["tasks"]["policies"][NONE]["matrix"][2][0]):
        width = stats.t.ppf(0.75, SEEDS - 1) * stats.sem(row["seeds"])
        assert row["high"] - row["value"] == pytest.approx(width, rel=1e-9)


def test_verdicts_follow_from_what_was_put_in(found):
    holds = [row["holds"] for row in found["timesteps"]["500"]["verdicts"]]
    assert holds[:3] == [True, True, True]
    assert len(holds) == 5


def test_verdicts_over_seeds_are_those_of_many_draws(table, found):
    whole = verdicts(
        [Errors(seed.energy, seed.before, seed.after) for seed in findings.seeds_of(table, 500)], bins=10, interval=Bootstrap()
    )
    for row, verdict in zip(found["timesteps"]["500"]["verdicts"], whole, strict=True):
        assert (row["holds"], row["reason"]) == (verdict.holds, verdict.reason)


def test_findings_are_json(found, alone):
    for each in (found, alone):
        assert json.loads(json.dumps(each, allow_nan=False)) == each
    assert found["conclusive"] is True
    assert found["reasons"] == []


def test_of_one_seed_intervals_are_of_samples(table, alone):
    (seed,), main = findings.seeds_of(only(table, 0), 500), alone["timesteps"]["500"]
    rise = INTERVAL(seed.rise())
    assert ends(main["rise"][NONE]) == pytest.approx((rise.value, rise.low, rise.high), rel=1e-12)
    means = bin_means(seed.rise("high"), seed.energy, 5, interval=INTERVAL)
    for end in ("values", "low", "high"):
        assert main["bins"]["rise"]["high"][end] == pytest.approx(getattr(means, end), rel=1e-12)
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
    expected = bin_means(sharpness, seed.energy, 10, interval=INTERVAL)  # of samples: there is nothing that a seed could change
    assert row["low"] == pytest.approx(expected.low, rel=1e-12)
    assert row["places"] == pytest.approx([-2 + (20 * i + 9.5) / 199 for i in range(10)], rel=1e-9)
    order = np.argsort(sharpness)
    rises = [each.rise()[order[:20]].mean() for each in findings.seeds_of(table, 500)]
    assert [found["sharpness"]["rise"][end][0] for end in ("values", "low", "high")] == pytest.approx(student(rises), rel=1e-9)
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
    each = [rank_correlation(seed.columns["energy@10"][rows], seed.columns["flow.none@300"][rows]) for seed in seeds]
    # Half-widths in Fisher's z: Student's over seeds, and the mean of those of samples.
    z = np.arctanh([one.value for one in each])
    own = np.mean([np.arctanh(one.high) - np.arctanh(one.value) for one in each])
    reach = np.hypot(stats.t.ppf(0.975, SEEDS - 1) * stats.sem(z), own)
    row = intrinsic["predictors"]["energy at β = 10"]["flow"]
    assert ends(row) == pytest.approx(np.tanh([z.mean(), z.mean() - reach, z.mean() + reach]), rel=1e-9)


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
    assert ends(rows[NONE]["accepted"]) == pytest.approx(student([30 / 60, 31 / 60, 32 / 60]))
    assert [row["value"] for row in rows[NONE]["shares"]] == [1, 0, 0]
    assert [row["value"] for row in rows["high"]["recognised"]] == pytest.approx([14 / 60, 13 / 60, 13 / 60])
    assert ends(rows[NONE]["relative"]) == pytest.approx(student([0.6, 0.62, 0.64]))
    # Seeds that agree say nothing: Wilson's interval of 50 in 60.
    z, p, n = stats.norm.ppf(0.975), 50 / 60, 60
    centre, reach = (p + z**2 / (2 * n)) / (1 + z**2 / n), z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert ends(rows["real"]["accepted"]) == pytest.approx((p, centre - reach, centre + reach))
    assert [check["passes"] for check in generated["checks"]] == [True] * 3


def test_the_error_of_a_ratio_is_that_of_draws(alone):
    row = alone["generated"]["policies"]["before"]["relative"]
    draws = np.random.default_rng(0).binomial(60, [[45 / 60], [50 / 60]], (2, 100_000))
    assert row["value"] == pytest.approx(0.9)
    assert row["error"] == pytest.approx((draws[0] / draws[1]).std(), rel=0.05)  # of first order in 1/60
    assert row["low"] == pytest.approx(row["value"] - stats.norm.ppf(0.975) * row["error"])


def test_a_model_that_did_not_learn_task_1_makes_all_inconclusive(table):
    found = findings.findings(table, generated=made_up.generated(before=[45, 20, 2]), interval=INTERVAL)
    assert found["conclusive"] is False
    assert [check["passes"] for check in found["generated"]["checks"]] == [True, False, False]
    assert [reason.partition(":")[0] for reason in found["reasons"]] == ["seed 1", "seed 2", "seed 2"]
    assert "0.40 ±" in found["reasons"][0]
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
