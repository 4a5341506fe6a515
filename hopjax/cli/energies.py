"""What the energies of a data set say, in pictures and words: `python -m hopjax energies`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from hopjax.cli import figures
from hopjax.cli.heights import Heights, heights
from hopjax.cli.page import Sample, class_name, gallery, number, power, render
from hopjax.cli.table import Table
from hopjax.data import Images

GALLERY = 24
# More classes than this are not drawn one by one: the highest and the lowest are.
CLASSES = 12
DOTS = 20_000
# Sharpness and rise are shown where at least this part of the samples differ in them.
TOLD = 0.1


def sample_names(table: Table, rows: np.ndarray) -> list[str]:
    """Indices and classes."""
    indices = table["index"][rows].tolist()
    if "label" not in table:
        return list(map(str, indices))
    return [f"{index} ({class_name(table.settings, label)})" for index, label in zip(indices, table["label"][rows].tolist(), strict=True)]


def summary(table: Table) -> list[str]:
    """The result in a few lines."""
    ranked = heights(table).order()
    first, last = (", ".join(sample_names(table, rows)) for rows in (ranked[:6], ranked[::-1][:6]))
    return [
        f"β = {table.settings['beta']:.5g}: {table.settings['beta_rule']}",
        f"highest energy, forgotten first: {first}",
        f"lowest energy, kept longest: {last}",
    ]


def page(table: Table, images: Images) -> bytes:
    """The page's HTML."""
    height = heights(table)
    ranked = height.order()
    ends = _ends(ranked)
    shown = [[height.text(score) for score in height.scores[rows].tolist()] for rows in ends]
    classes = _classes(table, ranked, height.scores)
    told = _told_apart(table, height)
    return render(
        "energies.html.jinja",
        table.settings,
        count=len(table),
        height=height.name,
        text=height.text,
        relative=height.beta is not None,
        leakage=power(float(np.median(table["log_leakage"])) / math.log(10)),
        highest=_samples(table, images, ends[0], shown[0]),
        lowest=_samples(table, images, ends[1], shown[1]),
        distances=[float(np.median(table["distance"][rows])) for rows in ends],
        percentiles=[height.text(score) for score in np.percentile(height.scores, [10, 50, 90]).tolist()],
        classes=classes if len(classes) <= CLASSES else classes[: CLASSES // 2] + classes[-CLASSES // 2 :],
        histogram=figures.picture(lambda figure: _histogram(figure, table, classes, height), 9.0, 2.2 + 0.35 * min(len(classes), CLASSES)),
        told=float(np.mean(told)),
        curvature=_curvature(table, height, told, ends) if np.mean(told) >= TOLD else None,
        change=_change(table, images, height) if "energy_change" in table else None,
    )


def _ends(ranked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last rows of a ranking, as many as a gallery shows."""
    count = min(GALLERY, len(ranked) // 2)
    return ranked[:count], ranked[::-1][:count]


def _samples(table: Table, images: Images, rows: np.ndarray, values: Sequence[str]) -> list[Sample]:
    return gallery(images, rows, [f"{name} {value}" for name, value in zip(sample_names(table, rows), values, strict=True)])


def _told_apart(table: Table, height: Heights) -> np.ndarray:
    """Which samples the others weigh on in the digits of sharpness and rise: of equal norms, the rest have those of a memory on its own."""
    leakage = table["log_leakage"]
    return np.full(len(table), True) if height.beta is None else leakage > np.log(np.finfo(leakage.dtype).eps)


def _curvature(table: Table, height: Heights, told: np.ndarray, ends: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """What there is to say of sharpness and predicted rise."""
    return {
        **{name: _correlation(height.scores[told], table[name][told]) for name in ("rise", "sharpness")},
        "png": figures.picture(lambda figure: _scatter(figure, table, height, ends), 9.0, 3.8),
    }


def _correlation(scores: np.ndarray, values: np.ndarray) -> float:
    """Spearman's, with the energy; zero where either is constant."""
    return float(spearmanr(scores, values)[0]) if np.ptp(scores) and np.ptp(values) else 0.0


def _classes(table: Table, ranked: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """What there is to say of each class, the highest first; nothing where there are no labels."""
    if "label" not in table:
        return []
    tenth = table["label"][ranked[: max(1, len(table) // 10)]]
    found = []
    for label in np.unique(table["label"]).tolist():
        rows = table["label"] == label
        medians = {"score": float(np.median(scores[rows])), "rise": float(np.median(table["rise"][rows]))}
        share = float(np.mean(tenth == label))
        found.append({"label": label, "name": class_name(table.settings, label), "count": int(rows.sum()), "share": share, **medians})
    return sorted(found, key=lambda row: -row["score"])


def _histogram(figure: Figure, table: Table, classes: list[dict[str, Any]], height: Heights) -> None:
    """A row for each class, the highest on top."""
    drawn = height.places()
    edges = np.histogram_bin_edges(drawn, 60)
    groups = [(row["name"], drawn[table["label"] == row["label"]]) for row in classes] or [("all", drawn)]
    if len(groups) > CLASSES:
        groups = groups[: CLASSES // 2] + groups[-CLASSES // 2 :]
    axes = figure.subplots()
    for place, (_, values) in enumerate(groups):
        counts = np.histogram(values, edges)[0]
        base = len(groups) - 1 - place
        axes.stairs(base + 0.9 * counts / counts.max(), edges, baseline=base, fill=True, color=figures.BLUE, alpha=0.65)
        axes.plot([np.median(values)] * 2, [base, base + 0.9], color=figures.ORANGE, label=None if place else "median")
    axes.set_yticks([len(groups) - 0.6 - place for place in range(len(groups))], [name for name, _ in groups], parse_math=False)
    axes.set_ylim(0, len(groups) + 0.1)
    axes.grid(axis="y", visible=False)
    height.label(axes)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)


def _dots(axes: Any, height: Heights, values: np.ndarray, ends: tuple[np.ndarray, np.ndarray], labels: int) -> None:
    drawn = height.places()
    rows = np.arange(0, len(drawn), -(-len(drawn) // DOTS))
    axes.scatter(drawn[rows], values[rows], s=5, alpha=0.35, linewidths=0, color=figures.BLUE)
    for shown, colour in zip(ends, (figures.ORANGE, figures.GREEN), strict=True):
        axes.scatter(drawn[shown], values[shown], s=14, linewidths=0, color=colour)
    height.label(axes, labels)


def _scatter(figure: Figure, table: Table, height: Heights, ends: tuple[np.ndarray, np.ndarray]) -> None:
    for axes, name, title in zip(figure.subplots(1, 2), ("sharpness", "rise"), ("sharpness S", "predicted rise"), strict=True):
        _dots(axes, height, table[name], ends, labels=5)
        axes.set_title(title)


def _change(table: Table, images: Images, height: Heights) -> dict[str, Any]:
    """What there is to say of Task 2."""
    values = table["energy_change"]
    ends = _ends(np.argsort(-values, kind="stable"))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _dots(axes, height, values, ends, labels=8)
        axes.set_ylabel("ΔE")

    most, least = (_samples(table, images, rows, list(map(number, values[rows].tolist()))) for rows in ends)
    return {
        "correlation": _correlation(height.scores, values),
        "risen": float(np.mean(values > 0)),
        "median": float(np.median(values)),
        "png": figures.picture(draw, 9.0, 4.2),
        "most": most,
        "least": least,
    }
