"""Diffusion models as Hopfield networks: Section 3.3, Appendix A, and the β of a timestep."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from mpmath import mpf

import hopjax
from hopjax import correspondence
from theory_checks.claim import EPS, QUICK_COMPILE, Finding, Measurement, Setting, claim
from theory_checks.ladder import fit_order, order_is

DIM, COUNT = 6, 7


def _unit_memories(setting: Setting, stream: int, states: int = 20) -> tuple[jax.Array, jax.Array]:
    """Random unit memories, and states of size about one."""
    rng = np.random.default_rng([setting.seed, stream])
    memories = rng.normal(size=(COUNT, DIM))
    unit = memories / np.linalg.norm(memories, axis=1, keepdims=True)
    return jnp.asarray(unit), jnp.asarray(rng.normal(size=(states, DIM)) / DIM**0.5)


def _spread(values: Any) -> float:
    """How far the values are from one constant."""
    return float(np.max(values) - np.min(values))


@claim(
    "variance-exploding",
    "Section 3.3, Appendix A",
    "Variance exploding: −σ_t² log p_t is E at β = 1/σ_t² up to a constant for unit memories, and the score is (T(x) − x)/σ_t².",
)
def variance_exploding(setting: Setting) -> Finding:
    memories, states = _unit_memories(setting, 2)

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def differences(noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        beta = 1 / noise**2
        offset = jax.vmap(lambda x: correspondence.ve_implicit_energy(x, memories, noise) - hopjax.energy(x, memories, beta))(states)
        score = jax.vmap(jax.grad(lambda x: -correspondence.ve_implicit_energy(x, memories, noise) / noise**2))(states)
        retrieval = jax.vmap(lambda x: (hopjax.update_map(x, memories, beta) - x) / noise**2)(states)
        return offset, noise**2 * (score - retrieval)

    offsets, scores = [], []
    for noise in (0.03, 0.1, 0.3, 1.0, 3.0):
        offset, score = differences(jnp.asarray(noise))
        # Squares of size |x − ξ|² < 20 and products of d terms; the constant adds ½σ²d log 2πσ².
        rounding = 4 * DIM * EPS * (20 + abs(noise**2 * DIM * np.log(2 * np.pi * noise**2)) + noise**2 * np.log(COUNT))
        offsets.append(_spread(offset) / rounding)
        # The softmax weights have exponents of |x − ξ|²/2σ², which round by eps of themselves.
        scores.append(float(jnp.max(jnp.abs(score))) / (4 * DIM * EPS * (1 + 20 / noise**2)))
    return Finding(
        [
            Measurement("spread of −σ²log p − E over 20 states, in units of its rounding", max(offsets), "<=", 1.0),
            Measurement("σ²|score − (T(x) − x)/σ²|, in units of its rounding", max(scores), "<=", 1.0),
        ],
        note="Exact at every noise from 0.03 to 3, not only for low noise.",
    )


@claim(
    "variance-preserving",
    "Appendix A",
    "Variance preserving: at low noise the implicit energy, times v = 1 − α² over β(t), tends to E at β = 1/v up to a constant.",
)
def variance_preserving(setting: Setting) -> Finding:
    memories, states = _unit_memories(setting, 3)
    variances = 0.1 * 0.5 ** np.arange(10)

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def differences(variance: jax.Array) -> tuple[jax.Array, jax.Array]:
        alpha = jnp.sqrt(1 - variance)
        implicit = lambda x: variance * correspondence.vp_implicit_energy(x, memories, alpha)  # noqa: E731
        offset = jax.vmap(lambda x: implicit(x) - hopjax.energy(x, memories, 1 / variance))(states)
        force = jax.vmap(lambda x: jax.grad(implicit)(x) - hopjax.gradient(x, memories, 1 / variance))(states)
        return jnp.max(offset) - jnp.min(offset), jnp.max(jnp.linalg.norm(force, axis=1))

    spread, force = (np.array(part) for part in zip(*(map(float, differences(jnp.asarray(v))) for v in variances), strict=True))
    return Finding(
        [
            order_is("spread of v·u/β(t) − E over 20 states in v", fit_order(variances, spread), 1.0),
            order_is("largest difference of the two forces in v", fit_order(variances, force), 1.0),
            Measurement("spread at the smallest v over v", float(spread[-1] / variances[-1]), "<=", 10.0),
        ],
        note="At finite noise the patterns shrink by α, which is what remains of first order in v.",
    )


@claim(
    "exact-denoiser",
    "Section 3.3, Appendix A",
    "The score of noised data is ∇log p_t(y) = (αE[x₀|y] − y)/v, with the softmax mean of the memories as posterior mean.",
)
def exact_denoiser(setting: Setting) -> Finding:
    rng = np.random.default_rng([setting.seed, 4])
    memories = rng.normal(size=(COUNT, DIM)) * rng.uniform(0.5, 2.0, size=(COUNT, 1))  # of unequal norms
    stored = jnp.asarray(memories)

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def evaluate(states: jax.Array, scale: jax.Array, variance: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        score = jax.vmap(lambda y: correspondence.mixture_score(y, stored, scale, variance))(states)
        slope = jax.vmap(jax.grad(lambda y: correspondence.mixture_log_density(y, stored, scale, variance)))(states)
        return score, slope, jax.vmap(lambda y: correspondence.posterior_mean(y, stored, scale, variance))(states)

    by_autodiff, by_bayes, by_quotient = [], [], []
    for variance in (0.05, 0.5, 0.9):
        scale = (1 - variance) ** 0.5
        states = scale * memories[rng.integers(0, COUNT, 6)] + variance**0.5 * rng.normal(size=(6, DIM))
        score, slope, mean = (np.asarray(part) for part in evaluate(states, jnp.asarray(scale), jnp.asarray(variance)))
        farthest = float(np.max(np.sum((states[:, None] - scale * memories) ** 2, axis=2)))
        # Exponents of squares/2v round by eps of themselves, and so do the weights, relatively.
        rounding = 8 * DIM * EPS * (1 + farthest / variance) * float(np.max(np.abs(memories)))
        by_autodiff.append(variance * float(np.max(np.abs(score - slope))) / rounding)
        with mpmath.workdps(40):
            step = mpf(10) ** -15
            for y, denoised, gradient in zip(states, mean, score, strict=True):

                def density(point: list[Any], s: float = scale, v: float = variance) -> tuple[Any, list[Any]]:
                    """Bayes' rule by enumeration: p_t(y) up to its normaliser, and E[x₀ | y]."""
                    rows = memories.tolist()
                    squares = [mpmath.fsum((a - mpf(s) * m) ** 2 for a, m in zip(point, row, strict=True)) for row in rows]
                    likelihoods = [mpmath.exp(-square / (2 * mpf(v))) for square in squares]
                    total = mpmath.fsum(likelihoods)
                    return total, [mpmath.fdot(likelihoods, column) / total for column in memories.T.tolist()]

                here = [mpf(value) for value in y]
                _, expected = density(here)
                by_bayes.append(max(abs(float(value - mpf(got))) for value, got in zip(expected, denoised, strict=True)) / rounding)
                ahead, behind = ([here[0] + sign * step, *here[1:]] for sign in (1, -1))
                quotient = (mpmath.log(density(ahead)[0]) - mpmath.log(density(behind)[0])) / (2 * step)
                by_quotient.append(abs(float(quotient - mpf(gradient[0]))) * variance / rounding)
    return Finding(
        [
            Measurement("v|score − ∇log p by automatic differentiation|, in units of rounding", max(by_autodiff), "<=", 1.0),
            Measurement("|posterior mean − Bayes' rule in 40 digits|, in units of rounding", max(by_bayes), "<=", 1.0),
            Measurement("v|score − difference quotient of log p in 40 digits|, in units of rounding", max(by_quotient), "<=", 1.0),
        ],
        note="Memories of unequal norms, three noise levels.",
    )


@claim(
    "signal-to-noise",
    "Section 3.3, beyond the paper",
    "A clean image x sees the noisy landscape at y = αx as the kernel density at β = α²/v, the signal-to-noise ratio, not α/v.",
)
def signal_to_noise(setting: Setting) -> Finding:
    rng = np.random.default_rng([setting.seed, 5])
    memories, states = (jnp.asarray(rng.normal(size=(count, DIM))) for count in (COUNT, 12))
    timestep = 500

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def evaluate() -> tuple[jax.Array, ...]:
        schedule = correspondence.linear_alphas_cumprod()
        alpha, variance = jnp.sqrt(schedule[timestep]), 1 - schedule[timestep]
        ratio = correspondence.signal_to_noise(schedule)[timestep]
        noisy = jax.vmap(lambda x: correspondence.mixture_log_density(alpha * x, memories, alpha, variance))(states)

        def offset(beta: jax.Array) -> jax.Array:
            return noisy + jax.vmap(lambda x: beta * correspondence.kernel_energy(x, memories, beta))(states)

        times = jnp.linspace(0.0, 999.0, 37)
        back = correspondence.timestep_at_beta(correspondence.beta_at_timestep(times, schedule), schedule)
        at_grid = correspondence.beta_at_timestep(float(timestep), schedule)
        return ratio, alpha / variance, offset(ratio), offset(alpha / variance), jnp.max(jnp.abs(back - times)), at_grid

    ratio, wrong, right_offset, wrong_offset, round_trip, at_grid = (np.asarray(part) for part in evaluate())
    with mpmath.workdps(30):
        betas = [mpf(1) / 10**4 + (mpf(2) / 100 - mpf(1) / 10**4) * mpf(index) / 999 for index in range(timestep + 1)]
        product = mpmath.fprod(1 - value for value in betas)
        exact = float(product / (1 - product))
    # A sum of 500 logarithms, each rounded; ᾱ/(1 − ᾱ) magnifies that by 1/(1 − ᾱ) < 2.
    rounding = 2 * 500 * EPS
    # log β falls by at least 1e-3 a step at the schedule's ends, where the round trip magnifies rounding.
    return Finding(
        [
            Measurement("spread of log p_t(αx) + β·E_kernel(x) over 12 images at β = α²/v", _spread(right_offset), "<=", 1e3 * EPS),
            Measurement("the same at β = α/v, which it is not", _spread(wrong_offset), ">=", 0.1),
            Measurement("linear schedule, t = 500: relative error of β = ᾱ/(1 − ᾱ)", abs(float(ratio) / exact - 1), "<=", rounding),
            Measurement("β = 0.084 at t = 500, to its digits", abs(float(at_grid) - 0.084), "<=", 5e-4),
            Measurement("α/v = 0.302 at t = 500, to its digits", abs(float(wrong) - 0.302), "<=", 5e-4),
            Measurement("timestep → β → timestep, largest error in steps", float(round_trip), "<=", 1e3 * rounding),
        ],
        note=f"β(500) = {float(ratio):.5f} for data in the model's own scale; dividing the data by s multiplies β by s².",
    )
