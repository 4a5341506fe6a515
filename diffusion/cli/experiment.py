"""`run`: the continual-learning experiment on two tasks or more."""

import dataclasses
import io
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from cyclopts import Parameter

from diffusion.cli.learning import Learning
from diffusion.cli.options import Device, configure, explained
from diffusion.cli.report import BINS, EXPERIMENT, GENERATED, SHEETS, TABLE, TASKS, draw
from diffusion.cli.stable import made
from diffusion.cli.watching import interruption, watching
from diffusion.layout import Layout
from diffusion.run import Rhythm
from diffusion.settings import Settings, difference
from diffusion.trials import TRIALS, Trial
from hopjax.cli.options import Amount, BufferSize, Choice, Machine, Model, Reading, Temperature, UsageError, need
from hopjax.cli.output import check_writable, write
from hopjax.cli.progress import Screen

if TYPE_CHECKING:
    from diffusion.pipeline import Model as Base
    from diffusion.protocol import Plan
    from diffusion.stable.pipeline import StableDiffusion
    from hopjax.data import Images

Number = TypeVar("Number", int, float)
ENERGIES, PIPELINE, LATENTS, LATENT_ENERGIES = "energies.parquet", "pipeline", "latents", "energies-latent.parquet"


@Parameter(name="*", group="Changes of log density")
@dataclasses.dataclass(frozen=True)
class Density:
    """How intrinsic forgetting is measured directly."""

    densities: Annotated[
        int | None, Parameter(help="Samples of which the change of log density is measured, too; 0 for none (default: the preset's).")
    ] = None
    density_timestep: Annotated[int, Parameter(help="At which they are placed.")] = 300
    density_policies: Annotated[str, Parameter(help="After Task 2 by these policies.")] = "none"
    measures: Annotated[str, Parameter(help="By the variational bound, the probability flow, or both.")] = "bound,flow"

    def plan(self, usual: int) -> Any:
        """For `diffusion.protocol.Plan`; `usual` samples if nothing else is asked for."""
        from diffusion.protocol import Densities

        samples = usual if self.densities is None else self.densities
        if not samples:
            return None
        return Densities(samples, self.density_timestep, _names(self.measures), _names(self.density_policies))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _numbers(option: str, text: str, example: str, kind: Callable[[str], Number] = int) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} {text} is no list of {what}: give some, such as {option} {example}") from None


def trial_table() -> str:
    """The presets of `run`, for --help."""
    return "\n".join(
        f"    {name}: {trial.about}; {trial.first.length.steps:,} steps of Task 1, {trial.later.length.steps:,} of Task 2, "
        f"a buffer of {'10%' if trial.buffer is None else f'{trial.buffer:,}'}, {'all' if trial.samples is None else f'{trial.samples:,}'} "
        f"samples reconstructed from {', '.join(map(str, trial.timesteps))}, log densities of {trial.densities}"
        for name, trial in TRIALS.items()
    )


def run(
    data: Annotated[str | None, Parameter(help="Images, as for `python -m hopjax` (default: the preset's).")] = None,
    /,
    *,
    preset: Annotated[
        Literal["quick", "cpu-mnist", "paper-mnist", "paper-cifar10", "sd-tiny", "paper-sd"], Parameter(help="See below.")
    ] = "quick",
    weights: Annotated[
        str | None,
        Parameter(
            help="Of sd-tiny and paper-sd: folder of a Stable Diffusion, or its name on the hub (default of sd-tiny: made of the data)."
        ),
    ] = None,
    class_prompt: Annotated[
        str | None, Parameter(help="Of sd-tiny and paper-sd: prompt of a class, {label} for its name (default: the empty prompt for all).")
    ] = None,
    out: Annotated[Path | None, Parameter(help="Folder of the experiment (default: results/continual-PRESET).")] = None,
    policies: Annotated[
        str, Parameter(help="Ways of learning Task 2: none, high, random, low, stratified, coverage, generative, ewc, joint, continued.")
    ] = "none,high,random,low,coverage",
    buffer: Annotated[BufferSize | None, Parameter(help="Samples of Task 1 that are replayed (default: the preset's).")] = None,
    seeds: Annotated[str, Parameter(help="Seeds of learning, each an experiment of its own.")] = "0",
    samples: Annotated[
        int | None, Parameter(help="Samples of Task 1 that are reconstructed, spread over the energies (default: the preset's).")
    ] = None,
    timesteps: Annotated[str | None, Parameter(help="Of reconstruction; the first is the main one (default: the preset's).")] = None,
    draws: Annotated[int, Parameter(help="Of the noise, for each sample.")] = 2,
    generated: Annotated[int, Parameter(help="Samples that each model generates, for a classifier to see; 0 for none.")] = 200,
    betas: Annotated[str | None, Parameter(help="Further inverse temperatures whose energies are listed, A,B,… (default: none).")] = None,
    strength: Annotated[
        float | None, Parameter(help="λ of policy ewc, how firmly parameters are held (default: about as much as learning takes them).")
    ] = None,
    tasks: Annotated[int, Parameter(name="--tasks", help="With --rotate: how many tasks, each turned by so many degrees more.")] = 2,
    save_every: Annotated[int, Parameter(help="Steps between two checkpoints.")] = 250,
    learning: Learning = Learning(),
    choice: Choice = Choice(),
    temperature: Temperature = Temperature(),
    density: Density = Density(),
    model: Model = Model(),
    reading: Reading = Reading(),
    layout: Annotated[Layout, Parameter(name="*", group="Devices")] = Layout(),
    device: Device = None,
    dry_run: Annotated[bool, Parameter(negative="", help="Say what the experiment would take, and stop.")] = False,
) -> int:
    """Learn Task 1, rank its samples by energy, learn Task 2 under each replay policy, and measure what was forgotten of each sample.

    What is there is not computed again: an experiment that was interrupted goes on, and one that is given more seeds computes those.

    Example: with three seeds, and joint training as the upper bound:

        python -m diffusion run --preset quick --seeds 0,1,2 --policies none,high,random,low,coverage,joint
    """
    trial = TRIALS[preset]
    data = data or trial.data
    if data is None:
        raise UsageError(f"--preset {preset} needs DATA: name the images")
    if trial.weights == "given" and weights is None:
        raise UsageError(f"--preset {preset} needs --weights: name the folder of a Stable Diffusion")
    for name, given in (("--weights", weights), ("--class-prompt", class_prompt)):
        if trial.weights == "none" and given is not None:
            raise UsageError(f"{name} {given}: --preset {preset} learns pixels, from nothing; take --preset sd-tiny or paper-sd")
    if trial.weights != "none" and learning.network is not None:
        raise UsageError(f"--network {learning.network}: --preset {preset} has the network of its weights; leave it out")
    if not (choice.task2 or choice.task2_classes or choice.rotate is not None):
        choice = dataclasses.replace(choice, rotate=trial.rotate, task2_classes=trial.task2_classes)
    if reading.size is None and trial.size is not None:
        reading = dataclasses.replace(reading, size=trial.size)
    out = out or Path("results") / f"continual-{preset}"
    if not dry_run:
        check_writable("--out", out / TABLE)
    samples = trial.samples if samples is None else samples
    need(draws >= 1, "--draws", draws, "draws ≥ 1", 2)
    need(samples is None or samples >= 2 * BINS, "--samples", samples, f"samples ≥ {2 * BINS}, two for each bin of the report", 500)
    need(strength is None or 0 <= strength < math.inf, "--strength", strength, "0 ≤ strength < ∞", 300)
    need(tasks >= 2, "--tasks", tasks, "tasks ≥ 2", 2)
    if tasks > 2 and choice.rotate is None:
        raise UsageError(f"--tasks {tasks}: only rotations make more than two tasks: give --rotate")
    configure(device)
    screen = Screen()
    from diffusion.consolidation import STRENGTH
    from diffusion.continual import Experiment
    from diffusion.learner import UNetLearner, Unfinished
    from diffusion.protocol import Plan
    from diffusion.run import Task, config_of
    from hopjax.cli import table
    from hopjax.cli.buffer import choose
    from hopjax.cli.heights import heights
    from hopjax.cli.survey import Survey, survey
    from hopjax.cli.tasks import Tasks, description, directed, load
    from hopjax.data import rotated

    with explained():
        with screen.working(f"reading {data}"):
            read = directed(load(data, choice, reading), [model.normalise], skip=reading.skip_bad)
        if read.task2 is None:
            raise UsageError("there is no Task 2: give --rotate, --task2 or --task2-classes")
        lessons = [read.task1, read.task2, *(rotated(read.task1, number * (choice.rotate or 0)) for number in range(2, tasks))]
        whole = len(read.task1)
        if whole < 2 * BINS:
            raise UsageError(f"{read.task1.source}: Task 1 has {whole} samples, need at least {2 * BINS}, two for each bin of the report")
        size = (buffer or Amount.read("--buffer", "10%" if trial.buffer is None else str(trial.buffer))).of(whole)
        plan = Plan(
            _names(policies),
            size,
            _numbers("--seeds", seeds, "0,1,2"),
            samples,
            trial.timesteps if timesteps is None else _numbers("--timesteps", timesteps, "500 or --timesteps 500,100"),
            draws,
            generated=generated,
            betas=() if betas is None else _numbers("--betas", betas, "10,30", float),
            densities=density.plan(trial.densities),
        )
        plan.check(trial.first.noise.timesteps)
        first, later = learning.first(trial.first, layout), learning.later(trial.later, layout)
        if dry_run:
            return _dry_run(trial, weights, class_prompt, lessons, plan, first, later, screen)
        contents = {
            f"task{number}": {"source": task.source, "samples": len(task), "sha256": description(task)["sha256"][:16]}
            for number, task in enumerate(lessons, 1)
        }
        energies = {"temperature": dataclasses.asdict(temperature), "memories": dataclasses.asdict(model)}
        _hold(out, {"tasks": contents, "buffer": size, **energies})
        with interruption() as stop:
            base = _base(trial, weights, class_prompt, out, lessons, screen, stop)
        if base is not None:
            config_of(Task(lessons[0], start=base), first)  # what does not fit is said before anything is computed
            _hold(out, {"start": base.fingerprint()})

        def surveyed(number: int) -> Survey:
            file = out / (ENERGIES if number == 1 else f"energies-{number}.parquet")
            found = read if number == 1 else Tasks(lessons[number - 1], np.arange(len(lessons[number - 1])), None, read.read)
            result = survey("energies", found, temperature, model, "paper", Machine(), file, screen)
            table.write(file, result.table)
            return result

        surveys = [surveyed(number) for number in range(1, tasks)]
        latents = None
        if base is not None:
            file = out / LATENT_ENERGIES
            encoded = dataclasses.replace(read, task1=_latents(base, read.task1, screen), task2=None)
            latents = survey("energies", encoded, temperature, model, "paper", Machine(), file, screen)
            table.write(file, latents.table)
        rhythm = Rhythm(save_every=save_every, sample_every=0)
        with interruption() as stop:

            def watch(name: str, settings: Settings) -> Any:
                return watching(screen, settings, name)

            held = STRENGTH if strength is None else strength
            learner = UNetLearner(out, first, later, rhythm, base, strength=held, watch=watch, stop=stop)

            def rows(found: Survey, policy: str, size: int, seed: int) -> np.ndarray:
                return choose(found, policy, size, seed, screen)

            experiment = Experiment(out, lessons, learner, plan, surveys, rows, latents=latents)
            _check_bins(heights(surveys[0].table).scores[experiment.measured_rows()])
            try:
                measured = experiment.run(stages(screen, stop))
            except Unfinished as unfinished:
                raise KeyboardInterrupt(f"{unfinished}; the same command goes on from there") from None
        settings = {"learning": {"first": first.to_json(), "later": later.to_json()}}
        for name, found in ((TABLE, measured.samples), (TASKS, measured.tasks), (GENERATED, measured.generated)):
            if found is not None:
                table.write(out / name, table.Table(found.columns, {**found.settings, **settings}))
        sheets = io.BytesIO()
        np.savez_compressed(sheets, **measured.sheets)  # type: ignore[arg-type]
        write(out / SHEETS, sheets.getvalue())
        for each in surveys if latents is None else [*surveys, latents]:
            each.partial.discard()
        return draw(out, read.task1, screen)


def _hold(out: Path, known: dict[str, Any]) -> None:
    """Write down what is kept in an experiment's folder depends on, besides how models learn; refuse a folder that holds another's."""
    file = out / EXPERIMENT
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        before, now = {**known, **found}, {**found, **known}
        changed = difference(before, now)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} was not written by this version: name another folder") from error
    if changed:
        raise UsageError(f"{out} holds an experiment with other settings: {'; '.join(changed)}. Give the same, or name another folder")
    write(file, (json.dumps(now, indent=1, ensure_ascii=False) + "\n").encode())


def _check_bins(energy: np.ndarray) -> None:
    """Refuse, before anything is learnt, samples that the report's bins cannot hold."""
    from diffusion.statistics import bin_of, groups

    try:
        groups(energy)
        fewest = np.bincount(bin_of(energy, BINS), minlength=BINS).min()
    except ValueError as error:
        raise UsageError(f"energies do not tell the samples apart: {error}; take another temperature, such as --perplexity 30") from error
    need(bool(fewest >= 2), "--samples", len(energy), f"two samples or more in each of the report's {BINS} bins of energy", 500)


def stages(screen: Screen, stop: Callable[[], bool]) -> Any:
    """A line for each stage that is computed; after each batch of one that was asked to stop, the end."""
    from diffusion.learner import Unfinished

    def watch(stage: Any) -> Any:
        told = False

        def tell(_: int) -> None:
            nonlocal told
            if not told:
                screen.note(f"seed {stage.seed}: {stage.what}")
                told = True
            if stop():
                raise Unfinished(f"stopped while {stage.what}, what came before is kept")

        return tell

    return watch


def _base(
    trial: Trial,
    weights: str | None,
    class_prompt: str | None,
    out: Path,
    lessons: "Sequence[Images]",
    screen: Screen,
    stop: Callable[[], bool],
) -> "Base | None":
    """What Task 1 starts from; None for random parameters. A pipeline that is made is made of the images of all tasks."""
    if trial.weights == "none":
        return None
    from diffusion.stable import miniature
    from diffusion.stable.pipeline import StableDiffusion

    if weights is not None:
        with screen.working(f"reading {weights}"):
            pipeline = StableDiffusion.from_folder(weights)
    else:
        whole = dataclasses.replace(lessons[0], pixels=np.concatenate([task.pixels for task in lessons]), labels=None)
        pipeline = made(out / PIPELINE, whole, miniature.SMALL_PIPELINE, screen, stop)
    return _fine_tuned(pipeline, out / LATENTS, lessons, class_prompt)


def _fine_tuned(pipeline: "StableDiffusion", cache: Path, lessons: "Sequence[Images]", class_prompt: str | None) -> "Base":
    from diffusion.stable.fine_tuning import fine_tuned

    if class_prompt is None:
        return fine_tuned(pipeline, cache)
    names: dict[str, None] = {}
    for task in lessons:
        if task.labels is None:
            raise UsageError(f"--class-prompt {class_prompt}: {task.source} has no classes; leave it out")
        names |= dict.fromkeys(map(task.class_name, np.unique(task.labels).tolist()))
    return fine_tuned(pipeline, cache, classes=tuple(names), prompt=class_prompt)


def _latents(base: Any, images: "Images", screen: Screen) -> "Images":
    """The most likely latents of images, as the network sees them, in the place of their pixels."""
    with screen.counting("latents", len(images), 0, unit="images") as tell:
        batch = base.batch(images, pixels=False, progress=tell)
    latents = np.asarray(base.space.clean(batch), np.float32)
    return dataclasses.replace(images, pixels=latents, source=f"latents of {images.source}")


def _dry_run(
    trial: Trial,
    weights: str | None,
    class_prompt: str | None,
    lessons: "Sequence[Images]",
    plan: "Plan",
    first: Settings,
    later: Settings,
    screen: Screen,
) -> int:
    """Of a network whose weights are given, nothing is allocated and nothing timed."""
    if trial.weights == "none":
        return _plan(lessons, None, plan, first, later, screen)
    from diffusion.stable import miniature
    from diffusion.stable.pipeline import StableDiffusion

    small = miniature.SMALL_PIPELINE
    with tempfile.TemporaryDirectory() as folder:
        pipeline = small.untrained() if weights is None else StableDiffusion.from_folder(weights, abstract_unet=True)
        return _plan(lessons, _fine_tuned(pipeline, Path(folder), lessons, class_prompt), plan, first, later, screen, timed=weights is None)


def _plan(
    lessons: "Sequence[Images]", base: "Base | None", plan: "Plan", first: Settings, later: Settings, screen: Screen, *, timed: bool = True
) -> int:
    from diffusion.plan import plan as measure
    from diffusion.reconstruct import STEPS
    from diffusion.run import Task
    from hopjax.cli.progress import duration

    with screen.working("compiling and timing a few steps"):
        # Of latents a batch will do: an autoencoder takes its time.
        images = lessons[0] if base is None else lessons[0].take(np.arange(min(len(lessons[0]), first.length.batch_size)))
        found = measure(Task(images, start=base), first, timed=timed)
    seeds, policies, further = len(plan.seeds), len(plan.policies), len(lessons) - 1
    steps = seeds * (first.length.steps + policies * further * later.length.steps)
    measured = min(plan.samples or len(lessons[0]), len(lessons[0]))

    def reconstructing(timestep: int) -> int:
        return math.ceil(STEPS * timestep / first.noise.timesteps) * plan.draws

    others = sum(policies * (further + 1 - number) * min(plan.later, len(lessons[number])) for number in range(1, further + 1))
    evaluations = {
        "reconstruction": seeds * sum(reconstructing(timestep) for timestep in plan.timesteps) * (policies + 2) * measured
        + seeds * reconstructing(plan.timesteps[0]) * others,
        "generation": seeds * (policies + 1) * plan.generated * STEPS,
        "densities": 0 if plan.densities is None else seeds * plan.densities.evaluations(),
    }
    # A step is about three evaluations of a batch.
    seconds = found.step_seconds / found.batch_size / 3

    def about(length: float) -> str:
        return f", about {duration(length)}" if timed else ""

    screen.say(f"parameters: {found.parameters:,}")
    screen.say(found.memory())
    screen.say(f"learning: {steps:,} steps of {found.batch_size} images{about(steps * found.step_seconds)}")
    for what, count in evaluations.items():
        if count:
            screen.say(f"{what}: {count:,} evaluations of the network{about(count * seconds)}")
    if timed:
        screen.say(f"in all: about {duration(steps * found.step_seconds + sum(evaluations.values()) * seconds)}")
    return 0
