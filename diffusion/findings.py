"""What an experiment's table says: rises by energy, correlations, what policies save, verdicts. All intervals are computed here, once.

Input and output are plain (a table, JSON), so a report is drawn without a model, and its numbers can be had without a report.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from diffusion.claims import NONE, Errors, verdicts
from diffusion.statistics import Bootstrap, Estimate, across_seeds, bin_means, rank_correlation, reductions
from hopjax.cli.table import Table

Column = Float[np.ndarray, " n"]
EPS = np.finfo(np.float64).eps


@dataclasses.dataclass(frozen=True, eq=False)
class Seed:
    """One seed's columns at a timestep.

    Attributes:
        energy: what orders like the energy, with all its digits: minus the log odds of the others at a sample.
        before, control: errors before Task 2, from independent noise.
        after: by policy; from the noise of `before`.
        complexity: of the images.
    """

    energy: Column
    before: Column
    control: Column
    after: Mapping[str, Column]
    complexity: tuple[Column, ...]

    def rise(self, policy: str = NONE) -> Column:
        """What was forgotten of each sample."""
        return self.after[policy] - self.before


def seeds_of(table: Table, timestep: int) -> list[Seed]:
    """The columns of each seed.

    Raises: KeyError for a timestep that was not measured.
    """
    found = []
    policies = [name for name in table.settings["plan"]["policies"] if f"{name}@{timestep}" in table]
    for number in np.unique(table["seed"]):
        rows = table["seed"] == number
        column = {name: table[name][rows].astype(np.float64) for name in table.columns}
        found.append(
            Seed(
                -column["odds"],
                column[f"before@{timestep}"],
                column[f"control@{timestep}"],
                {policy: column[f"{policy}@{timestep}"] for policy in policies},
                (column["png_bytes"], column["total_variation"]),
            )
        )
    return found


def _over(values: Sequence[Estimate]) -> dict[str, Any]:
    """Over seeds, by Student's t; of one seed, its own interval over samples."""
    found = values[0] if len(values) == 1 else across_seeds(np.array([each.value for each in values]))
    return _json(found) | {"seeds": [each.value for each in values]}


def _correlation(values: Sequence[Estimate]) -> dict[str, Any]:
    """The same of correlations, in Fisher's z: intervals stay between −1 and 1."""
    inside = [each._replace(value=float(np.arctanh(np.clip(each.value, -1 + EPS, 1 - EPS)))) for each in values]
    found = _over(inside) if len(values) > 1 else _json(values[0])
    ends = found if len(values) == 1 else {name: float(np.tanh(found[name])) for name in ("value", "low", "high")}
    return {name: ends[name] for name in ("value", "low", "high")} | {"seeds": [each.value for each in values]}


def _json(found: Estimate) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in found._asdict().items() if name != "note"
    }


def findings(table: Table, *, bins: int = 10, interval: Bootstrap = Bootstrap()) -> dict[str, Any]:
    """Everything that the report shows, as JSON: for each timestep of the plan, the main one first.

    Args:
        bins: of equally many samples, by energy.
        interval: of means of samples; its level is that of all intervals.

    Raises: ValueError as `statistics` does, for too few samples or energies that are all alike.
    """
    return {
        "bins": bins,
        "level": interval.level,
        "samples": int(np.sum(table["seed"] == table["seed"][0])),
        "seeds": len(np.unique(table["seed"])),
        "timesteps": {str(timestep): _at(seeds_of(table, timestep), bins, interval) for timestep in table.settings["plan"]["timesteps"]},
    }


def _at(seeds: Sequence[Seed], bins: int, interval: Bootstrap) -> dict[str, Any]:
    policies = list(seeds[0].after)

    def correlation(of: Callable[[Seed], Column], given: Callable[[Seed], Sequence[Column]] = lambda _: ()) -> dict[str, Any]:
        return _correlation([rank_correlation(seed.energy, of(seed), given(seed), level=interval.level) for seed in seeds])

    def binned(of: Callable[[Seed], Column]) -> dict[str, Any]:
        """Means over seeds of each sample, so that an interval is that of samples."""
        mean = np.mean([of(seed) for seed in seeds], axis=0)
        found = bin_means(mean, seeds[0].energy, bins, interval=interval)
        return {name: getattr(found, name).tolist() for name in ("values", "low", "high", "counts")}

    judged = verdicts([Errors(seed.energy, seed.before, seed.after) for seed in seeds], bins=bins, interval=interval)
    return {
        "rise": {policy: _over([interval(seed.rise(policy)) for seed in seeds]) for policy in policies},
        "bins": {
            "before": binned(lambda seed: seed.before),
            "after": {policy: binned(functools.partial(_after, policy=policy)) for policy in policies},
            "rise": {policy: binned(functools.partial(Seed.rise, policy=policy)) for policy in policies},
        },
        "saved": {
            policy: {
                group: _over([reductions(seed.after[NONE], seed.after[policy], seed.energy, interval=interval)[group] for seed in seeds])
                for group in ("all", "low", "high")
            }
            for policy in policies
            if policy != NONE
        },
        "correlations": {
            "energy and error before": correlation(lambda seed: seed.before),
            "energy and error after (the paper's)": correlation(lambda seed: seed.after[NONE]),
            "energy and rise": correlation(lambda seed: seed.rise()),
            "energy and rise, given error before": correlation(lambda seed: seed.rise(), lambda seed: (seed.control,)),
            "energy and rise, given error before and complexity": correlation(
                lambda seed: seed.rise(), lambda seed: (seed.control, *seed.complexity)
            ),
        },
        "verdicts": [_plain(dataclasses.asdict(verdict)) for verdict in judged],
    }


def _after(seed: Seed, policy: str) -> Column:
    return seed.after[policy]


def _plain(verdict: dict[str, Any]) -> dict[str, Any]:
    interval = verdict["interval"]
    return verdict | {"interval": None if interval is None else list(interval)}
