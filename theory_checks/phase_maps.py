"""Where an ordering holds at finite β, over (β, c): maps, and how they are drawn."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.colors import ListedColormap
from numpy.typing import NDArray

from theory_checks.claim import PRESETS
from theory_checks.figures import NEUTRAL, OUTLIER

LANES = 640


def in_lanes(function: Any, *columns: Any) -> Any:
    """`function` of flat arrays of any one length, in pieces of `LANES`: compiled once, whatever the length."""
    count = len(columns[0])
    padded = [np.pad(np.asarray(column, float), (0, -count % LANES), mode="edge").reshape(-1, LANES) for column in columns]
    parts = [jax.tree.map(np.asarray, function(*piece)) for piece in zip(*padded, strict=True)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


MAP_MEMBERS = (2, 12, 100)
SIZE = 80
HOLDS, FAILS, VACUOUS = 1, 0, -1


class Grid(NamedTuple):
    """Where the maps are evaluated: axes (K, row, column), a row for each cosine.

    Attributes:
        members: K, of every point.
        wide_cosine, wide_beta: over (c, β).
        strip_cosine, strip_beta: small c, magnified at the onset of the fixed points.
        onset: smallest β at which both fixed points exist, for each row of the wide map.
    """

    members: NDArray[np.float64]
    wide_cosine: NDArray[np.float64]
    wide_beta: NDArray[np.float64]
    strip_cosine: NDArray[np.float64]
    strip_beta: NDArray[np.float64]
    onset: NDArray[np.float64]


def phase_grid(signs: Any) -> Grid:
    """The grid, which takes the onset by bisection; `signs(members, cosine, beta)` is NaN where a fixed point does not exist."""
    shape = (len(MAP_MEMBERS), SIZE, SIZE)
    members = np.array(MAP_MEMBERS, float)[:, None]
    wide = np.stack([np.linspace(max(-0.5, -1 / (k - 1)), 0.98, SIZE) for k in MAP_MEMBERS])
    cosines = np.stack([wide, np.broadcast_to(np.geomspace(1e-5, 0.9, SIZE), wide.shape)])
    everywhere = np.broadcast_to(members, cosines.shape)
    low, high = np.zeros_like(cosines), (4 * np.log(members) + 8) / (1 - cosines)
    for _ in range(45):  # to 1e-12 of an onset of 10: far inside the strip's 1e-6
        middle = 0.5 * (low + high)
        exists = np.isfinite(signs(everywhere.ravel(), cosines.ravel(), middle.ravel())).reshape(middle.shape)
        low, high = np.where(exists, low, middle), np.where(exists, middle, high)
    beyond = 1 + np.geomspace(1e-6, 3.0, SIZE)
    return Grid(
        np.broadcast_to(members[..., None], shape),
        np.broadcast_to(cosines[0][..., None], shape),
        np.broadcast_to(np.geomspace(1.0, 100.0, SIZE), shape),
        np.broadcast_to(cosines[1][..., None], shape),
        high[1][..., None] * beyond,
        high[0],
    )


def phase_maps(signs: Any, grid: Grid) -> dict[str, Any]:
    """Where an ordering holds, as series for `draw_phases`.

    Args:
        signs: (K, c, β) flat arrays → positive where the ordering holds, NaN where a fixed point does not exist.
    """

    def code(cosine: NDArray[np.float64], beta: NDArray[np.float64]) -> NDArray[np.int64]:
        values = signs(grid.members.ravel(), cosine.ravel(), beta.ravel()).reshape(cosine.shape)
        return np.where(np.isnan(values), VACUOUS, np.where(values > 0, HOLDS, FAILS))

    wide, strip = code(grid.wide_cosine, grid.wide_beta), code(grid.strip_cosine, grid.strip_beta)
    maps = [
        {
            "members": members,
            "cosine": np.round(grid.wide_cosine[index, :, 0], 4).tolist(),
            "onset": np.round(grid.onset[index], 4).tolist(),
            "wide": wide[index].tolist(),
            "strip": strip[index].tolist(),
            "failures": int(np.sum((wide[index] == FAILS) & (grid.wide_cosine[index] > 0)) + np.sum(strip[index] == FAILS)),
        }
        for index, members in enumerate(MAP_MEMBERS)
    ]
    presets = [
        {"name": preset.name, "members": preset.members, "cosine": preset.cosine, "beta": preset.beta} for preset in PRESETS.values()
    ]
    return {"maps": maps, "presets": presets}


def draw_phases(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    """Above over (β, c), below magnified at the onset."""
    (values,) = series.values()
    colours = ListedColormap(["#e8e8e8", OUTLIER, "#a8cbe4"])
    grid = figure.subplots(2, len(values["maps"]), height_ratios=(3, 2))
    figure.set_size_inches(9, 6)
    for (above, below), entry in zip(grid.T, values["maps"], strict=True):
        cosines, size = np.array(entry["cosine"]), len(entry["cosine"])
        above.pcolormesh(np.geomspace(1.0, 100.0, size), cosines, entry["wide"], cmap=colours, vmin=-1.5, vmax=1.5, rasterized=True)
        above.plot(entry["onset"], cosines, color="black", linewidth=1.2)
        above.axhline(0, color=NEUTRAL, linewidth=0.7, linestyle=":")
        for mark, preset in zip("o^", values["presets"], strict=True):
            if abs(preset["members"] - entry["members"]) <= 2:
                above.plot(preset["beta"], preset["cosine"], mark, color="black")
                label = preset["name"] + (f" (K = {preset['members']})" if preset["members"] != entry["members"] else "")
                above.annotate(label, (preset["beta"], preset["cosine"]), (7, -3), textcoords="offset points", fontsize=8)
        above.set(xscale="log", xlim=(1, 100), ylim=(cosines[0], cosines[-1]), title=f"K = {entry['members']}", xlabel="β")
        strip = np.geomspace(1e-6, 3.0, size), np.geomspace(1e-5, 0.9, size), entry["strip"]
        below.pcolormesh(*strip, cmap=colours, vmin=-1.5, vmax=1.5, rasterized=True)
        below.set(xscale="log", yscale="log", xlabel="β/onset − 1")
        for axes in (above, below):
            axes.grid(False)
    grid[0, 0].set_ylabel("c")
    grid[1, 0].set_ylabel("c")
    handles = [figure.axes[0].fill_between([], [], color=colour) for colour in (colours(2), colours(1), colours(0))]
    figure.legend(handles, ["holds", "fails", "a fixed point is missing"], loc="outside lower center", ncols=3)
