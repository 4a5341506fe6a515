r"""The variational bound of log p_t, per image: denoising losses on a fixed grid of timesteps, no derivative of the network needed.

The model is `Ancestral` sampling on a grid $t_0 < t_1 < \dots < t_K$ that ends at the schedule's last timestep: with
$a_i = \alpha_i/\alpha_{i-1}$ and $b_i^2 = \sigma_i^2 - a_i^2\sigma_{i-1}^2$, $p(x_{i-1}|x_i)$ is normal of mean
$(x_i - b_i^2\varepsilon(x_i, t_i)/\sigma_i)/a_i$ and variance $w_i\sigma_{i-1}^2b_i^2/\sigma_i^2$, where $w_i = 1$, or
$\sigma_i^2/\sigma_{i-1}^2$ for the widest steps. The state $y = x_0$ at $t_0$ is noised on from there, $x_i = \alpha_i' y + \sigma_i' e$,
with $\alpha_i' = \alpha_i/\alpha_0$ and $\sigma_i'^2 = \sigma_i^2(1 - e^{-H_i})$; $H_i$ is the fall of the log signal-to-noise ratio
from $t_0$ to $t_i$, $h_i$ that from $t_{i-1}$. Then each term of the bound (Sohl-Dickstein et al. 2015, Ho et al. 2020)

$$-\log p(y) \le KL(q(x_K|y) | N(0, I)) + \sum_{i\ge2} E\,KL(q(x_{i-1}|x_i, y) | p(x_{i-1}|x_i)) - E \log p(y|x_1)$$

is a weighted denoising loss and a constant,

$$\frac{e^{h_i} - 1}{2w_i}\,|\varepsilon(x_i, t_i) - r_i e|^2 + \tfrac d2 (\rho_i - 1 - \log\rho_i), \qquad
r_i^2 = \frac1{1 - e^{-H_i}},\quad \rho_i = \frac{1 - e^{-H_{i-1}}}{w_i(1 - e^{-H_i})},$$

with $\tfrac d2\log(2\pi w_1\sigma_0^2(1 - e^{-h_1}))$ for the constant of $i = 1$. As K grows it tends to the bound of continuous time,
which for an exact score is $\log p_t(y)$ itself; $t_0$ is any timestep, so bound and flow (`FlowLogDensity`) estimate the same number.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffusion.likelihood import Draws, LogDensity, begin_at
from diffusion.samplers import Grid, Network, uniform_log_snr
from diffusion.schedules import Schedule


class _Term(NamedTuple):
    place: Any  # numbers, or arrays with one for each term
    timestep: Any
    alpha: Any
    sigma: Any
    weight: Any
    ratio: Any


@dataclasses.dataclass(frozen=True)
class VariationalBound(LogDensity):
    """A lower bound of log p(y) of ancestral sampling in `steps` steps down to timestep `start`, in nats.

    Steps are equal in the log signal-to-noise ratio by default. The model's are exact for a single image, with `widest` for normal data
    much wider than the noise: which of the two bounds is the tighter depends on the data.

    A draw is an unbiased estimate of the whole bound, from independent noise e and −e at each timestep: 2 × `steps` evaluations. From
    the squared loss its regression on |e|² is taken, (r − 1/r)²(|e|² − d), whose mean is 0: no variance is left for a single image.
    """

    steps: int = 64
    draws: int = 4
    widest: bool = False
    grid: Grid = uniform_log_snr

    def __post_init__(self) -> None:
        """Refuse an empty grid, or no draws."""
        if self.steps < 1 or self.draws < 1:
            raise ValueError(f"need at least 1 step and 1 draw, got {self.steps} and {self.draws}")

    def __call__(
        self, epsilon: Network, states: Float[Array, "n *shape"], schedule: Schedule, keys: Key[Array, " n"], *, start: int | float = 0
    ) -> Draws:
        """See `LogDensity`."""
        size, axes = math.prod(states.shape[1:]), tuple(range(1, states.ndim))
        terms, constant = self._terms(schedule, begin_at(schedule, start))
        # In float64 on the host, and rounded once.
        terms = _Term(*(jnp.asarray(column, None if column.dtype == np.int32 else states.dtype) for column in terms))
        last = 0.5 * jnp.sum(jnp.square(terms.alpha[-1] * states), axis=axes) + size * constant

        def draw(index: Int[Array, ""]) -> Float[Array, " n"]:
            own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)

            def add(total: Array, now: _Term) -> tuple[Array, None]:
                noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, now.place), states.shape[1:], states.dtype))(own)

                def loss(sign: Array) -> Array:
                    predicted = epsilon(now.alpha * states + sign * now.sigma * noise, jnp.full(len(states), now.timestep))
                    return jnp.sum(jnp.square(predicted - sign * now.ratio * noise), axis=axes)

                losses = jnp.mean(jax.lax.map(loss, jnp.asarray([1, -1], states.dtype)), axis=0)
                excess = jnp.sum(jnp.square(noise), axis=axes) - size
                return total + now.weight * (losses - jnp.square(now.ratio - 1 / now.ratio) * excess), None

            return -jax.lax.scan(add, last, terms)[0]

        values = jax.lax.map(draw, jnp.arange(self.draws))
        return Draws(values.T, jnp.full(len(states), 2 * self.steps * self.draws, jnp.int32))

    def _terms(self, schedule: Schedule, start: float) -> tuple[_Term, float]:
        timesteps = self.grid(schedule, schedule.timesteps - 1, start, self.steps + 1)[::-1]
        alphas, sigmas = schedule.alpha_sigma_float64(timesteps)
        falls = 2 * np.log(alphas[0] / sigmas[0] * sigmas[1:] / alphas[1:])
        shares = -np.expm1(-falls)  # σ'²/σ²
        widths = (sigmas[1:] / sigmas[:-1]) ** 2 if self.widest else np.ones(self.steps)
        spread = sigmas[1:] * np.sqrt(shares)
        ratios = shares[:-1] / shares[1:] / widths[1:]
        constants = np.log(2 * math.pi * widths[0] * sigmas[0] ** 2 * shares[0]) + np.sum(ratios - 1 - np.log(ratios))
        constants += spread[-1] ** 2 - 1 - 2 * np.log(spread[-1])  # of KL(q(x_K|y) | N(0, I))
        weights = 0.5 * np.expm1(np.diff(falls, prepend=0)) / widths
        places = np.arange(self.steps, dtype=np.int32)
        return _Term(places, timesteps[1:], alphas[1:] / alphas[0], spread, weights, 1 / np.sqrt(shares)), 0.5 * float(constants)
