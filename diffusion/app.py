"""The commands of `python -m diffusion`, their options and help. What takes long to import is imported when a command runs."""

import contextlib
import io
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import App, Parameter
from cyclopts.config import Dict

from diffusion.layout import Layout
from diffusion.optimiser import AdamW
from diffusion.run import Rhythm, RunError, Task
from diffusion.settings import PRESETS, Length, Network, Noise, Settings
from hopjax.cli.options import Choice, Machine, Reading, UsageError, as_options, need
from hopjax.cli.output import check_writable, write
from hopjax.cli.progress import Screen
from hopjax.data import DataError, Images

Device = Annotated[Literal["cpu", "gpu", "tpu"] | None, Parameter(group="Devices", help="Default: the best that JAX finds.")]
Model = Annotated[str, Parameter(help="Folder of a run, finished or not, or of a diffusers pipeline or UNet2DModel.")]

app = App(
    name="python -m diffusion",
    help="""Diffusion models of images: train, sample, measure likelihoods, exchange with diffusers.

Example: scikit-learn's digits, trained and sampled in two minutes, with nothing to download:

    python -m diffusion train --preset quick

The exit status is 0, 1 if a run could not go on or a file not be written, 2 if the command was misused, and 130 if it was interrupted:
the same command then goes on where it stopped.
""",
    help_format="plaintext",
    version_flags=[],
    suppress_keyboard_interrupt=False,  # it has something to say
)


def _presets(apps: Any, commands: tuple[str, ...], arguments: Any) -> None:
    """cyclopts' hook: what a preset sets, and the command line does not, is filled in before it is read."""
    if commands != ("train",):
        return
    named = [token.value for argument in arguments if argument.name == "--preset" for token in argument.tokens]
    preset = PRESETS.get(named[-1] if named else "quick")
    if preset is None:
        return  # refused when it is read
    values = {name: value for group in asdict(preset.settings).values() for name, value in group.items() if value is not None}
    Dict({"train": values}, source="preset")(apps, commands, arguments)


app.config = [_presets]


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What cannot be done is said in one line."""
    try:
        yield
    except (DataError, RunError, ValueError) as error:
        raise UsageError(as_options(str(error))) from error


def _table() -> str:
    lines = []
    for name, preset in PRESETS.items():
        different = []
        for group, values in asdict(preset.settings).items():
            usual = asdict(getattr(Settings(), group))
            different += [f"--{key.replace('_', '-')} {value}" for key, value in values.items() if value != usual[key]]
        lines.append(f"    {name}: {preset.about}{f' (DATA: {preset.data})' if preset.data else ''}: {' '.join(different)}")
    return "\n".join(lines)


@app.command(help_epilogue=f"What the presets set; everything else has the default shown:\n\n{_table()}")
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
    _configure(device, distributed)
    chosen = PRESETS[preset]
    out = out or Path("results") / preset
    with _told():
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
    from diffusion.run import MODEL, SAMPLES, run

    steps, batch = settings.length.steps, settings.length.batch_size
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_interruption())
        tell, at = None, 0

        def watch(done: int, record: Any) -> None:
            nonlocal tell, at
            if tell is None:  # now that it is known where a run goes on
                at = max(0, done - 10)
                tell = stack.enter_context(screen.counting("training", steps, at, unit="images", each=batch))
            tell(done - at, "" if record is None else f"loss {record.loss:.4f}")
            at = done

        finished = run(out, task, settings, rhythm, say=screen.note, watch=watch, wandb=wandb, stop=stop)
    if finished.step < steps:
        raise KeyboardInterrupt(f"saved step {finished.step:,} of {steps:,} in {out}; the same command goes on from there")
    screen.say(f"model: {out / MODEL}")
    sheets = sorted((out / SAMPLES).glob("*.png"))
    if sheets:
        screen.say(f"samples: {sheets[-1]}")
    return 0


@contextlib.contextmanager
def _interruption() -> Iterator[Any]:
    """Whether the run was asked to end (Ctrl-C, SIGTERM): it then ends after the step that it is at. The second time, at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _configure(device: Literal["cpu", "gpu", "tpu"] | None, distributed: bool = False) -> None:
    from hopjax.cli.app import configure

    if distributed:
        import jax

        jax.distributed.initialize()
    configure(Machine(device=device))


def _images(data: str, classes: str | None, reading: Reading) -> Images:
    from hopjax.cli.tasks import load

    return load(data, Choice(classes=classes), reading).task1


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

    images = _images(data, classes, reading)
    need(0 <= hold_out < len(images), "--hold-out", hold_out, f"0 ≤ hold-out < {len(images)}, the number of images", len(images) // 10)
    images = images.take(np.arange(len(images) - hold_out))
    old, places = None, None
    if replay is not None:
        old = _images(replay, replay_classes, reading)
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
    return Task(images, old, places, None if start is None else read_model(start))


@app.command
def sample(
    model: Model,
    /,
    *,
    count: Annotated[int, Parameter(help="How many images.")] = 64,
    out: Annotated[
        Path, Parameter(help="A sheet (.png), or the images as bytes n × h × w × c (.npy), which `train` and `hopjax` read.")
    ] = Path("results/samples.png"),
    sampler: Annotated[
        Literal["ddim", "ancestral", "dpm-solver", "flow"],
        Parameter(help="DDIM; DDPM's ancestral sampling; DPM-Solver++(2M); or the probability flow to a tolerance."),
    ] = "ddim",
    sampling_steps: Annotated[
        int | None, Parameter(help="Evaluations for each image (default: 50; 1000 of ancestral; 20 of dpm-solver).")
    ] = None,
    eta: Annotated[float, Parameter(help="For ddim: 0 is deterministic, 1 as random as ancestral.")] = 0.0,
    clip: Annotated[bool, Parameter(help="Clip estimates of the clean image to the range of pixels.")] = True,
    seed: Annotated[int, Parameter(help="Of the noise: image i depends on it and i alone, unless the sampler is random.")] = 0,
    batch: Annotated[int, Parameter(help="Images at once.")] = 64,
    raw: Annotated[bool, Parameter(negative="", help="Of a run, the parameters themselves instead of their average.")] = False,
    device: Device = None,
) -> int:
    """Draw new images from a model.

    Example: a hundred digits of the quick run, by 20 evaluations each:

        python -m diffusion sample results/quick --count 100 --sampler dpm-solver
    """
    if out.suffix not in (".png", ".npy"):
        raise UsageError(f"--out {out}: a sheet ends in .png, images in .npy, such as {out.with_suffix('.png')}")
    check_writable("--out", out)
    for option, value in (("--count", count), ("--batch", batch), ("--sampling-steps", sampling_steps or 1)):
        need(value >= 1, option, value, f"{option.removeprefix('--')} ≥ 1", 64)
    need(0 <= eta <= 1, "--eta", eta, "0 ≤ eta ≤ 1", 0)
    need(0 <= seed < 2**32, "--seed", seed, "0 ≤ seed < 2³²", 0)
    if eta and sampler != "ddim":
        raise UsageError(f"--eta {eta} is of --sampler ddim: leave it out with {sampler}")
    _configure(device)
    screen = Screen()
    import jax
    from flax import nnx

    from diffusion.generate import generate
    from diffusion.run import picture, read_model
    from diffusion.samplers import DDIM, Ancestral, DPMSolver, ProbabilityFlow

    samplers = {
        "ddim": DDIM(sampling_steps or 50, eta),
        "ancestral": Ancestral(sampling_steps),
        "dpm-solver": DPMSolver(sampling_steps or 20),
        "flow": ProbabilityFlow(),
    }
    with _told():
        unet, objective = read_model(model, averaged=not raw)
        graphdef, params = nnx.split(unet, nnx.Param)
        shape = (*_size(unet.config.sample_size), unet.config.in_channels)
        with screen.counting("sampling", count, 0, unit="images") as tell:
            found = generate(
                graphdef,
                params,
                objective,
                shape,
                count,
                key=jax.random.key(seed),
                sampler=samplers[sampler],
                batch=batch,
                clip=1.0 if clip else None,
                progress=tell,
            )
    if out.suffix == ".png":
        picture(out, found.images)
    else:
        buffer = io.BytesIO()
        np.save(buffer, found.images)
        write(out, buffer.getvalue())
    screen.say(f"{count:,} images of {found.evaluations:,} evaluations each: {out}")
    return 0


def _size(sample_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if sample_size is None:
        raise ValueError("the model's config.json has no sample_size: what size its images have is not known")
    return (sample_size, sample_size) if isinstance(sample_size, int) else sample_size


@app.command
def export(
    model: Model,
    folder: Annotated[Path, Parameter(help="To write; it must not exist, or be empty.")],
    /,
    *,
    raw: Annotated[bool, Parameter(negative="", help="Of a run, the parameters themselves instead of their average.")] = False,
) -> int:
    """Write a model as a diffusers pipeline: DDPMPipeline.from_pretrained(FOLDER) takes it.

    Works on a run that is not finished too; the one that is has its model/ already.

    Example:

        python -m diffusion export results/quick exported
    """
    from diffusion.pipeline import write_pipeline
    from diffusion.run import read_model
    from diffusion.unet import parameter_count

    screen = Screen()
    with _told():
        found = read_model(model, averaged=not raw)
        write_pipeline(folder, found)
    screen.say(f"{parameter_count(found.unet):,} parameters: {folder}")
    return 0


@app.command(name="import")
def import_(
    folder: Annotated[Path, Parameter(help="A diffusers pipeline, or the folder of a UNet2DModel; weights in safetensors.")],
    out: Annotated[Path, Parameter(help="To write; it must not exist, or be empty.")],
    /,
) -> int:
    """Check a model of diffusers and write it as this project does, older names of tensors made new; `train --start` goes on from it.

    Example:

        python -m diffusion import ddpm-cifar10-32 results/cifar10
    """
    return export(str(folder), out)
