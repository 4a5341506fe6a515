"""The continual-learning protocol: learn Task 1, rank its samples by energy, learn Task 2 under replay policies, see what was lost.

The protocol knows nothing of networks: a `Learner` learns tasks and reconstructs images. Every stage is kept by what it depends on
(`diffusion.stages`, and the folders of runs), so that an experiment that was cut off goes on, and one that is asked again is read.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64

from diffusion.complexity import png_bytes, total_variation
from diffusion.stages import Stages
from hopjax.cli.survey import Survey
from hopjax.cli.table import Table
from hopjax.cli.tasks import description
from hopjax.data import Images

NONE = "none"
# Names here → policies of `python -m hopjax buffer`.
BUFFERS = {"high": "highest", "random": "random", "low": "lowest", "stratified": "stratified", "coverage": "coverage"}
# What bounds and controls them: Task 1 and Task 2 together; Task 1 once more, for as long.
CONTROLS = ("joint", "continued")
POLICIES = (NONE, *BUFFERS, *CONTROLS)

Model = TypeVar("Model")


@runtime_checkable
class Learner(Protocol[Model]):
    """What can be taught tasks, one after another, and asked for reconstructions."""

    def learn(self, name: str, seed: int, images: Images, *, start: Model | None, replay: Images | None, replayed: Any) -> Model:
        """The model after a task, from the one before; `name` is unique within the experiment, and resumes what it began."""

    def fingerprint(self, model: Model) -> str:
        """Equal for equal models."""

    def reconstruct(
        self, model: Model, images: Images, *, timestep: int, draws: int, seed: int, progress: Callable[[int], None]
    ) -> Float[np.ndarray, "n m"]:
        """Errors of reconstruction, a column for each draw; equal seeds are equal noise for every model."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compared, on how many samples.

    Attributes:
        policies: ways of learning Task 2, `none` among them.
        buffer: samples of Task 1 that are replayed.
        seeds: of everything random in learning; each is an experiment of its own.
        samples: of Task 1 whose reconstruction is measured, equally spaced in the order of energies; None for all.
        timesteps: from which they are reconstructed; the first is the main one.
        draws: of the noise for each sample and timestep; as many again, independent, are the control for regression to the mean.

    Raises: ValueError naming what cannot be.
    """

    policies: tuple[str, ...] = (NONE, "high", "random", "low", "coverage")
    buffer: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int | None = 1000
    timesteps: tuple[int, ...] = (500,)
    draws: int = 2

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
        for name, value in (("buffer", self.buffer), ("draws", self.draws), ("samples", 1 if self.samples is None else self.samples)):
            if value < 1:
                raise ValueError(f"{name} = {value} is out of range: need {name} ≥ 1")


class Stage(NamedTuple):
    """One thing to be done, for a line of progress."""

    seed: int
    what: str


class Measured(NamedTuple):
    """An experiment's samples: a row for each measured sample and seed.

    Columns: seed, place (in Task 1), index (in the data), label, energy, odds (falls as the energy rises, and keeps its digits),
    sharpness, rise (predicted), png_bytes and total_variation (of the image), and for each timestep t: before@t and control@t (errors
    before Task 2, from independent noise), and POLICY@t (after it, from the noise of before@t).
    """

    table: Table


class Experiment(Generic[Model]):
    """Two tasks, a learner and a plan, in a folder.

    Args:
        survey: Task 1's energies and landscape, from `hopjax.cli.survey`.
        choose: rows of the survey's table for a policy of `python -m hopjax buffer`, a size and a seed.

    Raises: ValueError for a buffer that Task 1 cannot fill.
    """

    def __init__(
        self,
        folder: Path,
        task1: Images,
        task2: Images,
        learner: Learner[Model],
        plan: Plan,
        survey: Survey,
        choose: Callable[[Survey, str, int, int], Int64[np.ndarray, " k"]],
    ) -> None:
        if plan.buffer > len(task1):
            raise ValueError(f"buffer = {plan.buffer} is out of range: Task 1 has {len(task1)} samples")
        self.stages = Stages(folder / "stages")
        self.task1, self.task2 = task1, task2
        self.learner, self.plan, self.survey, self.choose = learner, plan, survey, choose

    def measured_rows(self) -> Int64[np.ndarray, " k"]:
        """Samples equally spaced in the order of energies, both ends among them, in the order of the data."""
        order = np.argsort(self._odds(), kind="stable")
        count = len(order) if self.plan.samples is None else min(self.plan.samples, len(order))
        return np.sort(order[np.unique(np.linspace(0, len(order) - 1, count).round().astype(np.int64))])

    def _odds(self) -> Float[np.ndarray, " n"]:
        table = self.survey.table
        return table["log_leakage"].astype(np.float64) - table["log_self_weight"]

    def buffer(self, policy: str, seed: int) -> Int64[np.ndarray, " k"] | None:
        """The rows of Task 1 that a policy replays; None for none."""
        if policy == "joint":
            return np.arange(len(self.task1))
        if policy not in BUFFERS:
            return None
        seed = seed if policy in ("random", "stratified") else 0
        inputs = {"survey": self.survey.table.settings, "policy": policy, "size": self.plan.buffer, "seed": seed}

        def make() -> dict[str, np.ndarray]:
            return {"rows": self.choose(self.survey, BUFFERS[policy], self.plan.buffer, seed)}

        return self.stages.get(f"buffer-{policy}", inputs, make)["rows"]

    def models(self, seed: int) -> Iterator[tuple[str, Model]]:
        """The model before Task 2 ("before"), and the one after it under each policy."""
        before = self.learner.learn(f"seed{seed}/task1", seed, self.task1, start=None, replay=None, replayed=None)
        yield "before", before
        for policy in self.plan.policies:
            rows = self.buffer(policy, seed)
            images = self.task1 if policy == "continued" else self.task2
            replay = None if rows is None else self.task1.take(rows)
            yield policy, self.learner.learn(f"seed{seed}/{policy}", seed, images, start=before, replay=replay, replayed=rows)

    def errors(self, model: Model, images: Images, timestep: int, noise: int, progress: Callable[[int], None]) -> Float[np.ndarray, " n"]:
        """Mean error of reconstruction of each image over the draws."""
        inputs = {
            "model": self.learner.fingerprint(model),
            "images": description(images)["sha256"],
            "timestep": timestep,
            "draws": self.plan.draws,
            "noise": noise,
        }

        def make() -> dict[str, np.ndarray]:
            draws = self.plan.draws
            return {"errors": self.learner.reconstruct(model, images, timestep=timestep, draws=draws, seed=noise, progress=progress)}

        return self.stages.get("reconstruct", inputs, make)["errors"].mean(axis=1, dtype=np.float64)

    def run(self, watch: Callable[[Stage], Callable[[int], None]] = lambda _: lambda _: None) -> Measured:
        """All stages of all seeds that are not there yet.

        Args:
            watch: told what begins; gives a function to be told how many more images are done.
        """
        rows = self.measured_rows()
        images = self.task1.take(rows)
        surveyed, odds = self.survey.table, self._odds()
        shared: dict[str, np.ndarray] = {"place": rows, "index": surveyed["index"][rows]}
        if "label" in surveyed:
            shared["label"] = surveyed["label"][rows]
        shared |= {name: surveyed[name][rows].astype(np.float64) for name in ("energy", "sharpness", "rise")}
        shared |= {"odds": odds[rows], "png_bytes": png_bytes(_bytes(images)), "total_variation": total_variation(_bytes(images))}
        columns: dict[str, list[np.ndarray]] = {}
        for seed in self.plan.seeds:
            found = {"seed": np.full(len(rows), seed), **shared}
            for name, model in self.models(seed):
                for timestep in self.plan.timesteps:
                    asked = [(name, seed)] if name != "before" else [(name, seed), ("control", seed + 2**31)]
                    for column, noise in asked:
                        told = watch(Stage(seed, f"reconstructing {column} from {timestep}"))
                        found[f"{column}@{timestep}"] = self.errors(model, images, timestep, noise, told)
            for column, values in found.items():
                columns.setdefault(column, []).append(values)
        settings = {**surveyed.settings, "command": "run", "plan": _plain(self.plan)}
        return Measured(Table({column: np.concatenate(parts) for column, parts in columns.items()}, settings))


def _plain(plan: Plan) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(plan).items()}


def _bytes(images: Images) -> np.ndarray:
    from diffusion.assess import to_8_bits

    return to_8_bits(images.pixels)
