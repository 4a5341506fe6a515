"""The rotation identity, Lemma B.5, the two laws of the rotated state, and the averaged rise: Eqs. (6), (8), (9), (17), (55), (59)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy import stats

import hopjax
from hopjax import cluster
from theory_checks.claim import Z_FALSE_ALARM, Z_LIMIT, Finding, Measurement, Setting, claim, z_score
from theory_checks.figures import CLUSTER, NEUTRAL, OTHER, OUTLIER
from theory_checks.ladder import fit_order, order_is

EPS = float(np.finfo(float).eps)


@claim("rotation-identity", "Eq. (17)", "Rotating the memories is rotating the state back: E(x; RX) = E(Rᵀx; X).", per_preset=True)
def rotation_identity(setting: Setting) -> Finding:
    preset = setting.preset
    generator = np.random.default_rng(setting.seed).normal(size=(preset.dim, preset.dim))
    generator = np.triu(generator, 1) - np.triu(generator, 1).T
    states = np.random.default_rng(setting.seed + 1).normal(size=(32, preset.dim))

    @jax.jit
    def evaluate(generator: jax.Array, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        memories = cluster.memories(preset.members, preset.dim, preset.cosine)
        turn = hopjax.rotation(generator, 1.0)
        rotated = jax.vmap(lambda x: hopjax.energy(x, memories @ turn.T, preset.beta))(states)
        turned = jax.vmap(lambda x: hopjax.energy(turn.T @ x, memories, preset.beta))(states)
        return turn, jnp.max(jnp.abs(rotated - turned) / (0.5 * jnp.sum(states**2, axis=1) + 1))

    turn, difference = evaluate(jnp.asarray(generator), jnp.asarray(states))
    # d products, each rounded: a random walk of d roundings stays below d. The exponential squares a matrix log₂|A| times on top.
    bound = preset.dim * EPS
    exponential = float(np.max(np.abs(np.asarray(turn) - scipy.linalg.expm(generator))))
    return Finding(
        [
            Measurement("largest relative difference of 32 states, one large rotation", float(difference), "<=", bound),
            Measurement(
                "largest entry of R − exp(A), the exponential by SciPy", exponential, "<=", float(np.linalg.norm(generator, 2)) * bound
            ),
        ]
    )


def _draw_laws(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    for axes, (preset, values) in zip(np.atleast_1d(figure.subplots(1, len(series))), series.items(), strict=True):
        edges = 1e3 * np.asarray(values["bin_edges"])
        axes.stairs(values["dense"], edges, fill=True, color=OUTLIER, alpha=0.35, label="full matrices")
        axes.stairs(values["planar"], edges, color=NEUTRAL, linewidth=1.5, label="d-free law")
        axes.set(title=preset, xlabel="1000 ΔE at the outlier", ylabel="density per unit of ΔE")
        axes.legend(frameon=False)


@claim(
    "exact-planar-law",
    "Eq. (6), beyond the paper",
    "Rᵀx = cosθ·x + sinθ·|x|·v with v uniform and θ from a tridiagonal matrix: the d-free law is the dense ensemble's.",
    per_preset=True,
    draw=_draw_laws,
    caption="Energy rises at the outlier's memory under rotations drawn as full matrices, and from the d-free law.",
)
def exact_planar_law(setting: Setting) -> Finding:
    # Matrices are what costs; ten times as many of the cheap draws make up for half as many of them.
    preset, draws = setting.preset, setting.rotations // 2

    @jax.jit
    def rises(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        memories = cluster.memories(preset.members, preset.dim, preset.cosine)
        state = memories[-1]
        dense_key, planar_key = jax.random.split(key)
        generators = jax.vmap(lambda k: hopjax.antisymmetric(k, preset.dim, preset.sigma))(jax.random.split(dense_key, draws))

        # exp(−εA)x by its Taylor series, not one matrix exponential a draw: with ε‖A‖ < ½ the 11th term is below 2^{−11}/11! = 1e-11,
        # a millionth of what so many draws resolve.
        def add_term(order: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            term, moved = carry
            term = -preset.epsilon / order * jnp.einsum("nij,nj->ni", generators, term)
            return term, moved + term

        start = jnp.broadcast_to(state[None], (draws, preset.dim))
        _, moved = jax.lax.fori_loop(1, 11, add_term, (start, jnp.zeros_like(start)))
        dense = hopjax.energy_rise(hopjax.weights(state, memories, preset.beta), moved @ memories.T, preset.beta)
        planar = hopjax.sample_rises(
            planar_key, state, memories, preset.beta, epsilon=preset.epsilon, sigma=preset.sigma, draws=20 * draws, law=hopjax.PlanarLaw()
        )
        return dense, planar

    dense, planar = (np.asarray(part) for part in rises(setting.key("exact-planar-law")))
    level = 1e-6
    p_value = float(stats.ks_2samp(dense, planar).pvalue)
    # Two distributions this far apart (in Kolmogorov's distance) are told apart in at least half of all runs.
    resolution = float(np.sqrt(0.5 * np.log(2 / level) * (1 / len(dense) + 1 / len(planar))))
    moments = [
        z_score(
            f"moment {order} of the rise",
            float(np.mean(dense**order) - np.mean(planar**order)),
            float(np.sqrt(np.var(dense**order) / len(dense) + np.var(planar**order) / len(planar))),
        )
        for order in (1, 2, 3)
    ]
    edges = np.histogram_bin_edges(dense, 40)
    series = {"bin_edges": edges.tolist()} | {
        name: np.histogram(values, edges, density=True)[0].tolist() for name, values in (("dense", dense), ("planar", planar))
    }
    return Finding(
        [Measurement("p-value, two-sample Kolmogorov–Smirnov", p_value, ">=", level, level), *moments],
        series,
        note=f"{len(dense)} full matrices against {len(planar)} draws of the law: a Kolmogorov distance of {resolution:.3f} would be seen.",
    )


@claim(
    "rotation-moments",
    "Lemma B.5",
    "⟨(Ax)ᵀM(Ax)⟩ = σ²(|x|² tr M − xᵀMx) for every M, from ⟨A_ij A_kl⟩ = σ²(δ_ik δ_jl − δ_il δ_jk); hence ⟨A²⟩ = −σ²(d−1)I.",
)
def rotation_moments(setting: Setting) -> Finding:
    dim, draws = 6, 10_000
    rng = np.random.default_rng(setting.seed)
    # In integers the sum over the covariance is exact.
    matrix, vector = rng.integers(-9, 10, (dim, dim)), rng.integers(-9, 10, dim)
    unit = np.eye(dim, dtype=np.int64)
    covariance = np.einsum("ik,jl->ijkl", unit, unit) - np.einsum("il,jk->ijkl", unit, unit)
    summed = np.einsum("ijkl,j,l,ik->", covariance, vector, vector, matrix)
    lemma = vector @ vector * np.trace(matrix) - vector @ matrix @ vector
    squared = np.einsum("ijjl->il", covariance) + (dim - 1) * unit

    scales = {"unit entries": hopjax.unit_entries, "unit displacement": hopjax.unit_displacement, "half difference": hopjax.half_difference}
    variances = {"unit entries": 1.0, "unit displacement": 1 / (dim - 1), "half difference": 0.5}

    @jax.jit
    def sample(key: jax.Array, sigmas: jax.Array) -> jax.Array:
        one = lambda key, sigma: hopjax.antisymmetric(key, dim, sigma)  # noqa: E731
        return jax.vmap(lambda key, sigma: jax.vmap(lambda k: one(k, sigma))(jax.random.split(key, draws)))(
            jax.random.split(key, len(scales)), sigmas
        )

    generators = np.asarray(sample(setting.key("rotation-moments"), jnp.asarray([scale(dim) for scale in scales.values()])))
    asymmetry = float(np.max(np.abs(generators + np.swapaxes(generators, -1, -2))))
    measurements = [
        Measurement("|Σ covariance − lemma|, random integer M and x", float(abs(summed - lemma)), "<=", 0.0),
        Measurement("largest entry of ⟨A²⟩ + (d−1)I from the covariance", float(np.max(np.abs(squared))), "<=", 0.0),
        Measurement("largest entry of A + Aᵀ, 30,000 draws", asymmetry, "<=", 0.0),
    ]
    for (name, variance), batch in zip(variances.items(), generators, strict=True):
        moved = batch @ vector
        upper = batch[:, *np.triu_indices(dim, 1)]
        squares = batch @ batch
        terms = np.concatenate(
            [
                (np.einsum("ni,ij,nj->n", moved, matrix, moved) - variance * lemma)[:, None],
                (upper[:, :, None] * upper[:, None] - variance * np.eye(upper.shape[1])).reshape(draws, -1),
                (squares + variance * (dim - 1) * np.eye(dim)).reshape(draws, -1),
                upper,
            ],
            axis=1,
        )
        scores = np.abs(terms.mean(axis=0)) / (terms.std(axis=0, ddof=1) / draws**0.5)
        measurements.append(
            Measurement(
                f"largest |z| of {scores.size} moments, σ by {name}", float(scores.max()), "<=", Z_LIMIT, scores.size * Z_FALSE_ALARM
            )
        )
    return Finding(measurements)


def _draw_rise(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    exact, sampled = figure.subplots(1, 2)
    for name, colour, marker in (("fixed point", CLUSTER, "o"), ("random state", OTHER, "s"), ("without the gradient", OUTLIER, "^")):
        exact.loglog(values["steps"], np.abs(values[name]), marker + "-", color=colour, label=name, markersize=4)
    steps = np.asarray(values["steps"])
    exact.loglog(steps, 0.02 * steps**4, ":", color=NEUTRAL, label="∝ ε⁴")
    exact.set(title="exact average, d = 3", xlabel="ε", ylabel="|⟨ΔE⟩ − second order|")
    for name, colour, marker in (("fixed point", CLUSTER, "o"), ("random state", OTHER, "s")):
        sampled.loglog(values["ensemble steps"], np.abs(values[f"{name}, ensemble"]), marker + "-", color=colour, label=name, markersize=4)
    steps = np.asarray(values["ensemble steps"])
    sampled.loglog(steps, abs(values["fixed point, ensemble"][-1]) * 0.2 * (steps / steps[-1]) ** 4, ":", color=NEUTRAL, label="∝ ε⁴")
    sampled.set(title="sampled rotations, d = 24", xlabel="ε", ylabel="|mean of ΔE − second order|")
    for axes in (exact, sampled):
        axes.legend(frameon=False)


def _rodrigues(axes: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """exp(−[ω]×)x for every ω (rows of `axes`) and x (rows of `vectors`), exactly."""
    angle = np.linalg.norm(axes, axis=1)[:, None, None]
    cross = -np.cross(axes[:, None], vectors[None])
    twice = -np.cross(axes[:, None], cross)
    return np.asarray(vectors[None] + np.sinc(angle / np.pi) * cross + 0.5 * np.sinc(angle / (2 * np.pi)) ** 2 * twice)


@claim(
    "rotation-averaged-rise",
    "Eqs. (8), (9), (55), (59)",
    "At a fixed point ⟨ΔE⟩ = ½ε²σ²S(x*) + O(ε⁴); off one, the gradient adds −½ε²σ²(d−1) x·∇E(x).",
    draw=_draw_rise,
    caption="What the second order leaves of the averaged rise falls like ε⁴; off a fixed point and without the gradient, only like ε².",
)
def rotation_averaged_rise(setting: Setting) -> Finding:
    rng = np.random.default_rng(setting.seed)
    # In d = 3 the ensemble is a Gaussian vector ω, Ax = ω × x: the average is a Gauss–Hermite sum, with no sampling error at all.
    sigma, beta, steps = 0.5**0.5, 3.0, np.geomspace(0.12, 0.01, 8)
    near, far = np.array([[1.0, 0.0, 0.0], [-0.2, 0.9, 0.4], [-0.4, -0.5, 1.0], [0.3, -0.7, -0.8]]), np.array([0.4, -0.6, 0.8])
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(16)
    omega = np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 3)
    masses = np.einsum("i,j,k->ijk", node_weights, node_weights, node_weights).reshape(-1) / (2 * np.pi) ** 1.5

    @jax.jit
    def fixed(memories: jax.Array) -> jax.Array:
        return hopjax.fixed_point(memories[0], memories, beta, method=hopjax.Picard()).state

    states = np.stack([np.asarray(fixed(jnp.asarray(near))), far])
    turned = np.stack([_rodrigues(step * sigma * omega, states) for step in steps])  # step, node, state, coordinate

    @jax.jit
    def changes(turned: jax.Array, states: jax.Array, memories: jax.Array, steps: jax.Array) -> tuple[jax.Array, ...]:
        def of_state(turned: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            shift = (turned - state[None, None]) @ memories.T
            rises = hopjax.energy_rise(hopjax.weights(state, memories, beta), shift, beta)
            second = jax.vmap(lambda step: hopjax.second_order_rise(state, memories, beta, epsilon=step, sigma=sigma))(steps)
            return rises, second, 0.5 * (steps * sigma) ** 2 * hopjax.sharpness(state, memories, beta)

        return jax.vmap(of_state, in_axes=(2, 0))(turned, states)

    rises, second, without = (np.asarray(p) for p in changes(*map(jnp.asarray, (turned, states, near, steps))))
    averages = rises @ masses
    remainders = {"fixed point": averages[0] - second[0], "random state": averages[1] - second[1]}
    remainders["without the gradient"] = averages[1] - without[1]

    ensemble = _sampled_rises(setting, rng)
    series: dict[str, Any] = {"steps": steps.tolist()} | {name: values.tolist() for name, values in remainders.items()}
    series |= {"ensemble steps": ensemble["steps"].tolist()}
    series |= {f"{name}, ensemble": ensemble[name].mean(axis=0).tolist() for name in ("fixed point", "random state")}
    measurements = [
        order_is("⟨ΔE⟩ − second order at a fixed point, exact average", fit_order(steps, remainders["fixed point"]), 4),
        order_is("⟨ΔE⟩ − second order off a fixed point, exact average", fit_order(steps, remainders["random state"]), 4),
        order_is("the same without the gradient term", fit_order(steps, remainders["without the gradient"]), 2),
    ]
    for name in ("fixed point", "random state"):
        measurements.append(order_is(f"sampled remainder, {name}", fit_order(ensemble["steps"], ensemble[name]), 4))
        extrapolated, error, closed = ensemble[f"{name}, ε → 0"]
        measurements.append(z_score(f"⟨ΔE⟩/ε² at ε → 0 against the closed form, {name}", float(extrapolated - closed), float(error)))
    extrapolated, error, _ = ensemble["random state, ε → 0"]
    left_out = abs(extrapolated - ensemble["without the gradient"]) / error
    measurements.append(Measurement("|z| of the same without the gradient term: seen", float(left_out), ">=", 2 * Z_LIMIT))
    return Finding(measurements, series)


def _sampled_rises(setting: Setting, rng: np.random.Generator) -> dict[str, Any]:
    """Antithetic pairs in d = 24 along a ladder of ε, the same rotations on every rung.

    Returns: "steps"; for each kind of state, batch means of pair − second order of the same rotation, whose mean is that of
    the remainder; and under "…, ε → 0" the extrapolated ⟨ΔE⟩/ε² of the pairs alone, its standard error and the closed form.
    """
    members, dim, cosine, beta, batches, pairs = 5, 24, 0.5, 6.0, 20, 3000
    steps = np.geomspace(3e-2, 1e-3, 8)
    upper = np.triu(rng.normal(size=(pairs, dim, dim)), 1)
    generators = upper - np.swapaxes(upper, 1, 2)

    @jax.jit
    def start(direction: jax.Array) -> tuple[jax.Array, jax.Array]:
        memories = cluster.memories(members, dim, cosine)
        return memories, jnp.stack(
            [hopjax.fixed_point(memories[0], memories, beta, method=hopjax.Picard()).state, 1.5 * memories[0] + direction]
        )

    # The same for every seed: how far the gradient term stands out of the noise depends on the state.
    memories, states = (np.asarray(part) for part in start(jnp.asarray(0.1 * np.cos(np.arange(dim)))))
    # Krylov vectors AᵏX/k!: every rung is a polynomial in ε of the same vectors. ε‖A‖ < 0.4, so twelve terms reach rounding.
    krylov = [np.broadcast_to(states.T, (pairs, dim, 2))]
    for order in range(1, 13):
        krylov.append(generators @ krylov[-1] / order)
    overlaps = np.stack([np.einsum("md,pds->psm", memories, vector) for vector in krylov[1:]])  # order, pair, state, memory

    @jax.jit
    def evaluate(
        overlaps: jax.Array, tangents: jax.Array, curls: jax.Array, states: jax.Array, memories: jax.Array, steps: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        powers = steps[:, None] ** jnp.arange(1.0, 13.0)[None]
        signs = (-1.0) ** jnp.arange(1.0, 13.0)[None]
        weights = jax.vmap(lambda x: hopjax.weights(x, memories, beta))(states)
        rise = jax.vmap(lambda p, shift: hopjax.energy_rise(p, shift, beta), in_axes=(0, 2), out_axes=2)
        there, back = (jnp.einsum("ro,opsm->rpsm", powers * sign, overlaps) for sign in (jnp.ones_like(signs), signs))
        pair = 0.5 * (rise(weights, there) + rise(weights, back))
        hessians = jax.vmap(lambda x: hopjax.hessian(x, memories, beta))(states)
        gradients = jax.vmap(lambda x: hopjax.gradient(x, memories, beta))(states)
        quadratic = jnp.einsum("pis,sij,pjs->ps", tangents, hessians, tangents) + jnp.einsum("pis,si->ps", curls, gradients)
        second = 0.5 * steps[:, None, None] ** 2 * quadratic[None]
        closed = jax.vmap(lambda x: hopjax.second_order_rise(x, memories, beta, epsilon=1.0, sigma=1.0))(states)
        return pair, pair - second, closed, 0.5 * jax.vmap(lambda x: hopjax.sharpness(x, memories, beta))(states)

    arguments = (overlaps, krylov[1], 2 * krylov[2], states, memories, steps)
    pair, remainder, closed, without = (np.asarray(part) for part in evaluate(*map(jnp.asarray, arguments)))
    result: dict[str, Any] = {"steps": steps, "without the gradient": without[1]}
    for index, name in enumerate(("fixed point", "random state")):
        result[name] = remainder[:, :, index].reshape(len(steps), batches, -1).mean(axis=2).T
        # Richardson: the O(ε²) term of two rungs cancels, draw by draw.
        ratio = (steps[-3] / steps[-1]) ** 2
        scaled = pair[:, :, index] / steps[:, None] ** 2
        limit = (ratio * scaled[-1] - scaled[-3]) / (ratio - 1)
        result[f"{name}, ε → 0"] = (limit.mean(), limit.std(ddof=1) / pairs**0.5, closed[index])
    return result
