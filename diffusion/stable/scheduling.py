"""Sampling as diffusers' scheduler_config.json says: the noise that a network was trained on, a method, and its timesteps.

Schedulers are this project's samplers at the whole timesteps that diffusers evaluates a network at, so that the images are the same:
DDIM (η = 0), PNDM without Runge-Kutta steps, and DPM-Solver++(2M).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffusion.objective import Denoising
from diffusion.pipeline import SCHEDULER, objective_of
from diffusion.samplers import DDIM, PNDM, DPMSolver, Listed, Network, Samples, Scan
from diffusion.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A sampler and the arguments that it is called with; what it begins with, pure noise or not, it takes to be at `start`.

    Immutable and hashable. Called like a `Sampler`.
    """

    sampler: DDIM | PNDM | DPMSolver
    start: int
    stop: int
    denoise: bool

    def __call__(
        self, epsilon: Network, noisy: Float[Array, "n *shape"], schedule: Schedule, *, key: Key[Array, ""] | None = None
    ) -> Samples:
        """The images at the end; arguments as for `Sampler`."""
        return self.sampler(epsilon, noisy, schedule, key=key, start=self.start, stop=self.stop, denoise=self.denoise)

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated on the whole batch."""
        return self.sampler.steps + (isinstance(self.sampler, PNDM) and self.sampler.steps > 1)


# From the timesteps of a schedule, steps and `steps_offset`: where the network is evaluated, downwards.
Spacing: TypeAlias = Callable[[int, int, int], Int[np.ndarray, " k"]]


def _leading(timesteps: int, steps: int, offset: int) -> Int[np.ndarray, " k"]:
    size = timesteps // steps
    if offset >= size:
        raise ValueError(f"steps_offset = {offset} must be less than {size}, the timesteps of each of {steps} steps")
    return np.arange(steps)[::-1] * size + offset


def _leading_but_last(timesteps: int, steps: int, offset: int) -> Int[np.ndarray, " k"]:
    return _leading(timesteps, steps + 1, offset)[:-1]


def _trailing(timesteps: int, steps: int, offset: int) -> Int[np.ndarray, " k"]:
    # To the last bit as diffusers computes it, which decides how halves are rounded. For some numbers of steps it then has a timestep
    # more, −1, at which no network was trained: it is left out.
    return np.arange(timesteps, 0, -timesteps / steps).round().astype(int)[:steps] - 1


def _trailing_evenly(timesteps: int, steps: int, offset: int) -> Int[np.ndarray, " k"]:
    # diffusers would step to timesteps other than those it evaluates at.
    if timesteps % steps:
        raise ValueError(f"timestep_spacing = 'trailing' needs a number of steps that divides {timesteps}, which {steps} does not")
    return _trailing(timesteps, steps, offset)


def _linspace_but_last(timesteps: int, steps: int, offset: int) -> Int[np.ndarray, " k"]:
    return np.linspace(0, timesteps - 1, steps + 1).round().astype(int)[:0:-1]  # halves are rounded as diffusers rounds them


class _Method(NamedTuple):
    sampler: type[DDIM | PNDM | DPMSolver]
    spacings: Mapping[str, Spacing]
    # What a configuration means that says nothing of `timestep_spacing` and `set_alpha_to_one`.
    spacing: str
    to_one: bool
    # The same of other fields, and what is supported.
    others: Mapping[str, tuple[Any, Any]]


_EVEN: dict[str, Spacing] = {"leading": _leading, "trailing": _trailing_evenly}
_METHODS = {
    "DDIMScheduler": _Method(
        DDIM,
        _EVEN,
        spacing="leading",
        to_one=True,
        others={"clip_sample": (True, False), "thresholding": (False, False)},
    ),
    "PNDMScheduler": _Method(
        PNDM,
        _EVEN,
        spacing="leading",
        to_one=False,
        # diffusers extrapolates the network's output, whatever that is; here it is the noise.
        others={"skip_prk_steps": (False, True), "prediction_type": ("epsilon", "epsilon")},
    ),
    "DPMSolverMultistepScheduler": _Method(
        DPMSolver,
        {"leading": _leading_but_last, "trailing": _trailing, "linspace": _linspace_but_last},
        spacing="linspace",
        to_one=True,
        others={
            "solver_order": (2, 2),
            "algorithm_type": ("dpmsolver++", "dpmsolver++"),
            "solver_type": ("midpoint", "midpoint"),
            "final_sigmas_type": ("zero", "zero"),
            "lambda_min_clipped": (-math.inf, -math.inf),
            "variance_type": (None, None),
            "thresholding": (False, False),
            **{
                f"use_{kind}": (False, False)
                for kind in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas", "flow_sigmas")
            },
        },
    ),
}

# What DPMSolverMultistepScheduler takes the values of other methods for.
_TAKEN_FOR: dict[str, dict[str, Any]] = {
    "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    "algorithm_type": {"deis": "dpmsolver++"},
    "variance_type": dict.fromkeys(("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")),
}


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What a scheduler_config.json says; immutable and hashable.

    Raises: ValueError naming the field, its value and what would do.
    """

    objective: Denoising
    """The schedule that the network was trained on, and what it predicts."""
    method: str
    """diffusers' name of the scheduler."""
    spacing: str
    """`timestep_spacing`: how timesteps are chosen."""
    offset: int
    """`steps_offset`, which is added to "leading" timesteps."""
    to_one: bool
    """Whether the last step leads to x₀ (`set_alpha_to_one`; DPM-Solver++'s always does); else the state at timestep 0 is the image."""

    def __post_init__(self) -> None:
        """Refuse what is not supported, in one line."""
        spacings = _METHODS[self.method].spacings
        if not isinstance(self.spacing, str) or self.spacing not in spacings:
            raise ValueError(f"{SCHEDULER}: timestep_spacing = {self.spacing!r} is not supported; what is: {', '.join(spacings)}")
        if isinstance(self.offset, bool) or not isinstance(self.offset, int) or self.offset < 0:
            raise ValueError(f"{SCHEDULER}: steps_offset = {self.offset!r} must be a whole number, 0 or more")
        if not isinstance(self.to_one, bool):
            raise ValueError(f"{SCHEDULER}: set_alpha_to_one = {self.to_one!r} must be true or false")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], method: str | None = None) -> "Scheduler":
        """The scheduler in a parsed scheduler_config.json; with a `method`, that one with what is said there (diffusers' `from_config`).

        What is left out is diffusers' default for the method. Fields of other methods have no effect.

        Raises: ValueError naming the field, its value and what would do.
        """
        name: Any = fields.get("_class_name") if method is None else method
        if not isinstance(name, str) or name not in _METHODS:
            where = f"{SCHEDULER}: _class_name" if method is None else "scheduler"
            raise ValueError(f"{where} = {name!r} is not supported; what is: {', '.join(_METHODS)}")
        known = _METHODS[name]
        for field, (default, supported) in known.others.items():
            value = fields.get(field, default)
            if (_TAKEN_FOR.get(field, {}).get(value, value) if isinstance(value, str) else value) != supported:
                raise ValueError(f"{SCHEDULER}: {field} = {value!r} is not supported for {name}; what is: {supported!r}")
        to_one = True if known.sampler is DPMSolver else fields.get("set_alpha_to_one", known.to_one)
        return cls(objective_of(fields), name, fields.get("timestep_spacing", known.spacing), fields.get("steps_offset", 0), to_one)

    def sampling(self, steps: int, *, last: int | None = None, scan: Scan = jax.lax.scan) -> Sampling:
        """The sampler with this many steps, or with the `last` of them alone, and where it starts and ends; `scan` as for samplers.

        Raises: ValueError if the schedule cannot be divided into so many steps, or there are not so many last ones.
        """
        timesteps, known = self.objective.schedule.timesteps, _METHODS[self.method]
        if not 1 <= steps < timesteps:
            raise ValueError(f"steps = {steps} is out of range: need 1 ≤ steps < {timesteps}, the schedule's timesteps")
        last = steps if last is None else last
        if not 1 <= last <= steps:
            raise ValueError(f"last = {last} is out of range: need 1 ≤ last ≤ {steps}, the steps")
        nodes = known.spacings[self.spacing](timesteps, steps, self.offset).tolist()[-last:]
        if not self.to_one:
            nodes.append(0)
        return Sampling(known.sampler(last, grid=Listed(tuple(nodes)), scan=scan), nodes[0], nodes[-1], denoise=self.to_one)


def noise(fields: Mapping[str, Any]) -> Denoising:
    """The noise in a parsed scheduler_config.json, and what the network predicts, whichever of diffusers' methods it names.

    Raises: ValueError naming a field whose value is not supported, or that is missing where diffusers' methods differ in its default.
    """
    method = fields.get("_class_name")
    if not isinstance(method, str):
        raise ValueError(f"{SCHEDULER}: _class_name = {method!r} must be the name of a scheduler")
    for field in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps"):
        if field not in fields and method not in _METHODS:
            raise ValueError(f"{SCHEDULER}: {field} is missing, without which the noise of {method!r} is not known")
    return objective_of(fields)


def methods_for(fields: Mapping[str, Any]) -> list[str]:
    """diffusers' names of the methods that a parsed scheduler_config.json does for."""
    found = []
    for name in _METHODS:
        with contextlib.suppress(ValueError):
            found.append(Scheduler.from_json(fields, name).method)
    return found
