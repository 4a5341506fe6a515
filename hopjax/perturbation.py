r"""Perturbation sharpness: the mean curvature of the energy as an experiment measures it, by perturbing samples at random.

$$\frac{\langle E(x + \delta) - E(x)\rangle}{\tfrac12\rho^2|x|^2/d} \to \mathrm{tr}\,H(x), \qquad |\delta| = \rho|x|,\ \rho \to 0,$$

over perturbations in pairs ±δ, which cancel the gradient. Its limit is the trace of the Hessian, not the sharpness S(x) under rotations
(`hopjax.sharpness`), which is |x|² tr H − xᵀHx. Source: arXiv:2605.27975, Eq. (84).
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Key, Real
from numpy.typing import NDArray

from hopjax.energy import _matmul
from hopjax.tiled import MEMORY_LIMIT, feed, pieces, plan
from hopjax.tiles import Rows, Tile, check_beta, check_rows, tile_rows


class PerturbationSharpness(NamedTuple):
    """Of each state: the mean over pairs of perturbations, and its standard error (NaN for one pair)."""

    mean: Float[np.ndarray, " n"]
    standard_error: Float[np.ndarray, " n"]


class _Tilted(NamedTuple):
    """Sums over memories of w = e^{l − top}, and of w e^{±t}, where t = β(ξ − x)·δ is what the perturbation adds to the logit l.

    Attributes:
        top, weight: of the logits as they are.
        steepest: largest |t|.
        bent: Σ w (e^{±t} − 1): keeps its digits for small t.
        tops, weights: of the logits l ± t, for large t.
    """

    top: Float[Array, " n"]
    weight: Float[Array, " n"]
    steepest: Float[Array, " n"]
    bent: Float[Array, "2 n"]
    tops: Float[Array, "2 n"]
    weights: Float[Array, "2 n"]


def _directions(key: Array, states: Array, radius: Array) -> Array:
    """δ, uniform on the sphere of radius ρ|x| about zero."""
    gauss = jax.random.normal(key, states.shape, states.dtype)
    return gauss * (radius * jnp.linalg.norm(states, axis=1) / jnp.linalg.norm(gauss, axis=1))[:, None]


def _none(states: Array) -> _Tilted:
    zero, low = jnp.zeros(states.shape[0], states.dtype), jnp.full(states.shape[0], -jnp.inf, states.dtype)
    return _Tilted(low, zero, zero, jnp.stack([zero, zero]), jnp.stack([low, low]), jnp.stack([zero, zero]))


def _step(sums: _Tilted, states: Array, delta: Array, memories: Array, beta: Array, offset: Array, rows: int) -> _Tilted:
    """`sums` and those over these memories, so many rows at a time."""
    count, total = states.shape[0], memories.shape[0]
    both, own = jnp.concatenate([states, delta]), jnp.sum(states * delta, axis=1)

    def add(place: Array, sums: _Tilted) -> _Tilted:
        start, offsets = tile_rows(place, offset, rows)
        overlaps = lax.optimization_barrier(_matmul(both, lax.dynamic_slice_in_dim(memories, start, offsets.shape[0]).T))
        logits = beta * overlaps[:count] + offsets[None]
        tilt = beta * (overlaps[count:] - own[:, None])
        signs = jnp.array([1.0, -1.0], tilt.dtype)[:, None, None]
        tilted = logits[None] + signs * tilt[None]
        top = jnp.maximum(sums.top, jnp.max(logits, axis=1))
        tops = jnp.maximum(sums.tops, jnp.max(tilted, axis=2))
        w, scale = jnp.exp(logits - top[:, None]), jnp.exp(sums.top - top)
        # Only used where no tilt exceeds one.
        bent = jnp.sum(w[None] * jnp.expm1(signs * jnp.clip(tilt, -1, 1)[None]), axis=2)
        return _Tilted(
            top,
            scale * sums.weight + jnp.sum(w, axis=1),
            jnp.maximum(sums.steepest, jnp.max(jnp.abs(tilt), axis=1)),
            scale[None] * sums.bent + bent,
            tops,
            jnp.exp(sums.tops - tops) * sums.weights + jnp.sum(jnp.exp(tilted - tops[:, :, None]), axis=2),
        )

    return lax.fori_loop(0, -(-total // rows), add, sums)


def _finish(sums: _Tilted, delta: Array, beta: Array) -> Array:
    """½[E(x + δ) + E(x − δ)] − E(x), relative to ½|δ|²/d."""
    small = (sums.steepest <= 1)[None]
    near = jnp.log1p(jnp.where(small, sums.bent / sums.weight[None], 0.0))
    far = sums.tops + jnp.log(sums.weights) - (sums.top + jnp.log(sums.weight))[None]
    square = jnp.sum(delta**2, axis=1)
    return delta.shape[1] * (1 - jnp.sum(jnp.where(small, near, far), axis=0) / (beta * square))


@cache
def _programs() -> tuple[jax.stages.Wrapped, ...]:
    return (
        jax.jit(_directions),
        jax.jit(_none),
        jax.jit(_step, static_argnames="rows", donate_argnums=0),
        jax.jit(_finish),
    )


def perturbation_sharpness(
    key: Key[Array, ""],
    states: Rows,
    memories: Rows,
    beta: Real[ArrayLike, ""],
    *,
    draws: int = 32,
    radius: float = 0.01,
    log_prior: NDArray[np.floating] | None = None,
    memory_limit: int = MEMORY_LIMIT,
    tile: Tile | None = None,
) -> PerturbationSharpness:
    """Mean of [E(x + δ) − E(x)]/(½ρ²|x|²/d) over random perturbations of every state, Eq. (84), in bounded memory.

    Args:
        key: a `jax.random.key`; the states' draws are independent.
        states, memories, beta, log_prior, memory_limit, tile: as in `hopjax.tiled.stream`.
        draws: number of perturbations, even: they come in pairs ±δ. The paper's number was not published.
        radius: ρ = |δ|/|x|; likewise.

    Raises: ValueError naming what does not fit. A state of norm zero has no perturbation: NaN.
    Accuracy: no two energies are subtracted; a few eps/(ρ√d) relative to tr H's identity part d, beside the O(ρ²) of a finite radius.
    """
    check_rows(states, memories)
    check_beta(beta)
    if draws < 2 or draws % 2:
        raise ValueError(f"draws={draws}: perturbations come in pairs ±δ, so need an even number, 2 at least")
    if not 0 < radius < np.inf:
        raise ValueError(f"radius={radius}: need 0 < radius < ∞")
    # Twice as many rows of overlaps and twice the states as a pass for moments that has the mean memory; more exponentials.
    sizes = plan(len(states), memories, ("mean",), memory_limit // 3, tile)
    memory = feed(memories, log_prior, sizes.memories)
    directions, none, step, finish = _programs()
    b, rho = np.asarray(beta, memory.prior.dtype), np.asarray(radius, memory.prior.dtype)

    def pair(x: Array, key: Array) -> NDArray[np.floating]:
        delta, sums = directions(key, x, rho), none(x)
        for _, offset, part in memory:
            jax.block_until_ready(sums)
            sums = step(sums, x, delta, part, b, offset, rows=sizes.tile)
        return np.asarray(finish(sums, delta, b))

    means, errors = [], []
    for first, begun, end in pieces(len(states), sizes.states):
        x = jnp.asarray(states[first:end], b.dtype)
        keys = jax.random.split(jax.random.fold_in(key, begun), draws // 2)
        values = np.stack([pair(x, one)[begun - first :] for one in keys])
        means.append(values.mean(axis=0))
        errors.append(np.sqrt(values.var(axis=0, ddof=1) / len(values)) if len(values) > 1 else np.full(end - begun, np.nan))
    return PerturbationSharpness(np.concatenate(means), np.concatenate(errors))
