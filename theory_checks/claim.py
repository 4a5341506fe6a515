"""What a check is: a claim of the paper, how it is measured, and what was found.

A check is a function `(setting) -> Finding` registered by `@claim(...)`. A finding is a list of measurements, each a number with the bound
that it must keep, and the series that a figure is drawn from. Nothing else leaves a check: report, table and figures are made from
findings alone.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from scipy import stats

from hopjax import half_difference, unit_entries

EPS = float(np.finfo(float).eps)

# A rotation kernel is compiled once and run for less than a second: half the compiler's time is worth a slower run.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}

# Two-sided normal quantile at which a Monte Carlo comparison fails, and what one such comparison adds to the false-alarm probability.
Z_LIMIT = 5.5
Z_FALSE_ALARM = float(2 * stats.norm.sf(Z_LIMIT))


@dataclass(frozen=True)
class Preset:
    """Parameters of the synthetic model: K cluster members and one outlier in d dimensions, rotated by exp(εA)."""

    name: str
    members: int
    dim: int
    cosine: float
    beta: float
    epsilon: float
    sigma: float


PRESETS = {
    # As an independent replication reports the paper's: far outside the asymptotic regime (Appendix E).
    "paper": Preset("paper", members=12, dim=50, cosine=0.35, beta=8.0, epsilon=0.02, sigma=half_difference(50)),
    # Inside the regime of the proofs; here plain Monte Carlo cannot see the gap of Theorem 4.1.
    "asymptotic": Preset("asymptotic", members=10, dim=64, cosine=0.5, beta=20.0, epsilon=1e-2, sigma=unit_entries(64)),
}


@dataclass(frozen=True)
class Setting:
    """What a check is run with.

    Attributes:
        preset: the model's parameters; checks that do not depend on them are run once and must not look at it.
        seed: the run's seed.
        rotations: rotations per Monte Carlo mean.
    """

    preset: Preset
    seed: int = 0
    rotations: int = 2000

    def key(self, name: str) -> jax.Array:
        """A key for the check `name`: its own for every name, preset and seed."""
        return jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(f"{name}/{self.preset.name}".encode()))


class Measurement(NamedTuple):
    """A number and the bound that it must keep.

    Attributes:
        what: what the number is, in a few words.
        value: the number; NaN never passes.
        relation: how it must stand to the bound.
        bound: the bound.
        false_alarm: probability that a true claim fails this comparison by chance: 0 for deterministic ones.
    """

    what: str
    value: float
    relation: Literal["<=", ">="]
    bound: float
    false_alarm: float = 0.0

    @property
    def passed(self) -> bool:
        return self.value <= self.bound if self.relation == "<=" else self.value >= self.bound


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        measurements: the first is the headline shown in tables; the claim holds if all pass.
        series: numbers for the figure: (nested) lists and dicts of numbers and strings; None for a value that does not exist.
        note: what a reader must know to judge, in a sentence or two.
    """

    measurements: Sequence[Measurement]
    series: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def passed(self) -> bool:
        return all(measurement.passed for measurement in self.measurements)


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and its check.

    Attributes:
        name: slug, unique; what `--only` takes.
        source: where the paper says it.
        statement: what it says, in one sentence of plain text and Unicode mathematics.
        per_preset: whether it is run for each preset, or once.
        check: measures it.
        draw: draws a figure from the series alone, if there is one; takes {preset name (or ""): series} and a figure.
        caption: the figure's caption.
    """

    name: str
    source: str
    statement: str
    check: Callable[[Setting], Finding]
    per_preset: bool
    draw: Callable[[Mapping[str, Mapping[str, Any]], Any], None] | None
    caption: str


REGISTRY: dict[str, Claim] = {}


def claim(
    name: str,
    source: str,
    statement: str,
    *,
    per_preset: bool = False,
    draw: Callable[[Mapping[str, Mapping[str, Any]], Any], None] | None = None,
    caption: str = "",
) -> Callable[[Callable[[Setting], Finding]], Callable[[Setting], Finding]]:
    """Registers a check under the claim that it measures."""

    def register(check: Callable[[Setting], Finding]) -> Callable[[Setting], Finding]:
        if name in REGISTRY:
            raise ValueError(f"two checks are named {name!r}")
        REGISTRY[name] = Claim(name, source, statement, check, per_preset, draw, caption)
        return check

    return register


def z_score(what: str, difference: float, standard_error: float) -> Measurement:
    """|difference|/standard error, which must stay below Z_LIMIT."""
    return Measurement(f"|z|, {what}", abs(difference) / standard_error, "<=", Z_LIMIT, Z_FALSE_ALARM)
