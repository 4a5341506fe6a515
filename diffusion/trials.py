"""Presets of the continual-learning experiment: two tasks, and how long each is learnt."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Literal, NamedTuple

from diffusion.optimiser import Adafactor, AdamW
from diffusion.settings import PRESETS, Length, Network, Noise, Settings


class Trial(NamedTuple):
    """An experiment on two tasks: data, how Task 2 comes of them, and how long each is learnt.

    Attributes:
        data: the images; None if there is no default.
        rotate: Task 2 is Task 1 turned by so many degrees; None for a split by class.
        task2_classes: the classes of Task 2, whose others are Task 1; None for a rotation.
        first, later: settings of Task 1, and of Task 2.
        size: side that images are stretched to; None for theirs.
        about: it, in a few words.
        samples: of Task 1 that are reconstructed; None for all.
        timesteps: from which they are, the main one first.
        buffer: samples of Task 1 that are replayed; None for a tenth.
        densities: of those, how many have their change of log density measured, which by the probability flow takes long.
        weights: of networks of pixels there are "none" to begin with. An experiment in the latents of Stable Diffusion begins with those
            that are "given", or with a small pipeline that is "made" of the data if none are.
    """

    data: str | None
    rotate: float | None
    task2_classes: str | None
    first: Settings
    later: Settings
    about: str
    size: int | None = None
    samples: int | None = 1000
    timesteps: tuple[int, ...] = (500,)
    buffer: int | None = None
    densities: int = 100
    weights: Literal["none", "made", "given"] = "none"


def _of_steps(settings: Settings, steps: int) -> Settings:
    return dataclasses.replace(settings, length=dataclasses.replace(settings.length, steps=steps))


def _latent(optimiser: AdamW | Adafactor, length: Length, *, remat: bool = False) -> Settings:
    """Stable Diffusion's noise; the network is that of the weights."""
    return Settings(Network(remat=remat), Noise("scaled-linear"), optimiser, length)


# Of the paper: the split, a buffer of 5,000, timesteps of reconstruction, all samples of Task 1, and those settings of PRESETS that are
# said to be; for MNIST angles and a tenth. Lost, and so ours: 100 epochs a task, of 25,000 and of 60,000 images in batches of 128 that are
# filled, for each policy as many steps; MNIST at 32 × 32; how many changes of log density are measured.
_TIMESTEPS = (500, 100, 250, 750)
_BUFFER = 5_000
# Of the paper: Stable Diffusion v1.5, whose U-Net alone is trained, images of 32 × 32, reconstructed from 500. Lost, and so ours: a rate
# of 1e-5, batches of 16, 5 epochs. Ours, for memory: Adafactor, no average, blocks computed again.
_STABLE = _latent(Adafactor(1e-5), Length(7_810, 16, ema=0.0), remat=True)
_TINY = _latent(AdamW(1e-3, warmup=50, decay=0.3), Length(1500, 32, ema=0.99))
_SPLIT = "airplane,automobile,frog,ship,truck"
_QUICK, _MNIST, _CIFAR = (PRESETS[name].settings for name in ("quick", "cpu-mnist", "paper-cifar10"))
TRIALS: Mapping[str, Trial] = types.MappingProxyType(
    {
        "quick": Trial(
            "digits",
            30.0,
            None,
            _of_steps(_QUICK, 400),
            _of_steps(_QUICK, 150),
            "8 × 8 digits turned, minutes on two cores",
            samples=500,
            densities=20,
        ),
        "cpu-mnist": Trial(
            "mnist-5k",
            30.0,
            None,
            _of_steps(_MNIST, 4000),
            _of_steps(_MNIST, 1000),
            "5,000 digits of MNIST turned, hours on two cores",
        ),
        # Four levels of resolution halve 32 × 32, not 28 × 28.
        "paper-mnist": Trial(
            None,
            30.0,
            None,
            _of_steps(_CIFAR, 46_800),
            _of_steps(_CIFAR, 46_800),
            "rotated MNIST at the paper's size, for an accelerator",
            32,
            samples=None,
            timesteps=_TIMESTEPS,
        ),
        "paper-cifar10": Trial(
            None,
            None,
            _SPLIT,
            _CIFAR,
            _CIFAR,
            "split CIFAR-10 at the paper's size, for an accelerator",
            samples=None,
            timesteps=_TIMESTEPS,
            buffer=_BUFFER,
        ),
        # Split, not turned: photographs that are turned are much the same patches. Task 1 are the 260 of the other photograph.
        "sd-tiny": Trial(
            "photographs",
            None,
            "flower",
            _TINY,
            _of_steps(_TINY, 300),
            "a small Stable Diffusion made of patches of two photographs, then taught one after the other",
            samples=260,
            densities=20,
            weights="made",
        ),
        "paper-sd": Trial(
            None,
            None,
            _SPLIT,
            _STABLE,
            _STABLE,
            "Stable Diffusion (--weights) on split CIFAR-10, for an accelerator",
            samples=None,
            buffer=_BUFFER,
            weights="given",
        ),
    }
)
