"""Learned memories: an E-step against scikit-learn's mixture, and fits of the paper's experiment by each method."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from sklearn.mixture import GaussianMixture

import hopjax
from benchmarks.row import Bench, Goal, Row, compiled
from hopjax import boltzmann, cluster

MEMBERS, DIM, COSINE, BETA = 5, 32, 0.35, 8.0
COUNT = MEMBERS + 1
SAMPLES, SEEDS = 20_000, 20


def _samples(key: jax.Array, count: int) -> jax.Array:
    return hopjax.sample_boltzmann(key, cluster.memories(MEMBERS, DIM, COSINE), BETA, (count,))


def _mixture(memories: np.ndarray) -> GaussianMixture:
    """scikit-learn's mixture with the same parameters: equal norms, so equal weights."""
    peer = GaussianMixture(COUNT, covariance_type="spherical")
    peer.weights_, peer.means_ = np.full(COUNT, 1 / COUNT), memories
    peer.covariances_, peer.precisions_cholesky_ = np.full(COUNT, 1 / BETA), np.full(COUNT, BETA**0.5)
    peer.n_features_in_ = DIM
    return peer


def _e_step(bench: Bench) -> Iterator[Row]:
    count = bench.size(1_000_000, 100_000)
    bench.progress("drawing samples")
    samples = jax.jit(partial(_samples, count=count))(jax.random.key(0))
    memories = jax.jit(lambda: cluster.memories(MEMBERS, DIM, COSINE))()
    rows, peer = np.asarray(samples), _mixture(np.asarray(memories))

    def densities(x: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        return boltzmann.log_likelihoods(x, m, BETA), boltzmann.responsibilities(x, m, BETA)

    posterior, _ = compiled(densities, samples, memories)
    moments, _ = compiled(lambda x, m: boltzmann.expectation(x, m, BETA), samples, memories)
    log_density, gamma = (np.asarray(part) for part in posterior(samples, memories))
    error = max(np.max(np.abs(log_density - peer.score_samples(rows))), np.max(np.abs(gamma - peer.predict_proba(rows))))
    ours, theirs = bench.medians(
        "E-step", bench.size(5, 3), lambda: posterior(samples, memories), lambda: (peer.score_samples(rows), peer.predict_proba(rows))
    )
    yield Row(
        f"log p and responsibilities of {count:,} samples, M = {COUNT}, d = {DIM}",
        ours,
        theirs,
        goals=(Goal("ratio", "≥", 3.0), Goal("error", "≤", 1e-5)),
        error=float(error),
        error_of="largest difference",
        note="peer: scikit-learn's GaussianMixture, spherical, score_samples and predict_proba",
    )

    found = moments(samples, memories)
    log_norm, log_gamma = peer._e_step(rows)
    error = max(abs(float(found.log_likelihood) - log_norm), np.max(np.abs(np.asarray(found.mean) - np.exp(log_gamma).T @ rows / count)))

    def their_moments() -> Any:
        _, log_gamma = peer._e_step(rows)
        return np.exp(log_gamma).T @ rows

    ours, theirs = bench.medians("moments", bench.size(5, 3), lambda: moments(samples, memories), their_moments)
    yield Row(
        "what an EM step needs of them: mean log p and moments",
        ours,
        theirs,
        goals=(Goal("ratio", "≥", 3.0), Goal("error", "≤", 1e-5)),
        error=float(error),
        error_of="largest difference",
        note="peer: its E-step, exp and one product; float64",
    )


def _experiment(bench: Bench, name: str, method: boltzmann.Method, best: np.ndarray | None) -> tuple[Row, np.ndarray]:
    seeds = bench.size(SEEDS, 4)

    def run(keys: jax.Array) -> boltzmann.Fit:
        def one(key: jax.Array) -> boltzmann.Fit:
            draw, learn = jax.random.split(key)
            return boltzmann.fit(learn, _samples(draw, SAMPLES).astype(jnp.float32), COUNT, BETA, method=method)

        return jax.vmap(one)(keys)

    bench.progress(f"{name}, compiling")
    keys = jax.random.split(jax.random.key(1), seeds)
    program, compilation = compiled(run, keys)
    (ours,) = bench.medians(name, bench.size(3, 1), lambda: program(keys))
    found = program(keys)
    reached = np.asarray(found.log_likelihood, float)
    lost = 0.0 if best is None else float(np.max(best - reached)) * SAMPLES
    row = Row(
        f"{seeds} seeds of the paper's experiment, {name}",
        ours + compilation,
        goals=(Goal("ours", "≤", 60.0),),
        error=lost,
        error_of="nats below the maximum, at most",
        note=f"K = {MEMBERS} + 1, d = {DIM}, β = {BETA:g}, {SAMPLES:,} samples; {compilation:.1f} s of it compiling; "
        f"{int(np.min(found.steps))} to {int(np.max(found.steps))} steps, {int(np.sum(found.converged))} converged",
    )
    return row, reached


def _methods(bench: Bench) -> Iterator[Row]:
    """One seed from the same start: how long each method takes to within 1e-3 nats a data set of the best likelihood."""
    samples = jax.jit(partial(_samples, count=SAMPLES))(jax.random.key(2))
    start = jax.jit(lambda x: boltzmann.starting_memories(jax.random.key(3), x, COUNT, BETA))(samples)
    em, _ = compiled(lambda x, m: boltzmann.fit(jax.random.key(0), x, COUNT, BETA, start=m), samples, start)
    slope = jax.jit(jax.value_and_grad(lambda m: -boltzmann.log_likelihood(samples, m, BETA)))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = slope(jnp.asarray(flat.reshape(COUNT, DIM)))
        return float(value), np.asarray(gradient).ravel()

    def quasi_newton() -> Any:
        return minimize(objective, np.asarray(start).ravel(), jac=True, method="L-BFGS-B", options={"ftol": 1e-13, "gtol": 1e-7})

    ours, theirs = bench.medians("EM and L-BFGS", bench.size(5, 3), lambda: em(samples, start), quasi_newton)
    peer, found = quasi_newton(), em(samples, start)
    yield Row(
        "one fit to convergence, EM with the exact M-step",
        ours,
        theirs,
        goals=(Goal("ratio", "≥", 1.0), Goal("error", "≤", 1e-3)),
        error=abs(float(found.log_likelihood) + float(peer.fun)) * SAMPLES,
        error_of="nats apart",
        note=f"peer: scipy's L-BFGS on the streaming gradient, {peer.nfev} evaluations against {int(found.steps)} steps",
    )


def measure(bench: Bench) -> Iterator[Row]:
    yield from _e_step(bench)
    yield from _methods(bench)
    row, best = _experiment(bench, "EM", boltzmann.EM(), None)
    yield row
    row, _ = _experiment(bench, "Adam", boltzmann.Adam(), best)
    yield row
