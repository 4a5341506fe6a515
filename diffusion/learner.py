"""A U-Net as a learner of the continual-learning protocol: each task is a run in a folder, each model a folder of diffusers in it."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int64, UInt8

from diffusion.assess import CleanDensity, Measure, Reconstruction, assess
from diffusion.consolidation import STRENGTH, Consolidation
from diffusion.generate import generate
from diffusion.likelihood import Draws, FlowLogDensity, Hutchinson
from diffusion.pipeline import Model
from diffusion.protocol import Densities
from diffusion.run import MODEL, Rhythm, Task, abstract_of, completed, run
from diffusion.samplers import ProbabilityFlow
from diffusion.schedules import Schedule
from diffusion.settings import Settings
from diffusion.train import Record
from diffusion.variational import VariationalBound
from hopjax.data import Images


class Unfinished(Exception):
    """A run was asked to stop before its end; the same call goes on from there."""


def _unwatched(name: str, settings: Settings) -> contextlib.AbstractContextManager[Callable[[int, Record | None], None]]:
    return contextlib.nullcontext(lambda *_: None)


@dataclasses.dataclass(frozen=True)
class UNetLearner:
    """Learns by `diffusion.run`.

    Attributes:
        folder: of the experiment; each task gets a folder in it.
        first: settings of the first task; the seed is replaced.
        later: of each later one, which starts from the averaged parameters of the one before.
        rhythm: of all runs.
        base: what the first task starts from; None for random parameters. Models of latents have one, which says what latents are.
        batch: images reconstructed at once.
        strength: λ of elastic weight consolidation, where it is asked for (see `diffusion.consolidation`).
        watch: for the time of a run, of which it gets name and settings, gives what is told how many steps are done.
        stop: asked after each step.
    """

    folder: Path
    first: Settings
    later: Settings
    rhythm: Rhythm = Rhythm(sample_every=0)
    base: Model | None = None
    batch: int = 50
    strength: float = STRENGTH
    watch: Callable[[str, Settings], contextlib.AbstractContextManager[Callable[[int, Record | None], None]]] = _unwatched
    stop: Callable[[], bool] = lambda: False

    def learn(
        self,
        name: str,
        seed: int,
        images: Images,
        *,
        start: Model | None,
        replay: Images | None,
        replayed: Int64[np.ndarray, " k"] | None,
        consolidate: Images | None = None,
    ) -> Model:
        """The model at the end of a run.

        Args:
            consolidate: images of the task that `start` learnt, to be kept by elastic weight consolidation; None for none of it.

        Raises: Unfinished; RunError as `run`.
        """
        chosen = self.first if start is None else self.later
        settings = dataclasses.replace(chosen, length=dataclasses.replace(chosen.length, seed=seed))
        kept = None if consolidate is None else Consolidation(consolidate, self.strength)
        task = Task(images, replay, replayed, self.base if start is None else start, consolidation=kept)
        folder = self.folder / name
        gc.collect()  # traversals of nnx leave cycles, which would keep the arrays of models that nobody asks for any more
        found = completed(folder, task, settings)
        if found is None:
            with self.watch(name, settings) as watch:
                step = run(folder, task, settings, self.rhythm, watch=watch, stop=self.stop).step
            if step < settings.length.steps:
                raise Unfinished(f"saved step {step:,} of {settings.length.steps:,} in {folder}")
            gc.collect()
            found = abstract_of(task, settings).read(folder / MODEL)
        return found

    @property
    def schedule(self) -> Schedule:
        """Of the noise."""
        return self.first.noise.objective().schedule

    def fingerprint(self, model: Model) -> str:
        """Of the parameters and the noise that they were trained on."""
        return model.fingerprint()

    def reconstruct(
        self, model: Model, images: Images, *, timestep: int, draws: int, seed: int, progress: Callable[[int], None]
    ) -> Float[np.ndarray, "n m"]:
        """See `diffusion.assess.Reconstruction`."""
        return np.asarray(self._assess(model, images, Reconstruction(timestep, draws), seed, progress).values)

    def log_densities(
        self, model: Model, images: Images, measure: str, how: Densities, *, seed: int, progress: Callable[[int], None]
    ) -> Draws:
        """See `diffusion.assess.CleanDensity`."""
        flow = FlowLogDensity(Hutchinson(how.probes), ProbabilityFlow(how.tolerance, how.tolerance))
        log_density = flow if measure == "flow" else VariationalBound(how.steps, how.draws)
        return self._assess(model, images, CleanDensity(log_density, how.timestep), seed, progress)

    def generate(
        self, model: Model, shape: tuple[int, int, int], count: int, *, seed: int, progress: Callable[[int], None]
    ) -> UInt8[np.ndarray, "n h w c"]:
        """By the default sampler of `diffusion.generate`."""
        graphdef, params = nnx.split(model.unet, nnx.Param)
        key = jax.random.key(seed)
        return generate(
            graphdef,
            params,
            model.objective,
            shape,
            count,
            key=key,
            batch=self.batch,
            clip=model.space.clip,
            space=model.space,
            asked=model.asked(count),
            progress=progress,
        ).images

    def _assess(self, model: Model, images: Images, measure: Measure, seed: int, progress: Callable[[int], None]) -> Draws:
        return assess(model, model.batch(images, pixels=True), measure, key=jax.random.key(seed), batch=self.batch, progress=progress)
