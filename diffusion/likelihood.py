r"""Likelihood of images under a diffusion model, and intrinsic forgetting as the difference that learning makes to it.

The probability flow $dx/d\lambda = f$, $f = \sigma(\sigma x - \varepsilon)$, $\lambda = \log(\alpha/\sigma)$, carries $N(0, I)$ at the
end of the schedule to the model's density $p_t$ at timestep t, so that for a state y at t, with x at the end of its trajectory,

$$\log p_t(y) = \log N(x; 0, I) + \int_{\lambda_t}^{\lambda_\text{end}} \nabla\cdot f\,d\lambda .$$

(Chen et al. 2018, Song et al. 2021.) A *clean* image x lies at $y = \alpha_t x$, where $p_t$ smooths the data with kernels of inverse
temperature β = α²/σ², the signal-to-noise ratio: $-\beta^{-1}\log p_t$ is its energy up to a constant (`hopjax.correspondence`), and
$\Delta E = \beta^{-1}(\log p_1 - \log p_2)$ what a change of the model costs it (arXiv:2605.27975, Eq. 4).

Estimates are random where a divergence is probed, a bound sampled or a byte dequantised. Each image has a key, and equal keys mean
equal random numbers for whatever model: the noise of differences is far below that of likelihoods. Everything but `InBatches` is pure.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped, UInt8

from diffusion.backend import compiler_options
from diffusion.feed import filled_batches
from diffusion.samplers import Network, ProbabilityFlow, probability_flow
from diffusion.schedules import Schedule


class Draws(NamedTuple):
    """Independent draws of one estimate for each image. What has failed is NaN."""

    values: Float[Array, "n m"]
    evaluations: Int[Array, " n"]
    """Of the noise function, for each image, in all its draws together."""

    @property
    def mean(self) -> Float[Array, " n"]:
        """The estimate."""
        return jnp.mean(self.values, axis=1)

    @property
    def standard_error(self) -> Float[Array, " n"]:
        """One standard deviation of `mean`, from the spread of the draws; NaN for a single draw, which shows none."""
        count = self.values.shape[1]
        if count == 1:
            return jnp.full_like(self.values[:, 0], jnp.nan)
        return jnp.std(self.values, axis=1, ddof=1) / math.sqrt(count)


@dataclasses.dataclass(frozen=True)
class LogDensity(abc.ABC):
    """One interface for all estimates of log p_t: call it with a noise function and states at timestep `start`."""

    @abc.abstractmethod
    def __call__(
        self, epsilon: Network, states: Float[Array, "n *shape"], schedule: Schedule, keys: Key[Array, " n"], *, start: int | float = 0
    ) -> Draws:
        """log p_t of the states (not of clean images: see `clean_log_density`), in nats, in the states' dtype.

        Args:
            epsilon: the noise function; image i of its output must depend on image i of its input alone (no batch normalisation).
            states: they are at timestep t = `start`.
            keys: one for each state; the same keys give the same random numbers, whatever the noise function.

        Raises: ValueError for a timestep that is not before the schedule's last.
        """


def begin_at(schedule: Schedule, start: int | float) -> float:
    """`start`, if part of the schedule comes after it.

    Raises: ValueError if not.
    """
    if not 0 <= start < schedule.timesteps - 1:
        raise ValueError(f"start = {start:g} must be at least 0 and below {schedule.timesteps - 1}, the schedule's last timestep")
    return float(start)


@dataclasses.dataclass(frozen=True)
class Divergence(abc.ABC):
    """How the trace of a Jacobian J is had from products vᵀJ (reverse mode: some layers have derivatives of their own)."""

    @abc.abstractmethod
    def probes(self, keys: Key[Array, " n"], states: Float[Array, "n *shape"]) -> Float[Array, "k n *shape"]:
        """The vectors v."""

    @abc.abstractmethod
    def draws(self, forms: Float[Array, "k n"]) -> Float[Array, "n m"]:
        """Estimates of the trace from the forms vᵀJv."""


@dataclasses.dataclass(frozen=True)
class ExactTrace(Divergence):
    """All d diagonal entries, one product each; a single draw, in which nothing is random."""

    def probes(self, keys: Key[Array, " n"], states: Float[Array, "n *shape"]) -> Float[Array, "k n *shape"]:
        """The unit vectors."""
        size = math.prod(states.shape[1:])
        return jnp.broadcast_to(jnp.eye(size, dtype=states.dtype).reshape(size, 1, *states.shape[1:]), (size, *states.shape))

    def draws(self, forms: Float[Array, "k n"]) -> Float[Array, "n m"]:
        """Their sum."""
        return jnp.sum(forms, axis=0)[:, None]


@dataclasses.dataclass(frozen=True)
class Hutchinson(Divergence):
    """`count` random signs v, one product each: every one an unbiased draw, of variance 2 Σ_{i≠j} S_ij² with S = (J + Jᵀ)/2."""

    count: int = 4

    def __post_init__(self) -> None:
        """Refuse no probes."""
        if self.count < 1:
            raise ValueError(f"need at least 1 probe, got {self.count}")

    def probes(self, keys: Key[Array, " n"], states: Float[Array, "n *shape"]) -> Float[Array, "k n *shape"]:
        """Signs that depend on an image's key alone."""
        shape = (self.count, *states.shape[1:])
        return jnp.moveaxis(jax.vmap(lambda key: jax.random.rademacher(key, shape, states.dtype))(keys), 1, 0)

    def draws(self, forms: Float[Array, "k n"]) -> Float[Array, "n m"]:
        """One for each probe."""
        return forms.T


@dataclasses.dataclass(frozen=True)
class FlowLogDensity(LogDensity):
    """log p_t by the probability flow: the density of what `ProbabilityFlow` samples, whether or not ε is anyone's exact score.

    A probe is kept along its whole trajectory, so the draws are unbiased (up to the solver's error) and independent. The solver holds
    each step's error of the state (root mean square) and of log p_t (nats, root mean square over probes) to atol + rtol × size for
    each image of the batch; images that needed more than `max_steps`, and those that are not finite, are NaN. Besides, rounding leaves
    a few eps × d in log p_t. As for sampling, the end of the schedule is N(0, I): a density of data noised to there differs by up to
    α|x||x₀| nats (α = 6e-3 at the end of DDPM's schedule), which differences of two models hardly see.

    One evaluation is a call of the noise function and a product vᵀJ for each probe.
    """

    divergence: Divergence = Hutchinson()
    flow: ProbabilityFlow = ProbabilityFlow()

    def __call__(
        self, epsilon: Network, states: Float[Array, "n *shape"], schedule: Schedule, keys: Key[Array, " n"], *, start: int | float = 0
    ) -> Draws:
        """See `LogDensity`."""
        start = begin_at(schedule, start)
        axes = tuple(range(1, states.ndim))
        velocity = probability_flow(epsilon, schedule)
        probes = self.divergence.probes(keys, states)

        def field(time: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            slope, pullback = jax.vjp(lambda x: velocity(time, x), state[0])
            (products,) = jax.vmap(pullback)(probes)
            forms = jnp.sum(probes * products, axis=tuple(axis + 1 for axis in axes))
            return slope, self.divergence.draws(forms)

        # An image that is not finite would hold up the others of its batch: no step would ever be accepted.
        finite = jnp.all(jnp.isfinite(states), axis=axes, keepdims=True)
        begin = jnp.where(finite, states, 0)
        volume = jnp.zeros_like(self.divergence.draws(jnp.zeros(probes.shape[:2], states.dtype)))
        (end, volume), evaluations = self.flow.integrate(field, (begin, volume), schedule, start=start, stop=schedule.timesteps - 1)
        prior = -0.5 * jnp.sum(jnp.square(end), axis=axes) - 0.5 * math.prod(states.shape[1:]) * math.log(2 * math.pi)
        values = jnp.where(finite.reshape(-1, 1), prior[:, None] + volume, jnp.nan)
        return Draws(values, jnp.full(len(states), evaluations))


def clean_log_density(
    log_density: LogDensity,
    epsilon: Network,
    clean: Float[Array, "n *shape"],
    schedule: Schedule,
    keys: Key[Array, " n"],
    *,
    timestep: int | float = 0,
) -> Draws:
    """log of the model's density of clean images, seen at a timestep: log p_t(α_t x) + d log α_t, a normalised density of x.

    It smooths the data with noise of standard deviation σ_t/α_t (0.01 at DDPM's first timestep).

    Args:
        clean: images in the scale that the model was trained in.

    Raises: ValueError for a timestep that is not before the schedule's last.
    """
    (alpha,), _ = schedule.alpha_sigma_float64(np.array([begin_at(schedule, timestep)]))
    states = jnp.asarray(alpha, clean.dtype) * clean
    found = log_density(epsilon, states, schedule, keys, start=timestep)
    return found._replace(values=found.values + math.prod(clean.shape[1:]) * math.log(alpha))


def intrinsic_forgetting(before: Draws, after: Draws, schedule: Schedule, *, timestep: int | float) -> Draws:
    """ΔE = β⁻¹(log p₁ − log p₂) at β = α_t²/σ_t²: what a change of the model from p₁ to p₂ costs each image; positive is forgotten.

    Pairs of draws are subtracted, so the standard error is that of the difference: made with equal keys, `before` and `after` share
    their random numbers. Units: the square of the images' unit. Source: arXiv:2605.27975, Eq. (4), with trained densities.

    Raises: ValueError if there are not as many draws before as after.
    """
    if before.values.shape != after.values.shape:
        raise ValueError(f"need the same images and draws before and after, got shapes {before.values.shape} and {after.values.shape}")
    (alpha,), (sigma,) = schedule.alpha_sigma_float64(np.array([begin_at(schedule, timestep)]))
    return Draws(float((sigma / alpha) ** 2) * (before.values - after.values), before.evaluations + after.evaluations)


BIN = 2 / 255  # between the values of neighbouring bytes, when 0 … 255 are −1 … 1


def bits_per_dimension(
    log_density: LogDensity,
    epsilon: Network,
    images: UInt8[Array, "n *shape"],
    schedule: Schedule,
    keys: Key[Array, " n"],
    *,
    timestep: int | float = 0,
    draws: int = 4,
    dtype: DTypeLike = jnp.float32,
) -> Draws:
    """Bits that the model spends on each byte of 8-bit images, seen by the network in −1 … 1.

    A byte k becomes x = (k + u − ½)/127.5 − 1 with u uniform in [0, 1): bins of width 2/255 around the values k/127.5 − 1 that networks
    are trained on. The model's probability of the bytes is the integral of its density over their bins, and by Jensen's inequality

        −log₂ P(k) ≤ E_u[−log₂ p(x)] + d log₂ 127.5,

    the right-hand side divided by d being what is returned, with `p` of `clean_log_density`. Every draw has its own u and its own
    probes or noise (of which it is the mean), so the standard error covers both.

    Args:
        draws: how many u for each image; at least 2 for a standard error.
        dtype: of the network's input, and of the bits.

    Raises: ValueError without a draw, or for a timestep that is not before the schedule's last.
    """
    if draws < 1:
        raise ValueError(f"need at least 1 draw, got {draws}")
    size = math.prod(images.shape[1:])

    def draw(index: Int[Array, ""]) -> tuple[Array, Array]:
        pairs = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, index)))(keys)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:], dtype))(pairs[:, 0])
        clean = (images.astype(dtype) + (uniform - 0.5)) * BIN - 1
        found = clean_log_density(log_density, epsilon, clean, schedule, pairs[:, 1], timestep=timestep)
        return -(found.mean / size + math.log(BIN)) / math.log(2), found.evaluations

    bits, evaluations = jax.lax.map(draw, jnp.arange(draws))  # one after another: as much memory as one
    return Draws(bits.T, jnp.sum(evaluations, axis=0))


Params = TypeVar("Params")
Measure: TypeAlias = Callable[[Params, Shaped[Array, "b *shape"], Key[Array, " b"]], Draws]


class InBatches(Generic[Params]):
    """A measure of any number of images, batch by batch through one compiled program, in the memory of one batch.

    The model is an argument of the program, so that one compilation serves it before and after a change:

        def measure(params, images, keys):
            epsilon = noise_function(nnx.merge(graphdef, params), schedule, prediction)
            return clean_log_density(FlowLogDensity(), epsilon, images, schedule, keys, timestep=500)

        over = InBatches(measure, size=64)
        forgetting = intrinsic_forgetting(over(before, images, key=key), over(after, images, key=key), schedule, timestep=500)

    Image i has the key `fold_in(key, i)`, whatever the size of the batches. Not pure: it counts on the host, and waits for each batch.
    """

    def __init__(self, measure: Measure[Params], size: int) -> None:
        """`measure(params, images, keys)` of one batch, and the images in a batch; ValueError unless that is at least 1."""
        if size < 1:
            raise ValueError(f"a batch needs at least 1 image, got size = {size}")
        self.size = size
        self._program = jax.jit(measure, compiler_options=compiler_options())

    def __call__(
        self,
        params: Params,
        images: PyTree[Shaped[np.ndarray, "n ..."]],
        *,
        key: Key[Array, ""],
        progress: Callable[[int], None] = lambda _: None,
    ) -> Draws:
        """The measure of all images, in memory or mapped from a file: only the rows of a batch are read at a time.

        An image may be a row of each of several arrays in a tree.

        Args:
            progress: told after each batch how many more images are done.

        Raises: ValueError if there are no images.
        """
        count = len(jax.tree.leaves(images)[0])
        parts = []
        for rows in filled_batches(count, self.size):
            batch = jax.tree.map(lambda array, rows=rows: jnp.asarray(array[rows]), images)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(rows))
            parts.append(jax.device_get(self._program(params, batch, keys)))
            progress(min(len(rows), count - int(rows[0])))
        return Draws(*(jnp.asarray(np.concatenate(column)[:count]) for column in zip(*parts, strict=True)))
