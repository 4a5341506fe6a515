"""`report`: the page of an experiment, from its tables."""

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from cyclopts import Parameter

from diffusion.cli.options import explained
from hopjax.cli.options import UsageError
from hopjax.cli.output import write
from hopjax.cli.progress import Screen

if TYPE_CHECKING:
    from hopjax.cli.table import Table
    from hopjax.data import Images

TABLE, TASKS, GENERATED, SHEETS = "samples.parquet", "tasks.parquet", "generated.parquet", "generated.npz"
FINDINGS, PAGE, EXPERIMENT = "findings.json", "report.html", "experiment.json"
# By energy. Each needs two samples for an interval.
BINS = 10


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
    screen = Screen()
    with explained():
        return draw(folder, _task1(samples_of(folder), screen) if images else None, screen)


def samples_of(folder: Path) -> "Table":
    """The table of samples that `run` wrote."""
    from diffusion.run import RUN
    from hopjax.cli import table

    if not (folder / TABLE).exists():
        if (folder / RUN).exists():
            raise UsageError(f"{folder} holds a run of `train`: name the folder of an experiment, which `python -m diffusion run` makes")
        if (folder / EXPERIMENT).exists():
            raise UsageError(f"{folder} holds an experiment that is not finished: the `run` command that began it goes on from there")
        what = "holds no experiment" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {what}: `python -m diffusion run --out {folder}` makes one")
    found = table.read(folder / TABLE)
    plan = found.settings.get("plan", {})
    columns = {f"before@{timestep}" for timestep in plan.get("timesteps", ())}
    if not columns or not columns <= set(found.columns) or not {"read", "task1", "normalise", "accept", "required"} <= set(found.settings):
        raise UsageError(f"{folder / TABLE} was not written by this version of `run`: run the experiment again, in another folder")
    return found


def _task1(samples: "Table", screen: Screen) -> "Images | None":
    """The images, if their data are what they were."""
    from diffusion.run import read_again
    from hopjax.cli.tasks import description, directed

    told = samples.settings["read"]
    try:
        found = directed(read_again(told), [samples.settings["normalise"]], skip=told["skip_bad"]).task1
    except UsageError as error:
        screen.warn(f"no images of Task 1 are shown: {error}")
        return None
    if description(found)["sha256"] != samples.settings["task1"]["sha256"]:
        screen.warn(f"no images of Task 1 are shown: {told['data']} holds others than those of the experiment")
        return None
    return found


def draw(folder: Path, task1: "Images | None", screen: Screen) -> int:
    """Findings and page, from the tables in a folder; `task1` for the galleries."""
    from diffusion.findings import findings
    from diffusion.report import page
    from hopjax.cli import table

    samples = samples_of(folder)
    tasks, generated = (table.read(folder / name) if (folder / name).exists() else None for name in (TASKS, GENERATED))
    with screen.working("drawing"):
        found = findings(samples, tasks=tasks, generated=generated, bins=BINS)
        write(folder / FINDINGS, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
        write(folder / PAGE, page(samples, found, task1, _sheets(folder / SHEETS)))
    main = found["timesteps"][str(samples.settings["plan"]["timesteps"][0])]
    for row in main["verdicts"]:
        screen.say(f"{ {True: 'holds', False: 'fails', None: 'open'}[row['holds']]:>5}  {row['claim']}")
    for line in (f"table: {folder / TABLE}", f"findings: {folder / FINDINGS}", f"page: {folder / PAGE}"):
        screen.say(line)
    return 0


def _sheets(file: Path) -> dict[str, np.ndarray]:
    """Generated images, if there are any that can be read."""
    try:
        with file.open("rb") as stored, np.load(stored, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
