"""The weights off the dominant memory at large β: Propositions B.2 and B.3, Remark B.4, Eqs. (52), (54)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hopjax
from hopjax import asymptotics, cluster
from theory_checks.claim import Finding, Measurement, Setting, claim
from theory_checks.figures import CLUSTER, NEUTRAL, OTHER, OUTLIER
from theory_checks.fixed_points import symmetric_logs
from theory_checks.ladder import fit_order, order_is

CONFIGURATIONS = ((3, 0.0), (10, 0.5), (40, 0.7))


def _ladder(members: int, rate: float) -> np.ndarray:
    """β at which K e^{−rate·β} falls from 10⁻² to 10⁻⁷."""
    return np.asarray((np.log(members) + np.linspace(2, 7, 8) * np.log(10)) / rate)


def _log_weights(rate: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """β, one row a configuration, and for q, b, r the exact and the leading logarithms along it."""
    betas = np.stack([_ladder(members, rate(cosine)) for members, cosine in CONFIGURATIONS])

    members, cosines = (np.array(column, dtype=float)[:, None] for column in zip(*CONFIGURATIONS, strict=True))
    leading = jax.jit(lambda *point: asymptotics.log_weights(*point))
    rows = [leading(*point) for point in np.broadcast(members, cosines, betas)]
    first = {f"leading {name}": np.reshape([float(row[index]) for row in rows], betas.shape) for index, name in enumerate("qbr")}
    return betas, symmetric_logs(members, cosines, betas) | first


def _distances(index: int, members: int, cosine: float, betas: np.ndarray) -> np.ndarray:
    """|x* − ξ| at the fixed point of the full map that starts from memory `index`."""

    @jax.jit
    def solve(betas: jax.Array) -> jax.Array:
        memories = cluster.memories(members, members + 1, cosine)

        def one(beta: jax.Array) -> jax.Array:
            return jnp.linalg.norm(hopjax.fixed_point(memories[index], memories, beta, method=hopjax.Picard()).state - memories[index])

        return jax.vmap(one)(betas)

    return np.asarray(solve(jnp.asarray(betas)))


def _draw(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    weights, distance = figure.subplots(1, 2)
    colours = {"q": OUTLIER, "b": CLUSTER, "r": OTHER}
    for name, (exact, leading) in values["weights"].items():
        weights.semilogy(values["beta"], np.exp(exact), "o", color=colours[name], markersize=4, label=name)
        weights.semilogy(values["beta"], np.exp(leading), color=colours[name], linewidth=1)
    weights.set(xlabel="β", ylabel="off-memory weight", title="exact (dots), leading order (lines)")
    distance.loglog(values["steps"], values["distances"], "o-", color=NEUTRAL, markersize=4, label="|x* − ξ|")
    distance.loglog(values["steps"], values["steps"], ":", color=NEUTRAL, label=values["step"])
    distance.set(xlabel=values["step"], ylabel="distance from the memory", title="full map")
    for axes in (weights, distance):
        axes.legend(frameon=False)


@claim(
    "outlier-weights",
    "Eq. (52), Proposition B.2",
    "At the outlier's fixed point q = e^{−β}(1 + O(βKe^{−β})), p = 1 − Ke^{−β}(1 + …), and x* = ξ_o + O(Ke^{−β}).",
    draw=_draw,
    caption="Weight of a cluster member at the outlier's fixed point, and how far the fixed point lies from the outlier (K = 10, c = 0.5).",
)
def outlier_weights(setting: Setting) -> Finding:
    betas, logs = _log_weights(lambda cosine: 1.0)
    measurements = []
    for (members, cosine), beta, q, p, leading in zip(CONFIGURATIONS, betas, logs["q"], logs["p"], logs["leading q"], strict=True):
        small = members * np.exp(-beta)
        measurements.append(order_is(f"log(q e^β) in βKe^{{−β}}, K = {members}, c = {cosine}", fit_order(beta * small, q - leading), 1))
        lost = -np.expm1(p) / small - 1
        measurements.append(order_is(f"(1−p)/(Ke^{{−β}}) − 1, K = {members}, c = {cosine}", fit_order(beta * small, lost), 1))
    index = 1
    (members, cosine), beta = CONFIGURATIONS[index], betas[index]
    steps, distances = members * np.exp(-beta), _distances(-1, members, cosine, beta)
    measurements.append(order_is("|x* − ξ_o| in Ke^{−β}, full map", fit_order(steps, distances), 1))
    series = {"beta": beta.tolist(), "weights": {"q": [logs["q"][index].tolist(), logs["leading q"][index].tolist()]}}
    return Finding(measurements, series | {"steps": steps.tolist(), "distances": distances.tolist(), "step": "K exp(−β)"})


@claim(
    "cluster-weights",
    "Eq. (54), Proposition B.3, Remark B.4",
    "At a member's fixed point b = e^{−β(1−c)}(1 + O(βℓ_c)), r = e^{−β}(1 + O(βℓ_c)), x* = ξ₁ + O(Ke^{−β(1−c)}), and b/q → e^{βc}.",
    draw=_draw,
    caption="Weights of another member (b) and of the outlier (r) at a member's fixed point, and its distance from it (K = 10, c = 0.5).",
)
def cluster_weights(setting: Setting) -> Finding:
    betas, logs = _log_weights(lambda cosine: 1 - cosine)
    measurements = []
    for index, ((members, cosine), beta) in enumerate(zip(CONFIGURATIONS, betas, strict=True)):
        where = f"K = {members}, c = {cosine}"
        small = beta * ((members - 1) * np.exp(-beta * (1 - cosine)) + np.exp(-beta))
        for name in ("b", "r"):
            correction = logs[name][index] - logs[f"leading {name}"][index]
            measurements.append(order_is(f"log({name}/leading) in βℓ_c, {where}", fit_order(small, correction), 1))
        if cosine > 0:
            broader = logs["b"][index] - logs["q"][index] - beta * cosine
            measurements.append(order_is(f"log(b/q) − βc in βℓ_c, {where}", fit_order(small, broader), 1))
        else:
            # Orthogonal members: the cluster is not broader at all.
            equal = float(np.max(np.abs(logs["b"][index] - logs["q"][index]) / beta))
            measurements.append(Measurement(f"largest |log(b/q)|/β, {where}", equal, "<=", 32 * float(np.finfo(float).eps)))
    index = 1
    (members, cosine), beta = CONFIGURATIONS[index], betas[index]
    steps, distances = members * np.exp(-beta * (1 - cosine)), _distances(0, members, cosine, beta)
    measurements.append(order_is("|x* − ξ₁| in Ke^{−β(1−c)}, full map", fit_order(steps, distances), 1))
    weights = {name: [logs[name][index].tolist(), logs[f"leading {name}"][index].tolist()] for name in ("b", "r")}
    series = {"beta": beta.tolist(), "weights": weights, "steps": steps.tolist(), "distances": distances.tolist()}
    return Finding(measurements, series | {"step": "K exp(−β(1−c))"})
