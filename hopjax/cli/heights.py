r"""How high samples lie: the one order that all commands go by, and the numbers and axes that show it.

Where all memories have one norm, or the energy is that of the density, it is $-\beta^{-1}\log(1 + e^\Lambda)$ and a constant, with Λ the
log odds of the other memories against a sample's own. Λ falls as the energy rises, and has digits at every β, where the energy soon has
none left. Elsewhere the norms have their say, and samples lie as high as their energies.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

from hopjax.cli.page import number, power
from hopjax.cli.table import Table

# What is shown of each variant of the energy where Λ orders it: the height above a memory on its own.
NAMES: Mapping[str, str] = {"paper": "E + ½|x|²", "mean": "E + ½|x|² − β⁻¹ log M", "density": "E"}


def scores(values: Mapping[str, np.ndarray], normalise: str, variant: str) -> np.ndarray:
    """What samples are ordered by, the highest energy first: −Λ, or E where norms differ and count."""
    return (-values["log_odds"] if _ordered_by_odds(normalise, variant) else values["energy"]).astype(np.float64)


def _ordered_by_odds(normalise: str, variant: str) -> bool:
    return normalise != "none" or variant == "density"


class Heights(NamedTuple):
    """How high the samples of a table lie.

    Attributes:
        name: what the numbers are.
        scores: as above.
        beta: of scores that are −Λ: heights then are below zero, and on an axis as the logarithms of their depths, which no float need
            hold. None where scores are energies.
    """

    name: str
    scores: np.ndarray
    beta: float | None

    def order(self) -> np.ndarray:
        """Rows from the highest energy to the lowest."""
        return np.argsort(-self.scores, kind="stable")

    def places(self) -> np.ndarray:
        """Where on the axis the samples are."""
        return self.scores if self.beta is None else self._depths(self.scores, self.beta)

    def text(self, score: float) -> str:
        """The height of such a score, for people."""
        return number(score) if self.beta is None else f"−{power(float(self._depths(np.float64(score), self.beta)))}"

    def label(self, axes: Any, labels: int = 8) -> None:
        """What an x-axis of places is, in so many labels at most, the highest on the right."""
        axes.set_xlabel(self.name)
        if self.beta is not None:
            low, high = self.places().min(), self.places().max()
            margin = max(0.06, 0.02 * (high - low))
            axes.set_xlim(high + margin, low - margin)
            axes.xaxis.set_major_locator(MaxNLocator(labels, integer=high - low >= 2))
            axes.xaxis.set_major_formatter(lambda place, _: f"−{power(place)}")

    @staticmethod
    def _depths(scores: Any, beta: float) -> Any:
        """log₁₀ of β⁻¹ log(1 + e^Λ)."""
        odds = -scores
        # Where e^Λ has no digits beside 1 the logarithm is Λ.
        log = np.where(odds < -30, odds, np.log(np.logaddexp(0, np.maximum(odds, -30))))
        return (log - math.log(beta)) / math.log(10)


def heights(table: Table) -> Heights:
    """Those of a table's samples."""
    normalise, variant, beta = (table.settings[name] for name in ("normalise", "variant", "beta"))
    by_odds = _ordered_by_odds(normalise, variant)
    return Heights(NAMES[variant] if by_odds else "E", scores(table.columns, normalise, variant), beta if by_odds else None)
