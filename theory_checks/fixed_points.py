"""The symmetry-reduced fixed points held against the full retrieval map: Eqs. (20)-(28)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

import hopjax
from hopjax import cluster
from theory_checks.claim import Finding, Measurement, Setting, claim
from theory_checks.figures import CLUSTER, OTHER, OUTLIER
from theory_checks.phase_maps import in_lanes

EPS = float(np.finfo(float).eps)
TOLERANCE = 1e-13  # |x − T(x)| at which the iteration stops


def symmetric_logs(members: Any, cosine: Any, beta: Any) -> dict[str, np.ndarray]:
    """Solutions of the scalar equations at matching arrays of K, c and β, in float64.

    Returns: the logarithms p, q (at the outlier) and a, b, r (at a member) of the weights, of the leakages "outlier" and "cluster", and the
    solvers' "outlier condition" and "cluster condition"; NaN where there is no fixed point.
    """

    @jax.jit
    @jax.vmap
    def solve(members: jax.Array, cosine: jax.Array, beta: jax.Array) -> dict[str, jax.Array]:
        outlier, member = cluster.outlier_point(members, cosine, beta), cluster.cluster_point(members, cosine, beta)
        found = {"p": outlier.log_self, "q": outlier.log_member, "outlier condition": outlier.condition}
        found |= {"a": member.log_self, "b": member.log_other, "r": member.log_outlier, "cluster condition": member.condition}
        found |= {"outlier": cluster.log_outlier_leakage(outlier, members)}
        return found | {"cluster": cluster.log_cluster_leakage(member, members)}

    points = np.broadcast_arrays(members, cosine, beta)
    solved = in_lanes(solve, *(part.ravel() for part in points))
    return {name: part.reshape(points[0].shape) for name, part in solved.items()}


def _weights_in_50_digits(members: int, cosine: float, beta: float, near_outlier: bool) -> list[float]:
    """Logarithms of the distinct weights: Eqs. (20)-(22) or (23)-(25) solved as they stand, from the memory itself."""
    with mpmath.workdps(50):
        k, c, b = members, mpmath.mpf(cosine), mpmath.mpf(beta)
        if near_outlier:

            def equation(log_ratio: Any) -> Any:
                p = 1 / (1 + k * mpmath.exp(-log_ratio))
                q = p * mpmath.exp(-log_ratio)
                return log_ratio - b * (p - q * (1 + (k - 1) * c))

            y = mpmath.findroot(equation, b)
            p = 1 / (1 + k * mpmath.exp(-y))
            return [float(mpmath.log(p)), float(mpmath.log(p) - y)]

        def equations(to_other: Any, to_outlier: Any) -> list[Any]:
            a = 1 / (1 + (k - 1) * mpmath.exp(-to_other) + mpmath.exp(-to_outlier))
            other, outlier = a * mpmath.exp(-to_other), a * mpmath.exp(-to_outlier)
            return [to_other - b * (1 - c) * (a - other), to_outlier - b * (a + (k - 1) * other * c - outlier)]

        y, z = mpmath.findroot(equations, (b * (1 - c), b))
        log_a = -mpmath.log(1 + (k - 1) * mpmath.exp(-y) + mpmath.exp(-z))
        return [float(log_a), float(log_a - y), float(log_a - z)]


def _draw_weights(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    axes = figure.subplots()
    for name, colour, line, label in (
        ("outlier member", OUTLIER, "-", "q: a member, at the outlier"),
        ("cluster other", CLUSTER, "-", "b: another member, at a member"),
        ("cluster outlier", OTHER, "--", "r: the outlier, at a member"),
    ):
        axes.semilogy(values["beta"], np.exp(values[name]), line, color=colour, label=label)
        axes.semilogy(values["beta"], np.exp(values[f"{name}, iterated"]), "o", color=colour, markersize=4)
    axes.set(xlabel="β", ylabel="off-memory weight", title="K = 12, c = 0.35: scalar equations (lines), iterated map (dots)")
    axes.legend(frameon=False)


@claim(
    "symmetric-fixed-points",
    "Eqs. (20)-(28)",
    "By symmetry the fixed points near the outlier and near a cluster member reduce to the scalar equations (22) and (25).",
    draw=_draw_weights,
    caption="Off-memory weights at the two fixed points: solutions of the scalar equations, and the iterated retrieval map.",
)
def symmetric_fixed_points(setting: Setting) -> Finding:
    cosines, ratios = (-0.05, 0.0, 0.35, 0.5, 0.8), np.array([1.3, 1.6, 2.0, 3.0, 5.0])
    sizes = (3, 12)

    @partial(jax.jit, static_argnums=0)
    def geometry(members: int) -> tuple[jax.Array, jax.Array]:
        rows = jnp.stack([cluster.memories(members, members + 1, cosine) for cosine in cosines])
        return rows, rows[:, jnp.array([0, -1])]

    @jax.jit
    def iterate(starts: jax.Array, memories: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def one(start: jax.Array, memories: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            # Picard iterates T itself and cannot leave the basin of the memory that it starts from.
            point = hopjax.fixed_point(start, memories, beta, method=hopjax.Picard(), tolerance=TOLERANCE)
            return hopjax.log_weights(point.state, memories, beta), memories @ point.state, point.converged

        over_betas = jax.vmap(jax.vmap(one, in_axes=(0, None, None)), in_axes=(None, None, 0))
        return jax.vmap(over_betas)(starts, memories, beta)

    onsets = [float(onset) for onset in jax.jit(jax.vmap(cluster.critical_effective_beta))(np.array(sizes, float))]
    c = np.asarray(cosines)[:, None]
    betas = np.asarray(onsets)[:, None, None] * ratios / (1 - c)
    solved = symmetric_logs(np.asarray(sizes)[:, None, None], c, betas)
    worst: dict[str, float] = dict.fromkeys(("iterated", "logit", "outlier equation", "cluster equation", "effective"), 0.0)

    def record(name: str, errors: np.ndarray) -> None:
        worst[name] = float(np.maximum(worst[name], np.max(errors)))  # np.maximum keeps a NaN

    for index, members in enumerate(sizes):
        beta, logs = betas[index], {name: part[index] for name, part in solved.items()}
        log_p, log_q, log_a, log_b, log_r = (logs[name] for name in "pqabr")
        at_outlier, at_member = logs["outlier condition"], logs["cluster condition"]
        p, q, a, b, r = np.exp(log_p), np.exp(log_q), np.exp(log_a), np.exp(log_b), np.exp(log_r)
        pull = 1 + (members - 1) * c

        # A residual τ moves a logit by at most βτ and a logarithm of a ratio by 2βτ; the condition is what the equations make of it.
        def unit(log_weight: np.ndarray, condition: np.ndarray, beta: np.ndarray, members: int) -> np.ndarray:
            return np.asarray(condition * (2 * beta * TOLERANCE + 8 * EPS * np.maximum(1, np.abs(log_weight)) + (members + 5) * EPS * beta))

        rows, starts = geometry(members)
        log_weights, overlaps, converged = (np.asarray(part) for part in iterate(starts, rows, beta))
        if not converged.all():
            return Finding([Measurement("share of iterations that converged", float(converged.mean()), ">=", 1.0)])
        from_member, from_outlier = np.moveaxis(log_weights, 2, 0)
        weights = [
            (from_outlier[..., -1:], log_p, at_outlier),
            (from_outlier[..., :-1], log_q, at_outlier),
            (from_member[..., :1], log_a, at_member),
            (from_member[..., 1:-1], log_b, at_member),
            (from_member[..., -1:], log_r, at_member),
        ]
        for full, scalar, condition in weights:
            record("iterated", np.abs(full - scalar[..., None]) / unit(scalar, condition, beta, members)[..., None])
        by_member, by_outlier = np.moveaxis(overlaps, 2, 0)
        logits = [  # Eqs. (21) and (24), over β
            (by_outlier[..., -1], p, at_outlier),
            (by_outlier[..., 0], q * pull, at_outlier),
            (by_member[..., 0], a + (members - 1) * b * c, at_member),
            (by_member[..., 1], b + (a + (members - 2) * b) * c, at_member),
            (by_member[..., -1], r, at_member),
        ]
        for full, formula, condition in logits:
            record("logit", np.abs(full - formula) * beta / unit(beta * formula, condition, beta, members))
        # Each side is a few roundings of logarithms and of β, times the condition that the solver promises.
        equations = [
            ("outlier equation", log_p - log_q, beta * (p - q * pull), at_outlier),
            ("cluster equation", log_a - log_b, beta * (1 - c) * (a - b), at_member),
            ("cluster equation", log_a - log_r, beta * (a + (members - 1) * b * c - r), at_member),
            ("effective", (log_a - log_b) / (a - b), beta * (1 - c), at_member / (a - b)),
        ]
        for name, left, right, condition in equations:
            record(name, np.abs(left - right) / (32 * EPS * np.maximum(1, beta) * condition))

    # K = 12 again, without the outlier: Eq. (28) at the order parameter (27) of the iterated map.
    log_weights, _, converged = (np.asarray(part) for part in iterate(np.asarray(starts)[:, :1], np.asarray(rows)[:, :-1], beta))
    order = np.exp(log_weights[:, :, 0, 0]) - np.exp(log_weights[:, :, 0, 1])
    curie_weiss = np.log((1 + (members - 1) * order) / (1 - order)) - beta * (1 - c) * order
    # As above; and 1 − m is a difference of rounded numbers.
    scale = at_member * (2 * beta * TOLERANCE + (members + 5) * EPS * beta) + 8 * EPS / (1 - order)
    row = 2
    series: dict[str, Any] = {"beta": beta[row].tolist(), "outlier member": log_q[row].tolist(), "cluster other": log_b[row].tolist()}
    series |= {"cluster outlier": log_r[row].tolist(), "outlier member, iterated": from_outlier[row, :, 0].tolist()}
    series |= {"cluster other, iterated": from_member[row, :, 1].tolist()}
    series |= {"cluster outlier, iterated": from_member[row, :, -1].tolist()}
    return Finding(
        [
            Measurement("largest |log weight, iterated T − scalar| over its bound, 50 points", worst["iterated"], "<=", 1.0),
            Measurement("largest error of the logits (21), (24) over its bound", worst["logit"], "<=", 1.0),
            Measurement("largest residual of (22) over its rounding", worst["outlier equation"], "<=", 1.0),
            Measurement("largest residual of (25) over its rounding", worst["cluster equation"], "<=", 1.0),
            Measurement("largest error of β_eff (26) over its rounding", worst["effective"], "<=", 1.0),
            Measurement(
                "largest residual of (28) without the outlier over its bound", float(np.max(np.abs(curie_weiss) / scale)), "<=", 1.0
            ),
            _against_50_digits(),
        ],
        series,
    )


def _against_50_digits() -> Measurement:
    """Log weights against 50-digit solutions, in units of the solver's stated accuracy."""
    points = np.array([(12.0, 0.35, 8.0), (10.0, 0.5, 20.0), (4.0, -0.2, 6.0), (100.0, 0.8, 60.0), (5.0, 0.0, 300.0)])

    solved, errors = symmetric_logs(*points.T), []
    for names, side in (("pq", "outlier"), ("abr", "cluster")):
        for index, (members, cosine, beta) in enumerate(points):
            exact = _weights_in_50_digits(int(members), cosine, beta, near_outlier=side == "outlier")
            for name, log in zip(names, exact, strict=True):
                accuracy = 8 * EPS * max(1.0, abs(log)) * solved[f"{side} condition"][index]
                errors.append(abs(log - solved[name][index]) / accuracy)
    return Measurement(
        "largest error of a log weight over the solver's stated accuracy, against 50 digits", float(np.max(errors)), "<=", 1.0
    )
