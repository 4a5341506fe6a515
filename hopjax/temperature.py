r"""Rules for the inverse temperature β of a data set: how far apart samples may be and still support each other.

β is the one number that the energy of a data set leaves open. It can be fixed, taken from the noise level at which a diffusion model
looks at the data (`Timestep`: the signal-to-noise ratio, as in `hopjax.correspondence`), or solved for so that a sample has a given
number of effective neighbours (`Perplexity`) or keeps a given weight of its own (`SelfWeight`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import brentq

from hopjax.correspondence import beta_at_timestep, linear_alphas_cumprod
from hopjax.tiled import MEMORY_LIMIT, summarise
from hopjax.tiles import check_beta

# β is looked for between these, in units of the data's inverse variance, and the root found to this relative accuracy.
RANGE = 1e-4, 1e8
_ACCURACY = 1e-4


@runtime_checkable
class Rule(Protocol):
    """Something that gives β for memories, which are all stored."""

    def solve(self, memories: Float[np.ndarray, "m d"]) -> float: ...


@dataclass(frozen=True)
class Fixed:
    """A β that is known, in units of the normalised data."""

    beta: float

    def solve(self, memories: Float[np.ndarray, "m d"]) -> float:
        """Raises ValueError unless 0 < beta < ∞."""
        check_beta(self.beta)
        return self.beta


@dataclass(frozen=True)
class Timestep:
    """β = scale²·ᾱ/(1 − ᾱ) at a timestep of the linear DDPM schedule, 0 … 999: the noise at which a model looks at a clean image.

    Attributes:
        timestep: 0 (no noise) … 999, possibly fractional.
        scale: how many of the model's units one unit of the normalised data is: 2 for pixels in [0, 1] where the model has [−1, 1], times
            the norm that was divided out.
    """

    timestep: float
    scale: float

    def solve(self, memories: Float[np.ndarray, "m d"]) -> float:
        """Raises ValueError for a timestep outside the schedule, or a scale that is not positive."""
        alphas = linear_alphas_cumprod()
        if not 0 <= self.timestep <= len(alphas) - 1:
            raise ValueError(f"timestep={self.timestep}: need 0 ≤ timestep ≤ {len(alphas) - 1}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale}: need 0 < scale < ∞")
        return self.scale**2 * float(beta_at_timestep(self.timestep, alphas))


@dataclass(frozen=True)
class Perplexity:
    """The β at which a sample sees, on the geometric mean, so many of the others: e^entropy of their weights among themselves.

    Attributes:
        target: effective number of neighbours, more than 1 and fewer than there are.
        sample: how many states the mean is taken over, chosen at random from a fixed seed; all memories are seen by each.
        memory_limit: as in `hopjax.tiled.stream`.
    """

    target: float
    sample: int = 1000
    memory_limit: int = MEMORY_LIMIT

    def solve(self, memories: Float[np.ndarray, "m d"]) -> float:
        """Raises ValueError for a target that cannot be, naming what can. The entropy falls with β, so there is one solution."""
        if not 1 < self.target < len(memories) - 1:
            raise ValueError(f"perplexity={self.target}: need 1 < perplexity < {len(memories) - 1}, the number of other samples")
        return _solve(
            "perplexity",
            self.target,
            memories,
            "others_entropy",
            lambda entropy: float(np.exp(entropy.mean())),
            self.sample,
            self.memory_limit,
        )


@dataclass(frozen=True)
class SelfWeight:
    """The β at which a sample keeps, in the mean, this much of the softmax weight for itself.

    Attributes:
        target: mean own weight, above 1/m (which it is as β → 0) and below 1.
        sample, memory_limit: as in `Perplexity`.
    """

    target: float
    sample: int = 1000
    memory_limit: int = MEMORY_LIMIT

    def solve(self, memories: Float[np.ndarray, "m d"]) -> float:
        """Raises ValueError for a target that cannot be, naming what can: with unequal norms or duplicates the mean need not reach 1."""
        if not 1 / len(memories) < self.target < 1:
            raise ValueError(f"self_weight={self.target}: need {1 / len(memories):.3g} < self_weight < 1 for {len(memories)} samples")
        return _solve(
            "self_weight", self.target, memories, "log_self_weight", lambda log: float(np.exp(log).mean()), self.sample, self.memory_limit
        )


def _solve(
    name: str,
    target: float,
    memories: NDArray[np.floating],
    quantity: str,
    mean: Callable[[NDArray[np.floating]], float],
    sample: int,
    memory_limit: int,
) -> float:
    """β at which `mean` of the quantity is the target, by Brent's method on log β."""
    # At random: data sets are ordered, by class say. From one seed, so that the same data give the same β.
    chosen = np.sort(np.random.default_rng(0).choice(len(memories), min(sample, len(memories)), replace=False))
    states = np.asarray(memories[chosen])
    unit = 1 / float(np.mean(np.var(states, axis=0, dtype=np.float64).sum()) or 1.0)

    def log_ratio(log_beta: float) -> float:
        found = summarise(states, memories, math.exp(log_beta), [quantity], own=chosen, memory_limit=memory_limit)[quantity]
        return math.log(mean(found)) - math.log(target)

    low, high = (math.log(bound * unit) for bound in RANGE)
    ends = log_ratio(low), log_ratio(high)
    if not ends[0] * ends[1] <= 0:  # NaN included, where numbers leave their range
        reached = sorted(target * math.exp(end) for end in ends)
        raise ValueError(
            f"{name}={target}: no β gives it on these data; from β = {math.exp(low):.3g} to {math.exp(high):.3g} it goes from "
            f"{reached[0]:.4g} to {reached[1]:.4g}"
        )
    return math.exp(brentq(log_ratio, low, high, xtol=_ACCURACY))
