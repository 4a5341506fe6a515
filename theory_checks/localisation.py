"""Leakage: its asymptotics, what it feeds back, and the regimes that it defines: Eqs. (35)-(50)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from hopjax import cluster
from theory_checks.claim import PRESETS, Finding, Measurement, Setting, claim
from theory_checks.figures import CLUSTER, NEUTRAL, OTHER, OUTLIER
from theory_checks.fixed_points import symmetric_logs
from theory_checks.ladder import fit_order, order_is

CONFIGURATIONS = ((3.0, 0.0), (10.0, 0.5), (100.0, 0.8))  # K and c of the ladders in β
REGIME_COLOURS = ("#FFFFFF", "#DDDDDD", "#9ECAE1", "#3182BD")


class _Ladder(NamedTuple):
    """Exact logarithms at the fixed point near one memory, along β at which the leakage falls from 10⁻² to 10⁻⁸."""

    members: float
    cosine: float
    beta: np.ndarray
    logs: dict[str, np.ndarray]


def _ladders() -> dict[str, list[_Ladder]]:
    """The ladders of every configuration, for the "outlier" and for a member of the "cluster"."""
    members, cosines = (np.array(column)[None, :, None] for column in zip(*CONFIGURATIONS, strict=True))
    rates = np.stack([np.ones_like(cosines[0]), 1 - cosines[0]])
    betas = (np.log(members) + np.linspace(2, 8, 9) * np.log(10)) / rates
    logs = symmetric_logs(members, cosines, betas)
    return {
        side: [
            _Ladder(k, c, betas[row, column], {name: part[row, column] for name, part in logs.items()})
            for column, (k, c) in enumerate(CONFIGURATIONS)
        ]
        for row, side in enumerate(("outlier", "cluster"))
    }


@claim(
    "leakage",
    "Eqs. (35)-(36)",
    "The leakages 1 − (dominant weight) are ℓ_o = Kq ≈ Ke^{−β} and ℓ_c = (K−1)b + r ≈ (K−1)e^{−β(1−c)} + e^{−β}.",
)
def leakage(setting: Setting) -> Finding:
    measurements, sum_rule = [], []
    for side, ladders in _ladders().items():
        for k, c, beta, logs in ladders:
            member = np.log(k - 1) - beta * (1 - c)
            asymptote = np.log(k) - beta if side == "outlier" else np.logaddexp(member, -beta)
            # log(ℓ/asymptote) is of size βℓ ≥ 1e-7 and rounded at β·eps: resolved on every rung.
            order = fit_order(beta * np.exp(logs[side]), logs[side] - asymptote)
            measurements.append(order_is(f"log(ℓ/asymptote) in βℓ, {side}, K = {k:g}, c = {c:g}", order, 1))
            self_weight = logs["p"] if side == "outlier" else logs["a"]
            sum_rule.append(np.abs(-np.expm1(self_weight) / np.exp(logs[side]) - 1) / beta)
    # Definition (35): a logarithm of size β is rounded to β·eps, and so is the ratio of its exponentials.
    bound = 4 * float(np.finfo(float).eps)
    return Finding([*measurements, Measurement("largest relative |1 − (dominant weight) − ℓ|/β", float(np.max(sum_rule)), "<=", bound)])


def _draw_feedback(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    ladder, path = figure.subplots(1, 2)
    for name, colour, label in (("q", OUTLIER, "log(q exp β)"), ("b", CLUSTER, "log(b exp β(1−c))"), ("r", OTHER, "log(r exp β)")):
        ladder.loglog(values[f"{name} steps"], values[f"{name} corrections"], "o-", color=colour, markersize=4, label=label)
    ends = np.asarray([values["q steps"][0], values["q steps"][-1]])
    ladder.loglog(ends, ends, ":", color=NEUTRAL, label="βℓ")
    ladder.set(title="K = 10, c = 0.5", xlabel="βℓ", ylabel="correction of the log weight")
    for name, colour in (("outlier", OUTLIER), ("cluster", CLUSTER)):
        path.loglog(values["path beta"], values[f"{name} leak"], "--", color=colour, label=f"ℓ, {name}")
        path.loglog(values["path beta"], values[f"{name} correction"], "o-", color=colour, markersize=4, label=f"correction, {name}")
    path.set(title="K grows with β", xlabel="β", ylabel="")
    for axes in (ladder, path):
        axes.legend(frameon=False)


@claim(
    "leakage-feedback",
    "Eqs. (37), (41), (43), (44)",
    "Leakage corrects the off-memory weights by factors e^{O(βℓ)}: it is βℓ, not ℓ, that must vanish.",
    draw=_draw_feedback,
    caption="Left: corrections of the log weights are of order βℓ. Right: with K ∝ e^β/β (e^{β(1−c)}/β) ℓ vanishes, the correction stays.",
)
def leakage_feedback(setting: Setting) -> Finding:
    ladders = _ladders()
    series: dict[str, Any] = {}
    measurements = []
    for name, side, exponent in (("q", "outlier", "β"), ("b", "cluster", "β(1−c)"), ("r", "cluster", "β")):
        for k, c, beta, logs in ladders[side]:
            steps = beta * np.exp(logs[side])
            correction = logs[name] + beta * (1 - c if name == "b" else 1)
            measurements.append(order_is(f"log({name} e^{{{exponent}}}) in βℓ, K = {k:g}, c = {c:g}", fit_order(steps, correction), 1))
            if k == 10:
                series |= {f"{name} steps": steps.tolist(), f"{name} corrections": correction.tolist()}
    # K = κe^β/β at the outlier, K = κe^{β(1−c)}/β at a member. Then ℓ ~ 1/β, and to leading order the corrections w solve
    # w = (1+c)κe^w and w = (1−c)κe^w: Lambert's function.
    kappa, cosine, path = 0.1, 0.5, np.geomspace(20, 600, 8)
    on_path = symmetric_logs(kappa * np.exp(path * np.array([[1.0], [1 - cosine]])) / path, cosine, path)
    found = {
        "outlier": (on_path["outlier"][0], on_path["q"][0] + path, (1 + cosine) * kappa),
        "cluster": (on_path["cluster"][1], on_path["b"][1] + path * (1 - cosine), (1 - cosine) * kappa),
    }
    series |= {"path beta": path.tolist()}
    for name, (log_leak, correction, strength) in found.items():
        limit = -float(special.lambertw(-strength).real)
        measurements.append(order_is(f"ℓ in 1/β on the path, {name}", fit_order(1 / path, np.exp(log_leak)), 1))
        measurements.append(order_is(f"correction − {limit:.4f} in 1/β on the path, {name}", fit_order(1 / path, correction - limit), 1))
        series |= {f"{name} leak": np.exp(log_leak).tolist(), f"{name} correction": correction.tolist()}
    return Finding(measurements, series)


def _exact_regime(setting: Setting) -> cluster.Regime:
    preset = setting.preset
    # The parameters are arguments, so that all presets and both claims are one compiled program.
    return jax.jit(lambda *point: cluster.regime(*point))(float(preset.members), preset.cosine, preset.beta)


@claim(
    "localisation-condition",
    "Eqs. (38)-(46)",
    "The fixed points are localised: βℓ_o ≪ 1 and βℓ_c ≪ 1 (here at most 0.1), so that the feedbacks e^{O(βℓ)} are negligible.",
    per_preset=True,
)
def localisation_condition(setting: Setting) -> Finding:
    preset, found = setting.preset, _exact_regime(setting)
    outlier_form = preset.beta * preset.members * np.exp(-preset.beta)
    cluster_form = preset.beta * ((preset.members - 1) * np.exp(-preset.beta * (1 - preset.cosine)) + np.exp(-preset.beta))
    return Finding(
        [
            Measurement("βℓ_c, exact", float(found.cluster_leak), "<=", 0.1),
            Measurement("βℓ_o, exact", float(found.outlier_leak), "<=", 0.1),
            Measurement("β[(K−1)e^{−β(1−c)} + e^{−β}], Eq. (45)", cluster_form, "<=", 0.1),
            Measurement("βKe^{−β}, Eq. (41)", outlier_form, "<=", 0.1),
        ],
        note=f"β/β_c = {float(found.critical_ratio):.2f}, β(1−c) = {preset.beta * (1 - preset.cosine):.2f}.",
    )


@claim(
    "working-regime",
    "Eqs. (47)-(49), Assumption B.1",
    "The working regime β(1−c) ≫ log K + log β (here twice that at least) holds, and with it βℓ ≪ 1.",
    per_preset=True,
)
def working_regime(setting: Setting) -> Finding:
    found = _exact_regime(setting)
    return Finding(
        [
            Measurement("β(1−c)/(log K + log β)", float(found.strength), ">=", 2.0),
            Measurement("βℓ, the larger", float(np.maximum(found.outlier_leak, found.cluster_leak)), "<=", 0.1),
        ],
        note="What counts as ≫ in Eq. (48) is ours: twice log K + log β.",
    )


def _draw_chain(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    (values,) = series.values()
    for axes, (name, levels) in zip(figure.subplots(1, len(values["maps"]), sharey=True), values["maps"].items(), strict=True):
        axes.pcolormesh(
            values["cosine"],
            values["beta"],
            np.asarray(levels).T,
            cmap=ListedColormap(REGIME_COLOURS),
            vmin=-0.5,
            vmax=3.5,
            rasterized=True,
        )
        for preset, (members, cosine, beta) in values["presets"].items():
            if str(members) == name:
                axes.plot(cosine, beta, "o", color=OUTLIER, markersize=6)
                axes.annotate(preset, (cosine, beta), textcoords="offset points", xytext=(7, -3), color=OUTLIER)
        axes.set(yscale="log", xlabel="c", title=f"K = {name}")
    figure.axes[0].set(ylabel="β")
    labels = ("no pattern", "exists", "localised", "strong")
    patches = [Patch(facecolor=colour, edgecolor=NEUTRAL, label=label) for colour, label in zip(REGIME_COLOURS, labels, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False)


@claim(
    "inclusion-chain",
    "Eq. (50)",
    "Working regime ⊂ localised ⊂ pattern fixed points exist (checked for Kβ ≥ 20), and both inclusions are strict.",
    draw=_draw_chain,
    caption="Where pattern fixed points exist, are localised (βℓ ≤ 0.1) and lie in the working regime (β(1−c) ≥ 2(log K + log β)).",
)
def inclusion_chain(setting: Setting) -> Finding:
    sizes = np.array([2, 3, 5, 10, 12, 30, 100, 1000, 10_000], dtype=float)
    cosines, betas = np.linspace(0, 0.95, 39), np.geomspace(0.5, 400, 90)

    @jax.jit
    def regimes(members: jax.Array, cosines: jax.Array, betas: jax.Array) -> cluster.Regime:
        return jax.vmap(cluster.regime)(members, cosines, betas)

    k, c, beta = np.meshgrid(sizes, cosines, betas, indexing="ij")
    found = regimes(*(jnp.asarray(part.ravel()) for part in (k, c, beta)))
    exists, localised, strong = (np.asarray(part).reshape(k.shape) for part in (found.exists, found.localised, found.strong))
    inside = k * beta >= 20
    broken = (strong & ~localised) | (localised & ~exists)
    level = np.where(strong, 3, np.where(localised, 2, np.where(exists, 1, 0)))
    outside = int(np.sum(broken & ~inside))
    first = np.argwhere(broken & ~inside)
    example = tuple(float(axis[tuple(first[0])]) for axis in (k, c, beta)) if len(first) else None
    chosen = {"3": 1, "10": 3, "12": 4, "1000": 7}
    series = {
        "cosine": cosines.tolist(),
        "beta": betas.tolist(),
        "maps": {name: level[index].tolist() for name, index in chosen.items()},
        "presets": {name: [preset.members, preset.cosine, preset.beta] for name, preset in PRESETS.items()},
    }
    where = f", e.g. K = {example[0]:g}, c = {example[1]:.3g}, β = {example[2]:.3g}" if example else ""
    return Finding(
        [
            Measurement(f"points that break the chain, of {int(inside.sum())} with Kβ ≥ 20", float(np.sum(broken & inside)), "<=", 0.0),
            Measurement("points that exist without being localised: strict", float(np.sum(exists & ~localised & inside)), ">=", 1.0),
            Measurement(
                "points that are localised outside the working regime: strict", float(np.sum(localised & ~strong & inside)), ">=", 1.0
            ),
        ],
        series,
        note=f"In the working regime βℓ_c ≲ 1/(Kβ): the chain is a limit. "
        f"Below Kβ = 20 it breaks at {outside} of {int((~inside).sum())} points{where}.",
    )
