r"""What replaying one Task-1 sample z saves: the exact gain, its baseline, and the linear response to the energy rise.

With $\pi = e^{\beta z\cdot x}/Z_1(x)$ the replayed sample's softmax weight at the target x and ΔE the rise of its energy,

$$G_\mathrm{raw} = \beta^{-1}\log(1 + \pi e^{\beta\Delta E}), \qquad
G = \beta^{-1}\log\frac{1 + \pi e^{\beta\Delta E}}{1 + \pi}, \qquad
\chi = \frac{\pi}{1 + \pi} = \frac{\partial G}{\partial\Delta E}\Big|_0 .$$

Everything takes log π, so weights of 1e-300 are numbers like any other. Source: arXiv:2605.27975, Eqs. (13)-(15), (86)-(97).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key, Real

from hopjax.energy import _check_state, _logits, _matmul, _positive
from hopjax.forgetting import ControlVariate, Estimate, Estimator, rotation_average
from hopjax.rotation import Law, PlanarLaw


def log_replay_weight(
    state: Float[Array, " d"], replayed: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]
) -> Float[Array, ""]:
    """log π, π = exp(β z·x)/Σ_μ exp(β ξ_μ·x), Eq. (86): may be positive for a z that is no memory."""
    _check_state(state, memories)
    _check_state(replayed, memories)
    return _positive(beta, memories) * _matmul(replayed, state) - jax.nn.logsumexp(_logits(state, memories, beta))


def raw_gain(log_weight: Float[Array, "*s"], rise: Float[Array, "*s"], beta: Real[ArrayLike, ""]) -> Float[Array, "*s"]:
    """G_raw = E(x; X₂) − E(x; X₂ ∪ {z}) = β⁻¹ log(1 + π e^{βΔE}), Eqs. (87) and (91), exact.

    Args:
        log_weight: log π of the replayed sample under Task 1.
        rise: ΔE(x) = E(x; X₂) − E(x; X₁).
    """
    beta = _positive(beta, log_weight)
    return jax.nn.softplus(log_weight + beta * rise) / beta


def baseline_gain(log_weight: Float[Array, "*s"], beta: Real[ArrayLike, ""]) -> Float[Array, "*s"]:
    """β⁻¹ log(1 + π), Eq. (92): what duplicating a stored memory gives without any forgetting."""
    return jax.nn.softplus(log_weight) / _positive(beta, log_weight)


def gain(log_weight: Float[Array, "*s"], rise: Float[Array, "*s"], beta: Real[ArrayLike, ""]) -> Float[Array, "*s"]:
    """Baseline-subtracted replay gain G = β⁻¹ log[(1 + π e^{βΔE})/(1 + π)], Eqs. (14) and (93), exact.

    Accuracy: a few eps relative for |βΔE| < 1, where it is β⁻¹ log1p(χ expm1(βΔE)); of β|ΔE| elsewhere.
    """
    beta = _positive(beta, log_weight)
    exponent = beta * rise
    small = jnp.abs(exponent) < 1
    near = jnp.log1p(susceptibility(log_weight) * jnp.expm1(jnp.where(small, exponent, 0.0)))
    far = jnp.logaddexp(-jax.nn.softplus(log_weight), -jax.nn.softplus(-log_weight) + exponent)
    return jnp.where(small, near, far) / beta


def susceptibility(log_weight: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Replay susceptibility χ = π/(1 + π) = ∂G/∂ΔE at ΔE = 0, Eqs. (94)-(95)."""
    return jax.nn.sigmoid(log_weight)


def second_order_gain(log_weight: Float[Array, "*s"], rise: Float[Array, "*s"], beta: Real[ArrayLike, ""]) -> Float[Array, "*s"]:
    """χΔE + ½βχ(1−χ)ΔE², Eq. (96); drops O(β²ΔE³)."""
    chi = susceptibility(log_weight)
    return chi * rise + 0.5 * _positive(beta, log_weight) * chi * (1 - chi) * rise**2


def log_weight_matrix(
    targets: Float[Array, "t d"], replayed: Float[Array, "z d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]
) -> Float[Array, "t z"]:
    """log π of every replayed sample (column) at every target (row)."""
    by_sample = jax.vmap(log_replay_weight, in_axes=(None, 0, None, None))
    return jax.vmap(by_sample, in_axes=(0, None, None, None))(targets, replayed, memories, beta)


def gain_matrix(
    targets: Float[Array, "t d"],
    replayed: Float[Array, "z d"],
    memories: Float[Array, "m d"],
    rises: Float[Array, " t"],
    beta: Real[ArrayLike, ""],
) -> Float[Array, "t z"]:
    """Exact gain (93) of every target (row) from every replayed sample (column), given the targets' energy rises."""
    log_pi = log_weight_matrix(targets, replayed, memories, beta)
    return gain(log_pi, jnp.broadcast_to(rises[:, None], log_pi.shape), beta)


def average_gain(
    key: Key[Array, ""],
    state: Float[Array, " d"],
    replayed: Float[Array, "z d"],
    memories: Float[Array, "m d"],
    beta: Real[ArrayLike, ""],
    *,
    epsilon: Real[ArrayLike, ""],
    sigma: Real[ArrayLike, ""],
    draws: int = 2000,
    estimator: Estimator = ControlVariate(),
    law: Law = PlanarLaw(),
    batch: int = 1000,
) -> Estimate:
    """Ensemble mean ⟨G⟩ of the exact gain (93) at one target for every replayed sample, from the same rotations.

    Eq. (97), ⟨G⟩ ≈ χ⟨ΔE⟩, is its leading order at a fixed point. `jax.vmap` it over targets for the whole matrix; see
    `rotation_average` for the arguments.
    """
    log_pi = log_weight_matrix(state[None], replayed, memories, beta)[0]

    def observable(rise: Array) -> Array:
        return gain(log_pi, jnp.broadcast_to(rise, log_pi.shape), beta)

    return rotation_average(
        key,
        state,
        memories,
        beta,
        epsilon=epsilon,
        sigma=sigma,
        draws=draws,
        observable=observable,
        estimator=estimator,
        law=law,
        batch=batch,
    )
