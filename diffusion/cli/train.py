"""`train`: its options, presets, data and interruption."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter
from cyclopts.config import Dict

from diffusion.cli.options import Device, configure, explained, images_of
from diffusion.cli.watching import interruption, watching
from diffusion.layout import Layout
from diffusion.optimiser import AdamW
from diffusion.run import Rhythm, Task
from diffusion.settings import PRESETS, Length, Network, Noise, Settings
from hopjax.cli.options import Reading, UsageError, need
from hopjax.cli.output import check_writable
from hopjax.cli.progress import Screen


def presets(apps: Any, commands: tuple[str, ...], arguments: Any) -> None:
    """cyclopts' hook: what a preset sets, and the command line does not, is filled in before it is read."""
    if commands != ("train",):
        return
    named = [token.value for argument in arguments if argument.name == "--preset" for token in argument.tokens]
    preset = PRESETS.get(named[-1] if named else "quick")
    if preset is None:
        return  # refused when it is read
    values = {name: value for group in asdict(preset.settings).values() for name, value in group.items() if value is not None}
    Dict({"train": values}, source="preset")(apps, commands, arguments)


def preset_table() -> str:
    """What each preset sets, for --help."""
    lines = []
    for name, preset in PRESETS.items():
        different = []
        for group, values in asdict(preset.settings).items():
            usual = asdict(getattr(Settings(), group))
            different += [f"--{key.replace('_', '-')} {value}" for key, value in values.items() if value != usual[key]]
        lines.append(f"    {name}: {preset.about}{f' (DATA: {preset.data})' if preset.data else ''}: {' '.join(different)}")
    return "\n".join(lines)


def train(
    data: Annotated[str | None, Parameter(help="Images, as for `python -m hopjax` (default: the preset's).")] = None,
    /,
    *,
    preset: Annotated[Literal["quick", "cpu-mnist", "paper-cifar10"], Parameter(help="Settings to begin with; see below.")] = "quick",
    out: Annotated[Path | None, Parameter(help="Folder of the run (default: results/PRESET).")] = None,
    classes: Annotated[str | None, Parameter(group="Data", help="Only these classes, A,B,… by name or number (default: all).")] = None,
    hold_out: Annotated[int, Parameter(group="Data", help="Leave out the last so many images, for `likelihood`.")] = 0,
    start: Annotated[str | None, Parameter(group="Data", help="Model to go on from, as for `sample` (default: random parameters).")] = None,
    replay: Annotated[str | None, Parameter(group="Data", help="Data of an earlier task to see again (default: none).")] = None,
    replay_classes: Annotated[str | None, Parameter(group="Data", help="Only these of its classes (default: all).")] = None,
    buffer: Annotated[
        Path | None, Parameter(group="Data", help="Only the samples in this table, which `hopjax buffer` wrote (default: all).")
    ] = None,
    reading: Reading = Reading(),
    network: Annotated[Network, Parameter(name="*", group="Network")] = Network(),
    noise: Annotated[Noise, Parameter(name="*", group="Noise")] = Noise(),
    optimiser: Annotated[AdamW, Parameter(name="*", group="Optimiser")] = AdamW(),
    length: Annotated[Length, Parameter(name="*", group="Length")] = Length(),
    layout: Annotated[Layout, Parameter(name="*", group="Devices")] = Layout(),
    rhythm: Annotated[Rhythm, Parameter(name="*", group="Rhythm")] = Rhythm(),
    device: Device = None,
    distributed: Annotated[
        bool, Parameter(group="Devices", negative="", help="One of several processes; JAX finds the others (SLURM, TPU pods, …).")
    ] = False,
    wandb: Annotated[str | None, Parameter(group="Rhythm", help="Project of Weights & Biases to log to (default: none).")] = None,
    dry_run: Annotated[bool, Parameter(negative="", help="Say what the run would take, and stop.")] = False,
) -> int:
    """Train a model, or go on with a run that was cut off: the same command does both.

    The folder of the run gets losses (log.jsonl), sheets of samples (samples/), checkpoints, and in the end the averaged parameters
    as a diffusers pipeline (model/).

    Example: the second task of a pair, with a tenth of the first replayed:

        python -m diffusion train mnist-5k --preset cpu-mnist --classes 5,6,7,8,9 --start results/first --replay mnist-5k \\
            --buffer results/buffer.parquet --out results/second
    """
    screen = Screen()
    configure(device, distributed)
    chosen = PRESETS[preset]
    out = out or Path("results") / preset
    with explained():
        data = data or chosen.data
        if data is None:
            raise UsageError(f"--preset {preset} needs DATA: name the images to train on")
        settings = Settings(network, noise, optimiser, length, layout)
        with screen.working(f"reading {data}"):
            task = _task(data, classes, hold_out, start, replay, replay_classes, buffer, reading)
        if dry_run:
            from diffusion.plan import plan

            with screen.working("compiling and timing a few steps"):
                found = plan(task, settings)
            for line in found.lines():
                screen.say(line)
            return 0
        check_writable("--out", out / "run.json")
        return _train(out, task, settings, rhythm, wandb, screen)


def _train(out: Path, task: Task, settings: Settings, rhythm: Rhythm, wandb: str | None, screen: Screen) -> int:
    from diffusion.run import MODEL, SAMPLES, Stopped, run

    steps = settings.length.steps
    with interruption() as stop, watching(screen, settings, "training") as watch:
        try:
            finished = run(out, task, settings, rhythm, say=screen.note, watch=watch, wandb=wandb, stop=stop)
        except Stopped as error:
            screen.note(f"error: {error}")
            return 1
    if finished.step < steps:
        raise KeyboardInterrupt(f"saved step {finished.step:,} of {steps:,} in {out}; the same command goes on from there")
    screen.say(f"model: {out / MODEL}")
    sheets = sorted((out / SAMPLES).glob("*.png"))
    if sheets:
        screen.say(f"samples: {sheets[-1]}")
    return 0


def _task(
    data: str,
    classes: str | None,
    hold_out: int,
    start: str | None,
    replay: str | None,
    replay_classes: str | None,
    buffer: Path | None,
    reading: Reading,
) -> Task:
    from diffusion.run import read_model

    images = images_of(data, classes, reading)
    need(0 <= hold_out < len(images), "--hold-out", hold_out, f"0 ≤ hold-out < {len(images)}, the number of images", len(images) // 10)
    source = {"data": data, "classes": classes, "hold_out": hold_out, **asdict(reading)}
    images = images.take(np.arange(len(images) - hold_out))
    old, places = None, None
    if replay is not None:
        old = images_of(replay, replay_classes, reading)
        places = np.arange(len(old))
        if buffer is not None:
            from hopjax.cli import table
            from hopjax.cli.tasks import sample_ids

            chosen = table.read(buffer)["sample"]
            places = np.flatnonzero(np.isin(sample_ids(old), chosen))
            if len(places) < len(np.unique(chosen)):
                raise UsageError(
                    f"--buffer {buffer} holds {len(chosen)} samples, of which {len(places)} are in {replay}: it was made of other data"
                )
            old = old.take(places)
    elif buffer is not None or replay_classes is not None:
        raise UsageError("--buffer and --replay-classes choose from the data of --replay: give that too")
    return Task(images, old, places, None if start is None else read_model(start), source)
