"""How a ranking depends on what it was made with: `python -m hopjax compare`."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import kendalltau, spearmanr

from hopjax.cli import figures
from hopjax.cli.energies import DOTS, GALLERY
from hopjax.cli.heights import heights
from hopjax.cli.options import Choice, Reading, UsageError
from hopjax.cli.page import gallery, number, render
from hopjax.cli.table import Table, read
from hopjax.cli.tasks import description, directed, load
from hopjax.data import Images

FEWEST = 3
COLUMNS: Mapping[str, str] = {"energy": "energy", "rise": "predicted rise", "energy_change": "ΔE under Task 2"}
# What tables hold that is no setting, or follows from others.
NOT_SETTINGS = ("command", "columns", "warnings")


class Correlation(NamedTuple):
    """Of what, and how far two rankings agree: 1 where they are the same, −1 where one is the other reversed."""

    what: str
    spearman: float
    kendall: float


class Comparison(NamedTuple):
    """Two tables' view of the samples that are in both.

    Attributes:
        a, b: the tables, cut down to these samples, in the same order.
        ranks: (2, n) ranks by energy in either, 1 for the highest.
        correlations: of every column that both have.
        left_out: how many samples of either are not in the other.
        differences: (setting, in A, in B).
    """

    a: Table
    b: Table
    ranks: np.ndarray
    correlations: list[Correlation]
    left_out: tuple[int, int]
    differences: list[tuple[str, Any, Any]]

    def moved(self) -> np.ndarray:
        """Rows by how far their rank moved, the farthest first."""
        return np.argsort(-np.abs(self.ranks[1] - self.ranks[0]), kind="stable")


def compare(first: Path, second: Path) -> Comparison:
    """Raises UsageError for files that are no tables of energies, or have fewer than three samples in common."""
    tables = [read(path) for path in (first, second)]
    for path, table in zip((first, second), tables, strict=True):
        if "log_odds" not in table:
            raise UsageError(
                f"{path}: was written by `{table.settings.get('command')}`, without log odds: compare takes tables that `energies` wrote"
            )
    names = [_names(table) for table in tables]
    places = [{name: row for row, name in enumerate(column)} for column in names]
    common = [name for name in names[0] if name in places[1]]
    if len(common) < FEWEST:
        sources = " and ".join(f"{path} ({table.settings['task1']['source']})" for path, table in zip((first, second), tables, strict=True))
        raise UsageError(f"{sources} have {len(common)} samples in common, need {FEWEST}: compare tables of the same images, read alike")
    rows = [np.array([where[name] for name in common]) for where in places]
    a, b = (
        Table({name: column[row] for name, column in table.columns.items()}, table.settings)
        for table, row in zip(tables, rows, strict=True)
    )
    ranks = np.empty((2, len(common)), np.int64)
    for side, table in enumerate((a, b)):
        ranks[side, heights(table).order()] = np.arange(1, len(common) + 1)
    correlations = [
        _correlation(words, *(heights(table).scores if name == "energy" else table[name] for table in (a, b)))
        for name, words in COLUMNS.items()
        if name in a and name in b
    ]
    left_out = (len(tables[0]) - len(common), len(tables[1]) - len(common))
    return Comparison(a, b, ranks, correlations, left_out, list(_differences(a.settings, b.settings)))


def _names(table: Table) -> list[tuple[int, int]]:
    """What a sample is recognised by: its hash, and the how manieth of its copies it is."""
    seen: Counter[int] = Counter()
    names = []
    for name in table["sample"].tolist():
        names.append((name, seen[name]))
        seen[name] += 1
    return names


def _correlation(what: str, a: np.ndarray, b: np.ndarray) -> Correlation:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(what, float("nan"), float("nan"))
    return Correlation(what, float(spearmanr(a, b)[0]), float(kendalltau(a, b)[0]))


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys((*a, *b)):
        one, other = a.get(name), b.get(name)
        if one == other or (not prefix and name in NOT_SETTINGS):
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", one, other


def ranks_table(found: Comparison) -> Table:
    """Both ranks of every sample, who moved farthest first."""
    rows = found.moved()
    columns = {
        "index": found.a["index"],
        "index_b": found.b["index"],
        "rank_a": found.ranks[0],
        "rank_b": found.ranks[1],
        "sample": found.a["sample"],
    }
    settings = {"command": "compare", "a": found.a.settings, "b": found.b.settings}
    return Table({name: column[rows] for name, column in columns.items()}, settings)


def summary(found: Comparison) -> list[str]:
    """The result in a few lines."""
    count = len(found.a)
    lines = [
        f"{count:,} samples are in both"
        + (f"; {found.left_out[0]:,} of A and {found.left_out[1]:,} of B are left out" if any(found.left_out) else "")
    ]
    lines += [f"{what}: Spearman {spearman:.4f}, Kendall {kendall:.4f}" for what, spearman, kendall in found.correlations]
    lines += ["moved most: " + ", ".join(_moves(found, found.moved()[:6]))]
    return lines + [f"differs: {name}: {_short(one)} → {_short(other)}" for name, one, other in found.differences]


def _moves(found: Comparison, rows: np.ndarray) -> list[str]:
    both = zip(found.a["index"][rows], *found.ranks[:, rows], strict=True)
    return [f"{index}: {before} → {after}" for index, before, after in both]


def _short(value: object) -> str:
    text = "—" if value is None else number(value) if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def images(found: Comparison) -> tuple[Images | None, str]:
    """The images that table A was made from, if they can still be read and are the same; and why not."""
    made = found.a.settings["read"]
    # Task 2 need not be there any more; its classes matter where they are taken out of the same data.
    choice = Choice(classes=made["classes"], task2_classes=None if made["task2"] else made["task2_classes"])
    size = made["size"]
    reading = Reading(
        **{name: made[name] for name in Reading.__dataclass_fields__} | {"size": tuple(size) if isinstance(size, list) else size}
    )
    try:
        tasks = directed(load(made["data"], choice, reading), [found.a.settings["normalise"]], skip=reading.skip_bad)
    except UsageError as error:
        return None, str(error)
    if description(tasks.task1)["sha256"] != found.a.settings["task1"]["sha256"]:
        return None, f"{made['data']} has changed since"
    order = np.searchsorted(tasks.places, found.a["index"])
    return tasks.task1.take(order), ""


def page(found: Comparison, first: Path, second: Path) -> bytes:
    """The page's HTML."""
    seen, why_not = images(found)
    moved, moves = found.moved(), found.ranks[1] - found.ranks[0]
    up, down = (moved[np.sign(moves[moved]) == sign][:GALLERY] for sign in (-1, 1))
    tenth = max(1, len(moves) // 10)

    def group(rows: np.ndarray) -> dict[str, Any]:
        captions = _moves(found, rows)
        return {"captions": captions, "samples": [] if seen is None else gallery(seen, rows, captions)}

    return render(
        "compare.html.jinja",
        {"A": found.a.settings, "B": found.b.settings, "warnings": []},
        files=(first, second),
        count=len(moves),
        left_out=found.left_out,
        correlations=found.correlations,
        shared=float(np.mean(found.ranks[1][found.ranks[0] <= tenth] <= tenth)),
        median_move=float(np.median(np.abs(moves))),
        ranks=figures.picture(lambda figure: _draw(figure, found, up, down), 6.4, 5.8),
        up=group(up),
        down=group(down),
        why_not=why_not,
        differences=[(name, _short(one), _short(other)) for name, one, other in found.differences],
    )


def _draw(figure: Figure, found: Comparison, up: np.ndarray, down: np.ndarray) -> None:
    axes = figure.subplots()
    before, after = found.ranks
    rows = np.arange(0, before.size, -(-before.size // DOTS))
    axes.scatter(before[rows], after[rows], s=5, alpha=0.35, linewidths=0, color=figures.BLUE)
    axes.scatter(before[up], after[up], s=16, linewidths=0, color=figures.ORANGE, label="higher in B")
    axes.scatter(before[down], after[down], s=16, linewidths=0, color=figures.GREEN, label="lower in B")
    axes.plot([1, before.size], [1, before.size], color=figures.NEUTRAL, linewidth=0.8)
    axes.set(xlabel="rank in A", ylabel="rank in B", xlim=(before.size, 1), ylim=(before.size, 1), aspect="equal")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2)
