"""How much the answer depends on normalisation and β: `python -m hopjax sensitivity`."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from hopjax import normalisation, temperature, tiled
from hopjax.cli import figures
from hopjax.cli.heights import scores
from hopjax.cli.landscape import PERPLEXITY
from hopjax.cli.options import Machine, UsageError, as_options
from hopjax.cli.page import render
from hopjax.cli.progress import Screen
from hopjax.cli.resume import Partial
from hopjax.cli.table import Table, versions
from hopjax.cli.tasks import Tasks, description


class View(NamedTuple):
    """One way of looking at the samples, and their energies in it."""

    normalise: str
    perplexity: float
    beta: float
    energies: np.ndarray

    @property
    def title(self) -> str:
        return f"{self.normalise}, perplexity {self.perplexity:g}"


class Sensitivity(NamedTuple):
    """Views of the same samples and how far they agree.

    Attributes:
        views: normalisation by normalisation, perplexities rising.
        spearman: of every two views' energies.
        shared: of every two views, how much of the highest tenth of the one is in that of the other.
        inputs: what they depend on: plain JSON.
    """

    views: list[View]
    spearman: np.ndarray
    shared: np.ndarray
    inputs: dict[str, Any]

    @property
    def default(self) -> int:
        """The view that `energies` takes if it is told nothing, or the one nearest to it."""
        return min(
            range(len(self.views)),
            key=lambda place: (self.views[place].normalise != "unit", abs(self.views[place].perplexity - PERPLEXITY)),
        )


def numbers(text: str) -> list[float]:
    """P,Q,… in rising order. Raises UsageError for what are no perplexities."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"--perplexities {text} is no list of numbers: give one, such as --perplexities 5,30,100") from None
    if not all(1 < perplexity < math.inf for perplexity in found):
        raise UsageError(
            f"--perplexities {text} is out of range: need 1 < perplexity < number of samples − 1; take --perplexities 5,30,100"
        )
    return found


def described(tasks: Tasks, machine: Machine) -> dict[str, Any]:
    """All that the energies of a view depend on: plain JSON."""
    return {
        "read": tasks.read,
        "task1": description(tasks.task1),
        "precision": machine.precision,
        "device": jax.default_backend(),
        "versions": versions(),
    }


def views(tasks: Tasks, perplexities: Sequence[float], machine: Machine, partial: Partial, screen: Screen) -> list[View]:
    """One after the other, those that an earlier run has finished as it left them.

    Raises: UsageError for perplexities that the samples do not allow, and samples that cannot be normalised; KeyboardInterrupt that says
        how far it came.
    """
    vectors = tasks.task1.vectors().astype(machine.precision, copy=False)
    asked = [(name, perplexity) for name in normalisation.NORMALISATIONS for perplexity in perplexities]
    found: list[View] = []
    try:
        with screen.counting("views", len(asked), 0, unit="views") as count:
            for name, perplexity in asked:
                stage = f"{name}-{perplexity!r}"
                if not (kept := partial.load(stage)):
                    kept = [_view(normalisation.fit(name, vectors)(vectors), name, perplexity, machine.memory_limit)]
                    partial.save(stage, 0, kept[0])
                found.append(View(name, perplexity, float(kept[0]["beta"][0]), kept[0]["scores"]))
                count(1)
    except ValueError as error:
        raise UsageError(as_options(str(error))) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"views: {len(found)} of {len(asked)} are done and kept; the same command goes on from there") from None
    return found


def _view(memories: np.ndarray, name: str, perplexity: float, memory_limit: int) -> dict[str, np.ndarray]:
    """β, and what orders the samples."""
    beta = temperature.Perplexity(perplexity, memory_limit=memory_limit).solve(memories)
    own = np.arange(len(memories))
    values = tiled.summarise(memories, memories, beta, ["energy", "log_odds"], own=own, memory_limit=memory_limit)
    return {"scores": scores(values, name, "paper"), "beta": np.array([beta])}


def sensitivity(found: list[View], inputs: dict[str, Any]) -> Sensitivity:
    """Compares every two views."""
    energies = np.stack([view.energies for view in found])
    spearman = np.array([[float(spearmanr(a, b).statistic) for b in energies] for a in energies])
    tenth = max(1, energies.shape[1] // 10)
    highest = [set(np.argsort(-row, kind="stable")[:tenth].tolist()) for row in energies]
    shared = np.array([[len(a & b) / tenth for b in highest] for a in highest])
    return Sensitivity(found, spearman, shared, inputs)


def table(found: Sensitivity, tasks: Tasks) -> Table:
    """Every two views, in one row each."""
    pairs = [(i, j) for i in range(len(found.views)) for j in range(i)]
    columns = {"a": np.array([i for i, _ in pairs]), "b": np.array([j for _, j in pairs])}
    columns |= {
        name: np.array([matrix[pair] for pair in pairs]) for name, matrix in (("spearman", found.spearman), ("shared", found.shared))
    }
    return Table(columns, settings(found, tasks))


def settings(found: Sensitivity, tasks: Tasks) -> dict[str, object]:
    """What the table and the page say of how they were made."""
    return {
        "command": "sensitivity",
        "views": [f"{view.title}: β = {view.beta:.4g}" for view in found.views],
        **found.inputs,
        "warnings": list(tasks.task1.warnings),
    }


def _extremes(found: Sensitivity) -> Iterator[tuple[str, str, float, float]]:
    """(kind of change, between which views, Spearman, shared): the pair that agrees least of each kind."""
    kinds: dict[str, Callable[[View, View], bool]] = {
        "β alone": lambda a, b: a.normalise == b.normalise,
        "the normalisation alone": lambda a, b: a.perplexity == b.perplexity,
        "both": lambda a, b: a.normalise != b.normalise and a.perplexity != b.perplexity,
    }
    for kind, is_of in kinds.items():
        pairs = [(i, j) for i, a in enumerate(found.views) for j, b in enumerate(found.views[:i]) if is_of(a, b)]
        if pairs:
            i, j = min(pairs, key=lambda pair: found.spearman[pair])
            between = f"{found.views[j].title} and {found.views[i].title}"
            yield kind, between, float(found.spearman[i, j]), float(found.shared[i, j])


def summary(found: Sensitivity) -> list[str]:
    """The result in a few lines."""
    return [
        f"changing {kind}: Spearman down to {spearman:.3f}, {shared:.0%} of the highest tenth shared ({between})"
        for kind, between, spearman, shared in _extremes(found)
    ]


def page(found: Sensitivity, tasks: Tasks) -> bytes:
    """The page's HTML."""
    return render(
        "sensitivity.html.jinja",
        settings(found, tasks),
        count=len(tasks.task1),
        source=tasks.task1.source,
        views=found.views,
        default=found.views[found.default],
        against_default=zip(found.views, found.spearman[found.default], found.shared[found.default], strict=True),
        extremes=list(_extremes(found)),
        meanings=normalisation.NORMALISATIONS,
        matrix=figures.picture(lambda figure: _draw(figure, found), 6.8, 6.0),
    )


def _draw(figure: Figure, found: Sensitivity) -> None:
    axes = figure.subplots()
    titles = [f"{view.normalise}, {view.perplexity:g}" for view in found.views]
    shown = axes.imshow(found.spearman, vmin=min(0.0, float(found.spearman.min())), vmax=1)
    for i, row in enumerate(found.spearman):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white")
    axes.set_xticks(range(len(titles)), titles, rotation=40, ha="right")
    axes.set_yticks(range(len(titles)), titles)
    axes.set(xlabel="normalisation, perplexity")
    axes.grid(visible=False)
    figure.colorbar(shown, ax=axes, label="Spearman correlation of the energies", shrink=0.8)
