"""From samples to the table of all that is known of them: what `energies` writes and `buffer` chooses from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hopjax.cli import landscape as landscapes
from hopjax.cli.landscape import Landscape
from hopjax.cli.options import Machine, Model, Temperature
from hopjax.cli.progress import Screen
from hopjax.cli.resume import Partial
from hopjax.cli.table import Table, printable, versions
from hopjax.cli.tasks import Tasks, description, sample_ids
from hopjax.moments import QUANTITIES

MEANINGS = {
    "index": "place of the sample in the data, of which what was left out counts too",
    "file": "its file",
    "label": "its class",
    **{name: QUANTITIES[name].meaning for name in ("energy", "excess", "log_leakage", "sharpness", "log_odds", "log_self_weight")},
    "rise": "predicted mean rise of the energy under a small random rotation of the memories, ½ε²σ²[S − (d−1) x·∇E]",
    "nearest": "index of the nearest other sample of Task 1",
    "distance": "its distance",
    "energy_change": "ΔE = E under Task 2 − E under Task 1, Eq. (4)",
    "sample": "hash of the sample's pixels",
}


class Survey(NamedTuple):
    """All that is known of the samples; `partial` is to be discarded when the results are written."""

    landscape: Landscape
    table: Table
    partial: Partial


def survey(
    command: str, tasks: Tasks, rule: Temperature, model: Model, variant: str, machine: Machine, out: Path, screen: Screen
) -> Survey:
    """Finds β, and computes every sample's energy and what goes with it, going on where an earlier run stopped.

    Raises: UsageError for what cannot be done; KeyboardInterrupt that says how far it came.
    """
    described: dict[str, Any] = {
        "read": tasks.read,
        "task1": description(tasks.task1),
        "task2": None if tasks.task2 is None else description(tasks.task2),
    }
    computed = {"precision": machine.precision, "device": jax.default_backend(), "versions": versions()}
    # The memory limit is left out: it moves the last digits at most, and may be what has to change.
    numbers = {"variant": variant, "quantities": landscapes.QUANTITIES}
    partial = Partial(out, {**described, **asdict(rule), **asdict(model), **numbers, **computed})
    with screen.working("looking for β"):
        landscape = landscapes.prepare(tasks, rule, model, variant, machine, partial)
    values = landscapes.energies(landscape, partial, screen, machine.memory_limit)
    columns = _columns(tasks, landscape, values)
    warnings = [*tasks.task1.warnings, *(tasks.task2.warnings if tasks.task2 else ()), *landscapes.warnings(landscape)]
    warnings += [
        f"left out of {images.source}: {len(images.skipped)}" for images in (tasks.task1, tasks.task2) if images and images.skipped
    ]
    warnings += _lost(columns, variant)
    for line in dict.fromkeys(warnings):
        screen.warn(line)
    settings = {
        "command": command,
        **landscape.settings,
        **described,
        **computed,
        "warnings": list(dict.fromkeys(warnings)),
        "columns": {name: MEANINGS[name] for name in columns},
    }
    return Survey(landscape, Table(columns, settings), partial)


def _lost(columns: dict[str, np.ndarray], variant: str) -> list[str]:
    """A warning where the excess is that of a memory on its own in all digits."""
    excess, odds = columns["excess"], columns["log_odds"]
    lost = np.mean(excess == 0 if variant == "paper" else odds < np.log(np.finfo(odds.dtype).eps))
    words = f"others weigh so little on {lost:.2%} of the samples that their excess has no digits left: log_odds still tells them apart"
    return [words] if lost else []


def _columns(tasks: Tasks, landscape: Landscape, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One row for each sample of Task 1; `index` and `nearest` are places in DATA."""
    scale = 0.5 * (landscape.settings["epsilon"] * landscape.settings["sigma"]) ** 2
    columns = {"index": tasks.places.astype(np.int64)}
    if tasks.task1.files is not None:
        columns["file"] = np.array([printable(name) for name in tasks.task1.files])
    if tasks.task1.labels is not None:
        columns["label"] = tasks.task1.labels
    columns |= {name: values[name] for name in ("energy", "excess", "log_leakage", "sharpness")}
    columns["rise"] = values["rise"] * values["rise"].dtype.type(scale)
    columns["log_odds"] = values["log_odds"]
    columns["log_self_weight"] = values["log_self_weight"]
    columns["nearest"] = tasks.places[values["nearest"]].astype(np.int64)
    columns["distance"] = values["distance"]
    if "energy_change" in values:
        columns["energy_change"] = values["energy_change"]
    columns["sample"] = sample_ids(tasks.task1)
    return columns
