"""The rotation identity, Lemma B.5, and the two laws of the rotated state: Eqs. (6), (17), (59)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import hopjax
from hopjax import cluster
from theory_checks.claim import Finding, Measurement, Setting, claim, z_score


@claim("rotation-identity", "Eq. (17)", "Rotating the memories is rotating the state back: E(x; RX) = E(Rᵀx; X).", per_preset=True)
def rotation_identity(setting: Setting) -> Finding:
    preset = setting.preset

    @jax.jit
    def largest_difference(key: jax.Array) -> jax.Array:
        memories = cluster.memories(preset.members, preset.dim, preset.cosine)
        turn_key, state_key = jax.random.split(key)
        turn = hopjax.rotation(hopjax.antisymmetric(turn_key, preset.dim), 1.0)
        states = jax.random.normal(state_key, (32, preset.dim))
        rotated = jax.vmap(lambda x: hopjax.energy(x, memories @ turn.T, preset.beta))(states)
        turned = jax.vmap(lambda x: hopjax.energy(turn.T @ x, memories, preset.beta))(states)
        return jnp.max(jnp.abs(rotated - turned) / (0.5 * jnp.sum(states**2, axis=1) + 1))

    # d products, each rounded: a random walk of d roundings stays below d.
    bound = preset.dim * float(np.finfo(float).eps)
    value = float(largest_difference(setting.key("rotation-identity")))
    return Finding([Measurement("largest relative difference of 32 states, one large rotation", value, "<=", bound)])


def _draw_laws(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    for axes, (preset, values) in zip(np.atleast_1d(figure.subplots(1, len(series))), series.items(), strict=True):
        for law in ("dense", "planar"):
            axes.step(values["bin_edges"][:-1], values[law], where="post", label=law)
        axes.set(title=preset, xlabel="energy rise ΔE of the outlier", ylabel="rotations")
        axes.legend()


@claim(
    "exact-planar-law",
    "Eq. (6), beyond the paper",
    "Rᵀx = cosθ·x + sinθ·|x|·v with v uniform and θ from a tridiagonal matrix: the d-free law is the dense ensemble's.",
    per_preset=True,
    draw=_draw_laws,
    caption="Energy rises of the outlier's fixed point under rotations drawn as full matrices (dense) and from the d-free law (planar).",
)
def exact_planar_law(setting: Setting) -> Finding:
    preset, draws = setting.preset, setting.rotations

    @jax.jit
    def rises(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        memories = cluster.memories(preset.members, preset.dim, preset.cosine)
        state = hopjax.fixed_point(memories[-1], memories, preset.beta).state
        keys = jax.random.split(key)

        def sample(law: hopjax.DenseLaw | hopjax.PlanarLaw, key: jax.Array) -> jax.Array:
            return hopjax.sample_rises(key, state, memories, preset.beta, epsilon=preset.epsilon, sigma=preset.sigma, draws=draws, law=law)

        return sample(hopjax.DenseLaw(), keys[0]), sample(hopjax.PlanarLaw(), keys[1])

    dense, planar = (np.asarray(part) for part in rises(setting.key("exact-planar-law")))
    level = 1e-6
    p_value = float(stats.ks_2samp(dense, planar).pvalue)
    edges = np.histogram_bin_edges(np.concatenate([dense, planar]), 40)
    moments = [
        z_score(
            f"moment {order} of the rise",
            float(np.mean(dense**order) - np.mean(planar**order)),
            float(np.sqrt((np.var(dense**order) + np.var(planar**order)) / draws)),
        )
        for order in (1, 2)
    ]
    series = {"bin_edges": edges.tolist()} | {
        name: np.histogram(values, edges)[0].tolist() for name, values in (("dense", dense), ("planar", planar))
    }
    return Finding([Measurement("p-value, two-sample Kolmogorov–Smirnov", p_value, ">=", level, level), *moments], series)
