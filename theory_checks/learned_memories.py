"""Figures 3(a) and 4: memories learned by maximum likelihood, and whether they are forgotten and replayed as the theory says."""

import itertools
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.colors import LogNorm
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import linear_sum_assignment

import hopjax
from hopjax import boltzmann, cluster
from theory_checks.claim import Z_LIMIT, Finding, Measurement, Preset, Setting, claim, z_score
from theory_checks.figures import CLUSTER, OTHER, OUTLIER

# K, d, β, Adam's rate and the batch are the paper's; c, σ, ε, the samples and the steps are not known, and these are ours.
MODEL = Preset("learned", members=5, dim=32, cosine=0.35, beta=8.0, epsilon=0.05, sigma=hopjax.half_difference(32))
SAMPLES = 20_000
# Adam's noise at this rate moves a single rise by as much as the difference to be seen: 32 seeds resolve it at some 5 standard errors.
SEEDS = 32
# The true differences lie near six of Adam's standard errors: a limit of 5.5 would be missed every third time, one of two by P(z < −4).
ADAM_Z_LIMIT, ADAM_FALSE_ALARM = 2.0, 3.2e-5
METHODS: dict[str, boltzmann.Method] = {"maximum likelihood": boltzmann.EM(), "Adam": boltzmann.Adam(steps=3000, rate=1e-2, batch=256)}


class Learned(NamedTuple):
    """What each seed learned, by EM or Adam; memories in the order of the true ones that they were matched to.

    Attributes:
        true: the true memories, turned at random for each seed: Adam's steps depend on the axes.
        memories: (seed, memory, d).
        log_likelihood: mean log p of the samples, and that of the true memories.
        converged: of each seed.
        rises: (seed, target): ⟨ΔE⟩ at the fixed point that the target flows to.
        gains: (seed, target, replayed): ⟨G⟩.
        own: (seed, target): the weight of the target itself at its fixed point.
    """

    true: NDArray[np.float64]
    memories: NDArray[np.float64]
    log_likelihood: tuple[NDArray[np.float64], NDArray[np.float64]]
    converged: NDArray[np.bool_]
    rises: NDArray[np.float64]
    gains: NDArray[np.float64]
    own: NDArray[np.float64]


@lru_cache(maxsize=2)
def _data(setting: Setting) -> tuple[jax.Array, jax.Array]:
    """True memories and samples of every seed, in the single precision that is enough for what is learned from them."""

    @jax.jit
    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            turn, sample = jax.random.split(key)
            axes, _ = jnp.linalg.qr(jax.random.normal(turn, (MODEL.dim, MODEL.dim), jnp.float32))
            true = cluster.memories(MODEL.members, MODEL.dim, MODEL.cosine, dtype=jnp.float32) @ axes
            return true, hopjax.sample_boltzmann(sample, true, MODEL.beta, (SAMPLES,))

        return jax.vmap(one)(jax.random.split(key, SEEDS))

    return draw(setting.key("learned-memories"))


def match(found: NDArray[np.float64], true: NDArray[np.float64]) -> NDArray[np.float64]:
    """`found` in the order that makes the sum of squared distances to `true` least."""
    _, order = linear_sum_assignment(np.sum((true[:, None] - found[None]) ** 2, axis=2))
    return found[order]


@jax.jit
def _likelihoods(true: jax.Array, samples: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, m: boltzmann.expectation(x, m, MODEL.beta).log_likelihood)(samples, true)


@lru_cache(maxsize=4)
def learned(setting: Setting, method: str) -> Learned:
    true, samples = _data(setting)

    @jax.jit
    def train(key: jax.Array, samples: jax.Array) -> boltzmann.Fit:
        def one(inputs: tuple[jax.Array, jax.Array]) -> boltzmann.Fit:
            key, x = inputs
            return boltzmann.fit(key, x, MODEL.members + 1, MODEL.beta, method=METHODS[method])

        # Seeds converge after 10 to 60 of EM's steps: together they would all take 60. Adam's are as many for all, and small.
        together = 1 if isinstance(METHODS[method], boltzmann.EM) else SEEDS
        return lax.map(one, (jax.random.split(key, SEEDS), samples), batch_size=together)

    fits = train(setting.key(f"learned-memories/{method}"), samples)
    true64 = np.asarray(true, float)
    memories = np.stack([match(found, origin) for found, origin in zip(np.asarray(fits.memories, float), true64, strict=True)])
    law = hopjax.PlanarLaw(angle=hopjax.generator_bound(MODEL.dim, MODEL.epsilon, MODEL.sigma))

    @jax.jit
    def evaluate(key: jax.Array, memories: jax.Array) -> tuple[jax.Array, jax.Array]:
        def average(key: jax.Array, state: jax.Array, memories: jax.Array) -> tuple[jax.Array, jax.Array]:
            point = hopjax.fixed_point(state, memories, MODEL.beta, method=hopjax.Picard()).state
            log_weights = hopjax.log_weight_matrix(point[None], memories, memories, MODEL.beta)[0]

            def observable(rise: jax.Array) -> jax.Array:
                gains = hopjax.gain(log_weights, jnp.broadcast_to(rise, log_weights.shape), MODEL.beta)
                return jnp.concatenate([rise[None], gains])

            means = hopjax.rotation_average(
                key, point, memories, MODEL.beta, epsilon=MODEL.epsilon, sigma=MODEL.sigma,
                draws=2 * (setting.rotations // 2), observable=observable, law=law,
            ).mean  # fmt: skip
            return means, jnp.exp(log_weights)

        def of_seed(key: jax.Array, memories: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.vmap(average, in_axes=(0, 0, None))(jax.random.split(key, len(memories)), memories, memories)

        return lax.map(lambda pair: of_seed(*pair), (jax.random.split(key, SEEDS), memories))

    means, weights = (np.asarray(part) for part in evaluate(setting.key(f"learned-rotations/{method}"), jnp.asarray(memories)))
    likelihoods = (np.asarray(fits.log_likelihood, float), np.asarray(_likelihoods(true, samples), float))
    own = weights[:, np.arange(MODEL.members + 1), np.arange(MODEL.members + 1)]
    return Learned(true64, memories, likelihoods, np.asarray(fits.converged), means[..., 0], means[..., 1:], own)


def _expected() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rises and gains of the true memories at second order."""

    @jax.jit
    def evaluate() -> tuple[jax.Array, jax.Array]:
        memories = cluster.memories(MODEL.members, MODEL.dim, MODEL.cosine)
        points = jax.vmap(lambda x: hopjax.fixed_point(x, memories, MODEL.beta, method=hopjax.Picard()).state)(memories)
        rises = jax.vmap(lambda x: hopjax.second_order_rise(x, memories, MODEL.beta, epsilon=MODEL.epsilon, sigma=MODEL.sigma))(points)
        return rises, hopjax.gain_matrix(points, memories, memories, rises, MODEL.beta)

    rises, gains = evaluate()
    return np.asarray(rises), np.asarray(gains)


T_FALSE_ALARM = 1e-5


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of (seed, …) values and its standard error over seeds; other axes are averaged first."""
    means = values.reshape(len(values), -1).mean(axis=1)
    return float(means.mean()), float(means.std(ddof=1) / len(means) ** 0.5)


def t_score(what: str, difference: float, standard_error: float, seeds: int) -> Measurement:
    """|difference| in standard errors that were estimated from so many seeds: Student's t, not a normal z."""
    limit = float(stats.t.isf(T_FALSE_ALARM / 2, seeds - 1))
    return Measurement(f"|t|, {what}", abs(difference) / standard_error, "<=", limit, T_FALSE_ALARM)


@claim(
    "learned-likelihood",
    "Section 3.2",
    "The MHN's Boltzmann distribution is learned by maximum likelihood: the memories are found as exactly as samples determine them.",
)
def learned_likelihood(setting: Setting) -> Finding:
    found = learned(setting, "maximum likelihood")
    count = found.memories[0].size
    # Wilks: twice the gain in likelihood over the truth follows χ² with as many degrees of freedom as there are parameters.
    gain = 2 * SAMPLES * (found.log_likelihood[0] - found.log_likelihood[1])
    # Hotelling: along a memory its norm is tied to the weights, across it the information is β·π·n at most; overlap loses some.
    errors = np.sum((found.memories - found.true) ** 2, axis=(1, 2)) / (count / (SAMPLES / len(found.true[0]) * MODEL.beta))
    return Finding(
        [
            z_score("2n(log p − log p of the truth) against χ², 32 seeds", gain.mean() - count, (2 * count / SEEDS) ** 0.5),
            Measurement("seeds that did not converge", int(np.sum(~found.converged)), "<=", 0),
            Measurement("mean squared error over that of samples with known labels", float(errors.mean()), "<=", 2.0),
        ],
        note=f"EM with an exact M-step, weights tied to norms; squared errors are {errors.mean():.3g} of what samples with known labels "
        "would leave.",
    )


@claim(
    "learned-likelihood-adam",
    "Section 3.2, Appendix H",
    "Adam at 1e-2 and batch 256 ends within sampling error of the maximum likelihood.",
)
def learned_likelihood_adam(setting: Setting) -> Finding:
    best, found = learned(setting, "maximum likelihood"), learned(setting, "Adam")
    count = best.memories[0].size
    lost = 2 * SAMPLES * (best.log_likelihood[0] - found.log_likelihood[0])
    far = np.linalg.norm(found.memories - best.memories, axis=2).max()
    return Finding(
        [
            Measurement("mean of 2n(log p of the maximum − log p of Adam) over the parameters", float(lost.mean() / count), "<=", 1.0),
            Measurement("farthest that Adam leaves a memory from the maximum", float(far), "<=", 0.5),
        ],
        note="1 is what sampling itself costs on average. A constant rate r leaves coordinates with variance ≈ rσ/2H, σ the batch "
        "gradient's deviation and H the curvature, which is several times that of sampling.",
    )


@claim(
    "learned-fixed-points",
    "Sections 3.1 and 4.2",
    "Every learned memory has a fixed point of the learned energy of its own.",
)
def learned_fixed_points(setting: Setting) -> Finding:
    return Finding(
        [Measurement(f"smallest own weight, {name}, {SEEDS} seeds", float(learned(setting, name).own.min()), ">=", 0.5) for name in METHODS]
    )


def _draw_rises(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    axes = figure.subplots()
    count = len(values["expected"])
    for shift, (name, colour) in zip((-0.12, 0.12), (("maximum likelihood", CLUSTER), ("Adam", OTHER)), strict=True):
        mean, error = np.array(values[name]["mean"]), np.array(values[name]["error"])
        axes.errorbar(np.arange(count) + shift, mean, yerr=2 * error, fmt="o", capsize=3, color=colour, label=name)
    axes.plot(range(count), values["expected"], "_", markersize=28, color=OUTLIER, label="closed form")
    axes.set(xticks=range(count), xticklabels=[f"ξ{i}" for i in range(1, count)] + ["outlier"], ylabel="⟨ΔE⟩", title="after learning")
    axes.legend()


@claim(
    "figure-3a",
    "Figure 3(a)",
    "The fixed point of the learned outlier has a larger rotation-averaged energy rise than those of the learned cluster members.",
    draw=_draw_rises,
    caption="Rotation-averaged energy rises of the learned memories' fixed points, matched to the true ones: mean over seeds ± 2 standard "
    "errors.",
)
def figure_3a(setting: Setting) -> Finding:
    expected, _ = _expected()
    series: dict[str, Any] = {"expected": expected}
    measurements, notes = [], []
    for name in METHODS:
        rises = learned(setting, name).rises
        series[name] = dict(zip(("mean", "error"), np.transpose([interval(column) for column in rises.T]), strict=True))
        gap, gap_error = interval(rises[:, -1] - rises[:, :-1].mean(axis=1))
        limit, false_alarm = (ADAM_Z_LIMIT, ADAM_FALSE_ALARM) if name == "Adam" else (Z_LIMIT, 1e-9)
        measurements.append(
            Measurement(f"z of outlier > mean of the members, {name}, {SEEDS} seeds", float(gap / gap_error), ">=", limit, false_alarm)
        )
        notes.append(f"{name}: {gap / expected[0]:.3f} ± {gap_error / expected[0]:.3f}")
    predicted = (expected[-1] - expected[0]) / expected[0]
    return Finding(measurements, series, note=f"Outlier over members, less one: {', '.join(notes)}; closed form {predicted:.3f}.")


@claim(
    "figure-3a-every-seed",
    "Figure 3(a)",
    "In every training run the learned outlier's rise is larger than that of every learned cluster member.",
)
def figure_3a_every_seed(setting: Setting) -> Finding:
    measurements = []
    for name in METHODS:
        rises = learned(setting, name).rises
        broken = int(np.sum(rises[:, -1] <= rises[:, :-1].max(axis=1)))
        measurements.append(Measurement(f"of {SEEDS} runs, those where it is not: {name}", broken, "<=", 0))
    return Finding(
        measurements[::-1],
        note="The rise goes as the squared norm of the fixed point, and the difference is 3.6 % of it: Adam's noise in the norms hides it "
        "in a single run, the samples' own does not.",
    )


GROUPS = ("o ← o", "c ← c", "c ← c′", "c ← o", "o ← c")


def canonical(gains: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Means of (seed, target, replayed) gains over the pairs of each kind, by seed."""
    inside = gains[:, :-1, :-1]
    same = np.eye(inside.shape[1], dtype=bool)
    parts = (gains[:, -1:, -1], inside[:, same], inside[:, ~same], gains[:, :-1, -1], gains[:, -1, :-1])
    return {name: part.mean(axis=1) for name, part in zip(GROUPS, parts, strict=True)}


def _draw_gains(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    figure.set_size_inches(9, 3.8)
    left, right = figure.subplots(1, 2)
    matrix = np.array(values["matrix"])
    image = left.imshow(matrix, norm=LogNorm(), cmap="cividis")
    labels = [f"ξ{i}" for i in range(1, len(matrix))] + ["outlier"]
    left.set(xticks=range(len(matrix)), yticks=range(len(matrix)), xlabel="replayed", ylabel="target", title="⟨G⟩, Adam")
    left.set_xticklabels(labels, rotation=90)
    left.set_yticklabels(labels)
    left.grid(False)
    figure.colorbar(image, ax=left)
    for shift, (name, colour) in zip((-0.12, 0.12), (("maximum likelihood", CLUSTER), ("Adam", OTHER)), strict=True):
        mean, error = np.array(values[name]["mean"]), np.array(values[name]["error"])
        right.errorbar(np.arange(5) + shift, mean, yerr=2 * error, fmt="o", capsize=3, color=colour, label=name)
    right.plot(range(5), values["expected"], "_", markersize=24, color=OUTLIER, label="closed form")
    right.set(yscale="log", xticks=range(5), xticklabels=GROUPS, title="target ← replayed")
    right.legend()


@claim(
    "figure-4",
    "Figure 4",
    "After learning, the outlier's self-gain is largest, then the members', then those within the cluster, then across types.",
    draw=_draw_gains,
    caption="Left: mean over seeds of the rotation-averaged replay gain of every learned memory from every other. Right: means over the "
    "pairs of each kind ± 2 standard errors over seeds.",
)
def figure_4(setting: Setting) -> Finding:
    _, expected = _expected()
    series: dict[str, Any] = {"expected": [float(value[0]) for value in canonical(expected[None]).values()]}
    measurements = []
    for name in METHODS:
        gains = learned(setting, name).gains
        groups = canonical(gains)
        mean, error = np.transpose([interval(groups[group]) for group in GROUPS])
        series[name] = {"mean": mean, "error": error}
        for larger, smaller in [*itertools.pairwise(GROUPS[:4]), ("c ← c′", "o ← c")]:
            difference, spread = interval(groups[larger] - groups[smaller])
            limit, false_alarm = (ADAM_Z_LIMIT, ADAM_FALSE_ALARM) if name == "Adam" else (Z_LIMIT, 1e-9)
            measurements.append(
                Measurement(f"z of G({larger}) > G({smaller}), {name}", float(difference / spread), ">=", limit, false_alarm)
            )
        much, alike = np.log(mean[2] / mean[3]), abs(np.log(mean[3] / mean[4]))
        measurements.append(Measurement(f"|log G(c←o)/G(o←c)| over log G(c←c′)/G(c←o), {name}", float(alike / much), "<=", 1.0))
        series["matrix"] = gains.mean(axis=0)
    return Finding(measurements, series)
