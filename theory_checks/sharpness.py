"""Energy and sharpness: isolated memories lie high in sharp basins, supported ones low in broad ones: Eqs. (74)-(84)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hopjax
from hopjax import asymptotics, cluster, gaps
from theory_checks.claim import EPS, QUICK_COMPILE, Z_LIMIT, Finding, Measurement, Setting, claim, z_score
from theory_checks.enclosure import enclose, strong_grid
from theory_checks.ladder import EXCESS, LADDERS, Ladder, draw_ladders, fit_order, ladder_panels, order_is

RUNGS = len(EXCESS)


@partial(jax.jit, compiler_options=QUICK_COMPILE)
def _evaluate(members: jax.Array, cosine: jax.Array, beta: jax.Array, dim: jax.Array) -> dict[str, Any]:
    """Exact values, closed forms, and the first order in the exact weights at both fixed points."""

    def one(members: jax.Array, cosine: jax.Array, beta: jax.Array, dim: jax.Array) -> dict[str, Any]:
        at_outlier, at_cluster = cluster.outlier_point(members, cosine, beta), cluster.cluster_point(members, cosine, beta)
        log_leaks = cluster.log_outlier_leakage(at_outlier, members), cluster.log_cluster_leakage(at_cluster, members)
        others = (members - 1) * jnp.exp(at_cluster.log_other)
        leak = jnp.exp(log_leaks[0])
        # Equal competitors enter the sum (77) together.
        first_outlier = asymptotics.first_order_sharpness(leak[None], jnp.zeros(1), beta, dim)
        weights = jnp.stack([others, jnp.exp(at_cluster.log_outlier)])
        first_cluster = asymptotics.first_order_sharpness(weights, jnp.stack([cosine, 0 * cosine]), beta, dim)
        return {
            "log leak": log_leaks,
            "energy": gaps.energies(members, cosine, beta),
            "energy form": asymptotics.energies(members, cosine, beta),
            "first energy": tuple(asymptotics.first_order_energy(jnp.exp(log_leak), beta) for log_leak in log_leaks),
            "sharpness": gaps.sharpnesses(members, cosine, beta, dim),
            "sharpness form": asymptotics.sharpnesses(members, cosine, beta, dim),
            "first sharpness": (first_outlier, first_cluster),
        }

    return jax.vmap(one)(members, cosine, beta, dim)


def _ladders(where: str) -> tuple[dict[str, Any], np.ndarray]:
    """`_evaluate` along the ladders on which the outlier's or the cluster's leakage is e^{−6} … e^{−13}, and their β."""
    members, cosine, dim = (np.repeat(np.array(column, float), RUNGS) for column in zip(*LADDERS, strict=True))
    excess = np.tile(EXCESS, len(LADDERS)) + np.log(members)
    beta = excess if where == "outlier" else excess / (1 - cosine)
    values: dict[str, Any] = jax.tree.map(np.asarray, _evaluate(members, cosine, beta, dim))
    return values, beta


@claim(
    "energy-expansion",
    "Eqs. (75), (78), (80)",
    "E(x*) = −½ − ℓ/β up to O(ℓ²), with ℓ ≈ Ke^{−β} at the outlier and (K−1)e^{−β(1−c)} + e^{−β} at a cluster member.",
    draw=draw_ladders,
    caption="Remainders of the closed forms (78), (80) against exact energies, relative to their leakage terms.",
)
def energy_expansion(setting: Setting) -> Finding:
    measurements: list[Measurement] = []
    panels: dict[str, dict[str, tuple[Ladder, float]]] = {}
    for index, (where, equation) in enumerate((("outlier", "(78)"), ("cluster", "(80)"))):
        values, beta = _ladders(where)
        leak = np.exp(values["log leak"][index])
        exact, form = values["energy"][index], values["energy form"][index]
        name = f"{where} {equation}"
        panels[name] = {}
        for number, (k, c, d) in enumerate(LADDERS):
            part, label = slice(number * RUNGS, (number + 1) * RUNGS), f"K={k}, c={c}, d={d}"
            first = fit_order(leak[part], (exact - values["first energy"][index])[part])
            measurements.append(order_is(f"{where}: E less (75) at {label} in ℓ", first, 2.0))
            ladder = Ladder((beta * leak)[part], exact[part], form[part])
            measurements.append(order_is(f"{name} at {label} in βℓ", ladder.order(-0.5), 1.0))
            panels[name][label] = (ladder, -0.5)
    return Finding(measurements, ladder_panels(panels))


@claim(
    "energy-gap",
    "Eq. (82)",
    "The outlier's fixed point lies higher: E_o − E_c ≈ (K−1)(e^{−β(1−c)} − e^{−β})/β > 0.",
    draw=draw_ladders,
    caption="Remainder of (82) against the exact gap of the energies, relative.",
)
def energy_gap(setting: Setting) -> Finding:
    values, beta = _ladders("cluster")
    gap, form = values["energy"], values["energy form"].gap
    measurements, lines = [], {}
    for number, (k, c, d) in enumerate(LADDERS):
        part, label = slice(number * RUNGS, (number + 1) * RUNGS), f"K={k}, c={c}, d={d}"
        ladder = Ladder((beta * np.exp(values["log leak"][1]))[part], (gap.sign * np.exp(gap.log_gap))[part], form[part])
        measurements.append(order_is(f"E_o − E_c less (82) at {label} in βℓ", ladder.order(), 1.0))
        lines[label] = (ladder, 0.0)
    grid = strong_grid()[::2]  # one dimension each: energies do not depend on it
    unproved = sum((e := enclose(*point)) is None or not e.energy_gap > 0 for point in grid)
    measurements.append(Measurement(f"points of {len(grid)} where ball arithmetic does not prove E_o > E_c", unproved, "<=", 0))
    return Finding(measurements, ladder_panels({"difference (82)": lines}))


@claim(
    "sharpness-definition",
    "Eq. (74)",
    "S(x) = |x|² tr H − xᵀHx is the mean curvature (Ax)ᵀH(Ax), and (d−1)|x|² times that along random tangential directions.",
)
def sharpness_definition(setting: Setting) -> Finding:
    dim, count, beta, draws = 12, 9, 3.0, setting.rotations

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def curvatures(key: jax.Array) -> tuple[jax.Array, ...]:
        memory_key, state_key, generator_key, tangent_key = jax.random.split(key, 4)
        memories, state = jax.random.normal(memory_key, (count, dim)), jax.random.normal(state_key, (dim,))
        hessian = jax.hessian(hopjax.energy)(state, memories, beta)
        quadratic = lambda vectors: jnp.sum((vectors @ hessian) * vectors, axis=1)  # noqa: E731
        # Exactly: the generators e_i e_jᵀ − e_j e_iᵀ, i < j, have independent unit-variance coefficients in A.
        rows, columns = np.triu_indices(dim, 1)
        basis = jnp.zeros((len(rows), dim)).at[np.arange(len(rows)), rows].set(state[columns])
        basis = basis.at[np.arange(len(rows)), columns].set(-state[rows])
        moves = jax.vmap(lambda key: hopjax.antisymmetric(key, dim) @ state)(jax.random.split(generator_key, draws))
        normal = jax.random.normal(tangent_key, (draws, dim))
        square = state @ state
        tangent = normal - (normal @ state / square)[:, None] * state[None]
        tangent = tangent / jnp.linalg.norm(tangent, axis=1, keepdims=True)
        mean_curvature = (dim - 1) * square * quadratic(tangent)
        return hopjax.sharpness(state, memories, beta), jnp.sum(quadratic(basis)), quadratic(moves), mean_curvature, square

    sharpness, summed, by_generators, by_tangents, square = (np.asarray(x) for x in curvatures(setting.key("sharpness-definition")))
    # H carries β|ξ|²: its entries, and what is summed from d² of them, round in that unit.
    rounding = dim**2 * EPS * float(square) * (1 + beta * dim)
    return Finding(
        [
            Measurement("|S − Σ over the basis of generators|", abs(float(summed - sharpness)), "<=", rounding),
            *(
                z_score(f"mean of {name} less S", float(np.mean(values) - sharpness), float(np.std(values, ddof=1)) / draws**0.5)
                for name, values in (("(Ax)ᵀH(Ax)", by_generators), ("(d−1)|x|² vᵀHv over tangents v", by_tangents))
            ),
        ],
        note="H by automatic differentiation of the energy, at a random state among random memories.",
    )


@claim(
    "sharpness-gap",
    "Eqs. (76)-(77), (79), (81), (83)",
    "Leakage flattens a basin: S = (d−1) − Σ p_ν(1−s_ν)[2(d−1) + β(1+s_ν)] + …, so the outlier's is also the sharper.",
    draw=draw_ladders,
    caption="Remainders of the closed forms (79), (81), (83) against exact sharpness, relative to their leakage terms.",
)
def sharpness_gap(setting: Setting) -> Finding:
    measurements: list[Measurement] = []
    panels: dict[str, dict[str, tuple[Ladder, float]]] = {}
    for index, (where, equation) in enumerate((("outlier", "(79)"), ("cluster", "(81)"))):
        values, beta = _ladders(where)
        leak = np.exp(values["log leak"][index])
        exact, form, first = values["sharpness"][index], values["sharpness form"][index], values["first sharpness"][index]
        panels[f"{where} {equation}"] = {}
        for number, (k, c, d) in enumerate(LADDERS):
            part, label = slice(number * RUNGS, (number + 1) * RUNGS), f"K={k}, c={c}, d={d}"
            measurements.append(order_is(f"{where}: S less (76) at {label} in ℓ", fit_order(leak[part], (exact - first)[part]), 2.0))
            ladder = Ladder((beta * leak)[part], exact[part], form[part])
            measurements.append(order_is(f"{where} {equation} at {label} in βℓ", ladder.order(d - 1), 1.0))
            panels[f"{where} {equation}"][label] = (ladder, d - 1)
    gap, form = values["sharpness"], values["sharpness form"].gap
    panels["difference (83)"] = {}
    for number, (k, c, d) in enumerate(LADDERS):
        part, label = slice(number * RUNGS, (number + 1) * RUNGS), f"K={k}, c={c}, d={d}"
        ladder = Ladder((beta * leak)[part], (gap.sign * np.exp(gap.log_gap))[part], form[part])
        measurements.append(order_is(f"S_o − S_c less (83) at {label} in βℓ", ladder.order(), 1.0))
        panels["difference (83)"][label] = (ladder, 0.0)
    measurements.append(Measurement("rungs where the exact S_o − S_c is not positive", int(np.sum(gap.sign != 1)), "<=", 0))
    return Finding(measurements, ladder_panels(panels))


@claim(
    "perturbation-sharpness",
    "Eq. (84)",
    "The perturbation estimate of a sample's sharpness tends, for small perturbations, to the trace of the Hessian.",
)
def perturbation_sharpness(setting: Setting) -> Finding:
    dim, members, beta, pairs = 16, 5, 6.0, setting.rotations
    scales = 0.2 * 0.5 ** np.arange(7)

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def estimates(key: jax.Array) -> tuple[jax.Array, ...]:
        memories = cluster.memories(members, dim, 0.5)
        # Between two members, where the curvature is far from that of a single well, and no fixed point.
        state = 0.6 * memories[0] + 0.4 * memories[1]
        square = state @ state
        normal = jax.random.normal(key, (pairs, dim))
        directions = normal / jnp.linalg.norm(normal, axis=1, keepdims=True)

        def at_scale(scale: jax.Array) -> jax.Array:
            """[E(x+δ) + E(x−δ)]/2 − E(x) over ½ρ²|x|²/d for every pair ±δ, |δ| = ρ|x|."""
            step = scale * jnp.sqrt(square) * directions
            # E(x+δ) − E(x) = x·δ + |δ|²/2 − β⁻¹ log Σ p e^{βξ·δ}: the gradient cancels in the pair, and no energies are subtracted.
            p = hopjax.weights(state, memories, beta)
            change = 0.5 * (hopjax.energy_rise(p, step @ memories.T, beta) + hopjax.energy_rise(p, -step @ memories.T, beta))
            return (change + 0.5 * scale**2 * square) / (0.5 * scale**2 * square / dim)

        limit = dim * jax.vmap(lambda v: hopjax.hessian_quadratic(state, v, memories, beta))(directions)
        trace, sharpness = hopjax.hessian_trace(state, memories, beta), hopjax.sharpness(state, memories, beta)
        return jax.vmap(at_scale)(jnp.array(scales)), limit, trace, sharpness / square

    rows, limit, trace, sharpness = (np.asarray(part) for part in estimates(setting.key("perturbation-sharpness")))
    small = rows[-1]
    error = float(np.std(small, ddof=1)) / pairs**0.5
    order = fit_order(scales, np.mean(rows, axis=1) - np.mean(limit))
    return Finding(
        [
            z_score("estimate at ρ = 0.003 less tr H", float(np.mean(small) - trace), error),
            order_is("estimate less its limit on the same directions in ρ", order, 2.0),
            Measurement("z of the estimate less S/|x|², which it is not", abs(float(np.mean(small) - sharpness)) / error, ">=", Z_LIMIT),
        ],
        note=f"It estimates tr H = {float(trace):.3f}, not the rotational sharpness S/|x|² = {float(sharpness):.3f}, which leaves the "
        "radial direction out. Number of pairs, ρ and normalisation are ours: the paper's are not known.",
    )
