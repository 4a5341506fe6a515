"""One parameter point: everything exact beside its asymptotic form, and the regime that says how far to trust the latter.

Must stay quick to import: it is a command of its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hopjax import asymptotics, cluster, gaps

# Largest K and d: above, float64 skips integers.
LARGEST = 2**53

_WEIGHTS = ("outlier_self", "outlier_leak", "cluster_self", "cluster_other", "cluster_outlier")
_CHI = ("chi_oo", "chi_cc", "chi_cc2", "chi_co", "chi_oc")


def check_point(members: int, cosine: float, beta: float, dim: int) -> None:
    """Raises: ValueError naming the value that is out of range, its range, and what to do."""
    if not 2 <= members <= LARGEST:
        raise ValueError(f"--K {members} is out of range: a cluster has 2 ≤ K ≤ 2^53 members; take K = 2 or more")
    lowest = -1 / (members - 1)
    if not lowest <= cosine < 1:
        raise ValueError(f"--cosine {cosine} is out of range: {members} unit vectors need −1/(K−1) = {lowest:.6g} ≤ c < 1; take c = 0.5")
    if not 0 < beta < math.inf:
        raise ValueError(f"--beta {beta} is out of range: need 0 < β < ∞; take β = 8")
    if not members + 1 <= dim <= LARGEST:
        fix = f"take --dim {members + 1} or more" if dim <= members else "take a smaller d"
        raise ValueError(f"--dim {dim} is out of range: K = {members} members and an outlier need K + 1 = {members + 1} ≤ d ≤ 2^53; {fix}")


@jax.jit
def _exact(members: jax.Array, cosine: jax.Array, beta: jax.Array, dim: jax.Array) -> dict[str, jax.Array]:
    logs = gaps.replay_log_weights(members, cosine, beta)
    named = dict(
        zip(_WEIGHTS, (logs.outlier_self, logs.outlier_cluster, logs.cluster_self, logs.cluster_other, logs.cluster_outlier), strict=True)
    )
    values = {key: jnp.exp(value) for key, value in named.items()} | {f"log_{key}": value for key, value in named.items()}
    for name, gap in (("E", gaps.energies(members, cosine, beta)), ("S", gaps.sharpnesses(members, cosine, beta, dim))):
        values |= {f"{name}_outlier": gap.outlier, f"{name}_cluster": gap.cluster, f"{name}_gap": gap.gap}
        values |= {f"log_{name}_gap": gap.log_gap, f"sign_{name}_gap": gap.sign}
    for key, log_weight in zip(_CHI, logs, strict=True):
        values |= {key: jax.nn.sigmoid(log_weight), f"log_{key}": jax.nn.log_sigmoid(log_weight)}
    regime = cluster.regime(members, cosine, beta)
    return values | {
        "beta_c": cluster.critical_beta(members, cosine),
        "beta_over_beta_c": regime.critical_ratio,
        "beta_outlier_leakage": regime.outlier_leak,
        "beta_cluster_leakage": regime.cluster_leak,
        "strength": regime.strength,
        "exists": regime.exists,
        "localised": regime.localised,
        "strong": regime.strong,
    }


@jax.jit
def _asymptotic(members: jax.Array, cosine: jax.Array, beta: jax.Array, dim: jax.Array) -> dict[str, jax.Array]:
    logs = asymptotics.log_weights(members, cosine, beta)
    leading = {"outlier_leak": logs.outlier_member, "cluster_other": logs.cluster_other, "cluster_outlier": logs.cluster_outlier}
    # Self-weights: 1 − ℓ with the leading leakage, Eq. (36).
    near, far = jnp.exp(logs.cluster_other), jnp.exp(logs.cluster_outlier)
    leakages = {"outlier_self": members * jnp.exp(logs.outlier_member), "cluster_self": (members - 1) * near + far}
    values = {key: jnp.exp(value) for key, value in leading.items()} | {f"log_{key}": value for key, value in leading.items()}
    values |= {key: 1 - leak for key, leak in leakages.items()} | {f"log_{key}": jnp.log1p(-leak) for key, leak in leakages.items()}
    # Eqs. (82) and (83) relative to the larger exponential, so that neither underflows.
    largest, tangent = jnp.maximum(logs.cluster_other, logs.cluster_outlier), dim - 1
    near, far = jnp.exp(logs.cluster_other - largest), jnp.exp(logs.cluster_outlier - largest)
    gap_terms = {
        "E": (asymptotics.energies(members, cosine, beta), near - far, (members - 1) / beta),
        "S": (
            asymptotics.sharpnesses(members, cosine, beta, dim),
            near * (1 - cosine) * (2 * tangent + beta * (1 + cosine)) - far * (2 * tangent + beta),
            members - 1,
        ),
    }
    for name, (sides, difference, factor) in gap_terms.items():
        log_gap, sign = largest + jnp.log(factor * jnp.abs(difference)), jnp.sign(difference)
        values |= {f"{name}_outlier": sides.outlier, f"{name}_cluster": sides.cluster, f"{name}_gap": sign * jnp.exp(log_gap)}
        values |= {f"log_{name}_gap": log_gap, f"sign_{name}_gap": sign}
    for key, log_chi in zip(_CHI, asymptotics.log_susceptibilities(members, cosine, beta), strict=True):
        values |= {key: jnp.exp(log_chi), f"log_{key}": log_chi}
    return values


@jax.jit
def _existence(members: jax.Array, cosine: jax.Array, betas: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (
        jax.vmap(lambda beta: cluster.outlier_point(members, cosine, beta).exists)(betas),
        jax.vmap(lambda beta: cluster.cluster_point(members, cosine, beta).exists)(betas),
    )


def _fold(members: float, cosine: float, beta: float, which: int) -> float:
    """Where the branch begins: above `beta`, where it does not exist, to six digits; each pass divides the interval by 64."""
    low, high = beta, beta
    while not bool(_existence(members, cosine, jnp.full(65, high))[which][0]):
        high *= 4
    while high / low > 1 + 1e-7:
        betas = [low * (high / low) ** (step / 64) for step in range(65)]
        exists = [bool(one) for one in _existence(members, cosine, jnp.asarray(betas))[which]]
        first = exists.index(True) if any(exists) else 64
        low, high = betas[first - 1], betas[first]
    return high


def _numbers(values: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Python's numbers; None for what does not exist, and for ±∞, which JSON lacks."""
    numbers: dict[str, Any] = {}
    for key, value in values.items():
        number = value.item()
        numbers[key] = None if not math.isfinite(number) else int(number) if key.startswith("sign_") else number
    return numbers


def evaluate(members: int, cosine: float, beta: float, dim: int) -> dict[str, Any]:
    """All numbers at a point that `check_point` accepts, by the names under which --json prints them."""
    arguments = [jnp.asarray(float(value)) for value in (members, cosine, beta, dim)]
    exact, asymptotic = _numbers(_exact(*arguments)), _numbers(_asymptotic(*arguments))
    reasons = []
    for which, name in enumerate(("outlier", "cluster")):
        if exact[f"log_{name}_self"] is None:
            fold = _fold(float(members), cosine, beta, which)
            reasons.append(f"no {name} fixed point: β = {beta:.6g} is below the fold at β ≈ {fold:.6g}; raise β or lower K")
    point = {"K": members, "cosine": cosine, "beta": beta, "dim": dim}
    return point | exact | {"asymptotic": asymptotic, "reason": "; ".join(reasons) or None}


def _show(value: Any) -> str:
    return "—" if value is None else f"{value:.15g}" if isinstance(value, float) else str(value)


def _rows(values: Mapping[str, Any], rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Lines of a table: what it is, its key, the exact value and the asymptotic one; logarithms where a value underflows."""
    lines = []
    for what, key, source in rows:
        exact, asymptotic = values[key], values["asymptotic"].get(key)
        if exact == 0.0 and values.get(f"log_{key}") is not None:
            key = f"log_{key}"
            what, exact, asymptotic = f"log |{what}|" if key.endswith("_gap") else f"log {what}", values[key], values["asymptotic"].get(key)
        lines.append(f"  {what:<34} {_show(exact):>23} {_show(asymptotic):>23}   {source}")
    return lines


def render(values: Mapping[str, Any]) -> str:
    """The numbers as a page of text."""
    word = {True: "yes", False: "no"}
    table = {
        "Weights at the outlier's fixed point": [
            ("on the outlier", "outlier_self", "(22), (36)"),
            ("on each cluster member", "outlier_leak", "(52)"),
        ],
        "Weights at a cluster member's fixed point": [
            ("on itself", "cluster_self", "(25), (36)"),
            ("on each other member", "cluster_other", "(54)"),
            ("on the outlier", "cluster_outlier", "(54)"),
        ],
        "Energy": [
            ("E_o", "E_outlier", "(78)"),
            ("E_c", "E_cluster", "(80)"),
            ("E_o − E_c", "E_gap", "(82)"),
        ],
        "Sharpness": [
            ("S_o", "S_outlier", "(79)"),
            ("S_c", "S_cluster", "(81)"),
            ("S_o − S_c", "S_gap", "(83)"),
        ],
        "Replay susceptibility (target ← replayed)": [
            ("χ(o ← o)", "chi_oo", "(98)"),
            ("χ(c ← c)", "chi_cc", "(98)"),
            ("χ(c ← c′)", "chi_cc2", "(98)"),
            ("χ(c ← o)", "chi_co", "(98)"),
            ("χ(o ← c)", "chi_oc", "(98)"),
        ],
    }
    lines = [
        f"K = {values['K']}, c = {values['cosine']!r}, β = {values['beta']!r}, d = {values['dim']}",
        "",
        f"  {'':<34} {'exact':>23} {'asymptotic':>23}   equations",
    ]
    for title, rows in table.items():
        lines += ["", title, *_rows(values, rows)]
    lines += [
        "",
        "Regime",
        f"  exists     {word[values['exists']]:<4} β/β_c = {_show(values['beta_over_beta_c'])}, needs ≥ 1; β_c = {_show(values['beta_c'])}",
        f"  localised  {word[values['localised']]:<4} βℓ_o = {_show(values['beta_outlier_leakage'])}, "
        f"βℓ_c = {_show(values['beta_cluster_leakage'])}, need ≤ 0.1",
        f"  strong     {word[values['strong']]:<4} β(1−c)/(log K + log β) = {_show(values['strength'])}, needs ≥ 2",
    ]
    if values["reason"]:
        lines += ["", values["reason"]]
    return "\n".join(lines)
