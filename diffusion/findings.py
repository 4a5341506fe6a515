"""What an experiment's tables say: rises by energy, correlations, what policies save, verdicts. All intervals are computed here, once.

Input and output are plain (tables, JSON), so a report is drawn without a model, and its numbers can be had without a report.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion.claims import NONE, Errors, verdicts
from diffusion.over_seeds import Column, binned, of_bins, of_correlations, of_numbers, of_ratio, of_samples, of_shares
from diffusion.statistics import Bootstrap, bin_edges, bin_of, confound, groups, rank_order
from hopjax.cli.table import Table

# Fewer samples than this have no correlation worth a line.
FEWEST = 10
# Of `generated`: real images that the classifier has not seen, and the model before Task 2.
REAL, BEFORE = "real", "before"


@dataclasses.dataclass(frozen=True, eq=False)
class Seed:
    """One seed's columns at a timestep.

    Attributes:
        energy: what orders like the energy, with all its digits: minus the log odds of the others at a sample.
        before, control: errors before Task 2, from independent noise.
        after: by policy; from the noise of `before`.
        complexity: of the images.
        columns: all of them, by their names in the table.
    """

    energy: Column
    before: Column
    control: Column
    after: Mapping[str, Column]
    complexity: tuple[Column, ...]
    columns: Mapping[str, Column]

    def rise(self, policy: str = NONE) -> Column:
        """What was forgotten of each sample."""
        return self.after[policy] - self.before

    def saved(self, policy: str) -> Column:
        """How much lower its error is under the policy than without replay."""
        return self.after[NONE] - self.after[policy]


def seeds_of(table: Table, timestep: int) -> list[Seed]:
    """The columns of each seed.

    Raises: KeyError for a timestep that was not measured.
    """
    found = []
    policies = [name for name in table.settings["plan"]["policies"] if f"{name}@{timestep}" in table]
    for seed in np.unique(table["seed"]):
        rows = table["seed"] == seed
        column = {name: table[name][rows].astype(np.float64) for name in table.columns}
        found.append(
            Seed(
                -column["odds"],
                column[f"before@{timestep}"],
                column[f"control@{timestep}"],
                {policy: column[f"{policy}@{timestep}"] for policy in policies},
                (column["png_bytes"], column["total_variation"]),
                column,
            )
        )
    return found


def findings(
    samples: Table,
    *,
    tasks: Table | None = None,
    generated: Table | None = None,
    bins: int = 10,
    interval: Bootstrap = Bootstrap(),
) -> dict[str, Any]:
    """Everything that the report shows, as JSON.

    Args:
        samples, tasks, generated: as `diffusion.continual.Measured` has them.
        bins: by energy, of equally many samples, and as many of equal width.
        interval: of means of one seed's samples; its level is that of all intervals.

    Returns: `timesteps`, for each timestep of the plan, the main one first; of the main one `predictors` of the rise, and, where the
        tables have them, `latents` (their energies against those of the images), `sharpness`, `intrinsic` (changes of log density),
        `tasks` and `generated`. `conclusive` is false, for `reasons`, if nothing was forgotten without replay, or if a model of Task 1
        was no good to begin with.

    Raises: ValueError as `statistics` does, for too few samples or energies that are all alike.
    """
    plan = samples.settings["plan"]
    seeds = seeds_of(samples, plan["timesteps"][0])
    found: dict[str, Any] = {
        "bins": bins,
        "level": interval.level,
        "samples": len(seeds[0].energy),
        "seeds": len(seeds),
        "timesteps": {str(timestep): _at(seeds_of(samples, timestep), bins, interval) for timestep in plan["timesteps"]},
        "predictors": {name: _correlate(seeds, of, Seed.rise, interval.level) for name, of in _predictors(seeds[0]).items()},
    }
    if "odds.latent" in samples:
        both = _correlate(seeds, lambda seed: seed.energy, lambda seed: -seed.columns["odds.latent"], interval.level)
        found["latents"] = {"energy and energy of latents": both}
    if "perturbation" in samples and np.ptp(seeds[0].columns["perturbation"]):
        found["sharpness"] = _sharpness(seeds, bins, interval)
    if plan.get("densities"):
        found["intrinsic"] = _intrinsic(seeds, plan["densities"], bins, interval)
    if tasks is not None:
        found["tasks"] = _tasks(tasks, interval.level)
    if generated is not None:
        found["generated"] = _generated(generated, interval.level)
    rise = found["timesteps"][str(plan["timesteps"][0])]["rise"][NONE]
    reasons = [] if generated is None else _doubts(found["generated"])
    if not rise["low"] > 0:
        ends = ", ".join(f"{rise[end]:.3g}" for end in ("low", "high"))
        reasons.append(f"without replay errors rise by {rise['value']:.3g} [{ends}], not significantly: there is no forgetting to explain")
    return {"conclusive": not reasons, "reasons": reasons, **found}


def _correlate(
    seeds: Sequence[Seed],
    first: Callable[[Seed], Column],
    second: Callable[[Seed], Column],
    level: float,
    given: Callable[[Seed], Sequence[Column]] = lambda _: (),
) -> dict[str, Any]:
    return of_correlations([rank_order(first(seed), second(seed), given(seed)) for seed in seeds], level)


def _at(seeds: Sequence[Seed], bins: int, interval: Bootstrap) -> dict[str, Any]:
    policies = list(seeds[0].after)
    saving = [policy for policy in policies if policy != NONE]
    energy = seeds[0].energy
    masks, edges = groups(energy), bin_edges(energy, bins)
    confounds = [confound(seed.energy, seed.before, seed.after[NONE], seed.control, seed.complexity) for seed in seeds]
    words = (
        "energy and error before",
        "energy and error after (the paper's)",
        "energy and rise",
        "energy and rise, given error before",
        "energy and rise, given error before and complexity",
    )

    def by_energy(columns: Sequence[Column]) -> dict[str, Any]:
        return of_bins(binned(columns, energy, edges, interval))

    judged = verdicts([Errors(seed.energy, seed.before, seed.after) for seed in seeds], bins=bins, interval=interval)
    return {
        "rise": {policy: of_samples([seed.rise(policy) for seed in seeds], interval) for policy in policies},
        "bins": {
            "before": by_energy([seed.before for seed in seeds]),
            "after": {policy: by_energy([seed.after[policy] for seed in seeds]) for policy in policies},
            "rise": {policy: by_energy([seed.rise(policy) for seed in seeds]) for policy in policies},
        },
        "widths": _by_width(seeds, bins, interval),
        "saved": {
            policy: {group: of_samples([seed.saved(policy)[mask] for seed in seeds], interval) for group, mask in masks.items()}
            for policy in saving
        },
        "correlations": {
            name: of_correlations(each, interval.level) for name, each in zip(words, zip(*confounds, strict=True), strict=True)
        },
        "verdicts": [_plain(dataclasses.asdict(verdict)) for verdict in judged],
    }


def _by_width(seeds: Sequence[Seed], bins: int, interval: Bootstrap) -> dict[str, Any]:
    """By bins of equal width, as the paper has them: errors after, what policies save as means, and as sums over a bin's samples."""
    axis, height = "energy", seeds[0].columns.get("energy", seeds[0].energy)
    edges = np.linspace(height.min(), height.max(), bins + 1)
    if "energy" not in seeds[0].columns or not (np.diff(edges) > 0).all():  # energies that agree in all digits that were kept
        axis, height = "log odds of a sample against the others, negative", seeds[0].energy
        edges = np.linspace(height.min(), height.max(), bins + 1)
    policies = list(seeds[0].after)
    saved = {policy: binned([seed.saved(policy) for seed in seeds], height, edges, interval) for policy in policies if policy != NONE}
    counts = np.bincount(bin_of(height, edges), minlength=bins)
    return {
        "axis": axis,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "left_out": int(counts[counts < 2].sum()),
        "after": {policy: of_bins(binned([seed.after[policy] for seed in seeds], height, edges, interval)) for policy in policies},
        "means": {policy: of_bins(row) for policy, row in saved.items()},
        "sums": {policy: of_bins(row.sums()) for policy, row in saved.items()},
    }


def _predictors(seed: Seed) -> dict[str, Callable[[Seed], Column]]:
    """What might tell beforehand how much of a sample will be forgotten, the energy first."""
    named = {"predicted rise": "rise", "sharpness": "sharpness", "perturbation sharpness": "perturbation"}
    named |= {f"energy at β = {name.partition('@')[2]}": name for name in seed.columns if name.startswith("energy@")}
    named |= {"bytes as PNG": "png_bytes", "total variation": "total_variation"}
    found: dict[str, Callable[[Seed], Column]] = {"energy": lambda seed: seed.energy}
    if "odds.latent" in seed.columns:
        found["energy of latents"] = lambda seed: -seed.columns["odds.latent"]
    for words, name in named.items():
        if name in seed.columns:
            found[words] = lambda seed, name=name: seed.columns[name]  # type: ignore[misc]
    return found | {"error before Task 2": lambda seed: seed.control}


def _sharpness(seeds: Sequence[Seed], bins: int, interval: Bootstrap) -> dict[str, Any]:
    """The paper's Figure S.1: perturbation sharpness by energy, and the rise by perturbation sharpness."""
    sharpness, level = seeds[0].columns["perturbation"], interval.level
    height = seeds[0].columns.get("energy", seeds[0].energy)

    def by(columns: Sequence[Column], order: Column, shown: Column) -> dict[str, Any]:
        edges = np.unique(np.quantile(order, np.linspace(0, 1, bins + 1), method="higher"))  # fewer bins if ties fill some
        own = bin_of(order, edges)
        places = [float(shown[own == i].mean()) for i in range(len(edges) - 1)]
        return of_bins(binned(columns, order, edges, interval)) | {"places": places}

    def perturbation(seed: Seed) -> Column:
        return seed.columns["perturbation"]

    return {
        "sharpness": by([sharpness], seeds[0].energy, height),
        "rise": by([seed.rise() for seed in seeds], sharpness, sharpness),
        "correlations": {
            "energy and perturbation sharpness": _correlate(seeds, lambda seed: seed.energy, perturbation, level),
            "perturbation sharpness and error after (the paper's)": _correlate(seeds, perturbation, lambda seed: seed.after[NONE], level),
            "perturbation sharpness and rise": _correlate(seeds, perturbation, Seed.rise, level),
        },
    }


def _intrinsic(seeds: Sequence[Seed], densities: Mapping[str, Any], bins: int, interval: Bootstrap) -> dict[str, Any]:
    """Three measures of what was forgotten, of the samples that have all: the rise of the error, and ΔE by changes of log density."""
    at, level = densities["timestep"], interval.level
    names = [name for name in densities["measures"] if f"{name}.{NONE}@{at}" in seeds[0].columns]
    policies = [policy for policy in seeds[0].after if all(f"{name}.{policy}@{at}" in seeds[0].columns for name in names)]
    whole = np.all([np.isfinite(seed.columns[f"{name}.{policy}@{at}"]) for seed in seeds for name in names for policy in policies], axis=0)
    energy = seeds[0].energy[whole]

    def measured(name: str, seed: Seed, policy: str = NONE) -> Column:
        return (seed.rise(policy) if name == "rise" else seed.columns[f"{name}.{policy}@{at}"])[whole]

    def correlation(first: Callable[[Seed], Column], name: str, given: Callable[[Seed], Sequence[Column]] = lambda _: ()) -> dict[str, Any]:
        return _correlate(seeds, first, lambda seed: measured(name, seed), level, given)

    def noise(name: str, seed: Seed) -> float:
        errors = seed.columns[f"{name}.{NONE}.error@{at}"][whole]
        return float(np.mean(errors**2) / np.var(measured(name, seed), ddof=1))

    measures = ["rise", *names]
    pairs = [(one, other) for i, one in enumerate(measures) for other in measures[i + 1 :]]
    predictors = _predictors(seeds[0]) if len(energy) >= FEWEST else {}
    table = {
        words: {name: correlation(lambda seed, of=of: of(seed)[whole], name) for name in measures}  # type: ignore[misc]
        for words, of in predictors.items()
    }
    if predictors:
        table["energy, given error before and complexity"] = {
            name: correlation(
                lambda seed: seed.energy[whole], name, lambda seed: [column[whole] for column in (seed.control, *seed.complexity)]
            )
            for name in measures
        }
    edges = bin_edges(energy, max(1, min(bins, len(energy) // FEWEST)))
    return {
        "timestep": at,
        "samples": len(energy),
        "measures": measures,
        "forgotten": {
            policy: {name: of_samples([measured(name, seed, policy) for seed in seeds], interval) for name in measures}
            for policy in policies
        },
        "saved": {
            policy: {
                name: of_samples([measured(name, seed) - measured(name, seed, policy) for seed in seeds], interval) for name in measures
            }
            for policy in policies
            if policy != NONE
        },
        "predictors": table,
        "among": {
            f"{one} and {other}": correlation(lambda seed, one=one: measured(one, seed), other)  # type: ignore[misc]
            for one, other in pairs
            if predictors
        },
        "noise": {name: of_numbers([noise(name, seed) for seed in seeds], level) for name in names},
        "bins": {name: of_bins(binned([measured(name, seed) for seed in seeds], energy, edges, interval)) for name in measures},
    }


def _tasks(table: Table, level: float) -> dict[str, Any]:
    r"""What is left of each task after the later ones, as errors $R_{kj}$ on Task j after k tasks.

    Backward transfer, the mean over j < T of $R_{Tj} - R_{jj}$ (Lopez-Paz and Ranzato, arXiv:1706.08840, of accuracies), and average
    forgetting, of $R_{Tj} - \min_{k<T} R_{kj}$ (Chaudhry et al., arXiv:1801.10112): of errors, both are positive for what was forgotten.
    """
    count, numbers = int(table["after"].max()), np.unique(table["seed"])
    found = {}
    for policy in dict.fromkeys(table["policy"].tolist()):
        errors = np.full((len(numbers), count, count), np.nan)
        rows = table["policy"] == policy
        errors[np.searchsorted(numbers, table["seed"][rows]), table["after"][rows] - 1, table["task"][rows] - 1] = table["error"][rows]
        last, learnt, earlier = errors[:, -1, :-1], np.diagonal(errors, axis1=1, axis2=2)[:, :-1], errors[:, :-1, :-1]
        found[policy] = {
            "matrix": [[of_numbers(errors[:, k, j].tolist(), level) if j <= k else None for j in range(count)] for k in range(count)],
            # fmin: a task has no error before it is learnt.
            "backward transfer": of_numbers([float(each.mean()) if count > 1 else math.nan for each in last - learnt], level),
            "forgetting": of_numbers(
                [float(each.mean()) if count > 1 else math.nan for each in last - np.fmin.reduce(earlier, axis=1, initial=np.inf)], level
            ),
        }
    return {"count": count, "policies": found}


def _generated(table: Table, level: float) -> dict[str, Any]:
    """What a classifier makes of generated images, and whether the model of Task 1 could generate them in the first place."""
    accept, required = table.settings["accept"], table.settings["required"]
    numbers, labels = np.unique(table["seed"]), np.unique(table["label"])
    names = dict.fromkeys(table["policy"].tolist())
    sure = table["confidence"] > accept

    def rows(policy: str) -> list[np.ndarray]:
        found = [(table["policy"] == policy) & (table["seed"] == seed) for seed in numbers]
        if not all(mask.any() for mask in found):
            raise ValueError(f"generated images of {policy!r} are not there for every seed {', '.join(map(str, numbers))}: generate them")
        return found

    of = {name: rows(name) for name in names}

    def shares(policy: str, counted: np.ndarray, seeds: slice = slice(None)) -> dict[str, Any]:
        masks = of[policy][seeds]
        return of_shares([int((counted & mask).sum()) for mask in masks], [int(mask.sum()) for mask in masks], level)

    def relative(policy: str, seeds: slice = slice(None)) -> dict[str, Any]:
        """To the rate of real images."""
        return of_ratio(shares(policy, sure, seeds), shares(REAL, sure, seeds))

    checks = []
    for i, seed in enumerate(numbers):
        ratio, shown = relative(BEFORE, slice(i, i + 1)), set(table["label"][sure & of[BEFORE][i]].tolist())
        missing = sorted(set(table["label"][sure & of[REAL][i]].tolist()) - shown)
        checks.append(
            {
                "seed": int(seed),
                "relative": ratio,
                "missing": missing,
                "passes": ratio["value"] is not None and ratio["value"] >= required and not missing,
            }
        )
    return {
        "accept": accept,
        "required": required,
        "labels": labels.tolist(),
        "policies": {
            name: {
                "images": int(of[name][0].sum()),
                "shares": [shares(name, table["label"] == label) for label in labels],
                "recognised": [shares(name, sure & (table["label"] == label)) for label in labels],
                "accepted": shares(name, sure),
                "relative": relative(name),
            }
            for name in names
        },
        "checks": checks,
    }


def _doubts(generated: Mapping[str, Any]) -> list[str]:
    """Why the models of Task 1 are no start for an experiment."""
    found, required = [], generated["required"]
    for check in generated["checks"]:
        seed, value = check["seed"], check["relative"]["value"]
        if value is None:
            found.append(f"seed {seed}: the classifier recognises no real image, so that it can judge none")
        elif value < required:
            found.append(
                f"seed {seed}: before Task 2 generated images are recognised at {value:.2f} [{check['relative']['low']:.2f}, "
                f"{check['relative']['high']:.2f}] of the rate of real ones, less than {required:g}: train Task 1 for longer"
            )
        if check["missing"]:
            found.append(f"seed {seed}: before Task 2 no recognised image is of class {', '.join(map(str, check['missing']))}")
    return found


def _plain(verdict: dict[str, Any]) -> dict[str, Any]:
    interval = verdict["interval"]
    return verdict | {"interval": None if interval is None else list(interval)}
