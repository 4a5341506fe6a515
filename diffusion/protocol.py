"""What a continual-learning experiment is: the policies it compares, how much it measures, and what it asks of a learner."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from diffusion.claims import NONE
from diffusion.likelihood import Draws
from diffusion.schedules import Schedule
from hopjax.data import Images

# Names here → policies of `python -m hopjax buffer`.
BUFFERS = {"high": "highest", "random": "random", "low": "lowest", "stratified": "stratified", "coverage": "coverage"}
# As many samples of the model before; none, but the parameters that mattered to the task before are held (elastic weight consolidation).
BASELINES = ("generative", "ewc")
# What bounds and controls them: all tasks so far together; Task 1 once more, for as long.
CONTROLS = ("joint", "continued")
POLICIES = (NONE, *BUFFERS, *BASELINES, *CONTROLS)
# Ways to measure a change of log density.
MEASURES = ("bound", "flow")

Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True)
class Densities:
    """How the change of log density of some samples is measured.

    Attributes:
        samples: of those that are reconstructed, equally spaced in the order of energies.
        timestep: at which the density is; its β is the signal-to-noise ratio there.
        measures: "bound" (variational) and "flow" (probability flow), either or both.
        policies: those after which it is measured.
        draws: of the bound's noise.
        steps: of the bound.
        probes: of the flow's divergence.
        tolerance: of the flow's solver. Of ΔE of 4 on digits with standard errors of 0.2, 1e-2 moved some by 0.17; 3e-3 by 0.05 at most,
            for 1.4 times the evaluations; 1e-3 took 2.3 times as many.

    Raises: ValueError naming what cannot be.
    """

    samples: int = 100
    timestep: int = 300
    measures: tuple[str, ...] = MEASURES
    policies: tuple[str, ...] = (NONE,)
    draws: int = 4
    steps: int = 32
    probes: int = 8
    tolerance: float = 3e-3

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for name, least in (("samples", 5), ("timestep", 0), ("draws", 2), ("steps", 1), ("probes", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"densities.{name} = {getattr(self, name)} is out of range: need {name} ≥ {least}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"densities.tolerance = {self.tolerance} is out of range: need 0 < tolerance < 1")
        for measure in self.measures:
            if measure not in MEASURES:
                raise ValueError(f"densities.measures = {measure!r} is not known: take {' or '.join(MEASURES)}")

    def evaluations(self) -> int:
        """Of the network, roughly, for one seed: a product vᵀJ is two, and the flow takes some eighty evaluations (on digits)."""
        each = {"bound": 2 * self.steps * self.draws, "flow": 80 * (1 + 2 * self.probes)}
        return self.samples * (1 + len(self.policies)) * sum(each[measure] for measure in self.measures)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compared, on how many samples.

    Attributes:
        policies: ways of learning the later tasks, `none` among them.
        buffer: samples of each earlier task that are replayed.
        seeds: of everything random in learning; each is an experiment of its own.
        samples: of Task 1 whose reconstruction is measured, equally spaced in the order of energies; None for all.
        timesteps: from which they are reconstructed; the first is the main one.
        draws: of the noise for each sample and timestep; as many again, independent, are the control for regression to the mean.
        later: samples of each later task whose reconstruction is measured, equally spaced in the data.
        generated: samples of each model that a classifier sees; 0 for none.
        betas: further inverse temperatures whose energies are listed.
        densities: how changes of log density are measured; None for not.

    Raises: ValueError naming what cannot be.
    """

    policies: tuple[str, ...] = (NONE, "high", "random", "low", "coverage")
    buffer: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int | None = 1000
    timesteps: tuple[int, ...] = (500,)
    draws: int = 2
    later: int = 200
    generated: int = 200
    betas: tuple[float, ...] = ()
    densities: Densities | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        for policy in self.policies:
            if policy not in POLICIES:
                raise ValueError(f"policies = {policy!r} is not known: take some of {', '.join(POLICIES)}")
        if NONE not in self.policies or len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies = {', '.join(self.policies)}: each once, and {NONE!r} among them, to which they are compared")
        for name, values in (("seeds", self.seeds), ("timesteps", self.timesteps)):
            if not values or len(set(values)) < len(values) or min(values) < 0:
                raise ValueError(f"{name} = {values} must be one or more different numbers, none negative")
        for name, value, least in (
            ("buffer", self.buffer, 1),
            ("draws", self.draws, 1),
            ("samples", 1 if self.samples is None else self.samples, 1),
            ("later", self.later, 1),
            ("generated", self.generated, 0),
        ):
            if value < least:
                raise ValueError(f"{name} = {value} is out of range: need {name} ≥ {least}")
        for beta in self.betas:
            if not 0 < beta < float("inf"):
                raise ValueError(f"betas = {beta} is out of range: need 0 < β < ∞")
        for policy in () if self.densities is None else self.densities.policies:
            if policy not in self.policies:
                raise ValueError(f"densities.policies = {policy!r} is not among the policies {', '.join(self.policies)}")

    def check(self, timesteps: int) -> None:
        """Refuse what a schedule of so many timesteps has not.

        Raises: ValueError naming the timestep, the bound and another.
        """
        for timestep in self.timesteps:
            if not 0 < timestep < timesteps:
                raise ValueError(f"timesteps = {timestep} is out of range: need 0 < timestep < {timesteps}; take {timesteps // 2}")
        at = 0 if self.densities is None else self.densities.timestep
        if at >= timesteps - 1:
            raise ValueError(f"densities.timestep = {at} is out of range: need 0 ≤ timestep < {timesteps - 1}; take {3 * timesteps // 10}")

    def to_json(self) -> dict[str, Any]:
        """Plain."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}


@runtime_checkable
class Learner(Protocol[Model]):
    """What can be taught tasks, one after another, and asked what it knows.

    Whatever is random depends on the seed alone: equal seeds are equal noise for every model. `progress` is told how many more images
    are done.
    """

    @property
    def schedule(self) -> Schedule:
        """Of the noise that densities are seen through."""

    def learn(
        self,
        name: str,
        seed: int,
        images: Images,
        *,
        start: Model | None,
        replay: Images | None,
        replayed: Any,
        consolidate: Images | None = None,
    ) -> Model:
        """The model after a task, from the one before; `name` is unique within the experiment, and resumes what it began.

        Args:
            replay, replayed: images of earlier tasks to see again, and their places there; None for none.
            consolidate: the images to which `start` shall stay true by its parameters; None for none.
        """

    def fingerprint(self, model: Model) -> str:
        """Equal for equal models."""

    def reconstruct(
        self, model: Model, images: Images, *, timestep: int, draws: int, seed: int, progress: Callable[[int], None]
    ) -> Float[np.ndarray, "n m"]:
        """Errors of reconstruction, a column for each draw."""

    def log_densities(
        self, model: Model, images: Images, measure: str, how: Densities, *, seed: int, progress: Callable[[int], None]
    ) -> Draws:
        """Of clean images at a timestep."""

    def generate(
        self, model: Model, shape: tuple[int, int, int], count: int, *, seed: int, progress: Callable[[int], None]
    ) -> UInt8[np.ndarray, "n h w c"]:
        """New images."""
