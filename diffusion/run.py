"""A training run in a folder: begun, cut off and resumed by the same call.

run.json          settings, data and versions: a resumed run must have the same
checkpoints/      of the whole state; the last ones
log.jsonl         losses
samples/          sheets of samples at intervals
model/            the averaged parameters at the end, as a diffusers pipeline
"""

import contextlib
import dataclasses
import io
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import UInt8
from PIL import Image

from diffusion import figures, logs
from diffusion.checkpoint import CheckpointError, Checkpoints
from diffusion.config import CLASS_NAME, UNetConfig
from diffusion.consolidation import Consolidation
from diffusion.feed import Feed
from diffusion.generate import generate
from diffusion.layout import Layout
from diffusion.pipeline import Model, Pipeline, read_pipeline
from diffusion.pixels import checked, grid
from diffusion.settings import Settings, SettingsError, difference
from diffusion.train import Diverged, Pause, Program, Record, TrainState, record, train
from diffusion.unet import UNet
from hopjax.cli.options import Choice, Reading
from hopjax.cli.output import write
from hopjax.cli.table import versions
from hopjax.cli.tasks import Tasks, description, load
from hopjax.data import Images

RUN, LOG, CURVE, CHECKPOINTS, SAMPLES, MODEL = "run.json", "log.jsonl", "loss.png", "checkpoints", "samples", "model"
# Its name in run.json.
CONSOLIDATION = "consolidation"
# Images on a sheet.
SHEET = 64
# Steps after which progress is told.
GLANCE = 10


class RunError(Exception):
    """A run that cannot begin or go on; the message says why, what is kept, and what to do."""


class Stopped(RunError):
    """A run that had begun and could not go on."""


@dataclasses.dataclass(frozen=True)
class Rhythm:
    """What happens how often; it changes nothing about the parameters.

    Attributes:
        log_every: steps between two records of the loss.
        save_every: steps between two checkpoints.
        sample_every: steps between two sheets of samples; 0 for none.
        keep: checkpoints that are kept.
    """

    log_every: int = 50
    save_every: int = 500
    sample_every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        """Refuse what never happens."""
        for name, least in (("log_every", 1), ("save_every", 1), ("sample_every", 0), ("keep", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} = {getattr(self, name)} is out of range: need {name} ≥ {least}")


class Task(NamedTuple):
    """What a run learns.

    Attributes:
        images: of the task.
        replay: of an earlier task, seen again; None for none.
        replayed: their places in that task's data, kept in the checkpoints.
        start: the model to go on from; None for random parameters.
        source: where the images were read, for `held_out`; JSON.
        consolidation: what is kept of the task that `start` learnt; None for nothing.
    """

    images: Images
    replay: Images | None = None
    replayed: np.ndarray | None = None
    start: Model | None = None
    source: Mapping[str, Any] | None = None
    consolidation: Consolidation | None = None


class Finished(NamedTuple):
    """How a run ended: at its last step, or stopped before."""

    state: TrainState
    program: Program
    step: int


def config_of(task: Task, settings: Settings) -> Any:
    """The network's configuration.

    Raises: DataError for images that no model is trained on; RunError if they do not fit the model to go on from, or what is to be kept
        of it.
    """
    shape = checked(task.images).pixels.shape[1:]
    if task.consolidation is not None:
        if task.start is None:
            raise RunError("there is nothing to consolidate in a model that has learnt nothing: give one to start from")
        kept = task.consolidation.images.pixels.shape[1:]
        if kept != shape:
            raise RunError(f"the images to consolidate have shape {kept}, those to learn {shape}: they must be alike")
    if task.start is None:
        return settings.network.config(*shape)
    objective = task.start.objective
    if objective != settings.noise.objective():
        there, here = settings.noise.unlike(objective)
        raise RunError(f"the model to start from was trained with {there}, not {here}: give the same")
    try:
        return task.start.config_for(shape, settings.network.dropout)
    except ValueError as error:
        raise RunError(str(error)) from error


def abstract_of(task: Task, settings: Settings) -> Model:
    """The model that is trained, the network's parameters abstract; RunError as `config_of`."""
    config = config_of(task, settings)
    if task.start is None:
        return Pipeline(settings.network.abstract(UNet, config), settings.noise.objective())
    return task.start.trained(settings.network.abstract(type(task.start.unet), config))


def params_of(task: Task, settings: Settings) -> Any:
    """The network's parameters before the first step; RunError as `config_of`."""
    made = settings.network.make(config_of(task, settings), settings.key("parameters")) if task.start is None else task.start.unet
    return nnx.state(made, nnx.Param)


def identity(task: Task, settings: Settings) -> dict[str, Any]:
    """All that the parameters at the end depend on, as JSON."""
    known = {
        "settings": settings.to_json(),
        "network": config_of(task, settings).to_json(),
        "source": None if task.source is None else dict(task.source),
        "data": description(task.images),
        "replay": None if task.replay is None else description(task.replay),
        "start": None if task.start is None else task.start.fingerprint(),
    }
    # Runs without one say nothing of it: they are the runs they were before there were any.
    return known if task.consolidation is None else known | {CONSOLIDATION: task.consolidation.to_json()}


def completed(folder: Path, task: Task, settings: Settings) -> Model | None:
    """The model of a run that has come to its end, without another look at its checkpoints; None if it has not.

    Raises: RunError for a run with other settings.
    """
    if not (folder / RUN).exists() or not (folder / MODEL).is_dir():
        return None
    check(folder, identity(task, settings))
    return abstract_of(task, settings).read(folder / MODEL)


def _read(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """What `check` wrote down."""
    file = folder / RUN
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {name: found[name] if name != CONSOLIDATION else found.get(name) for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} was not written by this version: name another folder") from error


def check(folder: Path, wanted: dict[str, Any]) -> None:
    """Whether a run in this folder is this one; a new one is written down.

    Raises: RunError showing what differs.
    """
    if (folder / RUN).exists():
        whole = {CONSOLIDATION: None, **wanted}
        found = _read(folder, whole)
        try:
            # What there was no setting for was as its default is now.
            found["settings"] = Settings.from_json(found["settings"]).to_json()
        except ValueError as error:
            raise RunError(f"{folder / RUN} was not written by this version: {error}") from error
        changed = difference(found, json.loads(json.dumps(whole)))
        if changed:
            raise RunError(f"{folder} holds a run with other settings: {'; '.join(changed)}. Give the same, or name another folder")
        return
    # A run that was killed at this very place may have left a part of the file.
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(f".{RUN}.") for path in folder.iterdir())):
        raise RunError(f"{folder} is not empty and holds no run: name another folder")
    made = {**wanted, "versions": versions() | {"platform": platform.machine(), "device": jax.default_backend()}}
    write(folder / RUN, (json.dumps(made, indent=1, ensure_ascii=False) + "\n").encode())


def feed_of(task: Task, model: Model, settings: Settings) -> Feed:
    """The batches of a task, as the model takes them."""
    length = settings.length
    images, replay = (None if each is None else model.batch(each, pixels=False) for each in (task.images, task.replay))
    return Feed(images, length.batch_size, length.seed, replay, length.replay_ratio)


def program_of(model: Model, settings: Settings) -> tuple[Program, Any]:
    """What is compiled, and the model's parameters."""
    graphdef, params = nnx.split(model.unet, nnx.Param)
    length, mesh = settings.length, settings.layout.mesh()
    return Program(graphdef, model.objective, settings.optimiser, length.steps, length.ema, mesh, space=model.space), params


def run(
    folder: Path,
    task: Task,
    settings: Settings,
    rhythm: Rhythm = Rhythm(),
    *,
    say: Callable[[str], None] = lambda _: None,
    watch: Callable[[int, Record | None], None] = lambda *_: None,
    wandb: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Finished:
    """Train until the end, or until `stop`; go on from the last checkpoint if there is one.

    Args:
        say: told in words what begins.
        watch: told every few steps how many are done, with a record of the losses when there is one.
        wandb: project of Weights & Biases to log to.

    Raises: RunError for other settings than before, a loss that is not finite, or a disk that is full; nothing that was saved is lost.
    """
    model = abstract_of(task, settings)
    feed = feed_of(task, model, settings)
    if jax.process_index() == 0:
        check(folder, identity(task, settings))
    program, _ = program_of(model, settings)
    params = params_of(task, settings)
    steps, stop = settings.length.steps, _agreed(stop)
    with contextlib.ExitStack() as stack:
        try:
            checkpoints = stack.enter_context(Checkpoints(folder / CHECKPOINTS, keep=rhythm.keep))
            found = checkpoints.restore(program.abstract(params))
        except CheckpointError as error:
            raise RunError(str(error)) from error
        begun = 0 if found is None else found.step
        state = program.initial(params) if found is None else found.state
        if begun:
            say(f"going on from step {begun:,} of {steps:,}")
        if begun < steps:
            if task.consolidation is not None:
                say("estimating the Fisher information")
                # No step has this number.
                key = jax.random.fold_in(settings.key("training"), np.uint32(2**32 - 1))
                held = model.batch(task.consolidation.images, pixels=False)
                penalty = task.consolidation.penalty(program.graphdef, params, program.objective, held, key=key, space=program.space)
                program = dataclasses.replace(program, penalty=penalty)
            say("compiling")
            step = program.compile(state, feed.batch(0))
            kept = _logs(folder, begun, settings, wandb)
            since: list[Pause] = []
            every = [each for each in (GLANCE, rhythm.log_every, rhythm.save_every, rhythm.sample_every) if each]
            try:
                for pause in train(
                    state,
                    step,
                    feed,
                    key=settings.key("training"),
                    mesh=program.mesh,
                    steps=steps,
                    pauses=every,
                    stop=stop,
                ):
                    state, done = pause.state, pause.step
                    since.append(pause)
                    if done % rhythm.log_every == 0 or done == steps:
                        latest, since = record(since, feed), []
                        for log in kept:
                            log(latest)
                        watch(done, latest)
                    else:
                        watch(done, None)
                    if done % rhythm.save_every == 0 or done == steps or stop():
                        checkpoints.save(done, state, _position(task, feed, done, settings))
                    if rhythm.sample_every and (done % rhythm.sample_every == 0 or done == steps):
                        averaged = program.gathered(program.averaged(state))
                        if jax.process_index() == 0:
                            picture(folder / SAMPLES / f"{done:07d}.png", _samples(model, program, averaged, task, settings))
                            if (folder / LOG).exists():  # not before the first record
                                write(folder / CURVE, figures.losses(logs.read(folder / LOG)))
            except Diverged as error:
                saved = checkpoints.steps
                good = f"the last good checkpoint is of step {saved[-1]:,}" if saved else "there is no checkpoint yet"
                raise Stopped(f"{error}: stopped; {good} in {folder / CHECKPOINTS}. A lower learning_rate or clip may help") from error
            except CheckpointError as error:
                raise Stopped(str(error)) from error
    done = int(state.step)
    if done == steps and not (folder / MODEL).exists():
        averaged = program.gathered(program.averaged(state))
        if jax.process_index() == 0:
            model.trained(nnx.merge(program.graphdef, averaged)).write(folder / MODEL)
    return Finished(state, program, done)


def read_model(path: str | os.PathLike[str], *, averaged: bool = True) -> Pipeline:
    """The model of a run, finished or not, or in a folder of diffusers.

    Args:
        averaged: of a run, the average of the parameters, or the parameters themselves as they are in its last checkpoint.

    Raises: RunError for a run without a checkpoint; ValueError for a folder that holds no model.
    """
    folder = Path(path)
    if not (folder / RUN).is_file():
        return read_pipeline(folder)
    if averaged and (folder / MODEL).is_dir():
        return read_pipeline(folder / MODEL)
    known = _read(folder, ("settings", "network"))
    settings = dataclasses.replace(Settings.from_json(known["settings"]), layout=Layout())
    kind = known["network"].get("_class_name")
    if kind != CLASS_NAME:
        raise RunError(f"{folder} holds a run of a {kind}, whose model cannot be read before its end")
    network = settings.network.abstract(UNet, UNetConfig.from_json(known["network"]))
    program, params = program_of(Pipeline(network, settings.noise.objective()), settings)
    try:
        with Checkpoints(folder / CHECKPOINTS) as checkpoints:
            found = checkpoints.restore(program.abstract(params))
    except CheckpointError as error:
        raise RunError(str(error)) from error
    if found is None:
        raise RunError(f"{folder} has no checkpoint yet: run its `train` command for longer")
    params = program.averaged(found.state) if averaged else found.state.params
    return Pipeline(nnx.merge(program.graphdef, params), program.objective)


def read_again(told: Mapping[str, Any]) -> Tasks:
    """What `hopjax.cli.tasks.load` was once told to read, back from JSON; what is not there has its default.

    Raises: UsageError if its data cannot be read any more.
    """
    choice, reading = (
        {field.name: told[field.name] for field in dataclasses.fields(kind) if field.name in told} for kind in (Choice, Reading)
    )
    if isinstance(reading.get("size"), list):
        reading["size"] = tuple(reading["size"])
    return load(told["data"], Choice(**choice), Reading(**reading))


def held_out(path: str | os.PathLike[str]) -> Images:
    """The images that a run was not shown, though they were in its data.

    Raises: RunError if it is no run or held none out; DataError if its data cannot be read any more.
    """
    folder = Path(path)
    if not (folder / RUN).is_file():
        raise RunError(f"{folder} is not the folder of a run: name the images to measure")
    source = _read(folder, ("source",))["source"]
    if source is None or not source["hold_out"]:
        raise RunError(f"the run in {folder} held no images out: name the images to measure, or train with --hold-out")
    images = read_again(source).task1
    return images.take(np.arange(len(images) - source["hold_out"], len(images)))


def _position(task: Task, feed: Feed, step: int, settings: Settings) -> dict[str, Any]:
    """Where the next batch is, of which data, for people: it follows from the step and the settings."""
    epoch, batch = divmod(step, feed.epoch_batches)
    replayed = None if task.replayed is None else task.replayed.tolist()
    return {"epoch": epoch, "batch": batch, "replayed": replayed, "settings": settings.to_json()}


def _logs(folder: Path, step: int, settings: Settings, wandb: str | None) -> list[logs.Log]:
    if jax.process_index():
        return []
    found = [logs.json_lines(folder / LOG, step), logs.tensorboard(folder / "tensorboard", step)]
    if wandb is not None:
        found.append(logs.weights_and_biases(wandb, folder, settings.to_json()))
    return [log for log in found if log is not None]


def _agreed(stop: Callable[[], bool]) -> Callable[[], bool]:
    """Whether any process was asked to stop: all must end after the same step. Where there are several, they ask each other at times."""
    if jax.process_count() == 1:
        return stop
    calls, stopping = 0, False

    def agreed() -> bool:
        nonlocal calls, stopping
        calls += 1
        if not stopping and calls % GLANCE == 0:
            stopping = bool(np.any(multihost_utils.process_allgather(np.asarray(stop()))))
        return stopping

    return agreed


def _samples(model: Model, program: Program, params: Any, task: Task, settings: Settings) -> UInt8[np.ndarray, "n h w c"]:
    """From the same noise at every step."""
    return generate(
        program.graphdef,
        params,
        program.objective,
        task.images.pixels.shape[1:],
        SHEET,
        key=settings.key("samples"),
        batch=SHEET,
        clip=program.space.clip,
        space=program.space,
        asked=model.asked(SHEET),
    ).images


def picture(file: Path, images: UInt8[np.ndarray, "n h w c"]) -> None:
    """A sheet of images, PNG; small ones enlarged."""
    sheet = grid(images, columns=max(1, round(len(images) ** 0.5)), scale=max(1, 64 // images.shape[1]))
    buffer = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet[..., :3]).save(buffer, "PNG")
    write(file, buffer.getvalue())
