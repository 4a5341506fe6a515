"""An experiment's page: drawn from its table and findings alone, without a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffusion.claims import NONE
from diffusion.findings import seeds_of
from hopjax.cli.figures import NEUTRAL, picture
from hopjax.cli.page import gallery, number, render
from hopjax.cli.table import Table
from hopjax.data import Images

GALLERY = 18


def _curve(axes: Any, row: Mapping[str, list[float]], label: str, **style: Any) -> None:
    places = np.arange(1, len(row["values"]) + 1)
    (line,) = axes.plot(places, row["values"], marker="o", label=label, **style)
    axes.fill_between(places, row["low"], row["high"], color=line.get_color(), alpha=0.15, linewidth=0)


def by_energy(found: Mapping[str, Any]) -> bytes:
    """Errors before and after, and their rise, by bin of energy: the paper's Figures 3(c) and 6, with and without the confound."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _curve(left, found["bins"]["before"], "before Task 2", color=NEUTRAL)
        for policy, row in found["bins"]["after"].items():
            _curve(left, row, policy)
        for policy, row in found["bins"]["rise"].items():
            _curve(right, row, policy)
        left.set_ylabel("reconstruction error")
        right.set_ylabel("rise of the error")
        for axes in (left, right):
            axes.set_xlabel("bin of energy, low to high")
        left.legend()

    return picture(draw, 10.0, 4.2)


def saved_by_energy(found: Mapping[str, Any]) -> bytes:
    """What each policy saves, by bin of energy."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        without = np.array(found["bins"]["after"][NONE]["values"])
        places = np.arange(1, len(without) + 1)
        for policy, row in found["bins"]["after"].items():
            if policy != NONE:
                axes.plot(places, without - np.array(row["values"]), marker="o", label=policy)
        axes.axhline(0, color=NEUTRAL, linewidth=0.8)
        axes.set_xlabel("bin of energy, low to high")
        axes.set_ylabel("error saved")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()

    return picture(draw)


def page(table: Table, found: Mapping[str, Any], task1: Images | None = None) -> bytes:
    """HTML, self-contained.

    Args:
        found: `findings` of the table.
        task1: the images, for the galleries; None for none.
    """
    timesteps = table.settings["plan"]["timesteps"]
    main = found["timesteps"][str(timesteps[0])]
    saved = {policy: rows["all"]["value"] for policy, rows in main["saved"].items() if policy not in ("joint", "continued")}
    best = max(saved, key=lambda policy: saved[policy]) if saved else None
    galleries: dict[str, Any] = {"forgotten": None, "rescued": None}
    if task1 is not None and best is not None:
        galleries = _galleries(table, task1, timesteps[0], best)
    return render(
        "report.html.jinja",
        table.settings,
        folder=Path(__file__).parent,
        found=found,
        main=main,
        timestep=timesteps[0],
        best=None if best is None else {"policy": best, "value": saved[best]},
        others={at: row for at, row in found["timesteps"].items() if at != str(timesteps[0])},
        pictures={"energy": by_energy(main), "saved": saved_by_energy(main)},
        **galleries,
    )


def _galleries(table: Table, task1: Images, timestep: int, best: str) -> dict[str, Any]:
    seeds = seeds_of(table, timestep)
    places = table["place"][table["seed"] == table["seed"][0]]
    index = table["index"][table["seed"] == table["seed"][0]]

    def shown(values: np.ndarray) -> Any:
        most = np.argsort(-values, kind="stable")[:GALLERY]
        return gallery(task1, places[most], [f"{index[i]}: {number(float(values[i]))}" for i in most])

    return {
        "forgotten": shown(np.mean([seed.rise() for seed in seeds], axis=0)),
        "rescued": shown(np.mean([seed.after[NONE] - seed.after[best] for seed in seeds], axis=0)),
    }
