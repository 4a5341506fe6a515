"""How figures look: one style for the project, pictures as bytes."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib import font_manager
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
ORANGE = "#D55E00"
BLUE = "#0072B2"
GREEN = "#009E73"
NEUTRAL = "#555555"
# Where a character is in none before.
EASTERN = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS"),
)

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": NEUTRAL,
    "axes.grid": True,
    "axes.labelcolor": "#222222",
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=[ORANGE, BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", NEUTRAL]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titley": 1.0,  # looking for a free place would lay everything out again
    "figure.facecolor": "white",
    "figure.figsize": (6.8, 4.0),
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "image.cmap": "cividis",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "savefig.dpi": 150,
    "svg.fonttype": "path",
    "svg.hashsalt": "hopjax",
    "xtick.color": NEUTRAL,
    "ytick.color": NEUTRAL,
}


def fonts() -> list[str]:
    """The style's font, and those of the usual ones for Chinese, Japanese and Korean that are there."""
    there = set(font_manager.get_font_names())
    return [STYLE["font.family"], *(name for name in EASTERN if name in there)]


def picture(draw: Callable[[Figure], None], width: float = 6.8, height: float = 4.0) -> bytes:
    """What `draw` puts into a figure of so many inches, as PNG."""
    with mpl.rc_context(STYLE | {"font.family": fonts()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)  # drawn as a box
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        layout = figure.get_layout_engine()
        if layout:  # once, not again while it is drawn
            layout.execute(figure)
            figure.set_layout_engine("none")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()
