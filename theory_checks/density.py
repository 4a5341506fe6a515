"""The energy, its stationary points, and the Boltzmann density that it defines: Eqs. (1)-(4), (16)."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from scipy import special, stats

import hopjax
from hopjax import cluster
from theory_checks.claim import Z_FALSE_ALARM, Z_LIMIT, Finding, Measurement, Setting, claim

EPS = float(np.finfo(float).eps)


def _rounding(memories: np.ndarray, states: np.ndarray, beta: float) -> np.ndarray:
    """First-order bound on the rounding error of E at each state: d products and a sum in each of |x|²/2 and ξ·x, one log-sum-exp."""
    count, dim = memories.shape
    norms = np.linalg.norm(states, axis=1)
    largest = np.max(np.linalg.norm(memories, axis=1))
    return np.asarray((dim + 4) * EPS * (0.5 * norms**2 + largest * norms + np.log(count) / beta))


def _exact_energy_and_map(state: np.ndarray, memories: np.ndarray, beta: float) -> tuple[mpmath.mpf, list[mpmath.mpf]]:
    """E(x) and T(x) by Eqs. (1)-(2) as they stand, in 50 digits."""
    with mpmath.workdps(50):
        x = [mpmath.mpf(float(entry)) for entry in state]
        rows = [[mpmath.mpf(float(entry)) for entry in row] for row in memories]
        boltzmann = [mpmath.exp(beta * mpmath.fdot(row, x)) for row in rows]
        total = mpmath.fsum(boltzmann)
        retrieved = [mpmath.fdot(boltzmann, column) / total for column in zip(*rows, strict=True)]
        return mpmath.fdot(x, x) / 2 - mpmath.log(total) / beta, retrieved


@claim(
    "energy-definition",
    "Eqs. (1), (2), (16)",
    "E(x) = −β⁻¹ log Σ exp(β ξ·x) + ½|x|², and the fixed points x* = T(x*) of the retrieval map are its stationary points.",
)
def energy_definition(setting: Setting) -> Finding:
    rng = np.random.default_rng(setting.seed)
    betas, memories, states = np.array([0.5, 8.0, 200.0]), rng.normal(size=(7, 5)), rng.normal(size=(6, 5))

    @jax.jit
    def evaluate(states: jax.Array, memories: jax.Array, betas: jax.Array) -> tuple[jax.Array, ...]:
        def at(state: jax.Array, beta: jax.Array) -> tuple[jax.Array, ...]:
            value, slope = jax.value_and_grad(hopjax.energy)(state, memories, beta)
            return value, slope, hopjax.update_map(state, memories, beta)

        return jax.vmap(lambda beta: jax.vmap(lambda x: at(x, beta))(states))(betas)

    @jax.jit
    def slopes_at_fixed_points() -> jax.Array:
        rows = cluster.memories(12, 50, 0.35)

        def stationary(start: jax.Array, beta: jax.Array) -> jax.Array:
            point = hopjax.fixed_point(start, rows, beta)
            return jnp.where(point.converged, jnp.linalg.norm(jax.grad(hopjax.energy)(point.state, rows, beta)), jnp.nan)

        return jax.vmap(lambda beta: jax.vmap(lambda start: stationary(start, beta))(rows))(jnp.array([4.0, 8.0, 20.0]))

    energies, slopes, retrieved = (np.asarray(part) for part in evaluate(states, memories, betas))
    stationary = np.asarray(slopes_at_fixed_points())
    energy_errors, map_errors, slope_errors = [], [], []
    for beta, energy_row, slope_row, map_row in zip(betas, energies, slopes, retrieved, strict=True):
        unit = _rounding(memories, states, beta)
        # A logit's error, beta times the energy's, is what moves the softmax weights; each entry of T is a mean of memories.
        map_unit = (beta * unit + 16 * EPS) * float(np.max(np.abs(memories)))
        for state, energy, slope, mapped, bound, map_bound in zip(states, energy_row, slope_row, map_row, unit, map_unit, strict=True):
            exact_energy, exact_map = _exact_energy_and_map(state, memories, float(beta))
            energy_errors.append(abs(float(exact_energy - float(energy))) / bound)
            map_errors += [abs(float(exact - float(entry))) / map_bound for exact, entry in zip(exact_map, mapped, strict=True)]
            slope_errors.append(np.max(np.abs(state - mapped - slope)) / map_bound)
    # The solver stops at |x − T(x)| ≤ 1e-13; differentiating E rounds once more, as above with |x| = |ξ| = 1.
    bound = 1e-13 + (20.0 * (50 + 4) * 3 + 16) * EPS
    return Finding(
        [
            Measurement("largest error of E over its rounding bound, against 50 digits", float(np.max(energy_errors)), "<=", 1.0),
            Measurement("largest error of T over its rounding bound, against 50 digits", float(np.max(map_errors)), "<=", 1.0),
            Measurement(
                "largest |∇E − (x − T(x))| over the same bound, ∇E by automatic differentiation", float(np.max(slope_errors)), "<=", 1.0
            ),
            Measurement("largest |∇E| at 39 fixed points", float(np.max(stationary)), "<=", bound),
        ]
    )


def _grid(memories: np.ndarray, beta: float) -> tuple[np.ndarray, float]:
    """Trapezoidal nodes around the memories and the volume of a cell.

    For Gaussians of width β^{−1/2} a spacing of a quarter of that leaves an error of e^{−2π²·16}; cutting off at 9.5 widths, e^{−45}.
    """
    width = beta**-0.5
    axes = [
        np.arange(low - 9.5 * width, high + 9.5 * width, 0.25 * width) for low, high in zip(memories.min(0), memories.max(0), strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, memories.shape[1]), (0.25 * width) ** memories.shape[1]


@claim(
    "boltzmann-mixture",
    "Eq. (3)",
    "The Boltzmann density exp(−βE)/Z is the Gaussian mixture Σ π_μ N(ξ_μ, I/β) with π_μ ∝ exp(β|ξ_μ|²/2), and Z is explicit.",
)
def boltzmann_mixture(setting: Setting) -> Finding:
    beta, draws = 4.0, 40_000
    # Norms from 0.5 to 1.3: mixture weights that differ by a factor of 16.
    configurations = [np.array([[-0.5], [0.9], [1.3]]), np.array([[1.0, 0.0], [-0.3, 0.6], [0.5, -1.2]])]

    @jax.jit
    def on_grid(memories: jax.Array, nodes: jax.Array) -> tuple[jax.Array, ...]:
        energies = jax.vmap(lambda x: hopjax.energy(x, memories, beta))(nodes)
        return energies, jax.vmap(lambda x: hopjax.log_density(x, memories, beta))(nodes), hopjax.log_partition(memories, beta)

    partition_errors, density_errors = [], []
    for memories in configurations:
        nodes, cell = _grid(memories, beta)
        energies, log_density, log_partition = (np.asarray(part) for part in on_grid(jnp.asarray(memories), jnp.asarray(nodes)))
        # Rounding of βE in the exponent, at the far corner.
        unit = beta * float(np.max(_rounding(memories, nodes, beta)))
        partition_errors.append(abs(special.logsumexp(-beta * energies) + np.log(cell) - log_partition) / unit)
        mixture = special.log_softmax(0.5 * beta * np.sum(memories**2, axis=1))
        normal = [stats.norm.logpdf(nodes, row, beta**-0.5).sum(axis=1) for row in memories]
        by_hand = special.logsumexp(mixture[:, None] + np.stack(normal), axis=0)
        errors = np.maximum(np.abs(log_density - by_hand), np.abs(log_density + beta * energies + log_partition))
        density_errors.append(np.max(errors) / unit)

    memories = configurations[1]

    @jax.jit
    def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = hopjax.sample_boltzmann(key, jnp.asarray(memories), beta, (draws,))
        return states, jax.vmap(lambda x: hopjax.weights(x, jnp.asarray(memories), beta))(states)

    # The softmax weight p_μ(x) is the posterior of component μ: its mean is π_μ, and weighted by it x is N(ξ_μ, I/β).
    states, posterior = (np.asarray(part) for part in sample(setting.key("boltzmann-mixture")))
    mixture = special.softmax(0.5 * beta * np.sum(memories**2, axis=1))
    deviation = states[:, None] - memories[None]
    terms = np.concatenate(
        [
            posterior - mixture,
            (posterior[:, :, None] * deviation).reshape(draws, -1),
            (posterior[:, :, None] * (beta * deviation**2 - 1)).reshape(draws, -1),
            posterior * beta * deviation[:, :, 0] * deviation[:, :, 1],
        ],
        axis=1,
    )
    scores = np.abs(terms.mean(axis=0)) / (terms.std(axis=0, ddof=1) / draws**0.5)
    return Finding(
        [
            Measurement(
                "largest error of log Z over its rounding bound, quadrature in d = 1, 2", float(np.max(partition_errors)), "<=", 1.0
            ),
            Measurement("largest error of the log density over its rounding bound", float(np.max(density_errors)), "<=", 1.0),
            Measurement(
                f"largest |z| of {scores.size} component weights, means and covariances of {draws} samples",
                float(scores.max()),
                "<=",
                Z_LIMIT,
                scores.size * Z_FALSE_ALARM,
            ),
        ],
        note="Three memories of unequal norm: equal mixture weights need equal norms.",
    )


@claim(
    "forgetting-density-ratio",
    "Eq. (4)",
    "For as many memories of the same norms, intrinsic forgetting is a log density ratio: ΔE(x) = −β⁻¹ log p₂(x)/p₁(x).",
)
def forgetting_density_ratio(setting: Setting) -> Finding:
    beta, rng = 6.0, np.random.default_rng(setting.seed)
    before, after = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.normal(size=(2, 6, 8)))
    states = rng.normal(size=(32, 8))
    longer = after * rng.uniform(0.7, 1.3, size=(6, 1))

    @jax.jit
    def discrepancy(states: jax.Array, before: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array]:
        def at(state: jax.Array) -> jax.Array:
            log_ratio = hopjax.log_density(state, after, beta) - hopjax.log_density(state, before, beta)
            return hopjax.energy_change(state, before, after, beta) + log_ratio / beta

        return jax.vmap(at)(states), (hopjax.log_partition(before, beta) - hopjax.log_partition(after, beta)) / beta

    (equal, _), (missed, offset), (replayed, replay_offset) = (
        (np.asarray(part) for part in discrepancy(states, before, rows)) for rows in (after, longer, np.concatenate([after, before[:1]]))
    )
    unequal, replayed = missed - offset, replayed - replay_offset
    unit = beta * (0.5 * np.max(np.sum(states**2, axis=1)) + 1.3 * np.max(np.linalg.norm(states, axis=1)))
    # Four logarithms, each of d products on numbers of the size of βE.
    bound = 4 * (8 + 4) * EPS * float(unit) / beta
    general = float(np.max(np.abs([unequal, replayed])))
    return Finding(
        [
            Measurement("largest |ΔE + β⁻¹ log p₂/p₁|, unit norms, 32 states", float(np.max(np.abs(equal))), "<=", bound),
            Measurement("the same less β⁻¹ log Z₁/Z₂: unequal norms, and one memory more", general, "<=", bound),
            Measurement("|ΔE + β⁻¹ log p₂/p₁| for unequal norms, least", float(np.min(np.abs(missed))), ">=", 1e3 * bound),
        ],
        note="The text asks for a fixed number of memories only; the identity needs Z₁ = Z₂, so norms must agree as well.",
    )
