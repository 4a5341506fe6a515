"""Energy rises and replay gains of every fixed point under random rotations, along a ladder of ε; shared by Theorems 4.1 and 5.1."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import hopjax
from hopjax import cluster
from theory_checks.claim import QUICK_COMPILE, Setting


@dataclass(frozen=True)
class _AllEstimators:
    """Plain (column 0), antithetic (column 1) and control variate (the others) from the same rotations."""

    rotations = 2

    def terms(self, value: jax.Array, mirrored: jax.Array, control: jax.Array, control_mean: jax.Array) -> jax.Array:
        pair = hopjax.Antithetic().terms(value, mirrored, control, control_mean)
        controlled = hopjax.ControlVariate().terms(value, mirrored, control, control_mean)
        return jnp.concatenate([value[:, :1], pair[:, 1:2], controlled[:, 2:]], axis=1)


class Ensemble(NamedTuple):
    """Means over rotations at every fixed point (members 0 … K−1, then the outlier) along a ladder of ε.

    Attributes:
        epsilons: 1-2-5 steps down from the preset's ε.
        mean: axes (replica, ε, target, observable); observables are the rise by plain mean, by antithetic pairs and by control
            variate, then the gain from replaying each memory, by control variate. Replicas are independent; all else shares rotations
            but for the target.
        error: standard errors of `mean`.
        second_order: ½ε²σ²S of every target, at each ε.
    """

    epsilons: NDArray[np.float64]
    mean: NDArray[np.float64]
    error: NDArray[np.float64]
    second_order: NDArray[np.float64]

    def pooled(self, rung: int = 0, replicas: slice = slice(None)) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Means and standard errors at one ε over the replicas: axes (target, observable)."""
        mean, error = self.mean[replicas, rung], self.error[replicas, rung]
        return mean.mean(axis=0), np.sqrt(np.mean(error**2, axis=0) / len(mean))

    def richardson(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Limit of mean/ε² as ε → 0 from ε/10 and ε/20, and its standard error: axes (target, observable).

        The two steps take different replicas. With common random numbers the extrapolation would be so precise that what O(ε⁴)
        leaves of it, 1e-10 of the mean, shows; with independent ones it is far below the standard error.
        """
        (coarse, coarse_error), (fine, fine_error) = self.pooled(TENTH, slice(0, None, 2)), self.pooled(TWENTIETH, slice(1, None, 2))
        coarse_square, fine_square = self.epsilons[TENTH] ** 2, self.epsilons[TWENTIETH] ** 2
        limit = (4 * fine / fine_square - coarse / coarse_square) / 3
        return limit, np.hypot(4 * fine_error / fine_square, coarse_error / coarse_square) / 3


PLAIN, ANTITHETIC, CONTROLLED, GAINS = 0, 1, 2, 3
STEPS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
TENTH, TWENTIETH = STEPS.index(0.1), STEPS.index(0.05)
REPLICAS = 4


@lru_cache(maxsize=4)
def ensemble(setting: Setting) -> Ensemble:
    """Rises and gains under `setting.rotations` rotations (pairs of a rotation and its inverse where the estimator takes pairs)."""
    preset = setting.preset
    # The bound on the angle fixes what is compiled; ε itself is traced.
    law = hopjax.PlanarLaw(angle=hopjax.generator_bound(preset.dim, preset.epsilon, preset.sigma))

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def evaluate(key: jax.Array, epsilons: jax.Array) -> tuple[hopjax.Estimate, jax.Array]:
        memories = cluster.memories(preset.members, preset.dim, preset.cosine)
        states = jax.vmap(lambda x: hopjax.fixed_point(x, memories, preset.beta, method=hopjax.Picard()).state)(memories)
        logs = hopjax.log_weight_matrix(states, memories, memories, preset.beta)

        def average(key: jax.Array, epsilon: jax.Array, state: jax.Array, log_weights: jax.Array) -> hopjax.Estimate:
            def observable(rise: jax.Array) -> jax.Array:
                gains = hopjax.gain(log_weights, jnp.broadcast_to(rise, log_weights.shape), preset.beta)
                return jnp.concatenate([jnp.broadcast_to(rise, (GAINS,)), gains])

            return hopjax.rotation_average(
                key,
                state,
                memories,
                preset.beta,
                epsilon=epsilon,
                sigma=preset.sigma,
                draws=2 * (setting.rotations // REPLICAS),
                observable=observable,
                estimator=_AllEstimators(),
                law=law,
            )

        over_states = jax.vmap(average, in_axes=(0, None, 0, 0))
        over_epsilons = jax.vmap(over_states, in_axes=(None, 0, None, None))
        keys = jax.random.split(key, (REPLICAS, len(memories)))
        estimates = jax.vmap(over_epsilons, in_axes=(0, None, None, None))(keys, epsilons, states, logs)
        second = jax.vmap(
            lambda epsilon: jax.vmap(lambda x: hopjax.second_order_rise(x, memories, preset.beta, epsilon=epsilon, sigma=preset.sigma))(
                states
            )
        )
        return estimates, second(epsilons)

    epsilons = preset.epsilon * np.array(STEPS)
    estimates, second = jax.tree.map(np.asarray, evaluate(setting.key("rotation-ensemble"), epsilons))
    return Ensemble(epsilons, estimates.mean, estimates.standard_error, second)
