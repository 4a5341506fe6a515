"""Likelihood by the probability flow: evaluations against Euler's method, and its differences against those of the bound."""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

from benchmarks.row import Bench, Goal, Row, compiled
from diffusion.likelihood import Draws, ExactTrace, FlowLogDensity, Hutchinson, LogDensity, clean_log_density, intrinsic_forgetting
from diffusion.samplers import Network, ProbabilityFlow, probability_flow
from diffusion.schedules import LinearSchedule
from diffusion.variational import VariationalBound
from hopjax.correspondence import mixture_log_density, posterior_mean

SCHEDULE = LinearSchedule()
MEMORIES, DIM, STATES = 20, 8, 16
PROBES = 64
MOST = 16_384  # steps of Euler's method that are taken


def _exact_noise(memories: jax.Array) -> Network:
    def epsilon(noisy: jax.Array, timestep: jax.Array) -> jax.Array:
        alpha, sigma = SCHEDULE.alpha_sigma(timestep)
        clean = jax.vmap(posterior_mean, in_axes=(0, None, 0, 0))(noisy, memories, alpha, sigma**2)
        return (noisy - alpha[:, None] * clean) / sigma[:, None]

    return epsilon


def _euler(states: jax.Array, memories: jax.Array, steps: jax.Array, start: float, in_log_snr: bool) -> jax.Array:
    """log p by Euler's method, with the exact trace: equal steps in log SNR or in t, as many as told at run time."""
    velocity = probability_flow(_exact_noise(memories), SCHEDULE)
    stop = SCHEDULE.timesteps - 1.0

    def node(i: jax.Array) -> jax.Array:
        share = i / steps
        first, last = (0.5 * SCHEDULE.log_snr(jnp.asarray(t, states.dtype)) for t in (start, stop))
        if in_log_snr:
            return first + share * (last - first)
        return 0.5 * SCHEDULE.log_snr(jnp.clip(start + share * (stop - start), start, stop))

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, volume = carry
        here, span = node(i), node(i + 1) - node(i)
        slope, pullback = jax.vjp(lambda y: velocity(here, y), x)
        basis = jnp.broadcast_to(jnp.eye(DIM, dtype=x.dtype)[:, None], (DIM, *x.shape))
        trace = jnp.sum(basis * jax.vmap(pullback)(basis)[0], axis=(0, 2))
        return x + span * slope, volume + span * trace

    x, volume = jax.lax.fori_loop(0, steps, step, (states, jnp.zeros_like(states[:, 0])))
    return volume - 0.5 * jnp.sum(x**2, axis=1) - 0.5 * DIM * math.log(2 * math.pi)


def _fewest(error: Callable[[int], float], target: float) -> int:
    """The fewest steps (to 2 %) at which the error of a method of order 1 is below the target; beyond `MOST`, extrapolated."""
    high = 8
    while (reached := error(high)) > target:
        if high >= MOST:
            return math.ceil(high * reached / target)
        high *= 2
    low = high // 2
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if error(middle) > target else (low, middle)
    return high


def _evaluations(bench: Bench, start: int, tolerances: tuple[float, ...]) -> Iterator[Row]:
    memories = jax.random.normal(jax.random.key(0), (MEMORIES, DIM))
    (alpha,), (sigma,) = SCHEDULE.alpha_sigma_float64(np.array([float(start)]))
    chosen = jax.random.choice(jax.random.key(1), memories, (STATES,))
    states = alpha * chosen + sigma * jax.random.normal(jax.random.key(2), (STATES, DIM))
    keys = jax.random.split(jax.random.key(3), STATES)

    def by_flow(tolerance: float) -> Callable[..., Draws]:
        estimate = FlowLogDensity(ExactTrace(), ProbabilityFlow(tolerance, tolerance))
        return compiled(lambda x, m: estimate(_exact_noise(m), x, SCHEDULE, keys, start=start), states, memories)[0]

    bench.progress(f"t = {start}, reference")
    reference = by_flow(1e-10)(states, memories).mean
    count = jnp.asarray(8)
    eulers = [
        compiled(functools.partial(_euler, start=float(start), in_log_snr=choice), states, memories, count)[0] for choice in (True, False)
    ]
    for tolerance in tolerances:
        bench.progress(f"t = {start}, tolerance {tolerance:g}")
        flow = by_flow(tolerance)
        found = flow(states, memories)
        error = float(jnp.max(jnp.abs(found.mean - reference)))

        def off(steps: int, euler: Callable[..., jax.Array]) -> float:
            return float(jnp.max(jnp.abs(euler(states, memories, jnp.asarray(steps)) - reference)))

        fewest = [_fewest(functools.partial(off, euler=euler), error) for euler in eulers]
        needed, best = min(zip(fewest, eulers, strict=True), key=lambda pair: pair[0])
        label = f"log p_t from t = {start}, tolerance {tolerance:g}"
        yield Row(
            f"evaluations, {label}",
            float(found.evaluations[0]),
            float(needed),
            unit="",
            # Looser than that, from t = 0 both are nats away, and equally bad is not what one wants to be fast at.
            goals=(Goal("ratio", "≥", 3.0),) if tolerance <= 1e-3 else (),
            error=error,
            error_of="nats, largest of both",
            note=f"{STATES} states, exact score of {MEMORIES} memories, d = {DIM}, exact trace, float64; peer: Euler's method "
            f"in the better of equal steps in log SNR ({fewest[0]:,}) and in t ({fewest[1]:,})"
            f"{', extrapolated from the error of ' + format(MOST, ',') if needed > MOST else ''}",
        )
        taken = min(needed, MOST)
        ours, theirs = bench.medians(
            label,
            bench.size(7, 3),
            functools.partial(flow, states, memories),
            functools.partial(best, states, memories, jnp.asarray(taken)),
        )
        yield Row(f"time of a state, {label}", ours / STATES, theirs * needed / taken / STATES, note="the same two")


def _agreement(bench: Bench, timestep: int) -> Iterator[Row]:
    """What digits 0-4 lose when 5-9 are learned with a few of them replayed, by flow, bound and the exact densities."""
    digits, count = load_digits(), bench.size(96, 32)
    images, early = (digits.data / 8 - 1).astype(np.float32), digits.target < 5
    old, new = images[early][:400], np.concatenate([images[~early][:400], images[early][:40]])
    clean, keys = jnp.asarray(old[:count]), jax.random.split(jax.random.key(4), count)
    (alpha,), (sigma,) = SCHEDULE.alpha_sigma_float64(np.array([float(timestep)]))

    def change(density: LogDensity) -> Callable[..., Draws]:
        def run(before: jax.Array, after: jax.Array) -> Draws:
            found = [clean_log_density(density, _exact_noise(m), clean, SCHEDULE, keys, timestep=timestep) for m in (before, after)]
            return intrinsic_forgetting(found[0], found[1], SCHEDULE, timestep=timestep)

        return compiled(run, old, new)[0]

    bench.progress(f"digits at t = {timestep}, compiling")
    exact = jax.jit(lambda m: jax.vmap(mixture_log_density, in_axes=(0, None, None, None))(alpha * clean, m, alpha, sigma**2))
    densities = [np.asarray(exact(memories.astype(float))) for memories in (old, new)]
    truth = (sigma / alpha) ** 2 * (densities[0] - densities[1])
    flow, bound = change(FlowLogDensity(Hutchinson(PROBES), ProbabilityFlow(1e-4, 1e-4))), change(VariationalBound(64, 8))
    by_flow, by_bound = flow(old, new), bound(old, new)
    ranks = [float(spearmanr(*pair).statistic) for pair in ((by_bound.mean, by_flow.mean), (by_flow.mean, truth), (by_bound.mean, truth))]
    ours, theirs = bench.medians(f"digits at t = {timestep}", bench.size(5, 1), lambda: bound(old, new), lambda: flow(old, new))
    spread = float(np.std(truth))
    yield Row(
        f"ΔE of a digit at t = {timestep}, by the bound",
        ours / count,
        theirs / count,
        error=ranks[0],
        error_of="Spearman with the flow",
        note=f"{count} digits of 0-4 after learning 5-9 with a tenth replayed, exact scores, d = 64, float32; peer: the flow. "
        f"Spearman with the exact ΔE: flow {ranks[1]:.3f}, bound {ranks[2]:.3f}; error bars in units of its spread {spread:.2g}: flow "
        f"{float(jnp.median(by_flow.standard_error)) / spread:.2f}, bound {float(jnp.median(by_bound.standard_error)) / spread:.2f}; "
        f"evaluations for both models: flow {int(by_flow.evaluations[0])}, with {PROBES} products vᵀJ each; "
        f"bound {int(by_bound.evaluations[0])}",
    )


def measure(bench: Bench) -> Iterator[Row]:
    for start in (0, 300):
        yield from _evaluations(bench, start, (1e-2, 1e-3, 1e-5))
    for timestep in (300, 500):
        yield from _agreement(bench, timestep)
