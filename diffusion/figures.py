"""Pictures of a training run, drawn from its records alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from hopjax.cli.figures import NEUTRAL, picture


def losses(records: Sequence[Mapping[str, Any]]) -> bytes:
    """The loss against the steps, of the whole schedule and of its parts, as PNG."""
    steps = np.array([record["step"] for record in records])
    parts = np.array([[np.nan if loss is None else loss for loss in record["part_losses"]] for record in records], float)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for part, colour in zip(parts.T, mpl.colormaps["cividis"](np.linspace(0, 1, parts.shape[1])), strict=True):
            axes.plot(steps, part, linewidth=0.8, color=colour)
        axes.plot(steps, [record["loss"] for record in records], color=NEUTRAL, linewidth=2.2, label="all timesteps")
        axes.set_yscale("log")
        axes.set_xlabel("steps")
        axes.set_ylabel("loss")
        axes.set_title("Denoising loss; thin: tenths of the schedule, low noise dark")
        axes.legend()

    return picture(draw)
