"""How images become memories: the norms that they keep decide, with β, which of them stand alone.

The theory's memories have unit norm. Raw pixels do not: with their norms kept, Eq. (1) puts a bright image's energy below a dark one's,
whatever its neighbours are. A normalisation is fitted on Task 1 and applied to every task alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

NORMALISATIONS: Mapping[str, str] = {
    "unit": "every image divided by its norm: the theory's setting, and the default",
    "none": "images as they are",
    "centred": "the mean image of Task 1 subtracted, then divided by the norm: similarity is correlation about the mean",
}


@dataclass(frozen=True, eq=False)
class Normalisation:
    """A fitted normalisation: call it on rows.

    Attributes:
        name: of `NORMALISATIONS`.
        divisor: root mean square of the norms that it divided out of Task 1, 1 for "none": β in units of the normalised data is
            divisor² times β in units of the images.
        shift: the mean image that is subtracted, if any.
    """

    name: str
    divisor: float
    shift: Float[np.ndarray, " d"] | None

    def __call__(self, rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        """The rows normalised, in their dtype. Raises ValueError naming a row that has no direction, or is not finite."""
        moved = self._moved(rows)
        norms = _norms(moved)
        if self.name == "none":
            return moved
        if not norms.all():
            raise ValueError(f"row {int(np.argmin(norms))} {self.lost}: leave it out, or normalise by 'none'")
        return (moved / norms[:, None]).astype(rows.dtype)

    @property
    def lost(self) -> str:
        """What is wrong with a row that has no direction."""
        return f"{'is black (all zero)' if self.shift is None else 'equals the mean image'} and has no direction"

    def directed(self, rows: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
        """Which rows can be normalised. Raises ValueError naming a row that is not finite."""
        return (_norms(self._moved(rows)) > 0) | (self.name == "none")

    def _moved(self, rows: NDArray[np.floating]) -> NDArray[np.floating]:
        return rows if self.shift is None else rows - self.shift[None]


def _norms(rows: NDArray[np.floating]) -> NDArray[np.floating]:
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    if not np.isfinite(norms).all():
        raise ValueError(f"row {int(np.argmin(np.isfinite(norms)))} holds a number that is not finite: leave it out")
    return norms


def fit(name: str, memories: Float[np.ndarray, "m d"]) -> Normalisation:
    """The normalisation of this name fitted on Task 1's images as rows.

    Raises: ValueError for a name that is not in `NORMALISATIONS`, and a row that is not finite.
    """
    if name not in NORMALISATIONS:
        raise ValueError(f"no normalisation is named {name!r}: choose from {', '.join(NORMALISATIONS)}")
    shift = memories.mean(axis=0, dtype=np.float64).astype(memories.dtype) if name == "centred" else None
    norms = _norms(memories if shift is None else memories - shift[None])
    return Normalisation(name, 1.0 if name == "none" else float(np.sqrt(np.mean(norms**2))), shift)
