"""The figures of an experiment's page, drawn from its findings; light dots in them are samples, from its table."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Real, UInt8
from matplotlib.figure import Figure

from diffusion.claims import NONE
from diffusion.pixels import grid
from hopjax.cli.figures import NEUTRAL, picture

# Dots of a scatter; more would only make it grey.
DOTS = 2000
# What bounds and controls the policies is drawn dashed.
CONTROLS = ("joint", "continued")
MEASURES = {"rise": "rise of the error", "bound": "ΔE, variational bound", "flow": "ΔE, probability flow"}
Row = Mapping[str, Any]


def _curve(axes: Any, places: Sequence[float] | np.ndarray, row: Row, label: str | None = None, **style: Any) -> None:
    """Means and the band of their intervals; what is null is left out, and ends that are, too."""
    values, low, high = (np.array(row[name], np.float64) for name in ("values", "low", "high"))
    shown = np.isfinite(values)
    places, values, low, high = np.asarray(places)[shown], values[shown], low[shown], high[shown]
    (line,) = axes.plot(places, values, marker="o", label=label, **style)
    axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _styles(policies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The same for a policy in all figures: `none` has the first colour."""
    return {name: {"color": f"C{i % 7}", "linestyle": "--" if name in CONTROLS or i > 6 else "-"} for i, name in enumerate(policies)}


def _dots(axes: Any, across: Real[np.ndarray, " n"], up: Real[np.ndarray, " n"]) -> None:
    """A sample each."""
    each = -(-len(across) // DOTS)
    axes.scatter(across[::each], up[::each], s=5, color=NEUTRAL, alpha=0.18, linewidths=0, zorder=0)


def by_energy(found: Row) -> bytes:
    """Errors before and after, and their rise, by bin of equal counts: the paper's Figures 3(c) and S.4, with and without the confound."""
    styles = _styles(list(found["bins"]["after"]))
    places = np.arange(1, len(found["bins"]["before"]["values"]) + 1)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _curve(left, places, found["bins"]["before"], "before Task 2", color=NEUTRAL, linestyle=":")
        for policy, row in found["bins"]["after"].items():
            _curve(left, places, row, policy, **styles[policy])
            _curve(right, places, found["bins"]["rise"][policy], **styles[policy])
        left.set_ylabel("reconstruction error")
        right.set_ylabel("rise of the error")
        for axes in (left, right):
            axes.set_xlabel("bin of energy, low to high")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=8)
        _apart(figure)

    return picture(draw, 10.0, 4.4)


def replay(found: Row, last: int) -> bytes:
    """What replay does by bin of equal width, after the last task: the paper's Figures 6 and S.5, (a) to (d)."""
    widths = found["widths"]
    styles = _styles(list(widths["after"]))
    places = (np.array(widths["edges"][1:]) + np.array(widths["edges"][:-1])) / 2

    def draw(figure: Figure) -> None:
        (high, low), (means, sums) = figure.subplots(2, 2, sharex=True)
        for axes, policies in ((high, (NONE, "high")), (low, (NONE, "random", "low"))):
            for policy in policies:
                if policy in widths["after"]:
                    _curve(axes, places, widths["after"][policy], policy, **styles[policy])
            axes.set_ylabel(f"error after Task {last}")
        for axes, kind in ((means, "means"), (sums, "sums")):
            for policy, row in widths[kind].items():
                _curve(axes, places, row, policy, **styles[policy])
            axes.axhline(0, color=NEUTRAL, linewidth=0.8)
            axes.set_xlabel(widths["axis"])
        means.set_ylabel("error saved, mean of the bin")
        sums.set_ylabel("error saved, sum over the bin")
        for axes, title in (
            (high, "(a) high energies replayed"),
            (low, "(b) random and low energies replayed"),
            (means, "(c) saved for each sample"),
            (sums, "(d) saved for all samples of a bin"),
        ):
            axes.set_title(title)
        handles = {label: line for axes in (high, low, means) for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8)
        _apart(figure)

    return picture(draw, 10.0, 7.4)


def sharpness(found: Row, energy: Real[np.ndarray, " n"], perturbation: Real[np.ndarray, " n"], rise: Real[np.ndarray, " n"]) -> bytes:
    """The paper's Figure S.1. The scatter is of single samples, the curve of bins of equal counts."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for axes, row, across, up in ((left, found["sharpness"], energy, perturbation), (right, found["rise"], perturbation, rise)):
            _dots(axes, across, up)
            _curve(axes, row["places"], row)
            axes.set_xlim(*_frame(across))
            axes.set_ylim(*_frame(np.concatenate([up, np.array(row["values"])])))
        left.set_xlabel("energy")
        left.set_ylabel("perturbation sharpness")
        right.set_xlabel("perturbation sharpness")
        right.set_ylabel("rise of the error")
        _apart(figure)

    return picture(draw, 10.0, 4.2)


def _apart(figure: Figure) -> None:
    """Panels with a little room between them."""
    figure.set_layout_engine("constrained", wspace=0.04, hspace=0.04)


def _frame(values: Real[np.ndarray, " n"]) -> tuple[float, float]:
    """Limits that hold all but the most extreme half per cent at either end, which would press the rest together."""
    low, high = np.quantile(values, [0.005, 0.995])
    margin = 0.06 * (high - low) or 1.0
    return float(low - margin), float(high + margin)


def measures(found: Row) -> bytes:
    """Each measure of forgetting by bin of energy, of the samples that have all of them."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(found["bins"]), squeeze=False)[0]
        for axes, (name, row) in zip(panels, found["bins"].items(), strict=True):
            _curve(axes, np.arange(1, len(row["values"]) + 1), row)
            axes.axhline(0, color=NEUTRAL, linewidth=0.8)
            axes.set_title(MEASURES[name])
            axes.set_xlabel("bin of energy, low to high")
            axes.xaxis.get_major_locator().set_params(integer=True)

    return picture(draw, 3.6 * len(found["bins"]), 3.4)


def classes(found: Row, names: Sequence[str], titles: Mapping[str, str]) -> bytes:
    """Of what class images are, real ones and each policy's; solid: those that are recognised."""
    policies = found["policies"]
    columns = min(4, len(policies))
    rows = -(-len(policies) // columns)
    places = np.arange(len(names))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, (policy, row) in zip(panels, policies.items(), strict=False):
            shares, low, high = (np.array([each[end] for each in row["shares"]]) for end in ("value", "low", "high"))
            colour = NEUTRAL if policy == "real" else "C1"
            axes.bar(places, shares, color=colour, alpha=0.3)
            axes.bar(places, [each["value"] for each in row["recognised"]], color=colour)
            ends = np.maximum([shares - low, high - shares], 0)  # rounding may put an end on the other side
            axes.errorbar(places, shares, ends, fmt="none", ecolor="black", linewidth=0.9)
            axes.set_title(titles.get(policy, policy))
            axes.grid(axis="x", visible=False)
            axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0, parse_math=False)
        for axes in panels[len(policies) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel("share of images")

    return picture(draw, 10.0, 2.5 * rows + 0.4)


def sheet(images: UInt8[np.ndarray, "n h w c"], columns: int = 6) -> bytes:
    """Images in rows, as PNG, none chosen."""
    from PIL import Image

    pixels = grid(images, min(columns, len(images)))
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]).save(buffer, "PNG")
    return buffer.getvalue()
