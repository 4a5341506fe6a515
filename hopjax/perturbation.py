r"""Perturbation sharpness: the mean curvature of the energy as an experiment measures it, by perturbing samples at random.

$$\frac{\langle E(x + \delta) - E(x)\rangle}{\tfrac12\rho^2|x|^2/d} \to \mathrm{tr}\,H(x), \qquad |\delta| = \rho|x|,\ \rho \to 0,$$

over perturbations in pairs ±δ, which cancel the gradient. Its limit is the trace of the Hessian, not the sharpness S(x) under rotations
(`hopjax.sharpness`), which is |x|² tr H − xᵀHx. Source: arXiv:2605.27975, Eq. (84).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Key, Real
from numpy.typing import NDArray

from hopjax.energy import _matmul
from hopjax.tiled import MEMORY_LIMIT, Sizes, feed, pieces, plan
from hopjax.tiles import Rows, Tile, check_beta, check_rows, tile_rows

PAIRS = 16  # perturbations ±δ of every state that share a pass over the memories


class PerturbationSharpness(NamedTuple):
    """Of each state: the mean over pairs of perturbations, and its standard error (NaN for one pair)."""

    mean: Float[np.ndarray, " n"]
    standard_error: Float[np.ndarray, " n"]


class _Tilted(NamedTuple):
    """Sums over memories of w = e^{l − top}, and of w e^{±t}, where t = β(ξ − x)·δ is what a perturbation adds to the logit l.

    Attributes:
        top, weight: of the logits as they are.
        steepest: largest |t|, of each pair of perturbations.
        bent: Σ w (e^{±t} − 1): keeps its digits for small t.
        tops, weights: of the logits l ± t, for large t.
    """

    top: Float[Array, " n"]
    weight: Float[Array, " n"]
    steepest: Float[Array, "p n"]
    bent: Float[Array, "p 2 n"]
    tops: Float[Array, "p 2 n"]
    weights: Float[Array, "p 2 n"]


@jax.jit
@partial(jax.vmap, in_axes=(0, None, None))
def _directions(key: Array, states: Array, radius: Array) -> Array:
    """δ, uniform on the sphere of radius ρ|x| about zero, for each key."""
    gauss = jax.random.normal(key, states.shape, states.dtype)
    return gauss * (radius * jnp.linalg.norm(states, axis=1) / jnp.linalg.norm(gauss, axis=1))[:, None]


@partial(jax.jit, static_argnames="pairs")
def _none(states: Array, pairs: int) -> _Tilted:
    zero = jnp.zeros((pairs, 2, states.shape[0]), states.dtype)
    low = jnp.full_like(zero, -jnp.inf)
    return _Tilted(low[0, 0], zero[0, 0], zero[:, 0], zero, low, zero)


@partial(jax.jit, static_argnames="rows", donate_argnames="sums")
def _step(sums: _Tilted, states: Array, deltas: Array, memories: Array, beta: Array, offset: Array, rows: int) -> _Tilted:
    """`sums` and those over these memories, so many rows at a time, one pair of perturbations ±δ after another."""
    signs = jnp.array([1.0, -1.0], states.dtype)[:, None, None]

    def add(place: Array, sums: _Tilted) -> _Tilted:
        start, offsets = tile_rows(place, offset, rows)
        part = lax.dynamic_slice_in_dim(memories, start, offsets.shape[0])
        logits = beta * lax.optimization_barrier(_matmul(states, part.T)) + offsets[None]
        top = jnp.maximum(sums.top, jnp.max(logits, axis=1))
        w, scale = jnp.exp(logits - top[:, None]), jnp.exp(sums.top - top)
        weight = jnp.sum(w, axis=1)

        def tilt(_: None, pair: tuple[Array, ...]) -> tuple[None, tuple[Array, ...]]:
            delta, steepest, bent, tops, weights = pair
            tilt = beta * (lax.optimization_barrier(_matmul(delta, part.T)) - jnp.sum(states * delta, axis=1)[:, None])
            steep = jnp.max(jnp.abs(tilt), axis=1)

            def bend(tilt: Array) -> Array:
                up = jnp.expm1(tilt)
                return jnp.stack([jnp.sum(w * up, axis=1), -jnp.sum(w * (up / (1 + up)), axis=1)])

            def gently() -> tuple[Array, Array, Array]:
                bent = bend(tilt)
                return bent, jnp.stack([top, top]), weight[None] + bent

            def steeply() -> tuple[Array, Array, Array]:
                tilted = logits[None] + signs * tilt[None]
                tops = jnp.max(tilted, axis=2)
                # Of the states that are tilted gently, which share the tile.
                return bend(jnp.clip(tilt, -1, 1)), tops, jnp.sum(jnp.exp(tilted - tops[:, :, None]), axis=2)

            more_bent, more_tops, more_weights = lax.cond(jnp.max(steep) <= 1, gently, steeply)
            highest = jnp.maximum(tops, more_tops)
            weights = jnp.exp(tops - highest) * weights + jnp.exp(more_tops - highest) * more_weights
            return None, (jnp.maximum(steepest, steep), scale[None] * bent + more_bent, highest, weights)

        _, tilted = lax.scan(tilt, None, (deltas, sums.steepest, sums.bent, sums.tops, sums.weights))
        return _Tilted(top, scale * sums.weight + weight, *tilted)

    return lax.fori_loop(0, -(-memories.shape[0] // rows), add, sums)


@jax.jit
def _finish(sums: _Tilted, deltas: Array, beta: Array) -> Array:
    """½[E(x + δ) + E(x − δ)] − E(x), relative to ½|δ|²/d, of each pair."""
    small = (sums.steepest <= 1)[:, None]
    near = jnp.log1p(jnp.where(small, sums.bent / sums.weight[None, None], 0.0))
    far = sums.tops + jnp.log(sums.weights) - (sums.top + jnp.log(sums.weight))[None, None]
    square = jnp.sum(deltas**2, axis=2)
    return deltas.shape[2] * (1 - jnp.sum(jnp.where(small, near, far), axis=1) / (beta * square))


def _sizes(count: int, memories: Rows, pairs: int, memory_limit: int, tile: Tile | None) -> Sizes:
    # Twice as many rows of overlaps and twice the states as a pass for moments that has the mean memory, more exponentials, and the pairs.
    return plan(count, memories, ("mean",), memory_limit // 3, tile, beside=pairs * (memories.shape[1] + 16) // 3)


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

    A pass over the memories serves `PAIRS` pairs; it is fastest where no perturbation changes a logit by more than one.

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
    pairs = min(PAIRS, draws // 2)
    sizes = _sizes(len(states), memories, pairs, memory_limit, tile)
    memory = feed(memories, log_prior, sizes.memories)
    b, rho = np.asarray(beta, memory.prior.dtype), np.asarray(radius, memory.prior.dtype)

    def some(x: Array, keys: Array) -> NDArray[np.floating]:
        deltas, sums = _directions(keys, x, rho), _none(x, len(keys))
        for _, offset, part in memory:
            jax.block_until_ready(sums)
            sums = _step(sums, x, deltas, part, b, offset, rows=sizes.tile)
        return np.asarray(_finish(sums, deltas, b))

    means, errors = [], []
    for first, begun, end in pieces(len(states), sizes.states):
        x = jnp.asarray(states[first:end], b.dtype)
        keys = jax.random.split(jax.random.fold_in(key, begun), draws // 2)
        parts = [some(x, keys[start : start + pairs]) for start in range(0, draws // 2, pairs)]
        values = np.concatenate(parts)[:, begun - first :]
        means.append(values.mean(axis=0))
        errors.append(np.sqrt(values.var(axis=0, ddof=1) / len(values)) if len(values) > 1 else np.full(end - begun, np.nan))
    return PerturbationSharpness(np.concatenate(means), np.concatenate(errors))
