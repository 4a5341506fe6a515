"""How the figures look, and the loop that draws them from a report alone."""

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, NullFormatter, NullLocator

from hopjax.cli import figures
from theory_checks.claim import Claim
from theory_checks.report import power
from theory_checks.run import Lost, Pool, load

# One colour for one thing in every figure.
OUTLIER, CLUSTER, OTHER, NEUTRAL = figures.ORANGE, figures.BLUE, figures.GREEN, figures.NEUTRAL
STYLE: dict[Any, Any] = figures.STYLE | {"svg.hashsalt": "theory_checks"}


@dataclass
class Drawn:
    """Figures as SVG and PNG by claim, and a line for each that could not be drawn."""

    svg: dict[str, bytes] = field(default_factory=dict)
    png: dict[str, bytes] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def files(self) -> Iterator[tuple[str, bytes]]:
        """File names and contents."""
        for suffix, pictures in (("svg", self.svg), ("png", self.png)):
            for name, picture in pictures.items():
                yield f"{name}.{suffix}", picture


def _label_decades(figure: Figure) -> None:
    """Powers of ten in plain characters on logarithmic axes: matplotlib's formulas take most of the drawing time."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            if axis.get_scale() == "log" and isinstance(axis.get_major_formatter(), LogFormatterSciNotation) and high >= 10 * low:
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"10{power(round(math.log10(value)))}"))
                axis.set_minor_formatter(NullFormatter())
                if high >= 1000 * low:  # too many to be read
                    axis.set_minor_locator(NullLocator())


def draw(claim: Claim, series: Mapping[str, Mapping[str, Any]]) -> tuple[bytes, bytes]:
    """A claim's figure as SVG and PNG, from its series by preset."""
    assert claim.draw
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        claim.draw(series, figure)
        _label_decades(figure)
        layout = figure.get_layout_engine()
        if layout:  # once, not for each format
            layout.execute(figure)
            figure.set_layout_engine("none")
        svg, png = io.BytesIO(), io.BytesIO()
        # Not by savefig, which draws everything once more beforehand, in case that the layout changes.
        figure.set_dpi(mpl.rcParams["savefig.dpi"])
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})  # last: it changes the resolution
        return svg.getvalue(), png.getvalue()


def _draw_entry(entry: Mapping[str, Any]) -> tuple[bytes, bytes] | str:
    """The figure of a claim in the report, or why there is none."""
    try:
        return draw(load()[entry["name"]], {result["preset"] or "": result["series"] for result in entry["results"] if result["series"]})
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())


def draw_all(report: Mapping[str, Any], claims: Mapping[str, Claim], pool: Pool) -> Drawn:
    """Draws what the report holds; nothing else is looked at."""
    entries = [entry for entry in report["claims"] if claims[entry["name"]].draw and any(result["series"] for result in entry["results"])]
    drawn = Drawn()
    for entry, picture in pool.map(_draw_entry, entries):
        name = entry["name"]
        if isinstance(picture, tuple) and not isinstance(picture, Lost):
            drawn.svg[name], drawn.png[name] = picture
        else:
            drawn.errors.append(f"the figure of {name} could not be drawn: {picture}")
    return drawn


def remove_stale(folder: Path, drawn: Drawn, claims: Mapping[str, Claim]) -> None:
    """Removes the figures of claims that this run did not draw: a report and its figures belong together."""
    kept = {name for name, _ in drawn.files()}
    for name in claims:
        for file in (f"{name}.svg", f"{name}.png"):
            if file not in kept:
                (folder / file).unlink(missing_ok=True)
