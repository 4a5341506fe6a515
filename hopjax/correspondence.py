r"""Diffusion models as Hopfield networks: implicit energies, the exact score and denoiser of a finite data set, β ↔ timestep.

Noised data y = αξ_μ + √v n have the Gaussian-mixture marginal $p_t(y) = M^{-1}\sum_\mu N(y; \alpha\xi_\mu, vI)$. The implicit energy
of a diffusion, $u(y, t) = -g^2\log p_t(y) + \int f\cdot dy$, is the Hopfield energy

- variance exploding (α = 1, v = σ_t²): at β = 1/σ_t², for unit memories, up to a constant;
- variance preserving (v = 1 − α²): in the low-noise limit v·u/β(t) → E at β = 1/v.

A *clean* image x sits at y = αx in the noisy landscape, where p_t is the kernel density of the data at x with
β = α²/v, the **signal-to-noise ratio** (not α/v). Dividing the data by s multiplies β by s².

For unequal norms the kernel density has logits β(ξ·x − |ξ|²/2), which Eq. (1) lacks: `kernel_energy` has them; on
unit-norm memories it is the energy of Eq. (1) up to the constant ½. Source: arXiv:2605.27975, Section 3.3 and Appendix A.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from hopjax.energy import _check_state, _matmul, _positive


def _kernel_exponents(state: Array, memories: Array, scale: ArrayLike, variance: ArrayLike) -> Array:
    _check_state(state, memories)
    squares = jnp.sum((state[None] - jnp.asarray(scale).astype(state.dtype) * memories) ** 2, axis=1)
    exponents = -0.5 * squares / _positive(variance, memories)
    # As in `hopjax.energy`: what is not finite must not pass through the softmax as a plausible number.
    return jnp.where(jnp.isfinite(exponents), exponents, jnp.nan)


def mixture_log_density(
    state: Float[Array, " d"], memories: Float[Array, "m d"], scale: Real[ArrayLike, ""], variance: Real[ArrayLike, ""]
) -> Float[Array, ""]:
    """log p_t(y) of M⁻¹ Σ N(y; scale·ξ_μ, variance·I), normalised."""
    exponents = _kernel_exponents(state, memories, scale, variance)
    dim = state.shape[0]
    normaliser = 0.5 * dim * (math.log(2 * math.pi) + jnp.log(_positive(variance, memories)))
    return jax.nn.logsumexp(exponents) - math.log(memories.shape[0]) - normaliser


def posterior_mean(
    state: Float[Array, " d"], memories: Float[Array, "m d"], scale: Real[ArrayLike, ""], variance: Real[ArrayLike, ""]
) -> Float[Array, " d"]:
    """The exact denoiser E[x₀ | y] of a finite data set: the softmax mean of the memories at noisy state y."""
    return _matmul(jax.nn.softmax(_kernel_exponents(state, memories, scale, variance)), memories)


def mixture_score(
    state: Float[Array, " d"], memories: Float[Array, "m d"], scale: Real[ArrayLike, ""], variance: Real[ArrayLike, ""]
) -> Float[Array, " d"]:
    """∇ log p_t(y) = (scale·E[x₀|y] − y)/variance; for scale 1 and unit memories it is (T(y) − y)/variance at β = 1/variance."""
    mean = jnp.asarray(scale).astype(state.dtype) * posterior_mean(state, memories, scale, variance)
    return (mean - state) / _positive(variance, memories)


def kernel_energy(state: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, ""]:
    """−β⁻¹ log Σ exp(−β|x − ξ_μ|²/2): the energy whose Boltzmann density weighs all memories alike.

    For memories of norm ρ it is E(x) of Eq. (1) plus ½ρ²; for unequal norms the two differ.
    """
    beta = _positive(beta, memories)
    return -jax.nn.logsumexp(_kernel_exponents(state, memories, 1.0, 1 / beta)) / beta


def ve_implicit_energy(state: Float[Array, " d"], memories: Float[Array, "m d"], noise: Real[ArrayLike, ""]) -> Float[Array, ""]:
    """−σ_t² log p_t(y) of variance-exploding diffusion (no drift), σ_t = `noise`: E(y) at β = 1/σ_t² plus a constant for unit memories.

    The diffusion's own u = −g² log p_t is this times the positive factor g²/σ_t², which moves no equilibrium.
    """
    variance = jnp.square(_positive(noise, memories))
    return -variance * mixture_log_density(state, memories, 1.0, variance)


def vp_implicit_energy(state: Float[Array, " d"], memories: Float[Array, "m d"], alpha: Real[ArrayLike, ""]) -> Float[Array, ""]:
    """u(y)/β(t) = −log p_t(y) − |y|²/4 of variance-preserving diffusion dx = −½β(t)x dt + √β(t) dw, α = exp(−½∫β).

    Times v = 1 − α² it tends to E(y) at β = 1/v in the low-noise limit, up to a constant, for unit memories.
    """
    alpha = _positive(alpha, memories)
    density = mixture_log_density(state, memories, alpha, 1 - jnp.square(alpha))
    return -density - 0.25 * _matmul(state, state)


def linear_alphas_cumprod(
    timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02, dtype: jnp.dtype | type = float
) -> Float[Array, " t"]:
    """ᾱ_t = Π(1 − β_s) = α_t² of the linear DDPM schedule, t = 0 … timesteps − 1.

    Raises: ValueError unless timesteps ≥ 1 and 0 < beta_start ≤ beta_end < 1.
    """
    if timesteps < 1 or not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"need timesteps ≥ 1 and 0 < beta_start ≤ beta_end < 1, got {timesteps}, {beta_start}, {beta_end}")
    return jnp.exp(jnp.cumsum(jnp.log1p(-jnp.linspace(beta_start, beta_end, timesteps, dtype=dtype))))


def signal_to_noise(alphas_cumprod: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """β = ᾱ/(1 − ᾱ): the inverse temperature at which a clean image sees the noisy landscape, in units of the model's data scale."""
    return alphas_cumprod / (1 - alphas_cumprod)


def beta_at_timestep(timestep: Real[ArrayLike, "*n"], alphas_cumprod: Float[Array, " t"]) -> Float[Array, "*n"]:
    """β of a (possibly fractional) timestep, linear in log β between the schedule's; NaN outside 0 … t − 1."""
    log_beta = jnp.log(signal_to_noise(alphas_cumprod))
    grid = jnp.arange(alphas_cumprod.shape[0], dtype=log_beta.dtype)
    return jnp.exp(jnp.interp(jnp.asarray(timestep).astype(log_beta.dtype), grid, log_beta, left=jnp.nan, right=jnp.nan))


def timestep_at_beta(beta: Real[ArrayLike, "*n"], alphas_cumprod: Float[Array, " t"]) -> Float[Array, "*n"]:
    """The (fractional) timestep whose signal-to-noise ratio is β: inverse of `beta_at_timestep`; NaN outside the schedule."""
    log_beta = jnp.log(signal_to_noise(alphas_cumprod))
    grid = jnp.arange(alphas_cumprod.shape[0], dtype=log_beta.dtype)
    wanted = jnp.log(jnp.asarray(beta).astype(log_beta.dtype))
    return jnp.interp(wanted, log_beta[::-1], grid[::-1], left=jnp.nan, right=jnp.nan)
