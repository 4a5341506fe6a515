r"""The cluster-plus-outlier model: K unit memories at cosine c to each other, and one orthogonal to all, Eq. (5).

By symmetry the fixed point near the outlier has weights (p on ξ_o, q on each ξ_μ), and the one near ξ₁ has weights
(a on ξ₁, b on each other member, r on ξ_o). Their ratios solve scalar equations, Eqs. (22) and (25),

$$\log\frac pq = \beta[p - q(1+(K-1)c)], \qquad
\log\frac ab = \beta(1-c)(a-b), \quad \log\frac ar = \beta[a + (K-1)bc - r],$$

solved here in the logarithms of the ratios, so that a weight of e^{−10⁴} is a number like any other.

The branch meant is the one continued from β = ∞. It ends where it folds; below, `exists` is False and the weights are NaN.

All functions take scalars K ≥ 2, −1/(K−1) ≤ c < 1, β > 0 (arrays under `jax.vmap`) and give NaN outside these bounds.
Source: arXiv:2605.27975, Eqs. (5), (20)-(50).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Key, Real

_Scalar = Float[Array, ""]


# ---- Geometry ----------------------------------------------------------------------------------------------------------


def _check_geometry(members: int, dim: int, cosine: float, lowest: float, least_dim: int) -> None:
    if members < 2:
        raise ValueError(f"members={members}: a cluster needs at least K = 2")
    if not lowest <= cosine < 1:
        raise ValueError(f"cosine={cosine} is out of range: need {lowest:.6g} ≤ c < 1 for K = {members}")
    if dim < least_dim:
        raise ValueError(f"dim={dim} is too small: need d ≥ {least_dim} for K = {members}")


def memories(members: int, dim: int, cosine: float, *, dtype: jnp.dtype | type = float) -> Float[Array, "m d"]:
    """K cluster members (rows 0 … K−1) and the outlier (row K) with exactly the Gram matrix of Eq. (5), up to rounding.

    Raises: ValueError unless K ≥ 2, −1/(K−1) ≤ c < 1 and d ≥ K + 1.
    """
    _check_geometry(members, dim, cosine, -1 / max(members - 1, 1), members + 1)
    # The symmetric square root of the Gram matrix (1−c)I + c11ᵀ; max() absorbs rounding at the lower bound.
    apart, along = (1 - cosine) ** 0.5, max(0.0, 1 + (members - 1) * cosine) ** 0.5
    root = apart * jnp.eye(members, dtype=dtype) + (along - apart) / members
    return jnp.zeros((members + 1, dim), dtype).at[:members, :members].set(root).at[members, members].set(1.0)


def latent_gaussian_memories(
    key: Key[Array, ""], members: int, dim: int, cosine: float, *, dtype: jnp.dtype | type = float
) -> Float[Array, "m d"]:
    """The random realisation ξ_μ ∝ √c·u + √(1−c)·g_μ/√d around a unit centroid u; the outlier is a random direction.

    Cosines differ from Eq. (5) by O(d^{−1/2}); norms are one. Raises: ValueError unless K ≥ 2, 0 ≤ c < 1 and d ≥ 2.
    """
    _check_geometry(members, dim, cosine, 0.0, 2)
    gauss = jax.random.normal(key, (members + 2, dim), dtype)
    centroid, noise, outlier = gauss[0], gauss[1:-1] / dim**0.5, gauss[-1:]
    cluster = cosine**0.5 * centroid[None] / jnp.linalg.norm(centroid) + (1 - cosine) ** 0.5 * noise
    rows = jnp.concatenate([cluster, outlier])
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


# ---- Fixed points ------------------------------------------------------------------------------------------------------


class OutlierPoint(NamedTuple):
    """Fixed point near the outlier.

    Attributes:
        log_self: log p, the weight on ξ_o.
        log_member: log q, the weight on each of the K cluster members.
        exists: whether the branch continued from β = ∞ reaches this β; else the weights are NaN.
        condition: worst relative change of a log-weight per relative change of the right sides of Eq. (22); at least 1.
    """

    log_self: _Scalar
    log_member: _Scalar
    exists: Bool[Array, ""]
    condition: _Scalar


class ClusterPoint(NamedTuple):
    """Fixed point near a cluster member ξ₁.

    Attributes:
        log_self: log a, the weight on ξ₁.
        log_other: log b, the weight on each of the K − 1 other members.
        log_outlier: log r, the weight on ξ_o.
        exists: whether the branch continued from β = ∞ reaches this β; else the weights are NaN.
        condition: worst relative change of a log-weight per relative change of the right sides of Eq. (25); at least 1.
    """

    log_self: _Scalar
    log_other: _Scalar
    log_outlier: _Scalar
    exists: Bool[Array, ""]
    condition: _Scalar


def _parameters(members: ArrayLike, cosine: ArrayLike, beta: ArrayLike) -> tuple[Array, Array, Array]:
    """(K, c, β) in one floating dtype, NaN where one is out of range."""
    dtype = jnp.result_type(cosine, beta)
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)
    members, cosine, beta = (jnp.asarray(value).astype(dtype) for value in (members, cosine, beta))
    valid = (members >= 2) & (cosine < 1) & (1 + (members - 1) * cosine >= -4 * jnp.finfo(dtype).eps) & (beta > 0) & (beta < jnp.inf)
    return members, cosine, jnp.where(valid, beta, jnp.nan)


def _newton_to_root(residual: Callable[[Array], Array], start: Array, steps: int = 100) -> Array:
    """Root of an increasing function that is convex right of it and entered from the right (or concave and from the left).

    Newton's iterates then approach monotonically: the iteration stops when rounding turns a step back. A slope that is not positive means
    that there is no root, and gives NaN.
    """

    def newton(y: Array) -> Array:
        value, slope = jax.jvp(residual, (y,), (jnp.ones_like(y),))
        return jnp.where(slope > 0, y - value / slope, jnp.nan)

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        before, now, count = carry
        return ((now - before) * direction > 0) & (count < steps)

    following = newton(start)
    direction = jnp.sign(following - start)
    _, root, _ = lax.while_loop(unfinished, lambda carry: (carry[1], newton(carry[1]), carry[2] + 1), (start, following, jnp.int32(0)))
    return root


def _implicit_root(residual: Callable[[Array], Array], solve: Callable[[Callable[[Array], Array]], Array], like: Array) -> Array:
    """A scalar root with derivatives by the implicit function theorem."""
    return lax.custom_root(
        residual, lax.stop_gradient(like), lambda function, _: solve(function), lambda linear, y: y / linear(jnp.ones_like(y))
    )


def outlier_point(members: Real[ArrayLike, ""], cosine: Real[ArrayLike, ""], beta: Real[ArrayLike, ""]) -> OutlierPoint:
    """Weights at the fixed point near the outlier, Eqs. (20)-(22), to the last digit that their condition allows.

    Accuracy: each log-weight within 8 eps·max(1, |log weight|)·condition.
    """
    members, cosine, beta = _parameters(members, cosine, beta)
    total = 1 + (members - 1) * cosine  # ξ_μ · Σξ_ν

    def residual(y: Array) -> Array:
        """y + β(p − q·total) at y = log(q/p): concave for K e^y < 1, convex beyond."""
        ratio = jnp.exp(y)
        return y + beta * (1 - total * ratio) / (1 + members * ratio)

    # Where the curve has no fold (few members, c < 0) the branch goes on past the inflection, and is entered from the right.
    inflection, log_members = 4 * members / (total + members), jnp.log(members)
    unfolded = 2 * (members - total) >= (members + total) * log_members
    beyond = unfolded & (beta < inflection) & (residual(-log_members) < 0)

    def solve(function: Callable[[Array], Array]) -> Array:
        root = _newton_to_root(function, jnp.where(beyond, jnp.zeros_like(beta), -beta))
        return jnp.where(beyond | (root <= -log_members), root, jnp.nan)

    y = _implicit_root(residual, solve, beta)
    log_self = -jnp.log1p(members * jnp.exp(y))
    _, slope = jax.jvp(residual, (y,), (jnp.ones_like(y),))
    condition = jnp.maximum(1, jnp.abs(y) / (slope * jnp.maximum(1, jnp.abs(y))))
    return OutlierPoint(log_self, y + log_self, jnp.isfinite(y), lax.stop_gradient(condition))


def _outlier_log_ratio(pull: Array, alignment: Array) -> Array:
    """w = log(r/a) from w = −pull·(alignment − e^w): the localised root, by Newton from the left of a concave function."""

    def residual(w: Array) -> Array:
        return w + pull * (alignment - jnp.exp(w))

    def solve(function: Callable[[Array], Array]) -> Array:
        # Eight steps reach rounding wherever the branch exists; where w has no root the slope turns and the result is NaN.
        w = -pull * alignment
        for _ in range(8):
            value, slope = jax.jvp(function, (w,), (jnp.ones_like(w),))
            w = jnp.where(slope > 0, w - value / slope, jnp.nan)
        return w

    return _implicit_root(residual, solve, pull)


def _cluster_curve(v: Array, members: Array, cosine: Array) -> tuple[Array, Array]:
    """β(1−c) and log(r/a) as functions of v = log(a/b) along the branch: both equations of (25) without β.

    Without the outlier β(1−c) = v + K v/(e^v − 1), a convex function although f of Eq. (28) is not convex in a − b.
    """
    per_gap = v / -jnp.expm1(-v)  # β(1−c)a
    alignment = 1 + (members - 1) * cosine * jnp.exp(-v)
    w = _outlier_log_ratio(per_gap / (1 - cosine), alignment)
    return per_gap * (1 + (members - 1) * jnp.exp(-v) + jnp.exp(w)), w


def cluster_point(members: Real[ArrayLike, ""], cosine: Real[ArrayLike, ""], beta: Real[ArrayLike, ""]) -> ClusterPoint:
    """Weights at the fixed point near a cluster member, Eqs. (23)-(26), to the last digit that their condition allows.

    Accuracy: each log-weight within 8 eps·max(1, |log weight|)·condition.
    """
    members, cosine, beta = _parameters(members, cosine, beta)
    effective = beta * (1 - cosine)  # Eq. (26)

    def residual(v: Array) -> Array:
        return _cluster_curve(v, members, cosine)[0] - effective

    def solve(function: Callable[[Array], Array]) -> Array:
        root = _newton_to_root(function, effective)
        return jnp.where(root > 0, root, jnp.nan)

    v = _implicit_root(residual, solve, effective)
    _, w = _cluster_curve(v, members, cosine)
    log_self = -jnp.log1p((members - 1) * jnp.exp(-v) + jnp.exp(w))
    condition = _cluster_condition(v, w, members, cosine)
    return ClusterPoint(log_self, log_self - v, log_self + w, jnp.isfinite(v) & jnp.isfinite(w), lax.stop_gradient(condition))


def _cluster_condition(v: Array, w: Array, members: Array, cosine: Array) -> Array:
    """Row sums of |(I − ∂Φ)⁻¹ diag(Φ)| / max(1, |y|) for y = (−v, w) = Φ(y), the equations (25) in logarithms."""
    y = jnp.stack([-v, w])
    pull = v / (-jnp.expm1(-v) * (1 - cosine) * jnp.exp(-jnp.log1p((members - 1) * jnp.exp(-v) + jnp.exp(w))))  # β

    def phi(y: Array) -> Array:
        ratios = jnp.exp(y)
        selfish = 1 / (1 + (members - 1) * ratios[0] + ratios[1])
        return -pull * selfish * jnp.stack([(1 - cosine) * (1 - ratios[0]), 1 + (members - 1) * cosine * ratios[0] - ratios[1]])

    jacobian = jnp.eye(2, dtype=y.dtype) - jax.jacfwd(phi)(y)
    (a, b), (c, d) = jacobian
    inverse = jnp.stack([jnp.stack([d, -b]), jnp.stack([-c, a])]) / (a * d - b * c)
    return jnp.maximum(1, jnp.max(jnp.abs(inverse) @ jnp.abs(y) / jnp.maximum(1, jnp.abs(y))))


# ---- Regimes -----------------------------------------------------------------------------------------------------------


def log_outlier_leakage(point: OutlierPoint, members: Real[ArrayLike, ""]) -> _Scalar:
    """log ℓ_o = log(Kq), the weight off the outlier at its fixed point, Eqs. (35)-(36)."""
    return jnp.log(jnp.asarray(members).astype(point.log_member.dtype)) + point.log_member


def log_cluster_leakage(point: ClusterPoint, members: Real[ArrayLike, ""]) -> _Scalar:
    """log ℓ_c = log((K−1)b + r), the weight off ξ₁ at its fixed point, Eqs. (35)-(36)."""
    return jnp.logaddexp(jnp.log(jnp.asarray(members).astype(point.log_other.dtype) - 1) + point.log_other, point.log_outlier)


def critical_effective_beta(members: Real[ArrayLike, ""]) -> _Scalar:
    """β_c(1−c) = min over v > 0 of v + K v/(e^v − 1): the onset of pattern fixed points without the outlier, Eqs. (29)-(31).

    v = log(a/b) at the onset. In v the curve is convex; in the paper's m = a − b, f is not for K > 2, and the onset is first order.
    """
    members, _, _ = _parameters(members, 0.0, 1.0)

    def slope_sign(v: Array) -> Array:
        """Sign of the derivative 1 + K B′(v), B = v/(e^v − 1): increasing through its one zero."""
        bernoulli = v / jnp.expm1(v)
        return 1 + members * bernoulli * (1 / v + 1 / jnp.expm1(-v))

    def halve(_: object, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        rising = slope_sign(middle) > 0
        return jnp.where(rising, low, middle), jnp.where(rising, middle, high)

    # The minimum lies below 2 log K + 2, and its value is stationary: an error of 1e-9 in v costs 1e-18.
    low, high = lax.fori_loop(0, 40, halve, (jnp.zeros_like(members), 2 * jnp.log(members) + 2))
    v = lax.stop_gradient(0.5 * (low + high))
    value = v + members * v / jnp.expm1(v)
    return jnp.where(members == 2, members, jnp.where(members > 2, value, jnp.nan))  # K = 2: continuous onset, at v = 0


def critical_beta(members: Real[ArrayLike, ""], cosine: Real[ArrayLike, ""]) -> _Scalar:
    """β_c, above which pattern-specific cluster fixed points exist, Eq. (34); of the cluster alone.

    The outlier raises the onset by a relative O(e^{−β_c}): 16 % at K = 3, c = 0, nothing to speak of where β_c is large."""
    members, cosine, _ = _parameters(members, cosine, 1.0)
    return critical_effective_beta(members) / jnp.where(cosine < 1, 1 - cosine, jnp.nan)


def critical_effective_beta_bounds(members: Real[ArrayLike, ""]) -> tuple[_Scalar, _Scalar]:
    """Elementary two-sided bounds on β_c(1−c) for K ≥ 3, standing for Eq. (32).

    With L = log K: L + log L + 1 < β_c(1−c) ≤ v + Kv/(e^v − 1) at v = L + log L; both sides are L + log L + 1 + o(1), Eq. (33).
    Lower: v/(e^v − 1) > v e^{−v}, and v + s ≥ L + log v + 1 for s = K v e^{−v}, since s − log s ≥ 1; the minimum has v ≥ L for
    K ≥ 4, and K = 3 is a number. Upper: the curve at any v bounds its minimum.
    """
    members, _, _ = _parameters(members, 0.0, 1.0)
    members = jnp.where(members >= 3, members, jnp.nan)
    log_members = jnp.log(members)
    v = log_members + jnp.log(log_members)
    return v + 1, v + members * v / jnp.expm1(v)


class Regime(NamedTuple):
    """Where a parameter point lies in the chain strong ⊂ localised ⊂ exists of Eq. (50), in numbers.

    Attributes:
        critical_ratio: β/β_c.
        outlier_leak: βℓ_o, Eq. (39); NaN where the fixed point does not exist.
        cluster_leak: βℓ_c, Eq. (45); NaN where the fixed point does not exist.
        strength: β(1−c)/(log K + log β), Eqs. (47)-(48); +inf for Kβ ≤ 1, where nothing is required.
        exists: β ≥ β_c.
        localised: both leaks at most the threshold.
        strong: `strength` at least its threshold.
    """

    critical_ratio: _Scalar
    outlier_leak: _Scalar
    cluster_leak: _Scalar
    strength: _Scalar
    exists: Bool[Array, ""]
    localised: Bool[Array, ""]
    strong: Bool[Array, ""]


def regime(
    members: Real[ArrayLike, ""],
    cosine: Real[ArrayLike, ""],
    beta: Real[ArrayLike, ""],
    *,
    localised_below: float = 0.1,
    strong_above: float = 2.0,
) -> Regime:
    """The regime of a parameter point. The thresholds are this library's: the paper says "≪" and "≫"."""
    members, cosine, beta = _parameters(members, cosine, beta)
    outlier_leak = beta * jnp.exp(log_outlier_leakage(outlier_point(members, cosine, beta), members))
    cluster_leak = beta * jnp.exp(log_cluster_leakage(cluster_point(members, cosine, beta), members))
    ratio = beta / critical_beta(members, cosine)
    needed = jnp.log(members) + jnp.log(beta)
    strength = jnp.where(needed <= 0, jnp.inf, beta * (1 - cosine) / needed)
    localised = (outlier_leak <= localised_below) & (cluster_leak <= localised_below)
    return Regime(ratio, outlier_leak, cluster_leak, strength, ratio >= 1, localised, strength >= strong_above)
