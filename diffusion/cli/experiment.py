"""`run` and `report`: the continual-learning experiment on two tasks, and its page."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from diffusion.cli.options import Device, configure, explained
from diffusion.cli.watching import interruption, watching
from diffusion.run import Rhythm
from diffusion.settings import Settings
from diffusion.trials import TRIALS
from hopjax.cli.options import BufferSize, Choice, Machine, Model, Reading, Temperature, UsageError, need
from hopjax.cli.output import check_writable, write
from hopjax.cli.progress import Screen

TABLE, FINDINGS, PAGE, ENERGIES = "samples.parquet", "findings.json", "report.html", "energies.parquet"


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text} is no list of whole numbers: give some, such as {option} 0,1,2") from None


def _steps(settings: Settings, steps: int | None) -> Settings:
    length = settings.length if steps is None else dataclasses.replace(settings.length, steps=steps)
    return dataclasses.replace(settings, length=length)


def trial_table() -> str:
    """The presets of `run`, for --help."""
    return "\n".join(
        f"    {name}: {trial.about}; {trial.first.length.steps:,} steps of Task 1, {trial.later.length.steps:,} of Task 2"
        for name, trial in TRIALS.items()
    )


def run(
    data: Annotated[str | None, Parameter(help="Images, as for `python -m hopjax` (default: the preset's).")] = None,
    /,
    *,
    preset: Annotated[Literal["quick", "cpu-mnist", "paper-mnist", "paper-cifar10"], Parameter(help="See below.")] = "quick",
    out: Annotated[Path | None, Parameter(help="Folder of the experiment (default: results/continual-PRESET).")] = None,
    policies: Annotated[
        str, Parameter(help="Ways of learning Task 2: none, high, random, low, stratified, coverage, joint, continued.")
    ] = "none,high,random,low,coverage",
    buffer: Annotated[BufferSize | None, Parameter(help="Samples of Task 1 that are replayed (default: 10%).")] = None,
    seeds: Annotated[str, Parameter(help="Seeds of learning, each an experiment of its own.")] = "0",
    samples: Annotated[int, Parameter(help="Samples of Task 1 that are reconstructed, spread over the energies.")] = 1000,
    timesteps: Annotated[str, Parameter(help="Of reconstruction; the first is the main one.")] = "500",
    draws: Annotated[int, Parameter(help="Of the noise, for each sample.")] = 2,
    steps1: Annotated[int | None, Parameter(help="Steps of Task 1 (default: the preset's).")] = None,
    steps2: Annotated[int | None, Parameter(help="Steps of Task 2 (default: the preset's).")] = None,
    save_every: Annotated[int, Parameter(help="Steps between two checkpoints.")] = 250,
    choice: Choice = Choice(),
    temperature: Temperature = Temperature(),
    model: Model = Model(),
    reading: Reading = Reading(),
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
    if not (choice.task2 or choice.task2_classes or choice.rotate is not None):
        choice = dataclasses.replace(choice, rotate=trial.rotate, task2_classes=trial.task2_classes)
    if reading.size is None and trial.size is not None:
        reading = dataclasses.replace(reading, size=trial.size)
    out = out or Path("results") / f"continual-{preset}"
    check_writable("--out", out / TABLE)
    for option, value in (("--draws", draws), ("--samples", samples), ("--steps1", steps1 or 1), ("--steps2", steps2 or 1)):
        need(value >= 1, option, value, f"{option.removeprefix('--')} ≥ 1", 2)
    configure(device)
    screen = Screen()
    from diffusion.continual import Experiment, Plan
    from diffusion.learner import UNetLearner, Unfinished
    from hopjax.cli import table
    from hopjax.cli.buffer import choose
    from hopjax.cli.survey import Survey, survey
    from hopjax.cli.tasks import load

    with explained():
        with screen.working(f"reading {data}"):
            tasks = load(data, choice, reading)
        if tasks.task2 is None:
            raise UsageError("there is no Task 2: give --rotate, --task2 or --task2-classes")
        size = buffer.of(len(tasks.task1)) if buffer else max(1, round(len(tasks.task1) / 10))
        plan = Plan(
            tuple(name.strip() for name in policies.split(",")),
            size,
            _numbers("--seeds", seeds),
            samples,
            _numbers("--timesteps", timesteps),
            draws,
        )
        first, later = _steps(trial.first, steps1), _steps(trial.later, steps2)
        if dry_run:
            return _plan(tasks.task1, plan, first, later, screen)
        surveyed = survey("energies", tasks, temperature, model, "paper", Machine(), out / ENERGIES, screen)
        table.write(out / ENERGIES, surveyed.table)
        rhythm = Rhythm(save_every=save_every, sample_every=0)
        with interruption() as stop:
            learner = UNetLearner(out, first, later, rhythm, watch=lambda name, settings: watching(screen, settings, name), stop=stop)

            def rows(found: Survey, policy: str, size: int, seed: int) -> np.ndarray:
                return choose(found, policy, size, seed, screen)

            try:
                measured = Experiment(out, tasks.task1, tasks.task2, learner, plan, surveyed, rows).run(stages(screen)).table
            except Unfinished as unfinished:
                raise KeyboardInterrupt(f"{unfinished}; the same command goes on from there") from None
    measured.settings["learning"] = {"first": first.to_json(), "later": later.to_json()}
    table.write(out / TABLE, measured)
    surveyed.partial.discard()
    return _report(out, tasks.task1, screen)


def stages(screen: Screen) -> Any:
    """A line for each stage that is computed."""

    def watch(stage: Any) -> Any:
        told = False

        def tell(_: int) -> None:
            nonlocal told
            if not told:
                screen.note(f"seed {stage.seed}: {stage.what}")
                told = True

        return tell

    return watch


def _plan(task1: Any, plan: Any, first: Settings, later: Settings, screen: Screen) -> int:
    from diffusion.plan import plan as measure
    from diffusion.reconstruct import STEPS
    from diffusion.run import Task
    from hopjax.cli.progress import duration

    with screen.working("compiling and timing a few steps"):
        found = measure(Task(task1), first)
    models = len(plan.policies)
    steps = len(plan.seeds) * (first.length.steps + models * later.length.steps)
    evaluations = sum(math.ceil(STEPS * timestep / first.noise.timesteps) for timestep in plan.timesteps)
    evaluations *= len(plan.seeds) * (models + 2) * plan.draws * min(plan.samples or len(task1), len(task1))
    learning = steps * found.step_seconds
    # A step is about three evaluations of a batch.
    measuring = evaluations / found.batch_size * found.step_seconds / 3
    screen.say(f"parameters: {found.parameters:,}")
    screen.say("memory of a device: " + ", ".join(f"{kind} {count / 2**20:,.1f} MiB" for kind, count in found.bytes.items()))
    screen.say(f"learning: {steps:,} steps of {found.batch_size} images, about {duration(learning)}")
    screen.say(f"reconstruction: {evaluations:,} evaluations of the network, about {duration(measuring)}")
    screen.say(f"in all: about {duration(learning + measuring)}")
    return 0


def report(
    folder: Annotated[Path, Parameter(help="Of an experiment that `run` has finished.")],
    /,
    *,
    images: Annotated[bool, Parameter(help="Show images of Task 1, for which its data are read again.")] = True,
) -> int:
    """Draw the page of an experiment again, from its table alone; no model is needed.

    Example:

        python -m diffusion report results/continual-quick
    """
    from hopjax.cli import table
    from hopjax.cli.tasks import load

    screen = Screen()
    task1 = None
    with explained():
        if images:
            read = table.read(folder / TABLE).settings["read"]
            size = tuple(read["size"]) if isinstance(read["size"], list) else read["size"]
            choice = Choice(read["classes"], read["task2"], read["task2_classes"], read["rotate"])
            task1 = load(read["data"], choice, Reading(read["split"], size, read["grey"], read["limit"], read["skip_bad"])).task1
        return _report(folder, task1, screen)


def _report(folder: Path, task1: Any, screen: Screen) -> int:
    from diffusion.findings import findings
    from diffusion.report import page
    from hopjax.cli import table

    measured = table.read(folder / TABLE)
    with screen.working("drawing"):
        found = findings(measured)
        write(folder / FINDINGS, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
        write(folder / PAGE, page(measured, found, task1))
    main = found["timesteps"][str(measured.settings["plan"]["timesteps"][0])]
    for row in main["verdicts"]:
        screen.say(f"{ {True: 'holds', False: 'fails', None: 'open'}[row['holds']]:>5}  {row['claim']}")
    for line in (f"table: {folder / TABLE}", f"findings: {folder / FINDINGS}", f"page: {folder / PAGE}"):
        screen.say(line)
    return 0
