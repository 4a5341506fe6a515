r"""Energy, sharpness and replay susceptibility at the two fixed points of the cluster-plus-outlier model, and their gaps.

At the fixed points of `hopjax.cluster` everything is a polynomial in the off-memory weights (plus one logarithm). With
ℓ = Kq at the outlier, and L = (K−1)b, r at the cluster member, and A = 1 + (K−1)c,

$$E_o + \tfrac12 = \beta^{-1}\log(1-\ell) + \tfrac12\ell^2(1 + A/K), \qquad
(d-1) - S = (d-1)(1-|x|^2) + \beta\sum_\mu p_\mu s_\mu(1-s_\mu), \quad s_\mu = \xi_\mu\cdot x,$$

and the gaps of Theorem 4.1 and Appendix C are differences of these small numbers, never of the totals: at β = 100 the gap is far below
the rounding of either side. All leakages are carried relative to the largest, e^s, so nothing underflows.

Exact at any β, unlike `hopjax.asymptotics`. Source: arXiv:2605.27975, Eqs. (8), (57), (74), (82)-(83), (86), (94).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from hopjax.cluster import _parameters, cluster_point, log_cluster_leakage, log_outlier_leakage, outlier_point

_Scalar = Float[Array, ""]


class Gap(NamedTuple):
    """A quantity at both fixed points, and the difference outlier − cluster from the leakages.

    Attributes:
        outlier: value at the outlier's fixed point.
        cluster: value at a cluster member's.
        gap: outlier − cluster; NaN where either fixed point does not exist; exactly 0 at c = 0, where the two are alike.
        sign: sign of the gap, also where it underflows.
        log_gap: log|gap|, also where it underflows.
        log_scale: logarithm of the larger of the two leakage terms that were subtracted: the gap's error is at most
            (16 eps · |log weight| · condition) of it, in float64 below 1e-12 while no weight is under 1e-308 and no condition above 100.
    """

    outlier: _Scalar
    cluster: _Scalar
    gap: _Scalar
    sign: _Scalar
    log_gap: _Scalar
    log_scale: _Scalar


class _Leakage(NamedTuple):
    """Off-memory weights ℓ = Kq; L = (K−1)b and r: as they are, and divided by e^log_scale."""

    outlier: Array
    others: Array
    stray: Array
    outlier_scaled: Array
    others_scaled: Array
    stray_scaled: Array
    log_scale: Array


def _leakage(members: Array, cosine: Array, beta: Array) -> _Leakage:
    at_outlier, at_cluster = outlier_point(members, cosine, beta), cluster_point(members, cosine, beta)
    log_outlier = log_outlier_leakage(at_outlier, members)
    log_scale = jnp.maximum(log_outlier, log_cluster_leakage(at_cluster, members))
    # jnp.maximum passes a NaN on, so a missing fixed point shows in the gap; each side still has its own value.
    logs = jnp.stack([log_outlier, jnp.log(members - 1) + at_cluster.log_other, at_cluster.log_outlier])
    outlier, others, stray = jnp.exp(logs)
    outlier_scaled, others_scaled, stray_scaled = jnp.exp(logs - log_scale)
    return _Leakage(outlier, others, stray, outlier_scaled, others_scaled, stray_scaled, log_scale)


def _gap(outlier: Array, cluster: Array, outlier_scaled: Array, cluster_scaled: Array, log_scale: Array, cosine: Array) -> Gap:
    difference = jnp.where(cosine == 0, 0 * (outlier_scaled - cluster_scaled), outlier_scaled - cluster_scaled)
    log_gap = log_scale + jnp.log(jnp.abs(difference))
    larger = log_scale + jnp.log(jnp.maximum(jnp.abs(outlier_scaled), jnp.abs(cluster_scaled)))
    return Gap(outlier, cluster, jnp.sign(difference) * jnp.exp(log_gap), jnp.sign(difference), log_gap, larger)


def _log1p_ratio(leak: Array) -> Array:
    """log(1 − ℓ)/ℓ, −1 at ℓ = 0."""
    safe = jnp.where(leak > 0, leak, 0.5)
    return jnp.where(leak > 0, jnp.log1p(-safe) / safe, jnp.where(leak == 0, -1.0, jnp.nan))


def energies(members: Real[ArrayLike, ""], cosine: Real[ArrayLike, ""], beta: Real[ArrayLike, ""]) -> Gap:
    """Exact energies of the two fixed points and their gap E_o − E_c, of which Eqs. (75), (78), (80), (82) are the first order."""
    members, cosine, beta = _parameters(members, cosine, beta)
    leak = _leakage(members, cosine, beta)
    others = members - 1

    def outlier(scaled: Array) -> Array:
        square = 0.5 * leak.outlier * (1 + (1 + others * cosine) / members)
        return scaled * (_log1p_ratio(leak.outlier) / beta + square)

    def cluster(others_scaled: Array, stray_scaled: Array) -> Array:
        total = leak.others + leak.stray
        support = (1 + (others - 1) * cosine) / others
        squares = others_scaled * (0.5 * support * leak.others - cosine * total) + 0.5 * stray_scaled * leak.stray
        return (others_scaled + stray_scaled) * (_log1p_ratio(total) / beta + 0.5 * total) + squares

    return _gap(
        outlier(leak.outlier) - 0.5,
        cluster(leak.others, leak.stray) - 0.5,
        outlier(leak.outlier_scaled),
        cluster(leak.others_scaled, leak.stray_scaled),
        leak.log_scale,
        cosine,
    )


def sharpnesses(members: Real[ArrayLike, ""], cosine: Real[ArrayLike, ""], beta: Real[ArrayLike, ""], dim: Real[ArrayLike, ""]) -> Gap:
    """Exact sharpness S (74) of the two fixed points and the gap S_o − S_c, which (71)-(73), (79), (81), (83) expand.

    Times ½ε²σ² these are the rotation-averaged rises of Theorem 4.1 at second order, Eq. (9).
    """
    members, cosine, beta = _parameters(members, cosine, beta)
    leak = _leakage(members, cosine, beta)
    tangent = jnp.asarray(dim).astype(beta.dtype) - 1
    others = members - 1

    def outlier(scaled: Array) -> Array:
        """(d−1) − S at the outlier: s = p on ξ_o and ℓA/K on each member."""
        overlap = leak.outlier * (1 + others * cosine) / members
        lost = 2 - leak.outlier - overlap
        return scaled * (tangent * lost + beta * ((1 - leak.outlier) ** 2 + overlap * (1 - overlap)))

    def cluster(others_scaled: Array, stray_scaled: Array) -> Array:
        """(d−1) − S at ξ₁, whose overlaps are s₁ with itself, s₂ with the other members and r with the outlier."""
        selfish = 1 - leak.others - leak.stray
        apart = (1 - cosine) * (selfish - leak.others / others)  # s₁ − s₂
        missing = leak.others * (1 - cosine) + leak.stray  # 1 − s₁
        missing_scaled = others_scaled * (1 - cosine) + stray_scaled
        first = 1 - missing
        lost = missing_scaled + others_scaled * apart + stray_scaled * (first - leak.stray)
        spread = (
            selfish * first * missing_scaled
            + others_scaled * (first - apart) * (missing + apart)
            + stray_scaled * leak.stray * (1 - leak.stray)
        )
        return tangent * lost + beta * spread

    return _gap(
        tangent - outlier(leak.outlier),
        tangent - cluster(leak.others, leak.stray),
        -outlier(leak.outlier_scaled),
        -cluster(leak.others_scaled, leak.stray_scaled),
        leak.log_scale,
        cosine,
    )


class ReplayLogWeights(NamedTuple):
    """log π of the five canonical (target ← replayed) pairs of Theorem 5.1, Eq. (86); χ = sigmoid(log π).

    Attributes:
        outlier_self: o ← o.
        cluster_self: c ← c.
        cluster_other: c ← c′, another member of the same cluster.
        cluster_outlier: c ← o.
        outlier_cluster: o ← c.
    """

    outlier_self: _Scalar
    cluster_self: _Scalar
    cluster_other: _Scalar
    cluster_outlier: _Scalar
    outlier_cluster: _Scalar


def replay_log_weights(members: Real[ArrayLike, ""], cosine: Real[ArrayLike, ""], beta: Real[ArrayLike, ""]) -> ReplayLogWeights:
    """Replay weights at the two fixed points: the softmax weights themselves, as the replayed sample is a stored memory."""
    at_outlier, at_cluster = outlier_point(members, cosine, beta), cluster_point(members, cosine, beta)
    return ReplayLogWeights(at_outlier.log_self, at_cluster.log_self, at_cluster.log_other, at_cluster.log_outlier, at_outlier.log_member)
