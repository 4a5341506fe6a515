"""Theorem 5.1, the order of the five replay gains: Eqs. (15), (98)."""

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import LogNorm

from hopjax import asymptotics, gaps
from theory_checks.claim import QUICK_COMPILE, Z_LIMIT, Finding, Measurement, Setting, claim
from theory_checks.ensemble import GAINS, ensemble
from theory_checks.figures import CLUSTER, NEUTRAL, OTHER, OUTLIER
from theory_checks.ladder import EXCESS, LADDERS, fit_order, order_is
from theory_checks.phase_maps import draw_phases, in_lanes, phase_grid, phase_maps
from theory_checks.replay_identity import CANONICAL, canonical_gains

COLOURS = dict(zip(CANONICAL, (OUTLIER, CLUSTER, OTHER, NEUTRAL, NEUTRAL), strict=True))


@partial(jax.jit, compiler_options=QUICK_COMPILE)
def _lanes_of_log_gains(members: jax.Array, cosine: jax.Array, beta: jax.Array, dim: jax.Array) -> dict[str, Any]:
    """log χ and log(χS) of the five pairs, exact, and what Theorem 5.1's first inequality needs."""

    def one(members: jax.Array, cosine: jax.Array, beta: jax.Array, dim: jax.Array) -> dict[str, Any]:
        log_weights = gaps.replay_log_weights(members, cosine, beta)
        log_chi = [jax.nn.log_sigmoid(value) for value in log_weights]
        sharpness = gaps.sharpnesses(members, cosine, beta, dim)
        log_outlier, log_cluster = jnp.log(sharpness.outlier), jnp.log(sharpness.cluster)
        # χ_oS_o − χ_cS_c = χ_o(S_o − S_c) + S_c(χ_o − χ_c), of which only the small factors are differences:
        # χ_o − χ_c = (ℓ_c − ℓ_o)/((2−ℓ_o)(2−ℓ_c)).
        log_leaks = (
            jnp.log(members) + log_weights.outlier_cluster,
            jnp.logaddexp(jnp.log(members - 1) + log_weights.cluster_other, log_weights.cluster_outlier),
        )
        size = jnp.maximum(log_leaks[0], log_leaks[1])
        leak_difference = jnp.exp(log_leaks[1] - size) - jnp.exp(log_leaks[0] - size)
        twos = (2 - jnp.exp(log_leaks[0])) * (2 - jnp.exp(log_leaks[1]))
        from_sharpness = jnp.exp(log_chi[0]) * sharpness.sign * jnp.exp(sharpness.log_gap - size)
        return {
            "chi": jnp.stack(log_chi),
            "gain": jnp.stack([log_chi[0] + log_outlier, *(value + log_cluster for value in log_chi[1:4]), log_chi[4] + log_outlier]),
            "leak": jnp.stack(log_leaks),
            "self difference": from_sharpness + sharpness.cluster * leak_difference / twos,
            "self scale": size,
        }

    return jax.vmap(one)(members, cosine, beta, dim)


def _log_gains(members: Any, cosine: Any, beta: Any, dim: Any) -> dict[str, Any]:
    values: dict[str, Any] = in_lanes(_lanes_of_log_gains, members, cosine, beta, dim)
    return values


def _draw_susceptibilities(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    axes = figure.subplots()
    for name, line in values["remainders"].items():
        axes.loglog(line["leak"], line["remainder"], "o--" if name == "o ← c" else "o-", color=COLOURS[name], label=name)
    axes.set(xlabel="βℓ", ylabel="relative remainder of χ", title=values["title"])
    axes.legend()


@claim(
    "susceptibility-asymptotics",
    "Eq. (98)",
    "χ ≈ ½ − ℓ/4 of a memory replayed to itself, e^{−β(1−c)} within the cluster, and e^{−β} across types.",
    draw=_draw_susceptibilities,
    caption="Remainders of the five closed forms (98), relative to their leakage term (self) or to themselves (cross).",
)
def susceptibility_asymptotics(setting: Setting) -> Finding:
    rungs = len(EXCESS)
    members, cosine, dim = (np.repeat(np.array(column, float), rungs) for column in zip(*LADDERS, strict=True))
    excess = np.tile(EXCESS, len(LADDERS)) + np.log(members)

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def forms(members: jax.Array, cosine: jax.Array, beta: jax.Array) -> jax.Array:
        return jnp.stack(jax.vmap(asymptotics.log_susceptibilities)(members, cosine, beta), axis=1)

    measurements, remainders = [], {}
    for side, beta in (("outlier", excess), ("cluster", excess / (1 - cosine))):
        exact, form = _log_gains(members, cosine, beta, dim), np.asarray(forms(members, cosine, beta))
        log_chi, leaks = np.asarray(exact["chi"]), np.exp(np.asarray(exact["leak"]))
        for index, name in enumerate(CANONICAL):
            if (name[0] == "o") != (side == "outlier"):
                continue
            difference, step = np.expm1(log_chi[:, index] - form[:, index]), beta * leaks[:, 0 if side == "outlier" else 1]
            if index < 2:  # what (98) says beyond ½ is −ℓ/4
                difference = difference * np.exp(form[:, index]) / (np.exp(form[:, index]) - 0.5)
            for number, (k, c, _) in enumerate(LADDERS):
                part = slice(number * rungs, (number + 1) * rungs)
                measurements.append(order_is(f"{name} at K={k}, c={c} in βℓ", fit_order(step[part], difference[part]), 1.0))
            part = slice(rungs, 2 * rungs)
            remainders[name] = {"leak": step[part].tolist(), "remainder": np.abs(difference[part]).tolist()}
    ordered = {name: remainders[name] for name in CANONICAL}
    return Finding(measurements, {"remainders": ordered, "title": f"K = {LADDERS[1][0]}, c = {LADDERS[1][1]}"})


@claim(
    "theorem-5-1-limit",
    "Theorem 5.1, Eq. (15)",
    "As β → ∞, G(o←o) > G(c←c) > G(c←c′) ≫ G(c←o) ≍ G(o←c), for G = χ⟨ΔE⟩ at second order.",
)
def theorem_5_1_limit(setting: Setting) -> Finding:
    betas = np.geomspace(30, 1e4, 12)
    cases = [(k, c, d) for k in (2, 12, 1000) for c in (0.1, 0.5, 0.9) for d in (k + 1, 5000)]
    # β starts well inside the existence of both points for every case: 1 − c ≥ 0.1 and log K ≤ 7.
    columns = [np.repeat(np.array(column, float), len(betas)) for column in zip(*cases, strict=True)]
    beta = np.tile(betas, len(cases)) / (1 - columns[1])
    values = {name: np.asarray(part) for name, part in _log_gains(columns[0], columns[1], beta, columns[2]).items()}
    shape = (len(cases), len(betas))
    gain = values["gain"].reshape(*shape, 5)
    strict = values["self difference"].reshape(shape)
    log_ratio = gain[..., 2] - gain[..., 3]  # G(c←c′)/G(c←o)
    growth = log_ratio / (beta * columns[1]).reshape(shape)
    comparable = np.abs(gain[..., 3] - gain[..., 4])
    smallest = np.min(np.log(np.abs(strict)) + values["self scale"].reshape(shape))
    return Finding(
        [
            Measurement("points where G(o←o) > G(c←c) fails", int(np.sum(~(strict > 0))), "<=", 0),
            Measurement("points where G(c←c) > G(c←c′) fails", int(np.sum(~(gain[..., 1] > gain[..., 2]))), "<=", 0),
            Measurement("≫: smallest step of log G(c←c′)/G(c←o) along a ladder of β", float(np.min(np.diff(log_ratio, axis=1))), ">=", 1.0),
            Measurement("≫: |log ratio/(βc) − 1| at the ladder's end", float(np.max(np.abs(growth[:, -1] - 1))), "<=", 1e-3),
            Measurement("≍: largest |log G(c←o)/G(o←c)| on the ladder", float(np.max(comparable)), "<=", float(np.log(2))),
            Measurement("≍: the same at its end", float(np.max(comparable[:, -1])), "<=", 1e-9),
        ],
        note=f"β(1−c) from 30 to 10⁴, in logarithms: the first difference goes down to e^{smallest:.0f}. ≫ is a ratio that grows without "
        "bound (here as e^{βc}), ≍ one that stays between two constants (here it tends to one).",
    )


def _draw_theorem(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    figure.set_size_inches(9, 3.6 * len(series))
    for row, (preset, values) in zip(np.reshape(figure.subplots(len(series), 2), (-1, 2)), series.items(), strict=True):
        matrix = np.array(values["matrix"])
        image = row[0].imshow(matrix, norm=LogNorm(), cmap="cividis")
        ticks = [0, len(matrix) - 1]
        row[0].set(
            xticks=ticks, xticklabels=["ξ₁", "outlier"], yticks=ticks, yticklabels=["ξ₁", "outlier"], title=f"{preset}: ⟨G⟩ in ½ε²σ²"
        )
        row[0].set(xlabel="replayed", ylabel="target")
        row[0].grid(False)
        figure.colorbar(image, ax=row[0])
        for place, colour in enumerate(COLOURS.values()):
            row[1].errorbar(place, values["gain"][place], yerr=values["error"][place], fmt="o", capsize=5, color=colour)
            row[1].annotate(f"± {values['error'][place] / values['gain'][place]:.0e}", (place, values["gain"][place]), (0, 7), fontsize=7,
                            textcoords="offset points", ha="center", color=NEUTRAL)  # fmt: skip
        row[1].set(yscale="log", xticks=range(5), xticklabels=list(COLOURS), xlim=(-0.5, 4.5), title="target ← replayed")
        row[1].margins(y=0.15)


@claim(
    "theorem-5-1",
    "Theorem 5.1, Eq. (15)",
    "Averaged over small rotations, G(o←o) > G(c←c) > G(c←c′) ≫ G(c←o) ≍ G(o←c).",
    per_preset=True,
    draw=_draw_theorem,
    caption="Left: mean gain of every target from every replayed memory. Right: the five of Theorem 5.1 with their standard errors, which "
    "are smaller than the dots; relative ones are written.",
)
def theorem_5_1(setting: Setting) -> Finding:
    runs = ensemble(setting)
    mean, error = runs.pooled()
    gains, errors = ({name: float(value) for name, value in canonical_gains(part).items()} for part in (mean, error))
    names = list(CANONICAL)
    measurements = []
    for larger, smaller in [*itertools.pairwise(names[:4]), ("c ← c′", "o ← c")]:
        # Gains at one target share their rotations and are positively correlated: the sum of variances is an upper bound.
        score = (gains[larger] - gains[smaller]) / np.hypot(errors[larger], errors[smaller])
        measurements.append(Measurement(f"z of G({larger}) > G({smaller})", float(score), ">=", Z_LIMIT))
    much, alike = np.log(gains["c ← c′"] / gains["c ← o"]), abs(np.log(gains["c ← o"] / gains["o ← c"]))
    # One β cannot tell ≫ from >; the cross-type gains must at least be nearer to each other than to the next larger.
    measurements.append(Measurement("|log G(c←o)/G(o←c)| over log G(c←c′)/G(c←o)", float(alike / much), "<=", 1.0))
    scale = 0.5 * (setting.preset.epsilon * setting.preset.sigma) ** 2
    series = {
        "matrix": [[float(f"{value / scale:.5g}") for value in row] for row in mean[:, GAINS:]],
        "gain": [gains[name] / scale for name in names],
        "error": [errors[name] / scale for name in names],
    }
    return Finding(
        measurements,
        series,
        note=f"G(c←c′)/G(c←o) = {np.exp(much):.3g}, G(c←o)/G(o←c) = {gains['c ← o'] / gains['o ← c']:.3g}; by control variate.",
    )


@claim(
    "theorem-5-1-everywhere",
    "Theorem 5.1, beyond the paper",
    "G(o←o) > G(c←c) > G(c←c′) > G(c←o), G(o←c) at every finite β where both fixed points exist, for all 0 < c < 1.",
    draw=draw_phases,
    caption="Where all four inequalities hold at d = 4K + 2, exact at finite β and second order in ε. Line: onset of the two fixed points. "
    "Below: magnified at the onset, for small c.",
)
def theorem_5_1_everywhere(setting: Setting) -> Finding:
    broken: dict[str, int] = {"o ← o > c ← c": 0, "c ← c > c ← c′": 0, "c ← c′ > c ← o": 0, "c ← c′ > o ← c": 0}

    def signs(members: np.ndarray, cosine: np.ndarray, beta: np.ndarray) -> np.ndarray:
        values = _log_gains(members, cosine, beta, 4 * members + 2)
        gain = np.asarray(values["gain"])
        margins = np.stack(
            [np.asarray(values["self difference"]), gain[:, 1] - gain[:, 2], gain[:, 2] - gain[:, 3], gain[:, 2] - gain[:, 4]], axis=1
        )
        if len(cosine) > 1000:  # a map, not the search for the onset
            for name, column in zip(broken, margins.T, strict=True):
                broken[name] += int(np.sum((column <= 0) & (cosine > 0)))
        return np.min(margins, axis=1)

    series = phase_maps(signs, phase_grid(signs))
    failures = {str(entry["members"]): entry["failures"] for entry in series["maps"]}
    return Finding(
        [Measurement("grid points with 0 < c < 1 where an inequality fails", sum(failures.values()), "<=", 0)],
        series | {"failures": failures, "broken": broken},
        note=f"Failures by K: {failures}; by inequality: {broken}.",
    )
