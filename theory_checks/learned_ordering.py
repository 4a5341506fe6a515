r"""How many samples the ordering of Theorem 4.1 needs to survive learning.

The rise goes as $(d-1)|x^*|^2$, and a memory's norm is what the tied weights determine best: Fisher's information about the length of
one of M unit memories is $I = \beta^2[\pi/\beta + \pi(1-\pi)]$ a sample, π = 1/M, without overlap and in every dimension. The difference
of outlier and mean member, in units of d − 1, then has the standard deviation $2\sqrt{(1 + 1/K)/(nI)}$: to see a difference Δ at z of
them takes $n = 4z^2(1 + 1/K)/(I\Delta^2)$ samples. Errors across the memories, of squared size $d/(n\beta\pi)$, lower the cosines that
are learned and with them the difference itself: a second condition, n ≫ d/βπ.

With more memories than there are, learned ones share a true one. Weights are tied to norms, so that sharing shortens them: by 2β⁻¹ log 2
of the squared norm for two equal halves, 17 % at β = 8, against the 3 to 5 % to be seen. The ordering is then a matter of which are shared.

The check takes part of a grid that `survey` measures in full, 10² … 10⁶ samples in 8 … 512 dimensions: see docs/learned-ordering.md.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

import hopjax
from hopjax import boltzmann, cluster, gaps
from theory_checks.claim import QUICK_COMPILE, Finding, Measurement, Setting, claim
from theory_checks.figures import CLUSTER, NEUTRAL, OTHER, OUTLIER
from theory_checks.learned_memories import MODEL

RUNS = 16
SIZES, DIMS = (100, 1000, 10_000), (8, 128, 512)
TRUE = MODEL.members + 1
COUNTS = (TRUE - 1, TRUE, TRUE + 1, 2 * TRUE)  # memories learned, in the first of `DIMS`
COUNTED = SIZES[1:]  # from so many samples
FULL_SIZES, FULL_DIMS = (100, 1000, 10_000, 100_000, 1_000_000), (8, 32, 128, 512)


class Survival(NamedTuple):
    """Runs at one number of samples, dimension and number of learned memories.

    Attributes:
        gap: (run,): sharpness at the fixed point that the outlier flows to less the members' mean, in units of d − 1.
        above_all: (run,): whether it is above that of every member.
    """

    gap: NDArray[np.float64]
    above_all: NDArray[np.bool_]


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _learn(key: jax.Array, samples: int, dim: int, count: int, runs: int) -> jax.Array:
    true = cluster.memories(MODEL.members, dim, MODEL.cosine, dtype=jnp.float32)

    def one(key: jax.Array) -> jax.Array:
        draw, learn = jax.random.split(key)
        data = hopjax.sample_boltzmann(draw, true, MODEL.beta, (samples,))
        return boltzmann.fit(learn, data, count, MODEL.beta, method=boltzmann.EM(150, 1e-4)).memories

    return lax.map(one, jax.random.split(key, runs))


@partial(jax.jit, compiler_options=QUICK_COMPILE)
def _sharpness(states: jax.Array, memories: jax.Array) -> jax.Array:
    """At the fixed points of each run's memories that the states flow to."""

    def at(x: jax.Array, memories: jax.Array) -> jax.Array:
        point = hopjax.fixed_point(x, memories, MODEL.beta, method=hopjax.Picard(), max_steps=2000).state
        return hopjax.sharpness(point, memories, MODEL.beta)

    return jax.vmap(jax.vmap(at, in_axes=(0, None)), in_axes=(None, 0))(states, memories)


def survival(key: jax.Array, samples: int, dim: int, count: int = TRUE, runs: int = RUNS) -> Survival:
    """Learns so many memories in each run and compares the sharpness where the true ones flow to."""
    found = jnp.asarray(_learn(key, samples, dim, count, runs), float)
    sharpness = np.asarray(_sharpness(cluster.memories(MODEL.members, dim, MODEL.cosine), found)) / (dim - 1)
    outlier, members = sharpness[:, -1], sharpness[:, :-1]
    return Survival(outlier - members.mean(axis=1), outlier > members.max(axis=1))


def _key(setting: Setting, samples: int, dim: int) -> jax.Array:
    return jax.random.fold_in(setting.key("learned-ordering"), 1000 * dim + samples)


def survey(setting: Setting) -> Iterator[str]:
    """The whole grid, a line of a Markdown table for each number of samples, dimension and number of memories; it takes half an hour."""
    yield f"| samples | d | memories | difference | deviation of a run | predicted | runs of {RUNS}: above the mean | above every member |"
    yield "|" + "---:|" * 8
    for samples in FULL_SIZES:
        for dim in FULL_DIMS:
            for count in COUNTS if dim == FULL_DIMS[0] else (TRUE,):
                run = survival(_key(setting, samples, dim), samples, dim, count)
                seen = f"{run.gap.mean():.4f} | {run.gap.std(ddof=1):.4f} | {predicted_deviation(samples):.4f}"
                yield f"| {samples:,} | {dim} | {count} | {seen} | {np.sum(run.gap > 0)} | {np.sum(run.above_all)} |"


def predicted_deviation(samples: int) -> float:
    """Standard deviation of `Survival.gap` by the information about lengths alone."""
    share = 1 / (MODEL.members + 1)
    information = MODEL.beta**2 * (share / MODEL.beta + share * (1 - share))
    return float(2 * np.sqrt((1 + 1 / MODEL.members) / (samples * information)))


def _draw(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    figure.set_size_inches(9, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for (dim, line), colour in zip(values["dims"].items(), (CLUSTER, OUTLIER, OTHER), strict=True):
        left.errorbar(line["samples"], line["gap"], yerr=line["deviation"], fmt="o-", capsize=4, color=colour, label=f"d = {dim}")
        left.axhline(line["exact"], color=colour, linewidth=0.8, linestyle="--")
    left.set(xscale="log", xlabel="samples", ylabel="(S_o − S_c)/(d − 1), learned", title="estimation noise")
    left.legend()
    for place, sizes in enumerate(values["counts"].values()):
        for (size, runs), shift, face in zip(sizes.items(), (-0.2, 0.2), ("none", CLUSTER), strict=True):
            label = f"{int(size):,} samples" if place == 0 else None
            places = place + shift + np.linspace(-0.15, 0.15, len(runs))
            right.plot(places, sorted(runs), "o", markersize=3.5, color=CLUSTER, markerfacecolor=face, label=label)
    right.axhline(values["dims"][str(DIMS[0])]["exact"], color=CLUSTER, linewidth=0.8, linestyle="--")
    right.set(xticks=range(len(COUNTS)), xticklabels=values["counts"], xlabel="memories learned", title="each run")
    right.legend()
    for axes in (left, right):
        axes.axhline(0, color=NEUTRAL, linewidth=0.8)


@claim(
    "learned-ordering",
    "Section 4.2, beyond the paper",
    "The outlier stays sharper than the mean cluster member in each run once samples tell norms apart, in any dimension.",
    draw=_draw,
    caption=f"Difference of sharpness after maximum likelihood; dashed: true memories. Left: {TRUE} memories learned, as many as there "
    f"are; mean over {RUNS} runs ± one standard deviation of a run. Right: fewer and more of them, every run, d = {DIMS[0]}.",
)
def learned_ordering(setting: Setting) -> Finding:
    measurements, notes = [], []
    dims: dict[str, dict[str, Any]] = {}
    for dim in DIMS:
        exact = float(gaps.sharpnesses(float(MODEL.members), MODEL.cosine, MODEL.beta, float(dim)).gap) / (dim - 1)
        runs = [survival(_key(setting, n, dim), n, dim) for n in SIZES]
        deviations = [float(run.gap.std(ddof=1)) for run in runs]
        dims[str(dim)] = {"samples": SIZES, "gap": [float(run.gap.mean()) for run in runs], "deviation": deviations, "exact": exact}
        broken = int(np.sum(runs[-1].gap <= 0))
        # A run fails with a probability below 1e-4, two of 16 do with one below 2e-6.
        measurements.append(Measurement(f"runs of {RUNS} in which it fails, {SIZES[-1]:,} samples, d = {dim}", broken, "<=", 1, 2e-6))
        # χ² with 15 degrees of freedom.
        ratio = deviations[-1] / predicted_deviation(SIZES[-1])
        measurements.append(Measurement(f"deviation of the difference over the predicted one, d = {dim}", ratio, "<=", 2.0, 3e-7))
        measurements.append(Measurement(f"the same, d = {dim}", ratio, ">=", 0.4, 1e-4))
        needed = (5 * predicted_deviation(1) / exact) ** 2
        alive = ", ".join(f"{np.mean(run.above_all):.2f} at n = {n:,}" for n, run in zip(SIZES, runs, strict=True))
        notes.append(f"d = {dim}: five deviations take {needed:,.0f} samples; above every member in {alive}")
    counts: dict[int, dict[int, Any]] = {count: {} for count in COUNTS}
    for n in COUNTED:
        shares = []
        for count in COUNTS:
            run = survival(_key(setting, n, DIMS[0]), n, DIMS[0], count)
            counts[count][n] = run.gap
            shares.append(f"{np.mean(run.gap > 0):.2f} ({np.mean(run.above_all):.2f}) with {count}")
        notes.append(f"share of runs above the mean member (every member), of memories learned, n = {n:,}: {', '.join(shares)}")
    return Finding(measurements, {"dims": dims, "counts": counts}, note=f"{'; '.join(notes)}.")
