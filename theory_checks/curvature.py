"""Curvature of the energy and its expansion in the leakage: Eqs. (10), (56)-(58), (60)-(62), (76), (77)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

import hopjax
from hopjax import asymptotics, cluster
from theory_checks.claim import Finding, Measurement, Setting, claim
from theory_checks.figures import CLUSTER, NEUTRAL, OTHER, OUTLIER
from theory_checks.ladder import fit_order, order_is

EPS = float(np.finfo(float).eps)


def _second_difference(state: np.ndarray, memories: np.ndarray, beta: float, i: int, j: int) -> float:
    """∂²E/∂x_i∂x_j by central differences in 60 digits: with h = 10⁻²⁰ the O(h²) error is far below a double's rounding."""
    with mpmath.workdps(60):
        h = mpmath.mpf(10) ** -20
        rows = [[mpmath.mpf(float(entry)) for entry in row] for row in memories]

        def energy(signs: tuple[int, int]) -> Any:
            x = [mpmath.mpf(float(entry)) for entry in state]
            x[i] += signs[0] * h
            x[j] += signs[1] * h
            return mpmath.fdot(x, x) / 2 - mpmath.log(mpmath.fsum(mpmath.exp(beta * mpmath.fdot(row, x)) for row in rows)) / beta

        return float((energy((1, 1)) - energy((1, -1)) - energy((-1, 1)) + energy((-1, -1))) / (4 * h * h))


@claim(
    "hessian",
    "Eqs. (56), (57)",
    "H(x) = I − β[Σ p_μ ξ_μξ_μᵀ − T Tᵀ]; at a fixed point of unit memories tr H = d − β(1 − |x*|²).",
)
def hessian(setting: Setting) -> Finding:
    rng = np.random.default_rng(setting.seed)
    dim, betas = 5, np.array([0.5, 4.0, 30.0])
    memories, states, vectors = rng.normal(size=(7, dim)), rng.normal(size=(4, dim)), rng.normal(size=(4, dim))

    @jax.jit
    def evaluate(memories: jax.Array, states: jax.Array, vectors: jax.Array, betas: jax.Array) -> dict[str, jax.Array]:
        def at(state: jax.Array, vector: jax.Array, beta: jax.Array) -> dict[str, jax.Array]:
            return {
                "matrix": hopjax.hessian(state, memories, beta),
                "automatic": jax.hessian(hopjax.energy)(state, memories, beta),
                "product": hopjax.hessian_product(state, vector, memories, beta),
                "trace": hopjax.hessian_trace(state, memories, beta),
                "quadratic": hopjax.hessian_quadratic(state, vector, memories, beta),
                "sharpness": hopjax.sharpness(state, memories, beta),
            }

        return jax.vmap(lambda beta: jax.vmap(lambda x, v: at(x, v, beta))(states, vectors))(betas)

    @jax.jit
    def fixed(memories: jax.Array) -> tuple[jax.Array, jax.Array]:
        def at(start: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array]:
            point = hopjax.fixed_point(start, memories, beta, method=hopjax.Picard())
            trace = memories.shape[1] - beta * (1 - jnp.sum(point.state**2))
            return jnp.where(point.converged, hopjax.hessian_trace(point.state, memories, beta), jnp.nan), trace

        return jax.vmap(lambda beta: jax.vmap(lambda start: at(start, beta))(memories))(jnp.array([2.0, 6.0, 12.0]))

    found = {name: np.asarray(part) for name, part in evaluate(memories, states, vectors, betas).items()}
    matrix = found["matrix"]
    largest, lengths = float(np.max(np.sum(memories**2, axis=1))), np.sum(vectors**2, axis=1)
    # β times a variance of memories, of weights whose logits (d products of size β|ξ||x|) are rounded in absolute terms.
    logits = betas[:, None] * np.sqrt(largest * np.sum(states**2, axis=1))
    unit = EPS * (1 + betas[:, None] * largest * (dim + 8) * (1 + logits))
    differences = np.array([_second_difference(states[0], memories, float(betas[1]), i, j) for i in range(dim) for j in range(dim)])
    traces = np.trace(matrix, axis1=-2, axis2=-1)
    quadratic = np.einsum("si,bsij,sj->bs", vectors, matrix, vectors)
    squared = np.sum(states**2, axis=1)
    sharpness = squared * traces - np.einsum("si,bsij,sj->bs", states, matrix, states)
    products = np.max(np.abs(np.einsum("bsij,sj->bsi", matrix, vectors) - found["product"]), axis=-1)
    unit_memories = memories / np.linalg.norm(memories, axis=1, keepdims=True)
    trace, formula = (np.asarray(part) for part in fixed(unit_memories))

    def worst(errors: np.ndarray, scale: Any) -> float:
        return float(np.max(np.abs(errors) / scale))

    # |x − T| ≤ 1e-13 moves |x*|² by 2e-13 and the weights' second moments by as much.
    fixed_bound = 12.0 * (4e-13 + 40 * EPS)
    return Finding(
        [
            Measurement(
                "largest |H − automatic ∂²E| over its bound, 12 states",
                worst(matrix - found["automatic"], unit[..., None, None]),
                "<=",
                1.0,
            ),
            Measurement(
                "largest |H − ∂²E by 60-digit differences| over its bound", worst(matrix[1, 0].ravel() - differences, unit[1, 0]), "<=", 1.0
            ),
            Measurement("largest |tr H − Σ H_ii| over its bound", worst(found["trace"] - traces, dim * unit), "<=", 1.0),
            Measurement("largest error of Hv over its bound", worst(products, unit * dim * np.sqrt(lengths)), "<=", 1.0),
            Measurement("largest error of vᵀHv over its bound", worst(found["quadratic"] - quadratic, unit * dim * lengths), "<=", 1.0),
            Measurement(
                "largest error of S = |x|² tr H − xᵀHx over its bound",
                worst(found["sharpness"] - sharpness, 2 * dim * unit * squared),
                "<=",
                1.0,
            ),
            Measurement(
                "largest |tr H − d + β(1 − |x*|²)|, 21 fixed points of unit memories", worst(trace - formula, 1.0), "<=", fixed_bound
            ),
        ]
    )


def _draw_hessian(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    axes = figure.subplots()
    for name, colour in (("outlier", OUTLIER), ("cluster", CLUSTER)):
        axes.loglog(values[f"{name} steps"], values[f"{name} norm"], "o-", color=colour, markersize=4, label=f"‖H − I‖, {name}")
        axes.loglog(
            values[f"{name} steps"], values[f"{name} remainder"], "s--", color=colour, markersize=4, label=f"what (58) leaves, {name}"
        )
    ends = np.asarray([values["outlier steps"][0], values["outlier steps"][-1]])
    axes.loglog(ends, ends, ":", color=NEUTRAL, label="βℓ")
    axes.set(xlabel="βℓ", ylabel="Frobenius norm", title="K = 8, c = 0.4, d = 12")
    axes.legend(frameon=False, fontsize="small")


@claim(
    "hessian-leakage",
    "Eq. (58)",
    "At a pattern's fixed point H = I − βΣ p_ν(ξ_ν−ξ_μ)(ξ_ν−ξ_μ)ᵀ + O(βℓ²): H − I is of order βℓ, exactly.",
    draw=_draw_hessian,
    caption="H − I is proportional to βℓ at both kinds of fixed point; what its leading term leaves is of order βℓ².",
)
def hessian_leakage(setting: Setting) -> Finding:
    members, dim, cosine = 8, 12, 0.4
    exponents = np.linspace(1.7, 5, 8) * np.log(10) + np.log(members)
    betas = np.stack([exponents, exponents / (1 - cosine)])  # for the outlier, and for a member

    @jax.jit
    def evaluate(betas: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        memories = cluster.memories(members, dim, cosine)

        def at(dominant: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            point = hopjax.fixed_point(dominant, memories, beta, method=hopjax.Picard()).state
            p = hopjax.weights(point, memories, beta)
            from_dominant = memories - dominant[None]
            # The dominant memory's own weight multiplies zero, so the sum runs over the leakage alone.
            leak = jnp.sum(jnp.where(jnp.all(from_dominant == 0, axis=1), 0.0, p))
            departure = hopjax.hessian(point, memories, beta) - jnp.eye(dim)
            leading = -beta * from_dominant.T @ (p[:, None] * from_dominant)
            return leak, jnp.linalg.norm(departure), jnp.linalg.norm(departure - leading)

        return jax.vmap(lambda start, row: jax.vmap(lambda beta: at(start, beta))(row))(memories[jnp.array([-1, 0])], betas)

    leaks, norms, remainders = (np.asarray(part) for part in evaluate(betas))
    measurements = []
    series: dict[str, Any] = {}
    for row, name in enumerate(("outlier", "cluster")):
        steps = betas[row] * leaks[row]
        measurements.append(order_is(f"‖H − I‖ in βℓ, {name}", fit_order(steps, norms[row]), 1))
        measurements.append(order_is(f"(what (58) leaves)/β in ℓ, {name}", fit_order(leaks[row], remainders[row] / betas[row]), 2))
        series |= {f"{name} steps": steps.tolist(), f"{name} norm": norms[row].tolist(), f"{name} remainder": remainders[row].tolist()}
    return Finding(measurements, series)


def _draw_expansion(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    axes = figure.subplots()
    for index, (steps, remainders) in enumerate(zip(values["steps"], values["remainders"], strict=True)):
        axes.loglog(steps, np.abs(remainders), "o-", color=OTHER, markersize=3, linewidth=1, label=None if index else "S")
    ends = np.asarray([min(map(min, values["steps"])), max(map(max, values["steps"]))])
    axes.loglog(ends, ends**2, ":", color=NEUTRAL, label="ℓ²")
    axes.set(xlabel="leakage ℓ", ylabel="|S − first order|/(d − 1 + β)", title="random similarities, M = 8, d = 16")
    axes.legend(frameon=False)


@claim(
    "leakage-expansion",
    "Eqs. (10), (60)-(62), (76), (77)",
    "At a fixed point x* = ξ − Σp_ν(ξ−ξ_ν), and |x*|², tr H, x*ᵀHx*, S and the averaged rise are first order in the leakage, up to O(ℓ²).",
    draw=_draw_expansion,
    caption="What the first order in the leakage leaves of the sharpness, for eight random sets of memories: second order.",
)
def leakage_expansion(setting: Setting) -> Finding:
    rng = np.random.default_rng(setting.seed)
    count, dim, sets, epsilon = 8, 16, 8, 1e-2
    raw = rng.normal(size=(sets, count, dim)) + 1.5 * rng.normal(size=(sets, 1, dim)) * rng.uniform(0.2, 0.6, size=(sets, 1, 1))
    memories = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
    similarities = np.einsum("sd,smd->sm", memories[:, 0], memories[:, 1:])
    # The nearest competitor, at cosine s, sets the leakage e^{−β(1−s)}: from 10⁻² to 10⁻⁵ on every ladder.
    betas = np.linspace(2, 5, 8)[None] * np.log(10) / (1 - similarities.max(axis=1, keepdims=True))

    @jax.jit
    def evaluate(memories: jax.Array, betas: jax.Array) -> dict[str, jax.Array]:
        def at(rows: jax.Array, beta: jax.Array) -> dict[str, jax.Array]:
            point = hopjax.fixed_point(rows[0], rows, beta, method=hopjax.Picard())
            x, off, cosines = point.state, hopjax.weights(point.state, rows, beta)[1:], rows[1:] @ rows[0]
            lost = jnp.sum(off * (1 - cosines))
            first = asymptotics.first_order_sharpness(off, cosines, beta, float(dim))
            rise = hopjax.second_order_rise(x, rows, beta, epsilon=epsilon, sigma=1.0)
            return {
                "converged": point.converged,
                "leak": jnp.sum(off),
                "identity": jnp.linalg.norm(x - rows[0] + off @ (rows[0][None] - rows[1:])),
                "|x*|²": jnp.sum(x**2) - (1 - 2 * lost),
                "tr H": (hopjax.hessian_trace(x, rows, beta) - (dim - 2 * beta * lost)) / beta,
                "x*ᵀHx*": (hopjax.hessian_quadratic(x, x, rows, beta) - (1 - 2 * lost - beta * jnp.sum(off * (1 - cosines) ** 2))) / beta,
                "S": (hopjax.sharpness(x, rows, beta) - first) / (dim - 1 + beta),
                "⟨ΔE⟩": (rise / (0.5 * epsilon**2) - first) / (dim - 1 + beta),
            }

        return jax.vmap(lambda rows, row: jax.vmap(lambda beta: at(rows, beta))(row))(memories, betas)

    found = {name: np.asarray(part) for name, part in evaluate(memories, betas).items()}
    if not found["converged"].all():
        return Finding([Measurement("share of fixed points found", float(found["converged"].mean()), ">=", 1.0)])
    leak = found["leak"]
    measurements = []
    for name in ("S", "⟨ΔE⟩", "|x*|²", "tr H", "x*ᵀHx*"):
        orders = [fit_order(steps, remainders) for steps, remainders in zip(leak, found[name], strict=True)]
        worst = orders[int(np.argmax([abs(order.slope - 2) + order.half_width for order in orders]))]
        measurements.append(order_is(f"{name} − first order in ℓ, the worst of {sets} sets of memories", worst, 2))
    measurements.append(Measurement("largest |x* − ξ + Σp_ν(ξ−ξ_ν)|", float(found["identity"].max()), "<=", 1e-13 + 2 * count * EPS))
    return Finding(measurements, {"steps": leak.tolist(), "remainders": found["S"].tolist()})
