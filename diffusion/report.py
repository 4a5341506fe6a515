"""An experiment's page: drawn from its tables and findings alone, without a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from diffusion import pictures
from diffusion.claims import ELSEWHERE, NONE
from diffusion.findings import BEFORE, REAL, Seed, seeds_of
from hopjax.cli.page import Sample, class_name, embedded, gallery, number, render
from hopjax.cli.table import Table
from hopjax.data import Images

GALLERY = 18
# Images of a sheet that are shown.
SHOWN = 36
TITLES = {REAL: "real images", BEFORE: "before Task 2", NONE: "no replay"}


def page(
    samples: Table,
    found: Mapping[str, Any],
    task1: Images | None = None,
    sheets: Mapping[str, UInt8[np.ndarray, "_ h w c"]] | None = None,
) -> bytes:
    """HTML, self-contained. What there are no data of is left out.

    Args:
        found: `findings` of the tables.
        task1: the images, for the galleries; None for none.
        sheets: generated images by SEED.POLICY.
    """
    timestep = samples.settings["plan"]["timesteps"][0]
    main = found["timesteps"][str(timestep)]
    seeds, last = seeds_of(samples, timestep), found["tasks"]["count"] if "tasks" in found else 2
    saved = {policy: rows["all"]["value"] for policy, rows in main["saved"].items() if policy not in pictures.CONTROLS}
    best = max(saved, key=lambda policy: saved[policy]) if saved else None
    shown: dict[str, bytes] = {"energy": pictures.by_energy(main)}
    if main["saved"]:
        shown["replay"] = pictures.replay(main, last)
    if "sharpness" in found:
        energy = seeds[0].columns.get("energy", seeds[0].energy)
        rise = np.mean([seed.rise() for seed in seeds], axis=0)
        shown["sharpness"] = pictures.sharpness(found["sharpness"], energy, seeds[0].columns["perturbation"], rise)
    if "intrinsic" in found:
        shown["measures"] = pictures.measures(found["intrinsic"])
    if "generated" in found:
        names = [class_name(samples.settings, label) for label in found["generated"]["labels"]]
        shown["classes"] = pictures.classes(found["generated"], names, TITLES)
    return render(
        "report.html.jinja",
        samples.settings,
        folder=Path(__file__).parent,
        found=found,
        main=main,
        timestep=timestep,
        elsewhere=ELSEWHERE,
        last=last,
        best=None if best is None else {"policy": best, "value": saved[best]},
        others={at: row for at, row in found["timesteps"].items() if at != str(timestep)},
        pictures=shown,
        measures=pictures.MEASURES,
        titles=TITLES,
        matrices=_matrices(found["tasks"]) if "tasks" in found else None,
        sheets=_sheets(sheets or {}),
        **_galleries(samples, seeds, task1, best),
    )


def _matrices(tasks: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """Each policy's cells with their heat, 0 … 1 from the least to the largest error of all."""
    values = [
        cell["value"] for row in tasks["policies"].values() for line in row["matrix"] for cell in line if cell and cell["value"] is not None
    ]
    low, width = (min(values), np.ptp(values) or 1.0) if values else (0.0, 1.0)

    def heated(cell: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if cell is None or cell["value"] is None else {**cell, "heat": round(float((cell["value"] - low) / width), 2)}

    return {policy: [[heated(cell) for cell in line] for line in row["matrix"]] for policy, row in tasks["policies"].items()}


def _sheets(sheets: Mapping[str, np.ndarray]) -> dict[str, list[Sample]]:
    """By seed, a sheet of each policy."""
    found: dict[str, list[Sample]] = {}
    for name, images in sheets.items():
        seed, _, policy = name.partition(".")
        if len(images):
            found.setdefault(seed, []).append(Sample(embedded(pictures.sheet(images[:SHOWN])), TITLES.get(policy, policy)))
    return found


def _galleries(samples: Table, seeds: list[Seed], task1: Images | None, best: str | None) -> dict[str, Any]:
    if task1 is None:
        return {"forgotten": None, "rescued": None}
    first = samples["seed"] == samples["seed"][0]
    places, index = samples["place"][first], samples["index"][first]

    def shown(values: np.ndarray) -> list[Sample]:
        most = np.argsort(-values, kind="stable")[:GALLERY]
        return gallery(task1, places[most], [f"{index[i]}: {number(float(values[i]))}" for i in most])

    return {
        "forgotten": shown(np.mean([seed.rise() for seed in seeds], axis=0)),
        "rescued": None if best is None else shown(np.mean([seed.saved(best) for seed in seeds], axis=0)),
    }
