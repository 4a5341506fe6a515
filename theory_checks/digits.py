"""Real data: scikit-learn's 1,797 handwritten digits as unit-norm memories. Does energy say what a rotation does to an image?"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

import hopjax
from theory_checks.claim import Z_FALSE_ALARM, Z_LIMIT, Finding, Measurement, Setting, claim
from theory_checks.figures import CLUSTER, NEUTRAL, OTHER, OUTLIER

DIM = 64
SIGMA = hopjax.unit_displacement(DIM)
BLOCK = 128  # states held against all memories at a time: 2 MB
STEPS = 20  # of the map, between two looks at which states have arrived
ARRIVED = (
    1e-5  # |x − T(x)| from which on a state counts as arrived, in float32: its fixed point is at most some 16 times farther, 1/(1 − 0.94)
)
SAME = 1e-3  # states that arrived nearer to each other than this are at one fixed point: the two nearest ones are 0.13 apart
CONVERGED = 1e-12  # |x − T(x)| to which the distinct fixed points are then iterated
SAMPLED = 128


class Quantities(NamedTuple):
    """At each state: E, S, the second-order rise at ε = 1, and the largest softmax weight."""

    energy: NDArray[np.float64]
    sharpness: NDArray[np.float64]
    rise: NDArray[np.float64]
    weight: NDArray[np.float64]


class Digits(NamedTuple):
    """The images as memories, and where they flow to.

    Attributes:
        images, labels: unit vectors, and what they show.
        beta: at which the median weight of an image on itself is ½.
        at_image: quantities of the images as they are.
        at_point: quantities of the distinct fixed points, in the order of `points`.
        points: the distinct fixed points.
        basin: for each image, which of them it flows to.
        residual: largest |x − T(x)| of a fixed point.
    """

    images: NDArray[np.float64]
    labels: NDArray[np.int64]
    beta: float
    at_image: Quantities
    at_point: Quantities
    points: NDArray[np.float64]
    basin: NDArray[np.int64]
    residual: float


def _half_weight_beta(images: NDArray[np.float64]) -> float:
    """β at which half of the images carry more than half of the softmax weight at themselves."""
    exponents = images @ images.T - 1

    def excess(log_beta: float) -> float:
        return float(np.median(1 / np.sum(np.exp(np.exp(log_beta) * exponents), axis=1)) - 0.5)

    return float(np.exp(brentq(excess, np.log(10), np.log(1000), xtol=1e-4)))


@jax.jit
def _blocks(states: jax.Array, memories: jax.Array, beta: jax.Array) -> Any:
    """`STEPS` steps of the map from a block of states, and how far the last one went."""

    def advance(_: int, states: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: hopjax.update_map(x, memories, beta))(states)

    moved = jax.lax.fori_loop(0, STEPS, advance, states)
    return moved, jnp.linalg.norm(advance(0, moved) - moved, axis=1)


@jax.jit
def _quantities(states: jax.Array, memories: jax.Array, beta: jax.Array) -> Any:
    def at(x: jax.Array) -> tuple[jax.Array, ...]:
        rise = hopjax.second_order_rise(x, memories, beta, epsilon=1.0, sigma=SIGMA)
        weight = jnp.max(hopjax.weights(x, memories, beta))
        return hopjax.energy(x, memories, beta), hopjax.sharpness(x, memories, beta), rise, weight

    return jax.vmap(at)(states)


def _in_blocks(function: Any, states: NDArray[np.float64], memories: NDArray[np.float64], beta: float) -> Any:
    """Applies a compiled function of one block to any number of states; the last block is filled up with copies."""
    count = -len(states) % BLOCK
    padded = np.concatenate([states, np.repeat(states[-1:], count, axis=0)]).reshape(-1, BLOCK, DIM)
    parts = [jax.tree.map(np.asarray, function(block, memories, beta)) for block in padded]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(states)], *parts)


def _flow(starts: NDArray[np.float64], images: NDArray[np.float64], beta: float, tolerance: float) -> tuple[NDArray[np.float64], float]:
    """Where states flow to by the plain map, which leaves no basin; those that have arrived are set aside. And the largest residual."""
    states, residual = starts.copy(), np.full(len(starts), np.inf)
    for _ in range(100):
        moving = np.flatnonzero(residual > tolerance)
        if not len(moving):
            break
        states[moving], residual[moving] = _in_blocks(_blocks, states[moving], images, beta)
    return states, float(np.max(residual))


def _distinct(states: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index of one state of each fixed point, and the fixed point of each state."""
    first: list[int] = []
    basin = np.empty(len(states), int)
    for index, state in enumerate(states):
        distances = np.linalg.norm(states[first] - state, axis=1) if first else np.array([np.inf])
        nearest = int(np.argmin(distances))
        if distances[nearest] > SAME:
            nearest = len(first)
            first.append(index)
        basin[index] = nearest
    return np.array(first), basin


@lru_cache(maxsize=1)
def digits() -> Digits:
    """Everything deterministic about the data set."""
    from sklearn.datasets import load_digits  # a second of imports, in the one process that needs it

    data = load_digits()
    images = data.data / np.linalg.norm(data.data, axis=1, keepdims=True)
    beta = _half_weight_beta(images)
    # In single precision to where each image belongs, in double to the fixed points themselves.
    arrived = _flow(images.astype(np.float32), images.astype(np.float32), beta, ARRIVED)[0].astype(float)
    first, basin = _distinct(arrived)
    points, residual = _flow(arrived[first], images, beta, CONVERGED)
    at_image, at_point = (Quantities(*_in_blocks(_quantities, part, images, beta)) for part in (images, points))
    return Digits(images, data.target, beta, at_image, at_point, points, basin, residual)


def _rank_correlation(
    energy: NDArray[np.float64], rise: NDArray[np.float64], seed: list[int], repeats: int = 1000
) -> tuple[float, Measurement]:
    """Spearman's rank correlation, and that its bootstrap interval (99.9 % two-sided, by resampling points) lies above zero."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(energy), (repeats, len(energy)))
    # Ranks once, resampled: a resample's own ranks are a monotone map of these, which averages to the identity.
    ranks = np.stack([stats.rankdata(energy), stats.rankdata(rise)])
    drawn = stats.rankdata(ranks[:, picks], axis=-1)
    drawn -= drawn.mean(axis=-1, keepdims=True)
    rho = np.sum(drawn[0] * drawn[1], axis=-1) / np.sqrt(np.sum(drawn[0] ** 2, axis=-1) * np.sum(drawn[1] ** 2, axis=-1))
    low, high = np.quantile(rho, [0.0005, 0.9995])
    value = float(stats.spearmanr(energy, rise).statistic)
    what = f"Spearman {value:.3f} of energy and rise, lower end of its interval [{low:.3f}, {high:.3f}]"
    # The chance that as many other points would have put the lower end below zero.
    return value, Measurement(what, float(low), ">=", 0.0, float(stats.norm.sf(low / np.std(rho))))


def _pixels(image: NDArray[np.float64]) -> list[int]:
    return np.rint(255 * image / np.max(image)).astype(int).tolist()


def _six(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _pictures(found: Digits, count: int = 10) -> dict[str, list[list[int]]]:
    order = np.argsort(found.at_image.energy)
    return {"lowest": [_pixels(found.images[i]) for i in order[:count]], "highest": [_pixels(found.images[i]) for i in order[::-1][:count]]}


def _draw_images(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    figure.set_size_inches(9, 4.6)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    below, above = np.array(values["energy"]), np.array(values["rise"])
    axes = left.subplots()
    axes.plot(below, above, ".", color=NEUTRAL, markersize=2, alpha=0.5, rasterized=True)
    for name, colour, chosen in (("lowest", CLUSTER, np.argsort(below)[:10]), ("highest", OUTLIER, np.argsort(below)[::-1][:10])):
        axes.plot(below[chosen], above[chosen], "o", color=colour, markersize=4, label=f"{name} ten")
    axes.set(xlabel="energy of the image", ylabel="rise / ε²", title=f"Spearman {values['rho']:.2f}")
    axes.legend()
    right.suptitle("ten highest energies (above), ten lowest", fontsize=9.5)
    for row, (name, colour) in enumerate((("highest", OUTLIER), ("lowest", CLUSTER))):
        for column, picture in enumerate(values["pictures"][name]):
            small = right.add_subplot(4, 5, row * 10 + column + 1)
            small.imshow(np.reshape(picture, (8, 8)), cmap="gray_r")
            small.set(xticks=[], yticks=[])
            small.grid(False)
            for spine in small.spines.values():
                spine.set(visible=True, color=colour, linewidth=1.5)


def _draw_points(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    figure.set_size_inches(9, 4.0)
    energy, sizes = np.array(values["energy"]), np.array(values["images"])
    for axes, (name, label) in zip(figure.subplots(1, 2), (("rise", "rise / ε²"), ("sharpness", "sharpness S")), strict=True):
        axes.scatter(energy, values[name], s=4 + 2 * sizes, color=OTHER, alpha=0.55, linewidths=0)
        axes.set(xlabel="energy of the fixed point", ylabel=label)
    figure.axes[0].set_title(f"{len(energy)} fixed points, Spearman {values['rho']:.2f}")
    figure.axes[1].set_title("area: images that flow there")


@claim(
    "digits-second-order",
    "Eqs. (8)-(9), on real data",
    "On real images, stored as they are, the mean rise under small rotations is the second-order form as ε → 0.",
)
def digits_second_order(setting: Setting) -> Finding:
    found = digits()
    # Stratified: equally spaced in the order of energy, both ends included.
    chosen = np.argsort(found.at_image.energy)[np.linspace(0, len(found.images) - 1, SAMPLED).astype(int)]
    epsilons = np.array([2e-3, 1e-3])
    law = hopjax.PlanarLaw(angle=hopjax.generator_bound(DIM, float(epsilons[0]), SIGMA))
    draws = setting.rotations // 4 * 2  # half of the rotations at either step, in pairs

    @jax.jit
    def averages(keys: jax.Array, states: jax.Array, memories: jax.Array, beta: jax.Array) -> hopjax.Estimate:
        def at(entry: tuple[jax.Array, jax.Array]) -> hopjax.Estimate:
            def mean(inputs: tuple[jax.Array, jax.Array]) -> hopjax.Estimate:
                key, epsilon = inputs
                return hopjax.average_rise(key, entry[1], memories, beta, epsilon=epsilon, sigma=SIGMA, draws=draws, law=law, batch=100)

            return jax.lax.map(mean, (entry[0], jnp.asarray(epsilons)))

        return jax.lax.map(at, (keys, states))

    keys = jax.random.split(setting.key("digits"), (SAMPLED, 2))
    runs = averages(keys, found.images[chosen], found.images, found.beta)
    coarse, fine = np.asarray(runs.mean).T / epsilons[:, None] ** 2
    coarse_error, fine_error = np.asarray(runs.standard_error).T / epsilons[:, None] ** 2
    scores = np.abs((4 * fine - coarse) / 3 - found.at_image.rise[chosen]) / (np.hypot(4 * fine_error, coarse_error) / 3)
    difference = float(np.max(np.abs(fine / found.at_image.rise[chosen] - 1)))
    # At ε → 0 under half the images' rise without the gradient term would be far off: how far tells what the comparison can see.
    without = np.median(np.abs(0.5 * SIGMA**2 * found.at_image.sharpness / found.at_image.rise - 1))
    return Finding(
        [
            Measurement(
                f"largest |z| of {SAMPLED} images, ⟨ΔE⟩/ε² extrapolated to ε = 0",
                float(np.max(scores)),
                "<=",
                Z_LIMIT,
                SAMPLED * Z_FALSE_ALARM,
            ),
            Measurement("largest |⟨ΔE⟩/second order − 1| at ε = 0.001, against (βε)²", difference, "<=", (found.beta * epsilons[1]) ** 2),
        ],
        note=f"β = {found.beta:.2f}, at which the median weight of an image on itself is ½. Without the gradient term, as at a fixed "
        f"point, the median image's rise would be off by {without:.1%}.",
    )


@claim(
    "digits-energy-rise",
    "Theorem 4.1, on real data",
    "Among stored images, as they are, higher energy goes with a larger rise under rotation.",
    draw=_draw_images,
    caption="Energy and second-order rise of 1,797 handwritten digits (unit displacement: ε is the typical distance an image moves), and "
    "the images at either end.",
)
def digits_energy_rise(setting: Setting) -> Finding:
    found = digits()
    rho, positive = _rank_correlation(found.at_image.energy, found.at_image.rise, [setting.seed, 6])
    rho_sharp = float(stats.spearmanr(found.at_image.energy, found.at_image.sharpness).statistic)
    series = {"energy": _six(found.at_image.energy), "rise": _six(found.at_image.rise), "rho": round(rho, 4), "pictures": _pictures(found)}
    span = found.at_image.rise.max() / found.at_image.rise.min() - 1
    return Finding(
        [positive],
        series,
        note=f"The association is strong, the effect is not: the largest rise is {span:.0%} above the smallest, since most of it is the "
        f"same ½ε² for every unit vector. Energy against sharpness: {rho_sharp:.2f}. Second-order values at β = {found.beta:.1f}.",
    )


@claim(
    "digits-energy-rise-fixed-point",
    "Theorem 4.1, on real data",
    "Among the distinct fixed points that images flow to, higher energy goes with a larger rise under rotation.",
    draw=_draw_points,
    caption="The fixed points that 1,797 digits flow to: energy against second-order rise and sharpness.",
)
def digits_energy_rise_fixed_point(setting: Setting) -> Finding:
    found = digits()
    energy, rise = found.at_point.energy, found.at_point.rise
    sizes = np.bincount(found.basin)
    rho, positive = _rank_correlation(energy, rise, [setting.seed, 7])
    weighted = float(stats.spearmanr(energy[found.basin], rise[found.basin]).statistic)
    shared = sizes > 1
    broad = float(stats.spearmanr(energy[shared], rise[shared]).statistic)
    series: dict[str, Any] = {"energy": _six(energy), "rise": _six(rise), "sharpness": _six(found.at_point.sharpness)}
    series |= {"images": sizes.tolist(), "rho": round(rho, 4)}
    return Finding(
        [
            positive,
            Measurement("largest |x − T(x)| of a fixed point", found.residual, "<=", CONVERGED),
        ],
        series,
        note=f"Images flow to {len(sizes)} distinct fixed points, {int(np.sum(~shared))} of them to one of their own. Counted once each, "
        f"energy orders the rise; counted once for each image the correlation is {weighted:.2f}, and {broad:.2f} among the "
        f"{int(np.sum(shared))} points that several images share: energy tells lone images from merged ones, hardly the large basins from "
        "each other.",
    )
