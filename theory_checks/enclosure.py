"""The two fixed points, and S and E there, enclosed in ball arithmetic: signs that are proved, not computed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flint
import numpy as np
from flint import arb
from scipy.optimize import brentq


class Enclosure(NamedTuple):
    """Balls that contain S (74) and E at both fixed points and the differences outlier − cluster; `None` if none was proved."""

    outlier_deficit: Any
    cluster_deficit: Any
    sharpness_gap: Any
    energy_gap: Any


def _krawczyk(equations: Any, start: Sequence[float]) -> list[Any] | None:
    """A box proved to hold exactly one root of equations(y) → (values, Jacobian rows), near `start`; None if the proof fails.

    Newton to working precision; then K(Y) = m − CF(m) + (I − CF′(Y))(Y − m) must lie inside Y.
    """
    size, middle = len(start), flint.arb_mat([[value] for value in start])
    for _ in range(14):
        values, jacobian = equations([middle[i, 0] for i in range(size)])
        step = flint.arb_mat(jacobian).solve(flint.arb_mat([[value] for value in values]))
        middle = flint.arb_mat([[(middle[i, 0] - step[i, 0]).mid()] for i in range(size)])
    radius = arb(2) ** (-flint.ctx.prec // 2)
    box = flint.arb_mat([[middle[i, 0] + arb(0, radius)] for i in range(size)])
    values, jacobian = equations([middle[i, 0] for i in range(size)])
    inverse = flint.arb_mat(jacobian).inv().mid()
    _, spread = equations([box[i, 0] for i in range(size)])
    identity = flint.arb_mat(size, size, [int(i == j) for i in range(size) for j in range(size)])
    image = middle - inverse * flint.arb_mat([[value] for value in values]) + (identity - inverse * flint.arb_mat(spread)) * (box - middle)
    # The image's radius is far below the box's: it is the box to go on with.
    return [image[i, 0] for i in range(size)] if all(box[i, 0].contains_interior(image[i, 0]) for i in range(size)) else None


def enclose(members: int, cosine: Any, beta: Any, dim: int) -> Enclosure | None:
    """Both fixed points in ball arithmetic, from Eqs. (22) and (25), and S and E there from their definitions.

    Nothing is shared with `hopjax.gaps`: |x|², tr H and xᵀHx come from the weights and the Gram matrix, at a precision that makes
    up for their cancellation.
    """
    k, previous = members, flint.ctx.prec
    try:
        flint.ctx.prec = 192 + int(4.5 * float(beta))
        c, b = arb(cosine), arb(beta)

        def at_outlier(y: list[Any]) -> tuple[list[Any], list[list[Any]]]:
            ratio = y[0].exp()
            p = 1 / (1 + k * ratio)
            total = 1 + (k - 1) * c
            # d(p − q·total)/dy = −pq(K + total)
            return [y[0] + b * p * (1 - ratio * total)], [[1 - b * p * p * ratio * (k + total)]]

        def at_cluster(y: list[Any]) -> tuple[list[Any], list[list[Any]]]:
            to_other, to_outlier = y[0].exp(), y[1].exp()
            a = 1 / (1 + (k - 1) * to_other + to_outlier)
            other, outlier = a * to_other, a * to_outlier
            slopes = [(-a * (k - 1) * other, other * (1 - (k - 1) * other), -outlier * (k - 1) * other)]
            slopes.append((-a * outlier, -other * outlier, outlier * (1 - outlier)))
            values = [y[0] + b * (1 - c) * (a - other), y[1] + b * (a + (k - 1) * c * other - outlier)]
            first = [b * (1 - c) * (da - db) for da, db, _ in slopes]
            second = [b * (da + (k - 1) * c * db - dr) for da, db, dr in slopes]
            return values, [[1 + first[0], first[1]], [second[0], 1 + second[1]]]

        near_outlier, near_cluster = _krawczyk(at_outlier, [-beta]), _krawczyk(at_cluster, [-beta * (1 - cosine), -beta])
        if near_outlier is None or near_cluster is None:
            return None

        def energy_and_deficit(groups: Sequence[tuple[int, Any, Any]]) -> tuple[Any, Any]:
            """E and (d−1) − S from (count, weight, overlap ξ·x) of each group of memories, the fixed point being Σ weight ξ."""
            square = sum(count * weight * overlap for count, weight, overlap in groups)
            trace = dim - b * (1 - square)
            along = square - b * (sum(count * weight * overlap**2 for count, weight, overlap in groups) - square**2)
            logits = sum(count * (b * overlap).exp() for count, _, overlap in groups)
            return square / 2 - logits.log() / b, (dim - 1) - (square * trace - along)

        ratio = near_outlier[0].exp()
        p = 1 / (1 + k * ratio)
        outlier_energy, outlier_deficit = energy_and_deficit([(1, p, p), (k, p * ratio, p * ratio * (1 + (k - 1) * c))])
        to_other, to_outlier = (value.exp() for value in near_cluster)
        a = 1 / (1 + (k - 1) * to_other + to_outlier)
        other, outlier = a * to_other, a * to_outlier
        cluster_energy, cluster_deficit = energy_and_deficit(
            [(1, a, a + (k - 1) * c * other), (k - 1, other, c * a + (1 + (k - 2) * c) * other), (1, outlier, outlier)]
        )
        return Enclosure(outlier_deficit, cluster_deficit, cluster_deficit - outlier_deficit, outlier_energy - cluster_energy)
    finally:
        flint.ctx.prec = previous


def strong_beta(members: int, cosine: float) -> float:
    """β at the edge of the strong regime, β(1−c) = 2(log K + log β)."""
    strength = lambda beta: beta * (1 - cosine) - 2 * np.log(members * beta)  # noqa: E731
    return float(brentq(strength, 2 / (1 - cosine), 1e5))  # the condition is lost below its minimum at 2/(1−c)


def strong_grid() -> list[tuple[int, float, float, int]]:
    """(K, c, β, d) in the strong regime: from its edge to three times as far in."""
    return [
        (members, cosine, factor * strong_beta(members, cosine), dim)
        for members in (2, 3, 12, 100, 10_000)
        for cosine in (0.01, 0.1, 0.35, 0.5, 0.9)
        for factor in (1.0, 1.7, 3.0)
        for dim in (members + 1, 100 * members)
    ]
