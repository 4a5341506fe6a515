"""The synthetic experiment of Appendix E in closed form, at the parameters an independent replication reports."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import LogNorm
from numpy.typing import NDArray

import hopjax
from hopjax import cluster, gaps
from theory_checks.claim import EPS, PRESETS, QUICK_COMPILE, Finding, Measurement, Setting, claim
from theory_checks.figures import CLUSTER, OUTLIER

MODEL = PRESETS["paper"]
EPSILONS = (0.02, 0.05)  # Appendix E, and Sections 4.2 and 5.2


class _Results(NamedTuple):
    rises: NDArray[np.float64]
    gains: NDArray[np.float64]
    symmetric: NDArray[np.float64]
    residual: NDArray[np.float64]


def _results() -> _Results:
    """Rises (ε, target) and gains (ε, target, replayed) at the fixed points that all 13 memories flow to, and S by symmetry."""

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def evaluate() -> tuple[jax.Array, ...]:
        memories = cluster.memories(MODEL.members, MODEL.dim, MODEL.cosine)
        points = jax.vmap(lambda x: hopjax.fixed_point(x, memories, MODEL.beta, method=hopjax.Picard()))(memories)

        def at(epsilon: jax.Array) -> tuple[jax.Array, jax.Array]:
            rises = jax.vmap(lambda x: hopjax.second_order_rise(x, memories, MODEL.beta, epsilon=epsilon, sigma=MODEL.sigma))(points.state)
            return rises, hopjax.gain_matrix(points.state, memories, memories, rises, MODEL.beta)

        symmetric = gaps.sharpnesses(float(MODEL.members), MODEL.cosine, MODEL.beta, float(MODEL.dim))
        rises, gains = jax.vmap(at)(jnp.array(EPSILONS))
        return rises, gains, jnp.stack([symmetric.outlier, symmetric.cluster]), points.residual

    return _Results(*(np.asarray(part) for part in evaluate()))


def _draw_rises(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    axes = figure.subplots()
    count = len(values["rises"])
    axes.bar(range(count), values["rises"], color=[CLUSTER] * (count - 1) + [OUTLIER], width=0.7)
    axes.set(xticks=range(count), xticklabels=[f"ξ{i}" for i in range(1, count)] + ["outlier"], ylabel="⟨ΔE⟩", title="ε = 0.02")


@claim(
    "appendix-e-1",
    "Appendix E.1",
    "At K = 12, d = 50, c = 0.35, β = 8 the outlier's rotation-averaged rise is strictly larger than every cluster member's.",
    draw=_draw_rises,
    caption="Second-order energy rises of the fixed points that the 13 memories flow to, σ² = ½.",
)
def appendix_e_1(setting: Setting) -> Finding:
    results = _results()
    rises, scale = results.rises[0], 0.5 * (EPSILONS[0] * MODEL.sigma) ** 2
    sharpness = rises / scale
    expected = np.append(np.full(MODEL.members, results.symmetric[1]), results.symmetric[0])
    # A state off by 1e-13, the iteration's tolerance over the contraction's distance from one, moves S by d + β times as much.
    tolerance = 1e-13 * 20 * (MODEL.dim + MODEL.beta)
    ratio = rises[-1] / np.max(rises[:-1])
    return Finding(
        [
            Measurement("rise of the outlier over the largest of 12 members'", float(ratio), ">=", 1 + 1e3 * EPS),
            Measurement(
                "largest |S − S of the symmetric solution|, 13 fixed points", float(np.max(np.abs(sharpness - expected))), "<=", tolerance
            ),
            Measurement("largest |x − T(x)|, 13 iterations", float(np.max(results.residual)), "<=", 1e-13),
        ],
        {"rises": [float(f"{value:.6g}") for value in rises]},
        note="Closed form is second order in ε: the ratio does not depend on ε or σ.",
    )


def _draw_matrix(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    figure.set_size_inches(5.6, 4.6)
    axes = figure.subplots()
    matrix = np.array(values["gains"])
    image = axes.imshow(matrix, norm=LogNorm(), cmap="cividis")
    labels = [f"ξ{i}" for i in range(1, len(matrix))] + ["outlier"]
    axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)), xlabel="replayed", ylabel="target", title="G at ε = 0.02")
    axes.set_xticklabels(labels, rotation=90)
    axes.set_yticklabels(labels)
    axes.grid(False)
    figure.colorbar(image, ax=axes)


@claim(
    "appendix-e-2",
    "Appendix E.2",
    "Of the 13 × 13 replay gains the outlier's self-gain is largest, then the members', then those within the cluster, then across.",
    draw=_draw_matrix,
    caption="Exact gain (93) of every target from every replayed memory at its second-order rise, in logarithmic colour.",
)
def appendix_e_2(setting: Setting) -> Finding:
    results = _results()
    members = np.arange(MODEL.members)
    measurements = []
    for epsilon, gains in zip(EPSILONS, results.gains, strict=True):
        inside = gains[:-1, :-1]
        groups = {
            "outlier self": gains[-1:, -1],
            "member self": inside[members, members],
            "within the cluster": inside[~np.eye(MODEL.members, dtype=bool)],
            "across types": np.concatenate([gains[-1, :-1], gains[:-1, -1]]),
        }
        pairs = zip(list(groups.items())[:-1], list(groups.items())[1:], strict=True)
        for (larger, above), (smaller, below) in pairs:
            what = f"ε = {epsilon}: smallest {larger} gain over largest {smaller}"
            measurements.append(Measurement(what, float(np.min(above) / np.max(below)), ">=", 1 + 1e3 * EPS))
    return Finding(measurements, {"gains": [[float(f"{value:.5g}") for value in row] for row in results.gains[0]]})
