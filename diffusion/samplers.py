r"""Samplers: objects that turn noise into images, given a noise function ε(x, t) of the schedule's (fractional) timesteps.

With $\lambda = \log(\alpha/\sigma)$, half the log signal-to-noise ratio, the probability-flow equation of variance-preserving diffusion is
$dx/d\lambda = \sigma(\sigma x - \varepsilon)$, and for $z = x/\alpha$, $s = \sigma/\alpha$ it is $dz/ds = \varepsilon$: DDIM is
Euler's method there, PNDM the same with noise extrapolated from earlier steps, DPM-Solver++(2M) a two-step method exact in the linear part,
`ProbabilityFlow` an adaptive Runge-Kutta method in λ.

Samplers are pure: wrap the call in one `jax.jit`. The noise function is traced once or twice, however many steps there are. Or let
Python take the steps (`scan=stepwise`) and compile the noise function alone, where that is the large part.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree, Real

from diffusion.schedules import Prediction, Schedule

Network: TypeAlias = Callable[[Float[Array, "n *shape"], Real[Array, " n"]], Float[Array, "n *shape"]]
Field: TypeAlias = Callable[[Any, Any], Any]  # dy/dλ of λ and y
Grid: TypeAlias = Callable[[Schedule, int | float, int | float, int], Float[np.ndarray, " k"]]
Scan: TypeAlias = Callable[[Callable[[Any, Any], tuple[Any, None]], Any, Any], tuple[Any, Any]]


class Samples(NamedTuple):
    """What a sampler returns."""

    images: Float[Array, "n *shape"]
    evaluations: Int[Array, ""]
    """How many times the noise function was called on the whole batch. (The adaptive solver's may be a few short if its tolerances
    are below the rounding of the dtype.)"""


def noise_function(network: Network, schedule: Schedule, prediction: Prediction, *, clip: int | float | None = None) -> Network:
    """ε(x, t) of a network that predicts `prediction`; with `clip`, the x₀ it stands for is first clipped to ±clip."""

    def epsilon(noisy: Float[Array, "n *shape"], timestep: Float[Array, " n"]) -> Float[Array, "n *shape"]:
        alpha, sigma = schedule.alpha_sigma_of(timestep, noisy)
        clean, noise = prediction.split(network(noisy, timestep), noisy, alpha, sigma)
        if clip is None:
            return noise
        return Prediction.CLEAN.split(jnp.clip(clean, -clip, clip), noisy, alpha, sigma)[1]

    return epsilon


def probability_flow(epsilon: Network, schedule: Schedule) -> Field:
    """dx/dλ = σ(σx − ε) of a batch of images, as a function of λ and x."""

    def field(time: Float[ArrayLike, ""], x: Float[Array, "n *shape"]) -> Float[Array, "n *shape"]:
        half_log_snr = jnp.asarray(time)
        timestep = jnp.full(x.shape[0], schedule.timestep_at(2 * half_log_snr))
        sigma = jnp.sqrt(jax.nn.sigmoid(-2 * half_log_snr))
        return sigma * (sigma * x - epsilon(x, timestep))

    return field


def uniform_timesteps(schedule: Schedule, start: int | float, stop: int | float, count: int) -> Float[np.ndarray, " k"]:
    """`count` timesteps from `start` down to `stop`, equally spaced."""
    return np.linspace(start, stop, count)


def uniform_log_snr(schedule: Schedule, start: int | float, stop: int | float, count: int) -> Float[np.ndarray, " k"]:
    """`count` timesteps from `start` down to `stop`, equally spaced in the logarithm of the signal-to-noise ratio."""
    alphas, sigmas = schedule.alpha_sigma_float64(np.arange(schedule.timesteps, dtype=float))
    table = np.log(alphas / sigmas)
    first, last = np.interp([start, stop], np.arange(schedule.timesteps), table)
    levels = np.linspace(float(first), float(last), count)
    nodes = np.asarray(np.interp(levels, table[::-1], np.arange(schedule.timesteps)[::-1]))
    return np.clip(nodes, stop, start)  # interpolating forth and back rounds


@dataclasses.dataclass(frozen=True)
class Listed:
    """A grid of timesteps given one by one, downwards: for a sampler that is called with their first and last as `start` and `stop`."""

    timesteps: tuple[int | float, ...]

    def __call__(self, schedule: Schedule, start: int | float, stop: int | float, count: int) -> Float[np.ndarray, " k"]:
        """The timesteps.

        Raises: ValueError unless they are those that are asked for.
        """
        given = (self.timesteps[0], self.timesteps[-1], len(self.timesteps))
        if given != (start, stop, count):
            raise ValueError(
                f"{given[2]} timesteps from {given[0]:g} to {given[1]:g} are listed, {count} from {start:g} to {stop:g} are needed: "
                "call the sampler with the start, stop, steps and denoise that they are for"
            )
        return np.array(self.timesteps, float)


def stepwise(step: Callable[[Any, Any], tuple[Any, None]], carry: Any, rows: Any) -> tuple[Any, None]:
    """`jax.lax.scan` as a loop in Python, for a sampler's `scan`: the noise function is called with values, once for each evaluation.

    One program of a network then serves all samplers and numbers of steps, and progress can be told in between.
    """
    rows = jax.tree.map(np.asarray, rows)  # else each number would be cut out of its column on the device
    for i in range(len(jax.tree.leaves(rows)[0])):
        carry, _ = step(carry, jax.tree.map(lambda column, i=i: jnp.asarray(column[i]), rows))
    return carry, None


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """One interface for all: call it with a noise function and noisy images."""

    @abc.abstractmethod
    def __call__(
        self,
        epsilon: Network,
        noisy: Float[Array, "n *shape"],
        schedule: Schedule,
        *,
        key: Key[Array, ""] | None = None,
        start: int | float | None = None,
        stop: int | float = 0,
        denoise: bool = True,
    ) -> Samples:
        """Images from `noisy`, which is at timestep `start` (the schedule's last by default: pure noise).

        With `denoise` the last evaluation, at `stop`, gives the estimate of x₀ that is returned; without it, the state at `stop` is.
        Stochastic samplers need a `key`, the others ignore it.

        Raises: ValueError for timesteps outside the schedule or in the wrong order, or a key that is missing.
        """


def _endpoints(schedule: Schedule, start: int | float | None, stop: int | float) -> tuple[float, float]:
    start = schedule.timesteps - 1 if start is None else start
    if not 0 <= stop <= start <= schedule.timesteps - 1:
        raise ValueError(f"need 0 ≤ stop ≤ start ≤ {schedule.timesteps - 1}, the schedule's last timestep; got {stop:g} and {start:g}")
    return float(start), float(stop)


class _Node(NamedTuple):
    timestep: Array
    alpha: Array
    sigma: Array


def _nodes(
    schedule: Schedule, grid: Grid, steps: int, start: int | float | None, stop: int | float, denoise: bool, dtype: jnp.dtype
) -> _Node:
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got {steps}")
    timesteps = grid(schedule, *_endpoints(schedule, start, stop), steps if denoise else steps + 1)
    return _Node(*(jnp.asarray(column, dtype) for column in (timesteps, *schedule.alpha_sigma_float64(timesteps))))


def _estimate(epsilon: Network, x: Array, node: _Node) -> tuple[Array, Array]:
    noise = epsilon(x, jnp.full(x.shape[0], node.timestep))
    return Prediction.NOISE.split(noise, x, node.alpha, node.sigma)


def _pairs(nodes: _Node) -> tuple[_Node, _Node]:
    return jax.tree.map(lambda a: a[:-1], nodes), jax.tree.map(lambda a: a[1:], nodes)


def _finish(epsilon: Network, x: Array, nodes: _Node, steps: int, denoise: bool) -> Samples:
    if denoise:
        x, _ = _estimate(epsilon, x, jax.tree.map(lambda a: a[-1], nodes))
    return Samples(x, jnp.asarray(steps, jnp.int32))


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models (Song et al. 2021): order 1; η = 0 is deterministic, η = 1 is ancestral sampling.

    `steps` is the number of evaluations.
    """

    steps: int = 50
    eta: int | float = 0
    grid: Grid = uniform_timesteps
    scan: Scan = jax.lax.scan

    def __call__(
        self,
        epsilon: Network,
        noisy: Float[Array, "n *shape"],
        schedule: Schedule,
        *,
        key: Key[Array, ""] | None = None,
        start: int | float | None = None,
        stop: int | float = 0,
        denoise: bool = True,
    ) -> Samples:
        """See `Sampler`."""
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie between 0 and 1, got {self.eta}")
        nodes = _nodes(schedule, self.grid, self.steps, start, stop, denoise, noisy.dtype)
        return _stochastic(epsilon, noisy, nodes, key, self.steps, denoise, eta=self.eta, widest=False, scan=self.scan)


@dataclasses.dataclass(frozen=True)
class Ancestral(Sampler):
    """Ancestral sampling of DDPM (Ho et al. 2020), on the whole schedule unless told fewer `steps`.

    The noise of a step has the variance of the posterior q(x_s | x_t, x₀), which is exact for one clean image; with `widest` it has
    1 − α_t²/α_s², exact for clean images that are normal ("fixed_large" in published configurations).
    """

    steps: int | None = None
    widest: bool = False
    grid: Grid = uniform_timesteps
    scan: Scan = jax.lax.scan

    def __call__(
        self,
        epsilon: Network,
        noisy: Float[Array, "n *shape"],
        schedule: Schedule,
        *,
        key: Key[Array, ""] | None = None,
        start: int | float | None = None,
        stop: int | float = 0,
        denoise: bool = True,
    ) -> Samples:
        """See `Sampler`."""
        first, last = _endpoints(schedule, start, stop)
        steps = max(1, round(first - last) + denoise) if self.steps is None else self.steps
        nodes = _nodes(schedule, self.grid, steps, start, stop, denoise, noisy.dtype)
        return _stochastic(epsilon, noisy, nodes, key, steps, denoise, eta=1.0, widest=self.widest, scan=self.scan)


def _stochastic(
    epsilon: Network,
    noisy: Array,
    nodes: _Node,
    key: Key[Array, ""] | None,
    steps: int,
    denoise: bool,
    *,
    eta: int | float,
    widest: bool,
    scan: Scan,
) -> Samples:
    if eta > 0 and key is None:
        raise ValueError("a stochastic sampler needs a key")
    count = len(nodes.timestep) - 1

    def step(x: Array, now: tuple[_Node, _Node, Int[Array, ""]]) -> tuple[Array, None]:
        node, following, i = now
        clean, noise = _estimate(epsilon, x, node)
        if key is None or eta == 0:
            return following.alpha * clean + following.sigma * noise, None
        # 1 − α_t²/α_s²; by the difference of squares of σ, because α_t/α_s is close to 1.
        added = (jnp.square(node.sigma) - jnp.square(following.sigma)) / jnp.square(following.alpha)
        deviation = eta * following.sigma / node.sigma * jnp.sqrt(added)
        mean = following.alpha * clean + jnp.sqrt(jnp.square(following.sigma) - jnp.square(deviation)) * noise
        fresh = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        return mean + (jnp.sqrt(added) if widest else deviation) * fresh, None

    x, _ = scan(step, noisy, (*_pairs(nodes), jnp.arange(count)))
    return _finish(epsilon, x, nodes, steps, denoise)


@dataclasses.dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022): order 2 at one evaluation a step; the first step is DDIM's. Equal steps in log SNR by default."""

    steps: int = 20
    grid: Grid = uniform_log_snr
    scan: Scan = jax.lax.scan

    def __call__(
        self,
        epsilon: Network,
        noisy: Float[Array, "n *shape"],
        schedule: Schedule,
        *,
        key: Key[Array, ""] | None = None,
        start: int | float | None = None,
        stop: int | float = 0,
        denoise: bool = True,
    ) -> Samples:
        """See `Sampler`."""
        nodes = _nodes(schedule, self.grid, self.steps, start, stop, denoise, noisy.dtype)
        spans = jnp.diff(jnp.log(nodes.alpha / nodes.sigma))
        # Weight of the change since the last estimate: h_i / (2 h_{i−1}), and 0 where there is none.
        slopes = jnp.concatenate([jnp.zeros_like(spans[:1]), spans[1:] / (2 * spans[:-1])])

        def step(carry: tuple[Array, Array], now: tuple[_Node, _Node, Array, Array]) -> tuple[tuple[Array, Array], None]:
            x, before = carry
            node, following, span, slope = now
            clean, _ = _estimate(epsilon, x, node)
            extrapolated = clean + slope * (clean - before)
            x = following.sigma / node.sigma * x - following.alpha * jnp.expm1(-span) * extrapolated
            return (x, clean), None

        (x, _), _ = self.scan(step, (noisy, jnp.zeros_like(noisy)), (*_pairs(nodes), spans, slopes))
        return _finish(epsilon, x, nodes, self.steps, denoise)


@dataclasses.dataclass(frozen=True)
class PNDM(Sampler):
    """Pseudo linear multistep (Liu et al. 2022) without Runge-Kutta steps ("PLMS", `skip_prk_steps`): order 2.

    DDIM's step with the noise extrapolated by the Adams-Bashforth formula of four steps, whose weights are those of equal steps in
    timestep. The first step is taken twice, the second time with the mean of the noise at both of its ends: one evaluation more than
    `steps`, if there is a second step. `denoise` is a step to x₀ like the others.
    """

    steps: int = 50
    grid: Grid = uniform_timesteps
    scan: Scan = jax.lax.scan

    def __call__(
        self,
        epsilon: Network,
        noisy: Float[Array, "n *shape"],
        schedule: Schedule,
        *,
        key: Key[Array, ""] | None = None,
        start: int | float | None = None,
        stop: int | float = 0,
        denoise: bool = True,
    ) -> Samples:
        """See `Sampler`."""
        nodes = _nodes(schedule, self.grid, self.steps, start, stop, denoise, noisy.dtype)
        if denoise:  # x₀: no noise; nothing is evaluated there
            nodes = _Node(*(jnp.append(column, jnp.asarray(value, noisy.dtype)) for column, value in zip(nodes, (0, 1, 0), strict=True)))
        # Of each evaluation: the step that it serves, where it is made, and the weights of its noise and of the three before it.
        steps = places = np.arange(self.steps)
        weights = np.array(_ADAMS_BASHFORTH)[np.minimum(steps, 3)]
        if self.steps > 1:
            steps, places = np.insert(steps, 1, 0), np.insert(places, 1, 1)
            weights = np.insert(weights, 1, (1 / 2, 1 / 2, 0, 0), axis=0)

        def evaluate(carry: tuple[Array, Array, tuple[Array, ...]], now: tuple[_Node, _Node, Array, Array, Array]) -> tuple[Any, None]:
            x, before, noises = carry
            node, following, timestep, repeated, weight = now
            noise = epsilon(x, jnp.full(x.shape[0], timestep))
            mean = functools.reduce(jnp.add, (w * e for w, e in zip(weight, (noise, *noises), strict=True)))
            # A step that is repeated begins where it began, and its second evaluation is not remembered.
            x = jnp.where(repeated, before, x)
            noises = tuple(jnp.where(repeated, old, new) for old, new in zip(noises, (noise, *noises[:2]), strict=True))
            clean, _ = Prediction.NOISE.split(mean, x, node.alpha, node.sigma)
            return (following.alpha * clean + following.sigma * mean, x, noises), None

        first, second = (jax.tree.map(lambda a: a[steps], half) for half in _pairs(nodes))
        plan = (first, second, nodes.timestep[places], jnp.asarray(places != steps), jnp.asarray(weights, noisy.dtype))
        (x, _, _), _ = self.scan(evaluate, (noisy, noisy, (jnp.zeros_like(noisy),) * 3), plan)
        return Samples(x, jnp.asarray(len(steps), jnp.int32))


# Weights of the noise at the last 1, 2, 3 and 4 of equally spaced timesteps, newest first, for the mean over the step that follows.
_ADAMS_BASHFORTH = ((1, 0, 0, 0), (3 / 2, -1 / 2, 0, 0), (23 / 12, -16 / 12, 5 / 12, 0), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class _Controller(diffrax.PIDController):
    """Begins with a hundredth of the way, which it corrects at once.

    Told to `diffeqsolve`, a first step would bring along a host callback that checks its sign, and such a program is never cached;
    chosen by diffrax, it would cost two more evaluations.
    """

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, dt0: Any, args: Any, func: Any, error_order: Any) -> Any:
        return super().init(terms, t0, t1, y0, (t1 - t0) / 100, args, func, error_order)


@dataclasses.dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    """The probability-flow equation by an adaptive Runge-Kutta method of order 5; every image of the batch meets the tolerances.

    A step's error is measured for each image (root mean square over its entries) and the worst one decides. Images that needed more
    than `max_steps` are NaN.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 4096

    def __call__(
        self,
        epsilon: Network,
        noisy: Float[Array, "n *shape"],
        schedule: Schedule,
        *,
        key: Key[Array, ""] | None = None,
        start: int | float | None = None,
        stop: int | float = 0,
        denoise: bool = True,
    ) -> Samples:
        """See `Sampler`."""
        first, last = _endpoints(schedule, start, stop)
        x, evaluations = self.integrate(probability_flow(epsilon, schedule), noisy, schedule, start=first, stop=last)
        if denoise:
            final = np.array([last])
            node = _Node(*(jnp.asarray(column[0], noisy.dtype) for column in (final, *schedule.alpha_sigma_float64(final))))
            x, _ = _estimate(epsilon, x, node)
        return Samples(x, evaluations + int(denoise))

    def integrate(
        self, field: Field, states: PyTree[Float[Array, "n ..."]], schedule: Schedule, *, start: int | float, stop: int | float
    ) -> tuple[PyTree[Float[Array, "n ..."]], Int[Array, ""]]:
        """The states at timestep `stop` of dy/dλ = field(λ, y), from those at `start`, and how often the field was evaluated.

        States are one array or several of one dtype, whose first axis counts images; each array meets the tolerances for each image.
        """
        alphas, sigmas = schedule.alpha_sigma_float64(np.array([start, stop], float))
        begin, end = jnp.asarray(np.log(alphas / sigmas), jax.tree.leaves(states)[0].dtype)

        def worst(errors: PyTree[Array]) -> Array:
            squares = [jnp.max(jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))) for x in jax.tree.leaves(errors)]
            return jnp.sqrt(functools.reduce(jnp.maximum, squares))

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda time, y, _: field(time, y)),
            diffrax.Tsit5(),
            begin,
            end,
            None,
            states,
            stepsize_controller=_Controller(rtol=self.rtol, atol=self.atol, norm=worst),
            saveat=diffrax.SaveAt(t1=True),
            max_steps=self.max_steps,
            throw=False,
        )
        solved = solution.result == diffrax.RESULTS.successful
        found = jax.tree.map(lambda y: jnp.where(solved, y[0], jnp.nan), solution.ys)
        # Six for each step, accepted or not: the seventh is the next step's first.
        return found, (1 + 6 * solution.stats["num_steps"]).astype(jnp.int32)
