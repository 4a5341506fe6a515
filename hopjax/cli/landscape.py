"""The energy landscape of Task 1's samples, stored as memories, and where in it every one of them lies."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from hopjax import normalisation, temperature, tiled
from hopjax.cli import resume
from hopjax.cli.options import Machine, Model, Temperature, UsageError, as_options
from hopjax.cli.progress import Screen
from hopjax.cli.tasks import Tasks

QUANTITIES = ("energy", "excess", "log_leakage", "sharpness", "rise", "log_odds", "log_self_weight", "nearest", "distance")
# The default rule for β asks for this, and of fewer than three times as many samples for a third.
PERPLEXITY = 30.0
DEFAULT = "(the default)"
# Above, a rotation moves samples so far that the second order in ε says little.
LARGE_DISPLACEMENT = 0.3
# Above, the rounding of β ξ·x shows in the weights.
LARGE_ROUNDING = 0.01


@dataclass(frozen=True, eq=False)
class Landscape:
    """Samples as memories.

    Attributes:
        memories: Task 1's samples, normalised.
        task2: Task 2's, by the same normalisation; None if there is none.
        beta: inverse temperature.
        variant: the energy's: "paper", "mean" or "density".
        settings: how these came about: plain JSON.
    """

    memories: np.ndarray
    task2: np.ndarray | None
    beta: float
    variant: str
    settings: dict[str, Any]

    @property
    def stored(self) -> np.ndarray:
        """Each sample is a memory: its index."""
        return np.arange(len(self.memories))

    def log_prior(self, memories: np.ndarray) -> np.ndarray | None:
        """What the variant adds to the memories' logits."""
        if self.variant == "mean":
            return np.full(len(memories), -math.log(len(memories)), memories.dtype)
        return np.asarray(tiled.density_prior(jnp.asarray(memories), self.beta)) if self.variant == "density" else None


def prepare(tasks: Tasks, rule: Temperature, model: Model, variant: str, machine: Machine, partial: resume.Partial) -> Landscape:
    """Normalises the samples and finds β, unless an earlier run has found it.

    Raises: UsageError for a sample that cannot be normalised, or a rule that no β satisfies.
    """
    vectors = tasks.task1.vectors()
    words = ""
    try:
        fitted = normalisation.fit(model.normalise, vectors)
        dtype = np.dtype(machine.precision)
        memories = fitted(vectors).astype(dtype, copy=False)
        task2 = None if tasks.task2 is None else fitted(tasks.task2.vectors()).astype(dtype, copy=False)
        if model.normalise == "none":
            _check_norms(memories, task2)
        chosen, words = _rule(rule, len(memories), fitted.divisor, machine.memory_limit)
        known = partial.load("beta")
        beta = float(known[0]["beta"][0]) if known else float(chosen.solve(memories))
    except ValueError as error:
        message = str(error)
        if words.endswith(DEFAULT):
            message = re.sub("^perplexity=", "the default rule for β, perplexity ", message) + "; take another, such as --beta 30"
        raise UsageError(as_options(message)) from None
    if not 0 < beta < math.inf:
        raise UsageError(f"no β satisfies the rule ({words}): it gives {beta}; take another, such as --beta 30")
    partial.save("beta", 0, {"beta": np.array([beta])})
    dim = memories.shape[1]
    sigma = model.sigma if model.sigma is not None else 1 / math.sqrt(max(dim - 1, 1))
    settings = {
        "beta": beta,
        "beta_rule": words,
        "normalise": model.normalise,
        "divisor": float(fitted.divisor),
        "variant": variant,
        "epsilon": model.epsilon,
        "sigma": sigma,
        "precision": machine.precision,
    }
    return Landscape(memories, task2, beta, variant, settings)


def _check_norms(*tasks: np.ndarray | None) -> None:
    """Raises UsageError where the logits, β up to the largest that is looked for, leave the range of the numbers' type."""
    for images in tasks:
        if images is not None:
            largest = float(np.max(np.einsum("nd,nd->n", images, images, dtype=np.float64)))
            reach = float(np.finfo(images.dtype).max) / temperature.RANGE[1]
            if not 1 / reach < largest < reach:
                raise UsageError(
                    f"--normalise none leaves norms up to {math.sqrt(largest):.2g}, whose squares {images.dtype} does not hold: "
                    f"need {math.sqrt(1 / reach):.2g} < norm < {math.sqrt(reach):.2g}; take --normalise unit"
                )


def _rule(rule: Temperature, count: int, divisor: float, memory_limit: int) -> tuple[temperature.Rule, str]:
    """The strategy, and in words what it asks for."""
    if rule.beta is not None:
        return temperature.Fixed(rule.beta), "given by --beta"
    if rule.timestep is not None:
        scale = rule.model_scale * divisor
        words = f"signal-to-noise ratio of timestep {rule.timestep:g} (--timestep), pixels times {rule.model_scale:g} being the model's"
        return temperature.Timestep(rule.timestep, scale), words
    if rule.self_weight is not None:
        words = f"a sample's own softmax weight is {rule.self_weight:g} on average (--self-weight)"
        return temperature.SelfWeight(rule.self_weight, memory_limit=memory_limit), words
    if rule.perplexity is not None and rule.perplexity >= count - 1:
        raise UsageError(f"--perplexity {rule.perplexity:g} is out of range: need perplexity < {count - 1}, the number of other samples")
    target = rule.perplexity or min(PERPLEXITY, count / 3)
    words = f"about {target:.3g} of the other samples weigh in on average: perplexity {'(--perplexity)' if rule.perplexity else DEFAULT}"
    return temperature.Perplexity(target, memory_limit=memory_limit), words


def warnings(landscape: Landscape) -> list[str]:
    """What a careful reader should know about the numbers."""
    settings, memories = landscape.settings, landscape.memories
    found = []
    moved = settings["epsilon"] * settings["sigma"] * math.sqrt(memories.shape[1] - 1)
    if moved > LARGE_DISPLACEMENT:
        found.append(
            f"a rotation of ε = {settings['epsilon']:g}, σ = {settings['sigma']:.3g} moves a sample by {moved:.2g} of its norm, "
            f"above {LARGE_DISPLACEMENT}: the predicted rise, a second order in ε, says little there"
        )
    rounding = float(np.finfo(memories.dtype).eps) * landscape.beta * float(np.max(np.einsum("nd,nd->n", memories, memories)))
    if rounding > LARGE_ROUNDING:
        better = ": take --precision float64" if memories.dtype == np.float32 else ": take a smaller β"
        found.append(
            f"β|x|² is so large that exponents are rounded by about {rounding:.2g}, and weights by that part of themselves{better}"
        )
    return found


def energies(landscape: Landscape, partial: resume.Partial, screen: Screen, memory_limit: int) -> dict[str, np.ndarray]:
    """The quantities of every sample by name; ΔE as `energy_change` where there is a Task 2."""
    memories, task2 = landscape.memories, landscape.task2
    columns = _stage("energies", memories, QUANTITIES, landscape, landscape.stored, partial, screen, memory_limit)
    if task2 is not None:
        after = _stage("energies under Task 2", task2, ("excess",), landscape, None, partial, screen, memory_limit)
        # The same ½|x|² is in both energies, and was left out of both.
        columns["energy_change"] = after["excess"] - columns["excess"]
    return columns


def _stage(
    words: str,
    memories: np.ndarray,
    quantities: tuple[str, ...],
    landscape: Landscape,
    own: np.ndarray | None,
    partial: resume.Partial,
    screen: Screen,
    memory_limit: int,
) -> dict[str, np.ndarray]:
    """Task 1's samples among these memories, from where an earlier run was cut off."""
    stage = words.replace(" ", "-").lower()
    states = landscape.memories
    blocks = partial.load(stage)
    done = sum(map(resume.rows, blocks))
    try:
        with screen.counting(words, len(states), done, unit="pairs", each=len(memories)) as count:
            found: Iterator[tiled.Block] = tiled.stream(
                states,
                memories,
                landscape.beta,
                quantities,
                own=own,
                log_prior=landscape.log_prior(memories),
                memory_limit=memory_limit,
                start=done,
            )
            for block in found:
                partial.save(stage, done, block.values)
                blocks.append(block.values)
                done = block.rows.stop
                count(resume.rows(block.values))
    except ValueError as error:
        raise UsageError(as_options(str(error))) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{words}: {done:,} of {len(states):,} samples are done and kept; the same command goes on from there"
        ) from None
    return resume.joined(blocks)
