r"""The paper's closed-form asymptotics at large β, under one roof.

Each function names what it drops. ℓ stands for a leakage, of order K e^{−β} at the outlier and (K−1)e^{−β(1−c)} at a cluster member; the
expansions hold in the localised regime βℓ ≪ 1 (`hopjax.cluster.regime`), the ratios to the exact values tend to one as β → ∞ at
fixed K, c, d. Exact finite-β values are in `hopjax.cluster` and `hopjax.gaps`.

Small numbers are returned as logarithms where a float64 would underflow at β = 10⁴. Source: arXiv:2605.27975.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from hopjax.cluster import _parameters
from hopjax.gaps import ReplayLogWeights

_Scalar = Float[Array, ""]


class Asymptotic(NamedTuple):
    """The leading orders at the outlier's and a cluster member's fixed point, and of the gap outlier − cluster."""

    outlier: _Scalar
    cluster: _Scalar
    gap: _Scalar


class LogWeights(NamedTuple):
    """Leading logarithms of the off-memory weights.

    Attributes:
        outlier_member: log q, a cluster member's weight at the outlier, Eq. (52).
        cluster_other: log b, another member's weight at a cluster member, Eq. (54).
        cluster_outlier: log r, the outlier's weight at a cluster member, Eq. (54).
    """

    outlier_member: _Scalar
    cluster_other: _Scalar
    cluster_outlier: _Scalar


def log_weights(members: Real[ArrayLike, ""], cosine: Real[ArrayLike, ""], beta: Real[ArrayLike, ""]) -> LogWeights:
    """log q ≈ −β and log b ≈ −β(1−c), log r ≈ −β, Eqs. (52) and (54).

    Drops: O(βℓ_o) in log q; O(βℓ_c) in log b and log r.
    """
    members, cosine, beta = _parameters(members, cosine, beta)
    return LogWeights(-beta, -beta * (1 - cosine), -beta)


def first_order_energy(leak: Real[ArrayLike, "*s"], beta: Real[ArrayLike, ""]) -> Float[Array, "*s"]:
    """E(x*) ≈ −½ − ℓ/β of a fixed point localised on a unit memory, Eq. (75). Drops: O(ℓ²)."""
    return -0.5 - jnp.asarray(leak) / beta


def first_order_sharpness(
    off_weights: Float[Array, " n"], similarities: Float[Array, " n"], beta: Real[ArrayLike, ""], dim: Real[ArrayLike, ""]
) -> _Scalar:
    """S ≈ (d−1) − Σ p_ν(1−s_ν)[2(d−1) + β(1+s_ν)], Eqs. (10), (76)-(77), near a unit memory.

    Args:
        off_weights: p_ν, the weights of the competing unit memories.
        similarities: s_ν, their cosines with the dominant memory.

    Drops: O((d + β)ℓ²).
    """
    tangent = jnp.asarray(dim).astype(off_weights.dtype) - 1
    per_weight = (1 - similarities) * (2 * tangent + jnp.asarray(beta).astype(off_weights.dtype) * (1 + similarities))
    return tangent - jnp.sum(off_weights * per_weight)


def energies(members: Real[ArrayLike, ""], cosine: Real[ArrayLike, ""], beta: Real[ArrayLike, ""]) -> Asymptotic:
    """Energies of the two fixed points, Eqs. (78) and (80), and their gap, Eq. (82), positive for c > 0.

    Drops: O(ℓ²) and, through the weights, O(ℓ²) again: relative O(βℓ) of the leakage terms.
    """
    members, cosine, beta = _parameters(members, cosine, beta)
    near, far = jnp.exp(-beta * (1 - cosine)), jnp.exp(-beta)
    # near − far from the larger of the two, so that nothing cancels or overflows: one of these terms is zero.
    difference = far * jnp.expm1(beta * jnp.minimum(cosine, 0)) - near * jnp.expm1(-beta * jnp.maximum(cosine, 0))
    gap = (members - 1) / beta * difference
    return Asymptotic(-0.5 - members * far / beta, -0.5 - ((members - 1) * near + far) / beta, gap)


def sharpnesses(
    members: Real[ArrayLike, ""], cosine: Real[ArrayLike, ""], beta: Real[ArrayLike, ""], dim: Real[ArrayLike, ""]
) -> Asymptotic:
    """Sharpness of the two fixed points, Eqs. (79) and (81), and their gap, Eq. (83).

    The gap is positive for 0 < c < 1 and large β, zero at c = 0, and of either sign for c < 0 (Remark B.6).
    Drops: O((d + β)βℓ²).
    """
    members, cosine, beta = _parameters(members, cosine, beta)
    tangent = jnp.asarray(dim).astype(beta.dtype) - 1
    near, far = jnp.exp(-beta * (1 - cosine)), jnp.exp(-beta)
    from_other = near * (1 - cosine) * (2 * tangent + beta * (1 + cosine))
    from_orthogonal = far * (2 * tangent + beta)
    return Asymptotic(
        tangent - members * from_orthogonal,
        tangent - (members - 1) * from_other - from_orthogonal,
        (members - 1) * (from_other - from_orthogonal),
    )


def rises(
    members: Real[ArrayLike, ""],
    cosine: Real[ArrayLike, ""],
    beta: Real[ArrayLike, ""],
    dim: Real[ArrayLike, ""],
    *,
    epsilon: Real[ArrayLike, ""],
    sigma: Real[ArrayLike, ""] = 1.0,
) -> Asymptotic:
    """Rotation-averaged energy rises, Eqs. (71)-(72), and the gap of Theorem 4.1, Eq. (73): ½ε²σ² times `sharpnesses`.

    Drops: O(ε⁴), and ½ε²σ² times what `sharpnesses` drops.
    """
    scale = 0.5 * jnp.square(jnp.asarray(epsilon) * sigma)
    return Asymptotic(*(scale.astype(part.dtype) * part for part in sharpnesses(members, cosine, beta, dim)))


def log_susceptibilities(members: Real[ArrayLike, ""], cosine: Real[ArrayLike, ""], beta: Real[ArrayLike, ""]) -> ReplayLogWeights:
    """log χ of the five canonical pairs, Eq. (98): self ½ − ℓ/4, same cluster e^{−β(1−c)}, across types e^{−β}.

    Drops: O(ℓ²) in the self-susceptibilities, relative O(βℓ) in the others.
    """
    members, cosine, beta = _parameters(members, cosine, beta)
    near, far = -beta * (1 - cosine), -beta
    outlier_leak = members * jnp.exp(far)
    cluster_leak = (members - 1) * jnp.exp(near) + jnp.exp(far)
    return ReplayLogWeights(jnp.log(0.5 - 0.25 * outlier_leak), jnp.log(0.5 - 0.25 * cluster_leak), near, far, far)
