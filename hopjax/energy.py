r"""Energy, retrieval map, curvature and Boltzmann density of the continuous modern Hopfield network.

$$E(x) = -\beta^{-1}\log\sum_\mu e^{\beta \xi_\mu\cdot x} + \tfrac12|x|^2, \qquad
T(x) = \sum_\mu p_\mu(x)\,\xi_\mu = x - \nabla E(x), \qquad p(x) = \mathrm{softmax}(\beta X x)$$

The Hessian is $H = I - \beta C$ with $C = \sum_\mu p_\mu\xi_\mu\xi_\mu^\top - T T^\top$, and the density
$p(x) \propto e^{-\beta E(x)}$ is the Gaussian mixture $\sum_\mu \pi_\mu N(\xi_\mu, \beta^{-1}I)$ with
$\pi_\mu \propto e^{\beta|\xi_\mu|^2/2}$.

Every function takes one state; `jax.vmap` it for many. Units: memories in u give E in u² and β in u⁻².
A β that is not positive or not finite, and logits that are not finite, give NaN: inside a kernel numerical failure is data.
Source: arXiv:2605.27975, Eqs. (1)-(3), (16), (56), (74).
"""

import math

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, ArrayLike, Float, Key, Real


def _check_memories(memories: Array) -> None:
    if memories.shape[0] == 0:  # the sum would be empty: silently -inf
        raise ValueError(f"need at least one memory, got memories of shape {memories.shape}")
    if not jnp.issubdtype(memories.dtype, jnp.floating):
        raise ValueError(f"memories must be floating point, got {memories.dtype}: convert them, e.g. memories.astype(jnp.float32)")


def _check_state(state: Array, memories: Array) -> None:
    _check_memories(memories)
    if state.shape != memories.shape[1:]:
        raise ValueError(f"state of shape {state.shape} does not fit memories of shape {memories.shape}: need ({memories.shape[1]},)")
    if state.dtype != memories.dtype:
        raise ValueError(f"state is {state.dtype} and memories are {memories.dtype}: convert one of them")


def _positive(value: ArrayLike, like: Array) -> Array:
    """`value` in the dtype of `like`, NaN where it is not positive or not finite."""
    # Poison instead of raising: the value may be traced, and a host callback would make the program uncacheable.
    value = jnp.asarray(value).astype(like.dtype)
    return jnp.where((value > 0) & (value < jnp.inf), value, jnp.nan)


def _matmul(a: Array, b: Array) -> Array:
    # TF32 or bfloat16 products would be amplified by beta in the exponent.
    return jnp.matmul(a, b, precision=Precision.HIGHEST)


def _logits(state: Array, memories: Array, beta: ArrayLike) -> Array:
    _check_state(state, memories)
    logits = _positive(beta, memories) * _matmul(memories, state)
    # A logit of ±inf (overflow, or a memory that is not finite) would pass through the softmax as a plausible number.
    return jnp.where(jnp.isfinite(logits), logits, jnp.nan)


def energy(state: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, ""]:
    """Modern Hopfield energy E(x; X), Eq. (1), without a log M term.

    Returns: E(state) in the inputs' dtype; NaN if `beta` is not positive.
    Raises: ValueError at trace time for no memories, shapes or dtypes that do not fit, or integers.
    Accuracy: absolute error of a few eps·(R² + log m / beta), R the largest norm: near a memory the two terms cancel.
    """
    logits = _logits(state, memories, beta)
    return 0.5 * jnp.sum(state**2) - jax.nn.logsumexp(logits) / _positive(beta, memories)


def log_weights(state: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, " m"]:
    """Logarithms of the softmax weights, log p_μ(x): finite where the weights themselves underflow."""
    return jax.nn.log_softmax(_logits(state, memories, beta))


def weights(state: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, " m"]:
    """Softmax weights p(x) = softmax(β X x), Eq. (2): non-negative, summing to one."""
    return jax.nn.softmax(_logits(state, memories, beta))


def update_map(state: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, " d"]:
    """Retrieval map T(x) = Xᵀ p(x), Eq. (2); its fixed points are the stationary points of the energy."""
    return _matmul(weights(state, memories, beta), memories)


def gradient(state: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, " d"]:
    """Gradient of the energy, ∇E(x) = x − T(x)."""
    return state - update_map(state, memories, beta)


def _centred(state: Array, memories: Array, beta: ArrayLike) -> tuple[Array, Array]:
    """Weights p and the memories about their mean T(x): an m × d array for every state, so only where a matrix is wanted anyway."""
    p = weights(state, memories, beta)
    return p, memories - _matmul(p, memories)[None]


def _spread(p: Array, memories: Array) -> Array:
    """Σ p_μ|ξ_μ − T|² = Σ p_μ|ξ_μ|² − |T|².

    Taken about the heaviest memory, whose own term is then exactly zero: what is left has the size of the leakage. Absolute error of a few
    eps·R² times the leakage.
    """
    top = jnp.argmax(p)
    lead, off = memories[top], p.at[top].set(0.0)
    squares = jnp.sum(memories**2, axis=1)
    distances = squares + squares[top] - 2 * _matmul(memories, lead)
    shift = _matmul(off, memories) - jnp.sum(off) * lead  # T − lead
    return jnp.sum(off * distances) - jnp.sum(shift**2)


def _deviations(p: Array, overlaps: Array) -> Array:
    """ξ_μ·v − T·v."""
    return overlaps - jnp.sum(p * overlaps)


def hessian(state: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, "d d"]:
    """Hessian H(x) = I − βC(x), Eq. (56), as a matrix: O(d²) memory. Prefer the product, trace or quadratic form."""
    p, centred = _centred(state, memories, beta)
    return jnp.eye(state.shape[0], dtype=state.dtype) - _positive(beta, memories) * _matmul(centred.T, p[:, None] * centred)


def hessian_product(
    state: Float[Array, " d"], vector: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]
) -> Float[Array, " d"]:
    """H(x) v in O(md), without the d × d matrix."""
    p = weights(state, memories, beta)
    pull = p * _deviations(p, _matmul(memories, vector))
    # Σ pull = 0 up to rounding, which the heaviest memory would amplify: measure the others from it.
    covariance = _matmul(pull, memories) - jnp.sum(pull) * memories[jnp.argmax(p)]
    return vector - _positive(beta, memories) * covariance


def hessian_trace(state: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, ""]:
    """tr H(x) = d − β(Σ p_μ|ξ_μ|² − |T(x)|²); at a fixed point of unit-norm memories d − β(1 − |x*|²), Eq. (57)."""
    p = weights(state, memories, beta)
    return state.shape[0] - _positive(beta, memories) * _spread(p, memories)


def hessian_quadratic(
    state: Float[Array, " d"], vector: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]
) -> Float[Array, ""]:
    """Quadratic form vᵀH(x)v = |v|² − β(Σ p_μ(ξ_μ·v)² − (T·v)²)."""
    p = weights(state, memories, beta)
    variance = jnp.sum(p * _deviations(p, _matmul(memories, vector)) ** 2)
    return jnp.sum(vector**2) - _positive(beta, memories) * variance


def sharpness(state: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, ""]:
    """Sharpness under infinitesimal rotations, S(x) = |x|² tr H − xᵀHx, Eq. (74).

    S is the mean of (Ax)ᵀH(Ax) over antisymmetric A with unit-variance entries (Lemma B.5), in u².
    """
    p = weights(state, memories, beta)
    square = jnp.sum(state**2)
    radial = jnp.sum(p * _deviations(p, _matmul(memories, state)) ** 2)
    # The identity part of H gives exactly (d−1)|x|²; d and 1 are never subtracted from rounded numbers.
    return (state.shape[0] - 1) * square - _positive(beta, memories) * (square * _spread(p, memories) - radial)


def log_partition(memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, ""]:
    """log Z of the Boltzmann density, Z = (2π/β)^{d/2} Σ exp(β|ξ_μ|²/2), Eq. (3)."""
    _check_memories(memories)
    beta = _positive(beta, memories)
    dim = memories.shape[1]
    return 0.5 * dim * (math.log(2 * math.pi) - jnp.log(beta)) + jax.nn.logsumexp(0.5 * beta * jnp.sum(memories**2, axis=1))


def log_density(state: Float[Array, " d"], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""]) -> Float[Array, ""]:
    """log p(x) of the Boltzmann density p ∝ exp(−βE), Eq. (3), a Gaussian mixture with weights tied to the norms.

    Accuracy: through the distances |x − ξ_μ|, so −βE and log Z, both of order βR², are never subtracted.
    """
    _check_state(state, memories)
    beta = _positive(beta, memories)
    log_mixture = jax.nn.log_softmax(0.5 * beta * jnp.sum(memories**2, axis=1))
    exponents = log_mixture - 0.5 * beta * jnp.sum((state[None] - memories) ** 2, axis=1)
    return jax.nn.logsumexp(exponents) + 0.5 * state.shape[0] * (jnp.log(beta) - math.log(2 * math.pi))


def sample_boltzmann(
    key: Key[Array, ""], memories: Float[Array, "m d"], beta: Real[ArrayLike, ""], shape: tuple[int, ...] = ()
) -> Float[Array, "*shape d"]:
    """Exact draws from the Boltzmann density p ∝ exp(−βE), Eq. (3).

    Args:
        key: a `jax.random.key`.
        shape: the draws' leading shape; all of it is held in memory.
    """
    _check_memories(memories)
    beta = _positive(beta, memories)
    component, noise = jax.random.split(key)
    index = jax.random.categorical(component, 0.5 * beta * jnp.sum(memories**2, axis=1), shape=shape)
    return memories[index] + jax.random.normal(noise, (*shape, memories.shape[1]), memories.dtype) / jnp.sqrt(beta)
