"""Where an ordering holds at finite β, over (β, c): maps, and how they are drawn."""

from collections.abc import Mapping
from typing import Any

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
HOLDS, FAILS, VACUOUS = 1, 0, -1


def onset(members: float, cosines: NDArray[np.float64], signs: Any) -> NDArray[np.float64]:
    """Smallest β at which both fixed points exist, by bisection; `signs(members, cosine, beta)` is NaN where one does not."""
    low, high = np.zeros_like(cosines), np.full_like(cosines, 4 * np.log(members) + 8) / (1 - cosines)
    for _ in range(60):
        middle = 0.5 * (low + high)
        exists = np.isfinite(signs(np.full_like(cosines, members), cosines, middle))
        low, high = np.where(exists, low, middle), np.where(exists, middle, high)
    return high


def phase_maps(signs: Any, size: int = 80) -> dict[str, Any]:
    """Where an ordering holds: over (β, c), and magnified at the onset of the fixed points over (β/onset − 1, c).

    Args:
        signs: (K, c, β) flat arrays → positive where the ordering holds, NaN where a fixed point does not exist.
    """
    maps = []
    for members in MAP_MEMBERS:
        lowest = max(-0.5, -1 / (members - 1))
        betas, cosines = np.geomspace(1.0, 100.0, size), np.linspace(lowest, 0.98, size)
        near, small = np.geomspace(1e-6, 3.0, size), np.geomspace(1e-5, 0.9, size)
        fold = onset(members, cosines, signs)
        c, beta = (grid.ravel() for grid in np.meshgrid(cosines, betas, indexing="ij"))
        wide = signs(np.full_like(c, members), c, beta)
        c_near = np.repeat(small, size)
        strip = signs(np.full_like(c_near, members), c_near, (onset(members, small, signs)[:, None] * (1 + near[None])).ravel())
        code = lambda values: np.where(np.isnan(values), VACUOUS, np.where(values > 0, HOLDS, FAILS)).reshape(size, size)  # noqa: E731
        wide_code, strip_code = code(wide), code(strip)
        maps.append(
            {
                "members": members,
                "cosine": np.round(cosines, 4).tolist(),
                "onset": np.round(fold, 4).tolist(),
                "wide": wide_code.tolist(),
                "strip": strip_code.tolist(),
                "failures": int(np.sum((wide_code == FAILS) & (cosines[:, None] > 0))) + int(np.sum(strip_code == FAILS)),
            }
        )
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
                above.annotate(label, (preset["beta"], preset["cosine"]), (0, 7), textcoords="offset points", fontsize=8, ha="center")
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
