"""What the energies of a data set say, in pictures and words: `python -m hopjax energies`."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from hopjax.cli import figures
from hopjax.cli.page import Sample, class_name, gallery, number, render
from hopjax.cli.table import Table
from hopjax.data import Images

GALLERY = 24
# More classes than this are not drawn one by one: the highest and the lowest are.
CLASSES = 12
DOTS = 20_000
# Energies closer to zero than this part of the lowest are drawn there.
SMALLEST = 1e-8
# What `heights` are of each variant of the energy.
HEIGHTS = {"paper": "E + ½|x|²", "mean": "E + ½|x|² − β⁻¹ log M", "density": "E"}


def odds(table: Table) -> np.ndarray:
    """Λ, log odds of the other memories against a sample's own: falls as the energy rises, and has digits where that has none left."""
    return table["log_leakage"].astype(np.float64) - table["log_self_weight"]


def order(table: Table) -> np.ndarray:
    """Rows from the highest energy to the lowest."""
    return np.argsort(odds(table), kind="stable")


def heights(table: Table) -> np.ndarray:
    """Energies above that of a memory on its own: −β⁻¹ log(1 + e^Λ) ≤ 0, E + ½|x|² of the paper's energy."""
    return table["log_self_weight"].astype(np.float64) / table.settings["beta"]


def drawable(table: Table) -> np.ndarray:
    """Heights without their sign, for a logarithmic axis."""
    depth = -heights(table)
    return np.maximum(depth, max(depth.max() * SMALLEST, np.finfo(np.float64).tiny))


def sample_names(table: Table, rows: np.ndarray) -> list[str]:
    """Indices and classes."""
    indices = table["index"][rows].tolist()
    if "label" not in table:
        return list(map(str, indices))
    return [f"{index} ({class_name(table.settings, label)})" for index, label in zip(indices, table["label"][rows].tolist(), strict=True)]


def summary(table: Table) -> list[str]:
    """The result in a few lines."""
    ranked = order(table)
    first, last = (", ".join(sample_names(table, rows)) for rows in (ranked[:6], ranked[::-1][:6]))
    return [
        f"β = {table.settings['beta']:.5g}: {table.settings['beta_rule']}",
        f"highest energy, forgotten first: {first}",
        f"lowest energy, kept longest: {last}",
    ]


def page(table: Table, images: Images) -> bytes:
    """The page's HTML."""
    ranked, height, drawn = order(table), heights(table), drawable(table)
    ends = _ends(ranked)
    classes = _classes(table, ranked, height)
    return render(
        "energies.html.jinja",
        table.settings,
        count=len(table),
        height=HEIGHTS[table.settings["variant"]],
        leakage=float(np.exp(np.median(table["log_leakage"]))),
        highest=_samples(table, images, ends[0], height),
        lowest=_samples(table, images, ends[1], height),
        distances=[float(np.median(table["distance"][rows])) for rows in ends],
        percentiles=np.percentile(height, [10, 50, 90]).tolist(),
        classes=classes if len(classes) <= CLASSES else classes[: CLASSES // 2] + classes[-CLASSES // 2 :],
        histogram=figures.picture(lambda figure: _histogram(figure, table, classes, drawn), 9.0, 2.2 + 0.35 * min(len(classes), CLASSES)),
        rise_correlation=_correlation(height, table["rise"]),
        sharpness_correlation=_correlation(height, table["sharpness"]),
        scatter=figures.picture(lambda figure: _scatter(figure, table, drawn, ends), 9.0, 3.8),
        change=_change(table, images, height, drawn) if "energy_change" in table else None,
    )


def _ends(ranked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last rows of a ranking, as many as a gallery shows."""
    count = min(GALLERY, len(ranked) // 2)
    return ranked[:count], ranked[::-1][:count]


def _samples(table: Table, images: Images, rows: np.ndarray, values: np.ndarray) -> list[Sample]:
    return gallery(
        images, rows, [f"{name} {number(value)}" for name, value in zip(sample_names(table, rows), values[rows].tolist(), strict=True)]
    )


def _correlation(height: np.ndarray, values: np.ndarray) -> float:
    """Spearman's, with the energy; zero where either is constant."""
    return float(spearmanr(height, values)[0]) if np.ptp(height) and np.ptp(values) else 0.0


def _classes(table: Table, ranked: np.ndarray, height: np.ndarray) -> list[dict[str, Any]]:
    """What there is to say of each class, the highest first; nothing where there are no labels."""
    if "label" not in table:
        return []
    tenth = table["label"][ranked[: max(1, len(table) // 10)]]
    found = []
    for label in np.unique(table["label"]).tolist():
        rows = table["label"] == label
        medians = {"height": float(np.median(height[rows])), "rise": float(np.median(table["rise"][rows]))}
        share = float(np.mean(tenth == label))
        found.append({"label": label, "name": class_name(table.settings, label), "count": int(rows.sum()), "share": share, **medians})
    return sorted(found, key=lambda row: -row["height"])


def _histogram(figure: Figure, table: Table, classes: list[dict[str, Any]], drawn: np.ndarray) -> None:
    """A row for each class, the highest on top."""
    edges = np.geomspace(drawn.min(), drawn.max() * (1 + 1e-9), 61)
    groups = [(row["name"], drawn[table["label"] == row["label"]]) for row in classes] or [("all", drawn)]
    if len(groups) > CLASSES:
        groups = groups[: CLASSES // 2] + groups[-CLASSES // 2 :]
    axes = figure.subplots()
    for place, (_, values) in enumerate(groups):
        counts = np.histogram(values, edges)[0]
        base = len(groups) - 1 - place
        axes.stairs(base + 0.9 * counts / counts.max(), edges, baseline=base, fill=True, color=figures.BLUE, alpha=0.65)
        axes.plot([np.median(values)] * 2, [base, base + 0.9], color=figures.ORANGE, label=None if place else "median")
    axes.set_yticks([len(groups) - 0.6 - place for place in range(len(groups))], [name for name, _ in groups])
    axes.set_ylim(0, len(groups) + 0.1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(HEIGHTS[table.settings["variant"]])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    figures.below_zero(axes, drawn)


def _dots(axes: Any, table: Table, drawn: np.ndarray, values: np.ndarray, ends: tuple[np.ndarray, np.ndarray], labels: int) -> None:
    rows = np.arange(0, len(drawn), -(-len(drawn) // DOTS))
    axes.scatter(drawn[rows], values[rows], s=5, alpha=0.35, linewidths=0, color=figures.BLUE)
    for shown, colour in zip(ends, (figures.ORANGE, figures.GREEN), strict=True):
        axes.scatter(drawn[shown], values[shown], s=14, linewidths=0, color=colour)
    axes.set_xlabel(HEIGHTS[table.settings["variant"]])
    figures.below_zero(axes, drawn, labels=labels)


def _scatter(figure: Figure, table: Table, drawn: np.ndarray, ends: tuple[np.ndarray, np.ndarray]) -> None:
    for axes, name, title in zip(figure.subplots(1, 2), ("sharpness", "rise"), ("sharpness S", "predicted rise"), strict=True):
        _dots(axes, table, drawn, table[name], ends, labels=5)
        axes.set_title(title)


def _change(table: Table, images: Images, height: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """What there is to say of Task 2."""
    values = table["energy_change"]
    ends = _ends(np.argsort(-values, kind="stable"))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _dots(axes, table, drawn, values, ends, labels=8)
        axes.set_ylabel("ΔE")

    return {
        "correlation": _correlation(height, values),
        "risen": float(np.mean(values > 0)),
        "median": float(np.median(values)),
        "png": figures.picture(draw, 9.0, 4.2),
        "most": _samples(table, images, ends[0], values),
        "least": _samples(table, images, ends[1], values),
    }
