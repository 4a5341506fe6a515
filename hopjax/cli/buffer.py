"""Which samples to replay, and what that saves: `python -m hopjax buffer`."""

import math
import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t

from hopjax import buffer as policies
from hopjax.cli import energies, figures
from hopjax.cli.heights import Heights, heights
from hopjax.cli.landscape import Landscape
from hopjax.cli.options import UsageError
from hopjax.cli.page import class_name, gallery, number, render
from hopjax.cli.progress import Screen
from hopjax.cli.survey import Survey
from hopjax.cli.table import Table
from hopjax.data import Images

WORDS: Mapping[str, str] = {
    "highest": "the highest energies: what stands alone",
    "lowest": "the lowest energies: what is typical",
    "random": "at random",
    "stratified": "as many from each tenth of the energies, at random in it",
    "class-balanced": "as many from each class, those of the highest energy",
    "coverage": "one after the other the sample that saves most, given those before it",
}
# Random buffers that the one chosen is compared with.
SEEDS = 8
# Probability with which a random buffer is called better or worse than chance.
CHANCE = 0.003
# Samples whose gain is computed, evenly spaced in the order of the energies.
TARGETS = 5000
BINS = 10
GALLERY = 60


class Gains(NamedTuple):
    """What replay saves at some of the samples, and what there is to save.

    Attributes:
        targets: rows of the table, from the highest energy to the lowest.
        chosen: gains from the buffer.
        random: gains from random buffers of its size, one row each.
        rises: the energy rises without replay.
    """

    targets: np.ndarray
    chosen: np.ndarray
    random: np.ndarray
    rises: np.ndarray

    def saved(self) -> tuple[float, np.ndarray]:
        """The parts of all that rises that the buffer and the random ones save; none where nothing does."""
        whole = max(float(np.maximum(self.rises, 0).sum()), sys.float_info.min)
        return float(self.chosen.sum(dtype=np.float64)) / whole, self.random.sum(axis=1, dtype=np.float64) / whole


def _rises(table: Table) -> np.ndarray:
    """How far the energies will rise: ΔE where Task 2 is known, else the prediction for a small rotation."""
    return table["energy_change"] if "energy_change" in table else table["rise"]


def _log_sums(table: Table, landscape: Landscape) -> np.ndarray:
    """log Z₁ of every sample."""
    return landscape.beta * (np.sum(landscape.memories**2, axis=1) - table["excess"])


def check(policy: str, images: Images) -> None:
    """Raises UsageError for a policy that these samples lack something for."""
    if policy == "class-balanced" and images.labels is None:
        raise UsageError(f"--policy class-balanced needs labels, and {images.source} has none: take --policy stratified")


def choose(found: Survey, policy: str, size: int, seed: int, screen: Screen) -> np.ndarray:
    """Rows of the table, most wanted first."""
    table, memories = found.table, found.landscape.memories
    candidates = policies.Candidates(scores=heights(table).scores, labels=table.columns.get("label"), rows=memories)
    with screen.counting("choosing", size, 0, unit="samples") as count:
        done = 0

        def tell(chosen: int, _: int) -> None:
            nonlocal done
            count(chosen - done)
            done = chosen

        strategies: Mapping[str, policies.Policy] = {
            "highest": policies.HighestEnergy(),
            "lowest": policies.LowestEnergy(),
            "random": policies.Random(seed),
            "stratified": policies.Stratified(seed=seed),
            "class-balanced": policies.ClassBalanced(),
            "coverage": policies.GreedyCoverage(
                memories, _log_sums(table, found.landscape), _rises(table), found.landscape.beta, progress=tell
            ),
        }
        try:
            return strategies[policy].choose(candidates, size)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("while choosing: the energies are done and kept; the same command goes on from there") from None


def kept(found: Survey, policy: str, size: int, seed: int, screen: Screen) -> np.ndarray:
    """What `choose` chooses, or an earlier run chose."""
    stage = f"rows-{policy}-{size}-{seed}"
    if earlier := found.partial.load(stage):
        return earlier[0]["rows"]
    rows = choose(found, policy, size, seed, screen)
    found.partial.save(stage, 0, {"rows": rows})
    return rows


def gains(found: Survey, rows: np.ndarray, seed: int, screen: Screen) -> Gains:
    """What the buffer and random ones save."""
    table, memories = found.table, found.landscape.memories
    ranked = heights(table).order()
    targets = ranked[np.linspace(0, len(ranked) - 1, min(TARGETS, len(ranked))).astype(int)]
    log_sums, rises = _log_sums(table, found.landscape)[targets], _rises(table)[targets]
    candidates = policies.Candidates(rows=memories)
    others = [policies.Random(seed + 1 + trial).choose(candidates, len(rows)) for trial in range(SEEDS)]
    values = []
    try:
        with screen.counting("gains", 1 + SEEDS, 0, unit="pairs", each=len(rows) * len(targets)) as count:
            for places in (rows, *others):
                values.append(np.asarray(policies.buffer_gains(memories[targets], memories[places], log_sums, rises, found.landscape.beta)))
                count(1)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("gains: the energies and the choice are done and kept; the same command goes on from there") from None
    return Gains(targets, values[0], np.stack(values[1:]), rises)


def listed(table: Table, rows: np.ndarray, policy: str, seed: int) -> Table:
    """The buffer's table, in order of choice."""
    names = [name for name in ("index", "file", "label", "energy", "excess", "rise", "energy_change", "sample") if name in table]
    settings = {**table.settings, "policy": policy, "size": len(rows), "seed": seed}
    settings["columns"] = {name: table.settings["columns"][name] for name in names}
    return Table({name: table[name][rows] for name in names}, settings)


def summary(table: Table, gained: Gains) -> list[str]:
    """The result in a few lines."""
    return [f"β = {table.settings['beta']:.5g}: {table.settings['beta_rule']}", saved(table, gained)]


def saved(table: Table, gained: Gains) -> str:
    """What the buffer is worth, in a line."""
    chosen, random = gained.saved()
    spread = float(random.std(ddof=1))
    # A further random buffer differs from the mean of these by √(1 + 1/n) standard deviations, which are estimated: Student's t.
    bound = float(t.ppf(1 - CHANCE / 2, len(random) - 1)) * spread * math.sqrt(1 + 1 / len(random))
    rise = "ΔE under Task 2" if "energy_change" in table else "predicted rise of the energies under a small rotation"
    gap = chosen - random.mean()
    verdict = "better than" if gap > bound else "worse than" if gap < -bound else "no better than"
    return (
        f"this buffer saves {chosen:.2%} of the {rise}, random ones of its size {random.mean():.2%} ± {spread:.2%}: it is {verdict} chance "
        f"(a random one is more than {number(100 * bound)}% away with probability {CHANCE})"
    )


def page(whole: Table, table: Table, rows: np.ndarray, gained: Gains, images: Images) -> bytes:
    """The page's HTML.

    Args:
        whole: the table of all samples.
        table: that of the buffer, whose samples are these rows of it.
    """
    shown = rows[:GALLERY]
    height = heights(whole)
    return render(
        "buffer.html.jinja",
        table.settings,
        policy=WORDS[table.settings["policy"]],
        size=len(rows),
        total=len(whole),
        saved=gained.saved(),
        words=saved(table, gained),
        gain=figures.picture(lambda figure: _draw_gains(figure, gained), 9.0, 4.0),
        targets=len(gained.targets),
        seeds=SEEDS,
        height=height.name,
        relative=height.beta is not None,
        medians=[height.text(float(np.median(scores))) for scores in (height.scores[rows], height.scores)],
        classes=[len(np.unique(labels)) for labels in (whole["label"][rows], whole["label"])] if "label" in whole else None,
        covered=figures.picture(lambda figure: _draw_covered(figure, whole, height, rows), 9.0, 4.0),
        samples=gallery(images, shown, energies.sample_names(whole, shown)),
    )


def _draw_gains(figure: Figure, gained: Gains) -> None:
    """Mean gain in groups of the targets, the highest energies to the right."""
    axes = figure.subplots()
    parts = np.array_split(np.arange(len(gained.targets))[::-1], min(BINS, len(gained.targets)))
    places = np.arange(len(parts))
    random = np.array([[values[part].mean() for part in parts] for values in gained.random])
    axes.errorbar(
        places,
        random.mean(axis=0),
        2 * random.std(axis=0, ddof=1),
        color=figures.BLUE,
        marker="o",
        capsize=3,
        label="random buffers, ± 2 standard deviations",
    )
    axes.plot(places, [gained.chosen[part].mean() for part in parts], color=figures.ORANGE, marker="s", label="this buffer")
    axes.set_xticks(places, ["lowest", *map(str, range(2, len(parts))), "highest"])
    axes.set_xlabel("samples by energy, in groups of one size")
    axes.set_ylabel("mean gain")
    axes.set_ylim(bottom=0.0 if min(random.min(), gained.chosen.min()) >= 0 else None)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2)


def _draw_covered(figure: Figure, whole: Table, height: Heights, rows: np.ndarray) -> None:
    """The energies, and the classes, of the buffer against all."""
    labels = whole.columns.get("label")
    panels = figure.subplots(1, 1 if labels is None else 2, squeeze=False)[0]
    places = height.places()
    edges = np.histogram_bin_edges(places, 40)
    for values, colour, name in ((places, figures.BLUE, "all samples"), (places[rows], figures.ORANGE, "buffer")):
        panels[0].stairs(np.histogram(values, edges)[0] / len(values), edges, fill=True, alpha=0.55, color=colour, label=name)
    panels[0].set_ylabel("share")
    height.label(panels[0], 5 if len(panels) > 1 else 8)
    panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2)
    if labels is not None:
        names = np.unique(labels)
        names = names[np.argsort([-np.mean(labels[rows] == label) for label in names], kind="stable")][: 2 * energies.CLASSES]
        places = np.arange(len(names))
        for shift, part, colour in ((-0.2, labels, figures.BLUE), (0.2, labels[rows], figures.ORANGE)):
            panels[1].bar(places + shift, [np.mean(part == label) for label in names], 0.4, color=colour, alpha=0.8)
        shown = [class_name(whole.settings, label) for label in names.tolist()]
        panels[1].set_xticks(places, shown, rotation=0 if len(names) <= 10 else 90, parse_math=False)
        panels[1].set_xlabel("class")
        panels[1].grid(axis="x", visible=False)
