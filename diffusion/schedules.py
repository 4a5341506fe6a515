r"""Noise schedules of variance-preserving diffusion, and what a network may predict.

A clean image $x_0$ at timestep t is seen as $x = \alpha_t x_0 + \sigma_t\varepsilon$, with $\alpha_t^2 = \bar\alpha_t$ and
$\alpha_t^2 + \sigma_t^2 = 1$. The signal-to-noise ratio $\alpha_t^2/\sigma_t^2$ is the inverse temperature β at which the clean
image sees the noisy landscape (`hopjax.correspondence.beta_at_timestep`); between two timesteps log β is linear in t, there as here.
"""

import abc
import dataclasses
import enum
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real

from hopjax.correspondence import linear_alphas_cumprod

_MOST = 10**6


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """ᾱ_t at the timesteps 0 … timesteps − 1; immutable and hashable, so that it may be a static argument of a jitted function."""

    timesteps: int = 1000

    def __post_init__(self) -> None:
        """Refuse a schedule without two timesteps, between which nothing could be interpolated, or with more than memory may hold."""
        if self.timesteps < 2:
            raise ValueError(f"a schedule needs at least 2 timesteps, got {self.timesteps}")
        if self.timesteps > _MOST:
            raise ValueError(f"a schedule has at most {_MOST} timesteps, got {self.timesteps}")

    @abc.abstractmethod
    def _products(self) -> Float[np.ndarray, " t"]:
        """ᾱ in float64, whatever the precision of JAX: in float32, 1 − ᾱ would lose three digits at the first timesteps."""

    def alphas_cumprod(self, dtype: jnp.dtype | type = jnp.float32) -> Float[Array, " t"]:
        """ᾱ_t = α_t² at t = 0 … timesteps − 1."""
        return jnp.asarray(_tables(self).products, dtype)

    def alpha_sigma_float64(self, timestep: Float[np.ndarray, "*n"]) -> tuple[Float[np.ndarray, "*n"], Float[np.ndarray, "*n"]]:
        """(α_t, σ_t) of timesteps known in advance: constants for a compiled loop, to float64 in any process.

        Raises: ValueError naming the schedule's range.
        """
        if not np.all((timestep >= 0) & (timestep <= self.timesteps - 1)):
            raise ValueError(f"timesteps must lie in the schedule's 0 … {self.timesteps - 1}, got {timestep}")
        log_snr = np.interp(timestep, np.arange(self.timesteps), _tables(self).log_snr)
        return 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))

    def log_snr(self, timestep: Real[ArrayLike, "*n"]) -> Float[Array, "*n"]:
        """log β = log(α²/σ²) at a (possibly fractional) timestep, in its dtype (integers: float32); NaN outside 0 … timesteps − 1."""
        timestep = _floating(timestep)
        table = _tables(self).log_snr.astype(timestep.dtype)
        grid = np.arange(self.timesteps, dtype=timestep.dtype)
        return jnp.interp(timestep, grid, table, left=jnp.nan, right=jnp.nan)

    def timestep_at(self, log_snr: Float[ArrayLike, "*n"]) -> Float[Array, "*n"]:
        """The fractional timestep with this log β; the nearest end of the schedule outside it, where rounding takes an ODE solver."""
        log_snr = _floating(log_snr)
        table = _tables(self).log_snr[::-1].astype(log_snr.dtype)
        return jnp.interp(log_snr, table, np.arange(self.timesteps, dtype=log_snr.dtype)[::-1])

    def alpha_sigma(self, timestep: Real[ArrayLike, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
        """(α_t, σ_t), each to a few units of rounding; NaN outside 0 … timesteps − 1."""
        log_snr = self.log_snr(timestep)
        return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))

    def alpha_sigma_of(
        self, timestep: Real[Array, " n"], images: Float[Array, "n *shape"]
    ) -> tuple[Float[Array, "n *ones"], Float[Array, "n *ones"]]:
        """(α_t, σ_t) of one timestep for each image, in the images' dtype and with as many axes: each multiplies its image."""
        alpha, sigma = self.alpha_sigma(timestep)
        axes = (-1, *(1,) * (images.ndim - 1))
        return alpha.astype(images.dtype).reshape(axes), sigma.astype(images.dtype).reshape(axes)

    def add_noise(
        self, clean: Float[Array, "n *shape"], noise: Float[Array, "n *shape"], timestep: Real[Array, " n"]
    ) -> Float[Array, "n *shape"]:
        """x = α_t x₀ + σ_t ε, one timestep for each image."""
        alpha, sigma = self.alpha_sigma_of(timestep, clean)
        return alpha * clean + sigma * noise


@dataclasses.dataclass(frozen=True)
class LinearSchedule(Schedule):
    """β_t from `beta_start` to `beta_end` in equal steps: the schedule of DDPM, and of arXiv:2605.27975 for pixels."""

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        """Refuse what gives no decreasing ᾱ between 0 and 1."""
        super().__post_init__()
        _check_ends(self.beta_start, self.beta_end)

    def _products(self) -> Float[np.ndarray, " t"]:
        # A constant, so it is computed at once even under a tracer, and in float64 even where the process runs in float32.
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            return np.asarray(linear_alphas_cumprod(self.timesteps, beta_start=self.beta_start, beta_end=self.beta_end, dtype=jnp.float64))


@dataclasses.dataclass(frozen=True)
class ScaledLinearSchedule(Schedule):
    """√β_t in equal steps; the defaults are those of Stable Diffusion."""

    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self) -> None:
        """Refuse what gives no decreasing ᾱ between 0 and 1."""
        super().__post_init__()
        _check_ends(self.beta_start, self.beta_end)

    def _products(self) -> Float[np.ndarray, " t"]:
        betas = np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), self.timesteps) ** 2
        return np.exp(np.cumsum(np.log1p(-betas)))


@dataclasses.dataclass(frozen=True)
class CosineSchedule(Schedule):
    """ᾱ = cos²(½π(u + s)/(1 + s)) at u = t/T, with every β_t at most `max_beta` (Nichol and Dhariwal 2021)."""

    shift: float = 0.008
    max_beta: float = 0.999

    def __post_init__(self) -> None:
        """Refuse what gives no decreasing ᾱ between 0 and 1."""
        super().__post_init__()
        if not (self.shift >= 0 and 0 < self.max_beta < 1):
            raise ValueError(f"need shift ≥ 0 and 0 < max_beta < 1, got {self.shift}, {self.max_beta}")

    def _products(self) -> Float[np.ndarray, " t"]:
        times = np.arange(self.timesteps + 1) / self.timesteps
        envelope = np.cos(0.5 * math.pi * (times + self.shift) / (1 + self.shift)) ** 2
        betas = np.minimum(1 - envelope[1:] / envelope[:-1], self.max_beta)
        return np.exp(np.cumsum(np.log1p(-betas)))


def _check_ends(beta_start: float, beta_end: float) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"need 0 < beta_start ≤ beta_end < 1, got {beta_start}, {beta_end}")


class _Tables(NamedTuple):
    products: Float[np.ndarray, " t"]
    log_snr: Float[np.ndarray, " t"]


@functools.cache
def _tables(schedule: Schedule) -> _Tables:
    products = schedule._products()
    return _Tables(products, np.log(products) - np.log1p(-products))


def _floating(value: ArrayLike) -> Array:
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.float32)


class Prediction(enum.Enum):
    """What a network is trained to output. The values are the names that published configurations use (`prediction_type`)."""

    NOISE = "epsilon"  # ε
    VELOCITY = "v_prediction"  # v = α ε − σ x₀
    CLEAN = "sample"  # x₀

    def target(
        self, clean: Float[Array, "*shape"], noise: Float[Array, "*shape"], alpha: Float[Array, "..."], sigma: Float[Array, "..."]
    ) -> Float[Array, "*shape"]:
        """What the network should output at x = α x₀ + σ ε; `alpha` and `sigma` are scalars, or come from `Schedule.alpha_sigma_of`."""
        match self:
            case Prediction.NOISE:
                return noise
            case Prediction.VELOCITY:
                return alpha * noise - sigma * clean
            case Prediction.CLEAN:
                return clean

    def split(
        self, output: Float[Array, "*shape"], noisy: Float[Array, "*shape"], alpha: Float[Array, "..."], sigma: Float[Array, "..."]
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """(x₀, ε) with x = α x₀ + σ ε that this output stands for: every change of parameterisation goes through here."""
        match self:
            case Prediction.NOISE:
                return (noisy - sigma * output) / alpha, output
            case Prediction.VELOCITY:
                return alpha * noisy - sigma * output, sigma * noisy + alpha * output
            case Prediction.CLEAN:
                return output, (noisy - alpha * output) / sigma
