"""The average over 2,000 rotations: the d-free law against a loop of scipy.linalg.expm."""

import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
import scipy.linalg
import scipy.special

import hopjax
from benchmarks.row import Bench, Goal, Row, compiled

MEMBERS, COSINE, BETA = 12, 0.35, 8.0
EPSILON, SIGMA = 0.02, hopjax.half_difference(50)
ROTATIONS = 2000


def _expm_loop(rng: np.random.Generator, state: np.ndarray, memories: np.ndarray, draws: int) -> np.ndarray:
    """Energy rises as one writes them down: draw A, exponentiate it, rotate the memories, subtract two energies."""

    def energy(stored: np.ndarray) -> float:
        return 0.5 * state @ state - scipy.special.logsumexp(BETA * stored @ state) / BETA

    rises = np.empty(draws)
    for index in range(draws):
        upper = np.triu(rng.normal(0.0, SIGMA, 2 * state.shape), 1)
        turn = scipy.linalg.expm(EPSILON * (upper - upper.T))
        rises[index] = energy(memories @ turn.T) - energy(memories)
    return rises


def _outlier(dim: int) -> tuple[jax.Array, jax.Array]:
    """The fixed point near the outlier, and the memories."""
    memories = hopjax.cluster.memories(MEMBERS, dim, COSINE)
    return jax.jit(lambda m: hopjax.fixed_point(m[-1], m, BETA).state)(memories), memories


def _compiled_average(state: jax.Array, memories: jax.Array, epsilon: float) -> tuple[Callable[..., hopjax.Estimate], float]:
    def mean(key: jax.Array, state: jax.Array, memories: jax.Array) -> hopjax.Estimate:
        return hopjax.average_rise(
            key, state, memories, BETA, epsilon=epsilon, sigma=SIGMA, draws=ROTATIONS, estimator=hopjax.Plain(), law=hopjax.PlanarLaw()
        )

    return compiled(mean, jax.random.key(0), state, memories)


def _z_score(bench: Bench) -> float:
    """Difference of our mean rise and the loop's at d = 50, in standard errors."""
    state, memories = _outlier(50)
    draws, chunks, rng = bench.size(100_000, 20_000), bench.size(20, 4), np.random.default_rng(0)
    ours = np.asarray(
        jax.jit(lambda key: hopjax.sample_rises(key, state, memories, BETA, epsilon=EPSILON, sigma=SIGMA, draws=draws))(jax.random.key(1))
    )
    parts = []
    for chunk in range(chunks):
        bench.progress(f"accuracy, {500 * chunk:,} of {500 * chunks:,} draws of the loop")
        parts.append(_expm_loop(rng, np.asarray(state), np.asarray(memories), 500))
    peer = np.concatenate(parts)
    return float(abs(ours.mean() - peer.mean()) / math.sqrt(ours.var(ddof=1) / ours.size + peer.var(ddof=1) / peer.size))


def _against_loop(bench: Bench, dim: int, peer_draws: int, goals: tuple[Goal, ...], z: float | None) -> Row:
    bench.progress(f"d = {dim:,}, compiling")
    state, memories = _outlier(dim)
    program, compilation = _compiled_average(state, memories, EPSILON)
    rng, key = np.random.default_rng(1), jax.random.key(2)
    host_state, host_memories = np.asarray(state), np.asarray(memories)
    ours, peer = bench.medians(
        f"d = {dim:,}",
        bench.size(9, 3),
        lambda: program(key, state, memories),
        lambda: _expm_loop(rng, host_state, host_memories, peer_draws),
    )
    return Row(
        f"mean of {ROTATIONS:,} rotations, d = {dim:,}",
        ours,
        peer * ROTATIONS / peer_draws,
        goals=goals,
        error=z,
        error_of="|z| of the means" if z is not None else "",
        note=f"compiled in {compilation:.1f} s; peer: expm loop, extrapolated from {peer_draws} draw{'s'[: peer_draws - 1]} a run",
    )


def measure(bench: Bench) -> Iterator[Row]:
    z = _z_score(bench)
    yield _against_loop(bench, 50, ROTATIONS // 10, (Goal("ratio", "≥", 40.0), Goal("error", "≤", 3.0)), z)
    yield _against_loop(bench, 1000, 1, (Goal("ratio", "≥", 1e4),), None)

    dim = 10**6
    bench.progress(f"d = {dim:,}, compiling")
    state, memories = _outlier(dim)
    # The same displacement ε√(d−1)σ as at d = 50.
    program, compilation = _compiled_average(state, memories, EPSILON * math.sqrt(49 / (dim - 1)))
    key = jax.random.key(2)
    (ours,) = bench.medians(f"d = {dim:,}", bench.size(9, 3), lambda: program(key, state, memories))
    yield Row(
        f"mean of {ROTATIONS:,} rotations, d = {dim:,}",
        ours,
        goals=(Goal("ours", "≤", 1.0),),
        note=f"compiled in {compilation:.1f} s; no peer: one rotation matrix would be 8 TB",
    )
