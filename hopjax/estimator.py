"""The Boltzmann machine as an estimator with scikit-learn's conventions, for data on the host of any size.

Samples that fit on the device are learned from in one program, all starts at once; larger ones, in memory or mapped from a file, start
from a part of them and are then streamed, block by block, once a step. scikit-learn itself is not needed, unless its tools ask
for the estimator's tags.
"""

import inspect
import math
import warnings
from collections.abc import Iterator
from functools import partial
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from hopjax.boltzmann import (
    EM,
    Adam,
    Fit,
    Moments,
    Reason,
    _advance,
    _begin,
    _Problem,
    _result,
    _tolerance,
    expectation,
    fit,
    responsibilities,
)
from hopjax.energy import log_partition, sample_boltzmann
from hopjax.tiled import MEMORY_LIMIT, summarise

Samples = NDArray[np.floating]


@partial(jax.jit, static_argnames=("count", "method", "starts"))
def _best_fit(
    key: jax.Array, samples: jax.Array, beta: jax.Array, norm: jax.Array | None, count: int, method: EM | Adam, starts: int
) -> Fit:
    """The fit of largest likelihood of so many starts."""
    fits = jax.vmap(lambda key: fit(key, samples, count, beta, method=method, norm=norm))(jax.random.split(key, starts))
    best = jnp.argmax(jnp.where(jnp.isnan(fits.log_likelihood), -jnp.inf, fits.log_likelihood))
    return jax.tree.map(lambda part: part[best], fits)


_e_step, _step, _responsibilities = jax.jit(expectation), jax.jit(_advance), jax.jit(responsibilities)


def _blocks(samples: Samples, rows: int) -> Iterator[Samples]:
    return (np.asarray(samples[start : start + rows]) for start in range(0, len(samples), rows))


def _checked(X: ArrayLike) -> Samples:
    """X as rows of single or double precision, all of them finite; raises ValueError otherwise. A mapped file of these stays one."""
    samples = np.asarray(X)
    if samples.ndim != 2 or 0 in samples.shape:
        raise ValueError(f"X has shape {samples.shape}: need (samples, dimension), neither of them 0")
    if samples.dtype not in (np.float32, np.float64):
        samples = samples.astype(np.float32 if samples.dtype == np.float16 else np.float64)
    for start, part in enumerate(_blocks(samples, 1 << 16)):
        finite = np.isfinite(part).all(axis=1)
        if not finite.all():
            raise ValueError(f"row {(start << 16) + int(np.argmin(finite))} of X holds a number that is not finite")
    return samples


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and value is not True and value is not False


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and value is not True and 0 < float(value) < math.inf


def _seed(random_state: int | np.random.RandomState | None) -> int:
    """The seed itself, or one drawn from the generator, which for None is NumPy's global one."""
    if random_state is None or isinstance(random_state, np.random.RandomState):
        return int((random_state or np.random).randint(2**31))
    if _is_whole(random_state) and 0 <= random_state < 2**32:
        return int(random_state)
    raise ValueError(f"random_state={random_state!r}: need a whole number from 0 to 2³² − 1, a numpy.random.RandomState, or None")


class BoltzmannMachine:
    """Memories of the modern Hopfield network, learned by maximum likelihood at a known inverse temperature.

    Args:
        n_memories: how many to learn.
        beta: inverse temperature, in the inverse square of the data's unit.
        norm: the norm of all memories; None to learn norms, and with them the mixture's weights.
        method: `hopjax.boltzmann.EM()` or `Adam()`.
        n_init: starts, of which the one that reaches the largest likelihood is kept.
        random_state: seed of everything that is random; or a `numpy.random.RandomState` to draw it from, by default of None NumPy's own.
        memory_limit: bytes of samples up to which they are learned from on the device; above, `EM` streams them.

    Attributes:
        memories_: n_memories × d.
        weights_: the mixture's weights π.
        log_likelihood_: mean log p of the samples.
        converged_, reason_: whether the fit converged, and why it stopped, in a line.
        n_iter_: steps of the kept start.
        trace_: log-likelihood before each of them.
        n_features_in_: d.

    >>> import numpy as np
    >>> from hopjax.estimator import BoltzmannMachine
    >>> samples = np.concatenate([np.eye(2), -np.eye(2)] * 50) + 0.1 * np.random.default_rng(0).normal(size=(200, 2))
    >>> machine = BoltzmannMachine(n_memories=4, beta=100.0).fit(samples)
    """

    memories_: Samples
    weights_: Samples
    log_likelihood_: float
    converged_: bool
    reason_: str
    n_iter_: int
    trace_: Samples
    n_features_in_: int

    def __init__(
        self,
        n_memories: int = 8,
        beta: float = 1.0,
        *,
        norm: float | None = None,
        method: EM | Adam = EM(),
        n_init: int = 4,
        random_state: int | np.random.RandomState | None = 0,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self.n_memories = n_memories
        self.beta = beta
        self.norm = norm
        self.method = method
        self.n_init = n_init
        self.random_state = random_state
        self.memory_limit = memory_limit

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> "BoltzmannMachine":
        """Sets some of the constructor's arguments. Raises ValueError for a name that is none."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"no parameter is named {name!r}: choose from {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        changed = (f"{name}={value!r}" for name, value in self.get_params().items() if value != defaults[name].default)
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn's pipelines and searches want to know: a density, of any numbers, without a target."""
        from sklearn.utils import Tags, TargetTags

        return Tags(estimator_type="density_estimator", target_tags=TargetTags(required=False))

    def fit(self, X: ArrayLike, y: object = None) -> "BoltzmannMachine":
        """Learns from the rows of X. Warns, in a line, if the fit has not converged; raises ValueError for input that cannot be used."""
        samples = _checked(X)
        if not (_is_whole(self.n_memories) and 1 <= self.n_memories <= len(samples)):
            raise ValueError(f"n_memories={self.n_memories!r}: need a whole number from 1 to the {len(samples)} samples")
        for name, value in (("n_init", self.n_init), ("memory_limit", self.memory_limit)):
            if not (_is_whole(value) and value >= 1):
                raise ValueError(f"{name}={value!r}: need a whole number, 1 at least")
        for name, number in (("beta", self.beta), ("norm", 1.0 if self.norm is None else self.norm)):
            if not _is_positive(number):
                raise ValueError(f"{name}={number!r}: need a number, positive and finite")
        if not isinstance(self.method, EM | Adam):
            raise ValueError(f"method={self.method!r}: need hopjax.boltzmann.EM() or Adam()")
        seed = _seed(self.random_state)
        if samples.nbytes <= self.memory_limit:
            found = self._fit_on_device(samples, seed)
        elif isinstance(self.method, EM):
            found = self._fit_streaming(samples, self.method, seed)
        else:
            raise ValueError(f"{samples.nbytes} bytes of samples exceed memory_limit={self.memory_limit}: only EM streams them")
        self.memories_ = np.asarray(found.memories)
        log_weights = 0.5 * self.beta * np.sum(self.memories_**2, axis=1)
        self.weights_ = np.exp(log_weights - np.logaddexp.reduce(log_weights))
        self.log_likelihood_ = float(found.log_likelihood)
        self.converged_, self.reason_ = bool(found.converged), str(Reason(int(found.reason)))
        self.n_iter_ = int(found.steps)
        self.trace_ = np.asarray(found.trace)[: self.n_iter_]
        self.n_features_in_ = samples.shape[1]
        if not self.converged_:
            warnings.warn(f"the fit has not converged after {self.n_iter_} steps: {self.reason_}", stacklevel=2)
        return self

    def _numbers(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
        """beta and norm as they go into a program that is compiled once for all of them."""
        return jnp.asarray(self.beta, dtype), None if self.norm is None else jnp.asarray(self.norm, dtype)

    def _fit_on_device(self, samples: Samples, seed: int) -> Fit:
        x = jnp.asarray(samples)
        beta, norm = self._numbers(x.dtype)
        return _best_fit(jax.random.key(seed), x, beta, norm, self.n_memories, self.method, self.n_init)

    def _fit_streaming(self, samples: Samples, method: EM, seed: int) -> Fit:
        """EM steps over blocks of all samples, from a fit to as many as the device may hold, chosen at random."""
        rows = max(self.n_memories, self.memory_limit // samples[:1].nbytes)
        chosen = np.sort(np.random.default_rng(seed).choice(len(samples), min(rows, len(samples)), replace=False))
        start = self._fit_on_device(np.asarray(samples[chosen]), seed).memories
        beta, norm = self._numbers(start.dtype)
        size = math.sqrt(sum(float(np.sum(np.square(part))) for part in _blocks(samples, rows)) / len(samples))
        problem = _Problem(beta, norm, jnp.asarray(size, start.dtype))
        climb = _begin(start, method.max_steps)
        while method.unfinished(climb):
            parts = [(len(part) / len(samples), _e_step(jnp.asarray(part), climb.following, beta)) for part in _blocks(samples, rows)]
            climb = _step(climb, Moments(*(sum(share * part[field] for share, part in parts) for field in range(2))), problem)
        return _result(climb, _tolerance(method.tolerance, start.dtype))

    def _known(self, X: ArrayLike) -> Samples:
        if not hasattr(self, "memories_"):
            raise ValueError(f"{self} has not learned yet: call fit first")
        samples = _checked(X).astype(self.memories_.dtype, copy=False)
        if samples.shape[1] != self.n_features_in_:
            raise ValueError(f"X has {samples.shape[1]} columns and the memories {self.n_features_in_}: need the same")
        return samples

    def energy(self, X: ArrayLike) -> Samples:
        """E(x; W) of each row, Eq. (1), streaming."""
        return summarise(self._known(X), self.memories_, self.beta, ["energy"], memory_limit=self.memory_limit)["energy"]

    def score_samples(self, X: ArrayLike) -> Samples:
        """log p(x) of each row, streaming."""
        return -self.beta * self.energy(X) - float(log_partition(jnp.asarray(self.memories_), self.beta))

    def score(self, X: ArrayLike, y: object = None) -> float:
        """Mean log p(x) of the rows."""
        return float(np.mean(self.score_samples(X)))

    def predict_proba(self, X: ArrayLike) -> Samples:
        """Responsibilities γ_μ(x) of each row, streaming."""
        rows = max(1, self.memory_limit // (8 * (self.n_features_in_ + 2 * self.n_memories)))
        return np.concatenate([np.asarray(_responsibilities(part, self.memories_, self.beta)) for part in _blocks(self._known(X), rows)])

    def predict(self, X: ArrayLike) -> NDArray[np.intp]:
        """Index of the most responsible memory of each row."""
        found: NDArray[np.intp] = np.argmax(self._known(X) @ self.memories_.T, axis=1)
        return found

    def sample(self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None) -> Samples:
        """Exact draws from the learned density; by default with the estimator's own `random_state`."""
        if not hasattr(self, "memories_"):
            raise ValueError(f"{self} has not learned yet: call fit first")
        if n_samples < 1:
            raise ValueError(f"n_samples={n_samples} must be at least 1")
        key = jax.random.key(_seed(self.random_state if random_state is None else random_state))
        return np.asarray(sample_boltzmann(key, jnp.asarray(self.memories_), self.beta, (n_samples,)))
