"""The onset of pattern fixed points without the outlier: Eqs. (27)-(34), and that it is first order.

In m = a − b the paper writes f(m) = log[(1+(K−1)m)/(1−m)] = β(1−c)m. In v = log(a/b) the same curve is β(1−c) = g(v) = v + K v/(e^v − 1),
convex for every K: the second derivative of v/(e^v − 1) is e^v[(v−2)e^v + v + 2]/(e^v−1)³, and (v−2)e^v + v + 2 = Σ_{n≥3} (n−2)vⁿ/n! > 0.
Hence min f(m)/m = min g can be enclosed rigorously in ball arithmetic.
"""

from collections.abc import Mapping
from typing import Any

import flint
import jax
import jax.numpy as jnp
import numpy as np
from flint import arb
from scipy import optimize

import hopjax
from hopjax import cluster
from theory_checks.claim import Finding, Measurement, Setting, claim
from theory_checks.figures import CLUSTER, NEUTRAL, OTHER, OUTLIER
from theory_checks.ladder import fit_order, order_is

EPS = float(np.finfo(float).eps)
BRANCH_COLOURS = {2: NEUTRAL, 3: OTHER, 10: CLUSTER, 100: OUTLIER}


def _slope(v: Any, members: Any) -> Any:
    """g′(v) = 1 + K[(1−v)e^v − 1]/(e^v − 1)²."""
    return 1 + members * ((1 - v) * v.exp() - 1) / (v.exp() - 1) ** 2


def _curve(v: Any, members: Any) -> Any:
    """g(v) = v + K v/(e^v − 1)."""
    return v + members * v / (v.exp() - 1)


def _enclose_onset(members: Any) -> tuple[Any, Any]:
    """Balls that contain the minimiser v_c > 0 of g and its minimum β_c(1−c), for K ≥ 3."""
    log_members = arb(members).log()
    low, high = log_members / 2, 2 * log_members + 2
    if not (_slope(low, members) < 0 and _slope(high, members) > 0):
        raise ArithmeticError(f"the onset for K = {members} is not where it should be")
    # Midpoints lose their radius: the bracket is certified by the signs, not by the arithmetic that proposes it.
    for _ in range(90):
        middle = arb(((low + high) / 2).mid())
        low, high = (low, middle) if _slope(middle, members) > 0 else (middle, high)
    if not (_slope(low, members) < 0 and _slope(high, members) > 0):
        raise ArithmeticError("the last signs are not certain: raise the precision")
    # Convex: above its tangent at the left end, below its value there.
    tangent = _curve(low, members) + _slope(low, members) * (high - low)
    return low.union(high), tangent.union(_curve(low, members))


@claim(
    "pattern-onset",
    "Eqs. (29)-(31), (34)",
    "Pattern fixed points appear where a line through the origin touches f: β_c(1−c) = min f(m)/m, and exist for β ≥ β_c.",
)
def pattern_onset(setting: Setting) -> Finding:
    sizes, cosine, distance = np.array([2, 3, 5, 10, 100, 10**4, 10**6]), 0.5, 1e-3

    @jax.jit
    def critical(members: jax.Array) -> jax.Array:
        return jax.vmap(cluster.critical_effective_beta)(members)

    @jax.jit
    def order_parameters(memories: jax.Array, betas: jax.Array) -> tuple[jax.Array, jax.Array]:
        def at(beta: jax.Array) -> tuple[jax.Array, jax.Array]:
            point = hopjax.fixed_point(memories[0], memories, beta, method=hopjax.Picard())
            weights = hopjax.weights(point.state, memories, beta)
            return weights[0] - weights[1], point.converged

        return jax.vmap(at)(betas)

    found = np.asarray(critical(jnp.asarray(sizes, float)))
    value_errors, tangency_errors = [], []
    least = {}
    for members, value in zip(sizes, found, strict=True):
        # In log(1−m), as the minimum is at 1 − m ~ 1/(K log K). Its value is stationary: 1e-8 in the place is rounding in the value.
        ratio = lambda t, k=float(members): (np.log1p((k - 1) * -np.expm1(t)) - t) / -np.expm1(t)  # noqa: E731
        place = optimize.minimize_scalar(ratio, bounds=(-np.log(1e3 * members), -1e-5), method="bounded", options={"xatol": 1e-8})
        value_errors.append(abs(place.fun / value - 1) if members > 2 else abs(value - 2.0))
        if members > 2:
            m = -np.expm1(place.x)
            slope = (members - 1) / (1 + (members - 1) * m) + np.exp(-place.x)
            tangency_errors.append(abs(slope / value - 1))
            least[int(members)] = m
    above, below, converged = [], [], True
    for members in (3, 10):
        memories = np.asarray(jax.jit(lambda k=members: cluster.memories(k, k + 1, cosine))())[:-1]
        betas = found[list(sizes).index(members)] / (1 - cosine) * np.array([1 + distance, 1 - distance])
        order, done = (np.asarray(part) for part in order_parameters(memories, betas))
        above.append(order[0] / least[members])
        below.append(abs(order[1]))
        converged &= bool(done.all())
    return Finding(
        [
            # A minimum of numbers with relative rounding error 8 eps lies that close to the true one.
            Measurement("largest relative |β_c(1−c) − min f(m)/m|, K = 2 … 10⁶", float(np.max(value_errors)), "<=", 16 * EPS),
            # The place is known to 1e-8 relative to 1 − m, and f″m/f′ < 2 log K there.
            Measurement("largest |f′(m_c)/β_c(1−c) − 1|: the line is a tangent", float(np.max(tangency_errors)), "<=", 1e-6),
            Measurement("least m/m_c of the full map at 1.001 β_c, K = 3, 10", float(np.min(above)) if converged else np.nan, ">=", 1.0),
            Measurement("largest m of the full map at 0.999 β_c", float(np.max(below)) if converged else np.nan, "<=", 1e-9),
        ]
    )


@claim(
    "onset-bounds",
    "Eq. (32)",
    "log K + log log K + 1 < β_c(1−c) ≤ g(log K + log log K) for all K ≥ 3.",
)
def onset_bounds(setting: Setting) -> Finding:
    sizes = [3, 4, 5, 6, 7, 8, 10, 20, 50, *(10**power for power in range(2, 10))]

    @jax.jit
    def evaluate(members: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high = jax.vmap(cluster.critical_effective_beta_bounds)(members)
        return low, high, jax.vmap(cluster.critical_effective_beta)(members)

    low, high, value = (np.asarray(part) for part in evaluate(jnp.asarray(sizes, float)))
    lower_margins, upper_margins, errors, cell_values = [], [], [], []
    flint.ctx.prec = 128
    for members, below, above, between in zip(sizes, low, high, value, strict=True):
        _, onset = _enclose_onset(members)
        lower_margins.append(float((onset - arb(float(below))).lower()))
        upper_margins.append(float((arb(float(above)) - onset).lower()))
        errors.append(float((abs(onset - arb(float(between))) / onset).upper()))
    # The lower bound needs v_c ≥ log K, that is g′(log K) ≤ 0, for every K ≥ 4: K²(log K − 2) + 3K − 1 ≥ 0. Beyond e² < 8 no term is
    # negative but the −1.
    cells = 64
    for cell in range(4 * cells):
        k = (4 + arb(cell) / cells).union(4 + arb(cell + 1) / cells)
        cell_values.append(float((k * k * (k.log() - 2) + 3 * k - 1).lower()))
    return Finding(
        [
            Measurement("certified least β_c(1−c) − lower bound, K = 3 … 10⁹", float(np.min(lower_margins)), ">=", 0.0),
            Measurement("certified least upper bound − β_c(1−c)", float(np.min(upper_margins)), ">=", 0.0),
            Measurement(
                "certified least K²(log K − 2) + 3K − 1 on 4 ≤ K ≤ 8: the lower bound holds for K ≥ 4",
                float(np.min(cell_values)),
                ">=",
                0.0,
            ),
            # Two terms of the same sign and one exponential: a few roundings.
            Measurement("certified largest relative error of β_c(1−c) in double precision", float(np.max(errors)), "<=", 8 * EPS),
        ]
    )


def _draw_asymptotics(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    left, right = figure.subplots(1, 2)
    left.plot(values["log K"], values["onset"], "o-", color=CLUSTER, markersize=4, label="β_c(1−c)")
    left.plot(values["log K"], values["leading"], ":", color=NEUTRAL, label="log K + log log K + 1")
    left.set(xlabel="log K", ylabel="β_c(1−c)")
    right.loglog(values["steps"], values["remainders"], "o-", color=CLUSTER, markersize=4, label="difference")
    right.loglog(values["steps"], values["steps"], ":", color=NEUTRAL, label="log log K / log K")
    right.set(xlabel="log log K / log K", ylabel="β_c(1−c) − log K − log log K − 1")
    for axes in (left, right):
        axes.legend(frameon=False)


@claim(
    "onset-asymptotics",
    "Eq. (33)",
    "β_c(1−c) = log K + log log K + 1 + o(1) as K → ∞.",
    draw=_draw_asymptotics,
    caption="The onset against its asymptote for K from 10³ to 10³⁰⁰. The difference vanishes, but only like log log K / log K.",
)
def onset_asymptotics(setting: Setting) -> Finding:
    powers = [3, 6, 10, 18, 30, 55, 100, 180, 300]

    @jax.jit
    def critical(members: jax.Array) -> jax.Array:
        return jax.vmap(cluster.critical_effective_beta)(members)

    found = np.asarray(critical(jnp.asarray([10.0**power for power in powers])))
    flint.ctx.prec = 256
    logs, onsets, remainders, errors = [], [], [], []
    for power, value in zip(powers, found, strict=True):
        members = arb(10) ** power
        _, onset = _enclose_onset(members)
        remainder = onset - members.log() - members.log().log() - 1
        logs.append(float(members.log().mid()))
        onsets.append(float(onset.mid()))
        remainders.append(float(remainder.mid()))
        # 10^power itself is rounded in double precision, which moves log K by an eps.
        errors.append(float((abs(onset - arb(float(value))) / onset).upper()))
    steps = np.log(logs) / np.asarray(logs)
    series = {"log K": logs, "onset": onsets, "leading": (np.asarray(logs) + np.log(logs) + 1).tolist()}
    series |= {"steps": steps.tolist(), "remainders": remainders}
    return Finding(
        [
            order_is("β_c(1−c) − log K − log log K − 1 in log log K/log K", fit_order(steps, remainders), 1),
            # The expansion goes on with log log K/log K, of coefficient one.
            Measurement("remainder at K = 10³⁰⁰ over log log K/log K", remainders[-1] / float(steps[-1]), "<=", 1.1),
            Measurement("certified largest relative error of β_c(1−c) in double precision", float(np.max(errors)), "<=", 8 * EPS),
        ],
        series,
        note=f"At K = 10³ the remainder is still {remainders[0]:.2f}, at 10³⁰⁰ {remainders[-1]:.4f}.",
    )


def _draw_convexity(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    axes = figure.subplots()
    for name, curve in values["curves"].items():
        m, f, bend = (np.asarray(curve[part]) for part in ("m", "f", "bend"))
        colour = BRANCH_COLOURS[int(name)]
        axes.plot(m, f, color=colour, label=f"K = {name}")
        axes.plot(m[bend < 0], f[bend < 0], color=colour, linewidth=4, alpha=0.35)
        if curve["tangency"]:
            place, slope = curve["tangency"]
            axes.plot([0, place], [0, slope * place], "--", color=colour, linewidth=1)
            axes.plot(place, slope * place, "o", color=colour, markersize=5)
    axes.set(
        xlabel="m = a − b",
        ylabel="f(m)",
        ylim=(0, 9),
        xlim=(0, 1),
        title="broad: f is concave; dashed: tangent from the origin, slope β_c(1−c)",
    )
    axes.legend(frameon=False, loc="upper left")


@claim(
    "onset-convexity",
    "below Eq. (28)",
    "f(m) = log[(1+(K−1)m)/(1−m)] is convex in m on [0, 1).",
    draw=_draw_convexity,
    caption="f is concave up to m = (K−2)/(2(K−1)) for K > 2. The tangent from the origin touches beyond: the order parameter jumps.",
)
def onset_convexity(setting: Setting) -> Finding:
    flint.ctx.prec = 128
    measurements, curves = [], {}
    for members in (10, 2, 3, 100):
        # f″(m) = (1−m)⁻² − (K−1)²/(1+(K−1)m)². Where the upper end of the ball is negative, f is certainly not convex.
        bend = lambda m, k=members: (1 - m) ** -2 - (k - 1) ** 2 / (1 + (k - 1) * m) ** 2  # noqa: E731
        least = min(float(bend(arb(step) / 100).upper()) for step in range(100))
        measurements.append(Measurement(f"certified upper end of the least f″(m), m = 0, 0.01 … 0.99, K = {members}", least, ">=", 0.0))
        m = 1 - np.concatenate([np.linspace(1, 0.02, 120), np.geomspace(0.02, 1e-4, 40)])
        curve: dict[str, Any] = {"m": m.tolist(), "f": (np.log1p((members - 1) * m) - np.log1p(-m)).tolist()}
        curve |= {"bend": ((1 - m) ** -2 - (members - 1) ** 2 / (1 + (members - 1) * m) ** 2).tolist(), "tangency": None}
        if members > 2:
            place, onset = _enclose_onset(members)
            curve["tangency"] = [float(((place.exp() - 1) / (place.exp() + members - 1)).mid()), float(onset.mid())]
        curves[str(members)] = curve
    return Finding(
        measurements,
        {"curves": {name: curves[name] for name in ("2", "3", "10", "100")}},
        note="f″(0) = 1 − (K−1)² is negative for K > 2. The tangency of Eqs. (29)-(31) stands: f(m)/m has one minimum all the same, "
        "as β(1−c) is convex in log(a/b).",
    )


def _draw_branches(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    axes = figure.subplots()
    for name, branch in values["branches"].items():
        beta, m, stable = (np.asarray(branch[part]) for part in ("beta", "m", "stable"))
        colour = BRANCH_COLOURS[int(name)]
        axes.plot(np.where(stable, beta, np.nan), m, color=colour, label=f"K = {name}")
        axes.plot(np.where(stable, np.nan, beta), m, "--", color=colour, linewidth=1)
        axes.plot(branch["onset"], branch["order"], "o", color=colour, markersize=5)
        axes.plot(branch["spinodal"], 0, "s", color=colour, markersize=5, clip_on=False)
    axes.set(xscale="log", xlabel="β(1−c)", ylabel="m = a − b", xlim=(1.7, 130), ylim=(0, 1.02), title="stable (full), unstable (dashed)")
    axes.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    axes.legend(frameon=False, loc="lower right")


@claim(
    "first-order-onset",
    "beyond the paper",
    "The order parameter appears at m_c > 0, with hysteresis up to β(1−c) = K, for K > 2; continuously, at β(1−c) = K = 2, for K = 2.",
    draw=_draw_branches,
    caption="Branches m(β) of the pattern fixed point without the outlier. Circles: onset; squares: where m = 0 turns unstable.",
)
def first_order_onset(setting: Setting) -> Finding:
    members, cosine = 10, 0.5
    flint.ctx.prec = 128
    branches, jumps = {}, {}
    for k in (2, 3, 10, 100):
        v = np.concatenate([np.geomspace(1e-3, 0.5, 30), np.linspace(0.5, 4 * np.log(k) + 8, 150)[1:]])
        branch: dict[str, Any] = {
            "beta": (v + k * v / np.expm1(v)).tolist(),
            "m": (np.expm1(v) / (np.exp(v) + k - 1)).tolist(),
            "spinodal": k,
        }
        place, onset = _enclose_onset(k) if k > 2 else (arb(0), arb(2))
        jumps[k] = (place.exp() - 1) / (place.exp() + k - 1)
        branch |= {"onset": float(onset.mid()), "order": float(jumps[k].mid()), "stable": (v >= float(place.mid())).tolist()}
        branches[str(k)] = branch

    @jax.jit
    def flow(memories: jax.Array, starts: jax.Array, betas: jax.Array) -> jax.Array:
        def at(start: jax.Array, beta: jax.Array) -> jax.Array:
            point = hopjax.fixed_point(start, memories, beta, method=hopjax.Picard())
            weights = hopjax.weights(point.state, memories, beta)
            return jnp.where(point.converged, weights[0] - weights[1], jnp.nan)

        return jax.vmap(lambda start: jax.vmap(lambda beta: at(start, beta))(betas))(starts)

    memories = np.asarray(jax.jit(lambda: cluster.memories(members, members + 1, cosine))())[:-1]
    nearly_uniform = 0.999 * memories.mean(axis=0) + 0.001 * memories[0]
    onset = branches["10"]["onset"]
    betas = np.array([0.98 * onset, 0.5 * (onset + members), 1.02 * members]) / (1 - cosine)
    (down_below, down_between, _), (_, up_between, up_above) = np.asarray(flow(memories, np.stack([memories[0], nearly_uniform]), betas))

    @jax.jit
    def pair_order(effective: jax.Array) -> jax.Array:
        pair = cluster.memories(2, 3, 0.0)[:-1]

        def at(beta: jax.Array) -> jax.Array:
            weights = hopjax.weights(hopjax.fixed_point(pair[0], pair, beta).state, pair, beta)
            return weights[0] - weights[1]

        return jax.vmap(at)(effective)

    steps = np.geomspace(0.1, 1e-4, 8)
    return Finding(
        [
            Measurement("certified least m_c for K = 3, 10, 100", min(float(jumps[k].lower()) for k in (3, 10, 100)), ">=", 0.1),
            order_is("m in β(1−c) − 2 for K = 2, full map", fit_order(steps, np.asarray(pair_order(jnp.asarray(2 + steps)))), 0.5),
            Measurement("m from ξ₁ at 0.98 β_c, K = 10: no pattern", float(abs(down_below)), "<=", 1e-9),
            Measurement("m from ξ₁ between β_c and K: pattern", float(down_between), ">=", float(jumps[10].upper())),
            Measurement("m from near the centroid at the same β: none, so both are stable", float(abs(up_between)), "<=", 1e-9),
            Measurement("m from near the centroid above β(1−c) = K: pattern", float(up_above), ">=", float(jumps[10].upper())),
        ],
        {"branches": branches},
        note="Jumps m_c: " + ", ".join(f"K = {k}: {float(jumps[k].mid()):.4f}" for k in (3, 10, 100)) + ".",
    )
