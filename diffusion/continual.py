"""The continual-learning protocol: learn Task 1, rank its samples by energy, learn later tasks under replay policies, see what was lost.

The protocol knows nothing of networks: a `Learner` learns tasks, and is asked what it knows. Every stage is kept by what it depends on
(`diffusion.stages`, and the folders of runs), so that an experiment that was cut off goes on, and one that is asked again is read.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int64, UInt8

from diffusion.assess import to_8_bits
from diffusion.complexity import png_bytes, total_variation
from diffusion.judge import CONFIDENCE, Judge
from diffusion.likelihood import Draws, intrinsic_forgetting
from diffusion.protocol import BUFFERS, Learner, Model, Plan
from diffusion.stages import Stages
from hopjax.cli.heights import heights
from hopjax.cli.survey import Survey
from hopjax.cli.table import Table
from hopjax.cli.tasks import description
from hopjax.data import Images
from hopjax.perturbation import perturbation_sharpness
from hopjax.tiled import summarise

BEFORE, CONTROL, REAL = "before", "control", "real"
# Generated images that are kept to be looked at.
SHEET = 64
# Of the rate at which real images are recognised, what a model of Task 1 must reach for the experiment to say anything.
REQUIRED = 0.6

Columns = dict[str, np.ndarray]


class Stage(NamedTuple):
    """One thing to be done, for a line of progress."""

    seed: int
    what: str


Watch = Callable[[Stage], Callable[[int], None]]


class Lesson(NamedTuple):
    """A model, after so many tasks."""

    policy: str
    tasks: int
    model: Any


class Measured(NamedTuple):
    """What an experiment found.

    Attributes:
        samples: a row for each measured sample of Task 1 and seed. Columns: seed, place (in Task 1), index (in the data), label, energy,
            odds (falls as the energy rises, and keeps its digits), energy.latent and odds.latent (of its latents among those of Task 1,
            where there are any), sharpness, rise (predicted), perturbation (Eq. (84)), energy@β for
            further β, png_bytes and total_variation (of the image); for each timestep t: before@t and control@t (errors before Task 2,
            from independent noise), and POLICY@t (after the last task, from the noise of before@t); for the timestep u of densities:
            MEASURE.POLICY@u and MEASURE.POLICY.error@u, intrinsic forgetting ΔE and its standard error, NaN where it was not measured.
        tasks: a row for each seed, policy, number of tasks learnt (`after`) and one of those (`task`): the mean `error` of
            reconstruction of `samples` of its images, from the first timestep.
        generated: a row for each generated image: seed, policy, the label that a classifier gives it, and its confidence; the rows of
            policy "real" are of images that the classifier has not seen. None if there are no labels, or nothing was generated.
        sheets: generated images by SEED.POLICY.
    """

    samples: Table
    tasks: Table
    generated: Table | None
    sheets: dict[str, UInt8[np.ndarray, "n h w c"]]


class Experiment(Generic[Model]):
    """Tasks, a learner and a plan, in a folder.

    Args:
        tasks: two or more, of which the first is the one that is forgotten.
        surveys: of every task but the last, from `hopjax.cli.survey`: energies and landscape.
        choose: rows of a survey's table for a policy of `python -m hopjax buffer`, a size and a seed.
        latents: a survey of the latents of the first task, whose energies are listed beside those of the images; None for none. All that
            is chosen is chosen by the images'.

    Raises: ValueError for one task, for a buffer that a task cannot fill, and for timesteps that the learner's schedule has not.
    """

    def __init__(
        self,
        folder: Path,
        tasks: Sequence[Images],
        learner: Learner[Model],
        plan: Plan,
        surveys: Sequence[Survey],
        choose: Callable[[Survey, str, int, int], Int64[np.ndarray, " k"]],
        *,
        latents: Survey | None = None,
    ) -> None:
        if len(tasks) < 2 or len(surveys) != len(tasks) - 1:
            raise ValueError(f"{len(tasks)} tasks with {len(surveys)} surveys: need two tasks or more, and a survey of all but the last")
        for number, task in enumerate(tasks[:-1], 1):
            if plan.buffer > len(task):
                raise ValueError(f"buffer = {plan.buffer} is out of range: Task {number} has {len(task)} samples")
        plan.check(learner.schedule.timesteps)
        self.stages = Stages(folder / "stages")
        self.tasks, self.learner, self.plan, self.surveys, self.choose = tuple(tasks), learner, plan, tuple(surveys), choose
        self.latents = latents

    def measured_rows(self, count: int | None = None) -> Int64[np.ndarray, " k"]:
        """Samples equally spaced in the order of energies, both ends among them, in the order of the data."""
        order = heights(self.surveys[0].table).order()
        count = self.plan.samples if count is None else count
        count = len(order) if count is None else min(count, len(order))
        return np.sort(order[_spaced(len(order), count)])

    def buffer(self, policy: str, seed: int, task: int = 0) -> Int64[np.ndarray, " k"]:
        """The rows of a task that a policy replays."""
        seed = seed if policy in ("random", "stratified") else 0
        survey = self.surveys[task]
        inputs = {"survey": survey.table.settings, "policy": policy, "size": self.plan.buffer, "seed": seed}

        def make() -> Columns:
            return {"rows": self.choose(survey, BUFFERS[policy], self.plan.buffer, seed)}

        return self.stages.get(f"buffer-{policy}", inputs, make)["rows"]

    def replay(self, policy: str, seed: int, learnt: int, model: Model, progress: Callable[[int], None]) -> tuple[Images | None, Any]:
        """What a policy replays while a task is learnt after `learnt` others: images, and their places in those tasks, put end to end."""
        if policy == "generative":
            count = self.plan.buffer * learnt
            return self._as_images(self.generated(model, count, seed + 2**31, progress)), None
        if policy == "joint":
            rows = [np.arange(len(task)) for task in self.tasks[:learnt]]
        elif policy in BUFFERS:
            rows = [self.buffer(policy, seed, task) for task in range(learnt)]
        else:
            return None, None
        parts = [task.take(chosen) for task, chosen in zip(self.tasks, rows, strict=False)]
        begin = np.cumsum([0, *(len(task) for task in self.tasks)])
        return _joined(parts), np.concatenate([first + chosen for first, chosen in zip(begin, rows, strict=False)])

    def lessons(self, seed: int, watch: Watch) -> Iterator[Lesson]:
        """The model after Task 1 ("before"), and those after each later task under each policy."""
        before = self.learner.learn(f"seed{seed}/task1", seed, self.tasks[0], start=None, replay=None, replayed=None)
        yield Lesson(BEFORE, 1, before)
        for policy in self.plan.policies:
            model = before
            for learnt in range(1, len(self.tasks)):
                images = self.tasks[0 if policy == "continued" else learnt]
                replay, places = self.replay(policy, seed, learnt, model, watch(Stage(seed, f"generating what {policy} replays")))
                name = f"seed{seed}/{policy}" + f"-task{learnt + 1}" * (learnt > 1)
                held = {"consolidate": self.tasks[learnt - 1]} if policy == "ewc" else {}
                model = self.learner.learn(name, seed, images, start=model, replay=replay, replayed=places, **held)
                yield Lesson(policy, learnt + 1, model)

    def errors(self, model: Model, images: Images, timestep: int, noise: int, progress: Callable[[int], None]) -> Float[np.ndarray, " n"]:
        """Mean error of reconstruction of each image over the draws."""
        draws = self.plan.draws
        inputs = self._inputs(model, images) | {"timestep": timestep, "draws": draws, "noise": noise}

        def make() -> Columns:
            return {"errors": self.learner.reconstruct(model, images, timestep=timestep, draws=draws, seed=noise, progress=progress)}

        return self.stages.get("reconstruct", inputs, make)["errors"].mean(axis=1, dtype=np.float64)

    def log_densities(self, model: Model, images: Images, measure: str, noise: int, progress: Callable[[int], None]) -> Draws:
        """log p of each image at the timestep of densities."""
        how = self.plan.densities
        assert how is not None
        # What the measure does not depend on shall not make it another question.
        apart = {"samples", "measures", "policies", *(("probes", "tolerance") if measure == "bound" else ("draws", "steps"))}
        asked = {name: value for name, value in dataclasses.asdict(how).items() if name not in apart}
        inputs = self._inputs(model, images) | {"measure": measure, "noise": noise, **asked}

        def make() -> Columns:
            found = self.learner.log_densities(model, images, measure, how, seed=noise, progress=progress)
            return {name: np.asarray(column) for name, column in found._asdict().items()}

        return Draws(**{name: jnp.asarray(column) for name, column in self.stages.get("density", inputs, make).items()})

    def generated(self, model: Model, count: int, noise: int, progress: Callable[[int], None]) -> UInt8[np.ndarray, "n h w c"]:
        """Images of a model."""
        height, width, channels = self.tasks[0].pixels.shape[1:]
        inputs = {"model": self.learner.fingerprint(model), "count": count, "noise": noise, "shape": [height, width, channels]}

        def make() -> Columns:
            return {"images": self.learner.generate(model, (height, width, channels), count, seed=noise, progress=progress)}

        return self.stages.get("generate", inputs, make)["images"]

    def _inputs(self, model: Model, images: Images) -> dict[str, Any]:
        return {"model": self.learner.fingerprint(model), "images": description(images)["sha256"]}

    def _as_images(self, pixels: UInt8[np.ndarray, "n h w c"]) -> Images:
        """Generated images in the numbers of Task 1."""
        first = self.tasks[0]
        like = pixels if first.pixels.dtype == np.uint8 else (pixels / 255).astype(np.float32)
        return dataclasses.replace(first, pixels=like, labels=None, source="generated images", warnings=(), skipped=())

    @functools.cached_property
    def _halves(self) -> tuple[Images, Images]:
        """Images of Task 1 that a classifier learns from, and those that it does not see: in random order, whatever that of the data."""
        order = np.random.default_rng(0).permutation(len(self.tasks[0]))
        return self.tasks[0].take(np.sort(order[::2])), self.tasks[0].take(np.sort(order[1::2]))

    @functools.cached_property
    def _judge(self) -> Judge:
        return Judge(self._halves[0])

    def judged(self, images: Images) -> Columns:
        """Labels and confidences, of a classifier that has learnt half of Task 1."""
        inputs = {"images": description(images)["sha256"], "task1": description(self.tasks[0])["sha256"]}

        def make() -> Columns:
            found = self._judge(images)
            return {"label": found.labels, "confidence": found.confidence}

        return self.stages.get("judge", inputs, make)

    def _can_judge(self) -> bool:
        labels = self._halves[0].labels
        if labels is None or not self.plan.generated:
            return False
        counts = np.unique(labels, return_counts=True)[1]
        return len(counts) > 1 and int(counts.min()) >= 5

    def run(self, watch: Watch = lambda _: lambda _: None) -> Measured:
        """All stages of all seeds that are not there yet.

        Args:
            watch: told what begins; gives a function to be told how many more images are done.
        """
        judging = self._can_judge()
        rows = self.measured_rows()
        shared = self._of_samples(rows)
        samples, tasks, generated, sheets = [], [], [], {}
        if judging:
            unseen = self._halves[1]
            generated += [{"seed": _full(seed, unseen), "policy": _full(REAL, unseen), **self.judged(unseen)} for seed in self.plan.seeds]
        for seed in self.plan.seeds:
            found = {"seed": np.full(len(rows), seed), **shared}
            densities: dict[str, Draws] = {}
            for lesson in self.lessons(seed, watch):
                tasks += self._of_tasks(lesson, seed, rows, watch)
                asked = lesson.tasks == len(self.tasks) or lesson.policy == BEFORE
                if asked:
                    found |= self._of_lesson(lesson, seed, rows, watch) | self._forgetting(lesson, seed, rows, densities, watch)
                if asked and self.plan.generated:
                    told = watch(Stage(seed, f"generating by {lesson.policy}"))
                    images = self.generated(lesson.model, self.plan.generated, seed, told)
                    sheets[f"{seed}.{lesson.policy}"] = images[:SHEET]
                    if judging:
                        own = {"seed": _full(seed, images), "policy": _full(lesson.policy, images)}
                        generated.append(own | self.judged(self._as_images(images)))
                del lesson  # its model would stay in memory while the next is learnt
            samples.append(found)
        settings = {**self.surveys[0].table.settings, "command": "run", "plan": self.plan.to_json()}
        settings |= {f"task{number}": description(task) for number, task in enumerate(self.tasks, 1)}
        settings |= {"accept": CONFIDENCE, "required": REQUIRED}
        judged = Table(_stacked(generated), settings) if judging else None
        return Measured(Table(_stacked(samples), settings), Table(_stacked(tasks), settings), judged, sheets)

    def _of_samples(self, rows: Int64[np.ndarray, " k"]) -> Columns:
        """What is known of samples before anything is learnt."""
        survey, pixels = self.surveys[0], to_8_bits(self.tasks[0].take(rows).pixels)
        found: Columns = {"place": rows, "index": survey.table["index"][rows]}
        if "label" in survey.table:
            found["label"] = survey.table["label"][rows]
        found |= {name: survey.table[name][rows].astype(np.float64) for name in ("energy", "sharpness", "rise")}
        memories, states = survey.landscape.memories, survey.landscape.memories[rows]
        inputs = {"survey": survey.table.settings, "rows": rows.tolist()}

        def perturbed() -> Columns:
            return {"mean": perturbation_sharpness(jax.random.key(0), states, memories, survey.landscape.beta).mean}

        found["perturbation"] = self.stages.get("perturbation", inputs, perturbed)["mean"].astype(np.float64)
        for beta in self.plan.betas:

            def at(beta: float = beta) -> Columns:
                return summarise(states, memories, beta, ["energy"], own=rows)

            found[f"energy@{beta:g}"] = self.stages.get("energy", inputs | {"beta": beta}, at)["energy"].astype(np.float64)
        if self.latents is not None:
            found["energy.latent"] = self.latents.table["energy"][rows].astype(np.float64)
            found["odds.latent"] = odds(self.latents)[rows]
        return found | {"odds": odds(survey)[rows], "png_bytes": png_bytes(pixels), "total_variation": total_variation(pixels)}

    def _of_lesson(self, lesson: Lesson, seed: int, rows: Int64[np.ndarray, " k"], watch: Watch) -> Columns:
        """Errors of Task 1's samples."""
        found, images = {}, self.tasks[0].take(rows)
        for timestep in self.plan.timesteps:
            for column, noise in [(lesson.policy, seed)] + [(CONTROL, seed + 2**31)] * (lesson.policy == BEFORE):
                told = watch(Stage(seed, f"reconstructing {column} from {timestep}"))
                found[f"{column}@{timestep}"] = self.errors(lesson.model, images, timestep, noise, told)
        return found

    def _of_tasks(self, lesson: Lesson, seed: int, rows: Int64[np.ndarray, " k"], watch: Watch) -> list[Columns]:
        """Mean errors of all tasks learnt so far; before the second one they are those of every policy."""
        found = []
        for number, task in enumerate(self.tasks[: lesson.tasks], 1):
            chosen = rows if number == 1 else _spaced(len(task), min(self.plan.later, len(task)))
            told = watch(Stage(seed, f"reconstructing Task {number} by {lesson.policy}"))
            errors = self.errors(lesson.model, task.take(chosen), self.plan.timesteps[0], seed, told)
            for policy in self.plan.policies if lesson.policy == BEFORE else (lesson.policy,):
                row = {
                    "seed": seed,
                    "policy": policy,
                    "after": lesson.tasks,
                    "task": number,
                    "error": errors.mean(),
                    "samples": len(chosen),
                }
                found.append({name: np.array([value]) for name, value in row.items()})
        return found

    def _forgetting(self, lesson: Lesson, seed: int, rows: Int64[np.ndarray, " k"], before: dict[str, Draws], watch: Watch) -> Columns:
        """Intrinsic forgetting of some of the samples; `before` gets the densities of the model before, by measure."""
        how = self.plan.densities
        found: Columns = {}
        if how is None or lesson.policy not in (BEFORE, *how.policies):
            return found
        order = np.argsort(odds(self.surveys[0])[rows], kind="stable")
        chosen = np.sort(order[_spaced(len(order), min(how.samples, len(order)))])
        images = self.tasks[0].take(rows[chosen])
        for measure in how.measures:
            told = watch(Stage(seed, f"measuring densities by {lesson.policy}, {measure}"))
            after = self.log_densities(lesson.model, images, measure, seed, told)
            if lesson.policy == BEFORE:
                before[measure] = after
                continue
            lost = intrinsic_forgetting(before[measure], after, self.learner.schedule, timestep=how.timestep)
            for name, values in (("", lost.mean), (".error", lost.standard_error)):
                column = np.full(len(rows), np.nan)
                column[chosen] = np.asarray(values)
                found[f"{measure}.{lesson.policy}{name}@{how.timestep}"] = column
        return found


def odds(survey: Survey) -> Float[np.ndarray, " n"]:
    """What falls as a sample's energy rises: the log odds of the others against it; where norms differ and count, minus its energy."""
    return -heights(survey.table).scores


def _spaced(length: int, count: int) -> Int64[np.ndarray, " k"]:
    """`count` of `length` places, equally spaced, both ends among them."""
    return np.unique(np.linspace(0, length - 1, count).round().astype(np.int64))


def _full(value: Any, like: Any) -> np.ndarray:
    return np.full(len(like), value)


def _joined(parts: Sequence[Images]) -> Images:
    """One after another; labels only if all have them."""
    if len(parts) == 1:
        return parts[0]
    labels = [part.labels for part in parts if part.labels is not None]
    return dataclasses.replace(
        parts[0],
        pixels=np.concatenate([part.pixels for part in parts]),
        labels=np.concatenate(labels) if len(labels) == len(parts) else None,
        source="; ".join(part.source for part in parts),
        warnings=tuple(line for part in parts for line in part.warnings),
        skipped=tuple(line for part in parts for line in part.skipped),
    )


def _stacked(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
