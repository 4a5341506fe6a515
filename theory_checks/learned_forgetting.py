r"""Continued training: does the exact likelihood of Task-1 samples fall as the energy says, and does replay save what it says?

A model that learns its data exactly ends at $p_2$ without replay, and $\beta^{-1}\log p_1/p_2 = \Delta E$ for equal norms. Samples of
memory B at a fraction λ of the data make it end at $q = (1-\lambda)p_2 + \lambda p_B$. With π the weight (86) of ξ_B at x,
$p_B/p_2 = M\pi e^{\beta\Delta E}$, so that

$$\beta^{-1}\log\frac{p_1}{q} = \Delta E - \beta^{-1}\log[1 + \kappa\pi e^{\beta\Delta E}] - \beta^{-1}\log(1-\lambda), \qquad
\kappa = \frac{\lambda M}{1-\lambda}:$$

the raw gain (91) with π replaced by κπ. One memory counted once more is λ = 1/(M+1): then κ = 1 and the normalisation adds
β⁻¹ log((M+1)/M). Everything else that is seen is due to learning.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

import hopjax
from hopjax import boltzmann, cluster
from theory_checks.claim import EPS, Finding, Measurement, Setting, claim
from theory_checks.figures import CLUSTER, NEUTRAL, OUTLIER
from theory_checks.learned_memories import MODEL, interval, t_score

SEEDS = 12
SAMPLES = 10_000  # of each task
TRUE = MODEL.members + 1
FRACTION = 1 / (TRUE + 1)
REPLAYED = (0, MODEL.members)  # a cluster member, and the outlier
ROOMY = TRUE + 1  # memories that are learned where samples are replayed: with room for one more
HELD_OUT = 500  # samples of each memory
# Overlapping memories make directions along which the likelihood is flat: the density settles long before they do.
CONVERGED, ONE_STEP = boltzmann.EM(max_steps=60, tolerance=2e-5), boltzmann.EM(max_steps=1)


class Task(NamedTuple):
    """Samples of either task and exact log-densities, in units of energy; the first axis of all is the seed.

    Attributes:
        first: what Task 1 is learned from.
        following: what training continues on, axes (seed, set, sample, d): the rotated task and Task 1, without replay, then with
            each of `REPLAYED`.
        held: held-out samples of every true memory, axes (seed, memory, sample, d).
        rise: ΔE of the held-out samples, axes (seed, memory, sample).
        predicted: what replay saves a model that learns exactly, less what it changes without a rotation: (replayed, seed, memory, sample).
        keys: for the fits.
    """

    first: jax.Array
    following: jax.Array
    held: jax.Array
    rise: NDArray[np.float64]
    predicted: NDArray[np.float64]
    keys: jax.Array


def _log_densities(samples: jax.Array, memories: jax.Array) -> jax.Array:
    """Of (memory, sample, d) under memories in any precision, in double, in units of energy."""
    wide, beta = jnp.result_type(float), MODEL.beta
    rows = samples.reshape(-1, MODEL.dim).astype(wide)
    return (boltzmann.log_likelihoods(rows, memories.astype(wide), beta) / beta).reshape(samples.shape[:-1])


@lru_cache(maxsize=1)
def _task(setting: Setting) -> Task:
    beta, dtype = MODEL.beta, jnp.float32
    replays = round(FRACTION * SAMPLES)

    def one(key: jax.Array) -> tuple[jax.Array, ...]:
        turning, first, *drawing, replaying, held, fitting = jax.random.split(key, 7)
        true = cluster.memories(MODEL.members, MODEL.dim, MODEL.cosine, dtype=dtype)
        turn = hopjax.rotation(hopjax.antisymmetric(turning, MODEL.dim, MODEL.sigma, dtype=dtype), MODEL.epsilon)
        stored = jnp.stack([true @ turn.T, true])

        def of_memory(key: jax.Array, memory: jax.Array, count: int) -> jax.Array:
            return hopjax.sample_boltzmann(key, memory[None], beta, (count,))

        fresh = jnp.stack([hopjax.sample_boltzmann(k, x, beta, (SAMPLES,)) for k, x in zip(drawing, stored, strict=True)])
        # The same draws, so that what is compared differs by the replayed samples alone.
        keys = jax.random.split(replaying, TRUE)
        replayed = [fresh.at[:, :replays].set(of_memory(keys[b], true[b], replays)[None]) for b in REPLAYED]
        samples = jax.vmap(lambda k, m: of_memory(k, m, HELD_OUT))(jax.random.split(held, TRUE), true)
        before = _log_densities(samples, true)
        exact = jax.vmap(lambda memories: _log_densities(samples, memories))(stored)
        single = jax.vmap(lambda b: _log_densities(samples, true[b][None]))(jnp.array(REPLAYED))
        mixed = jnp.logaddexp(jnp.log1p(-FRACTION) + beta * exact[None], jnp.log(FRACTION) + beta * single[:, None]) / beta
        gains = mixed - exact[None]
        learning = hopjax.sample_boltzmann(first, true, beta, (SAMPLES,))
        return learning, jnp.concatenate([fresh, *replayed]), samples, before - exact[0], gains[:, 0] - gains[:, 1], fitting

    keys = jax.random.split(setting.key("learned-forgetting"), SEEDS)
    first, following, held, rise, predicted, fitting = jax.jit(lambda keys: lax.map(one, keys))(keys)
    return Task(first, following, held, np.asarray(rise), np.moveaxis(np.asarray(predicted), 1, 0), fitting)


@partial(jax.jit, static_argnums=3)
def _learn(keys: jax.Array, samples: jax.Array, held: jax.Array, memories: int) -> tuple[jax.Array, jax.Array]:
    """Memories learned from Task 1 and the log-densities of held-out samples, for each seed."""

    def one(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        key, samples, held = inputs
        found = boltzmann.fit(key, samples, memories, MODEL.beta, method=CONVERGED).memories
        return found, _log_densities(held, found)

    return lax.map(one, (keys, samples, held))


@partial(jax.jit, static_argnums=4)
def _continue(keys: jax.Array, data: jax.Array, held: jax.Array, start: jax.Array, method: boltzmann.EM) -> jax.Array:
    """Log-densities of held-out samples after training went on from `start`, for each seed and set of data."""

    def one(inputs: tuple[jax.Array, ...]) -> jax.Array:
        key, data, held, start = inputs

        def end(samples: jax.Array) -> jax.Array:
            found = boltzmann.fit(key, samples, len(start), MODEL.beta, method=method, start=start).memories
            return _log_densities(held, found)

        return lax.map(end, data)

    return lax.map(one, (keys, data, held, start))


@lru_cache(maxsize=8)
def _learned(setting: Setting, memories: int) -> tuple[jax.Array, jax.Array]:
    task = _task(setting)
    return _learn(task.keys, task.first, task.held, memories)


@lru_cache(maxsize=8)
def _change(setting: Setting, memories: int, method: boltzmann.EM) -> NDArray[np.float64]:
    """β⁻¹ log of old over new density after each set that training continued on: all with room for what is replayed, else the first."""
    task, (start, before) = _task(setting), _learned(setting, memories)
    data = task.following if memories == ROOMY else task.following[:, :1]
    return np.asarray(before[:, None] - _continue(task.keys, data, task.held, start, method))


def forgotten(setting: Setting, memories: int, method: boltzmann.EM = CONVERGED) -> NDArray[np.float64]:
    """β⁻¹ log of old over new density of held-out Task-1 samples after the rotated task: axes (seed, memory, sample)."""
    return _change(setting, memories, method)[:, 0]


def gains(setting: Setting) -> NDArray[np.float64]:
    """How much of that replay saves `ROOMY` memories, less what it changes without a rotation: axes (replayed, seed, memory, sample)."""
    change = _change(setting, ROOMY, CONVERGED).reshape(SEEDS, -1, 2, TRUE, HELD_OUT)
    saved = change[:, :1] - change[:, 1:]
    return np.moveaxis(saved[:, :, 0] - saved[:, :, 1], 1, 0)


@claim(
    "replay-mixture",
    "Theorem 5.1, beyond the paper",
    "Replaying a memory's samples at fraction λ saves β⁻¹ log[(1−λ) + λMπe^{βΔE}] of log-density: the raw gain (91) less β⁻¹ log((M+1)/M) "
    "at λ = 1/(M+1).",
)
def replay_mixture(setting: Setting) -> Finding:
    beta, epsilon = MODEL.beta, 0.2

    @jax.jit
    def evaluate(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        turning, drawing = jax.random.split(key)
        memories = cluster.memories(MODEL.members, MODEL.dim, MODEL.cosine)
        rotated = memories @ hopjax.rotation(hopjax.antisymmetric(turning, MODEL.dim, MODEL.sigma), epsilon).T
        states = hopjax.sample_boltzmann(drawing, memories, beta, (64,))

        def one(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            rise = hopjax.energy_change(x, memories, rotated, beta)
            log_weight = hopjax.log_replay_weight(x, memories[0], memories, beta)
            after, single = hopjax.log_density(x, rotated, beta), hopjax.log_density(x, memories[:1], beta)
            fractions = jnp.array([1e-3, FRACTION, 0.5, 0.99])
            odds = jnp.log(fractions * TRUE / (1 - fractions))
            saved = jnp.logaddexp(jnp.log1p(-fractions) + after, jnp.log(fractions) + single) - after
            formula = beta * hopjax.raw_gain(log_weight + odds, jnp.broadcast_to(rise, odds.shape), beta) + jnp.log1p(-fractions)
            raw = hopjax.raw_gain(log_weight, rise, beta) - jnp.log((TRUE + 1) / TRUE) / beta
            return jnp.max(jnp.abs(saved - formula)), jnp.abs(saved[1] / beta - raw), jnp.abs(after)

        general, counted, size = jax.vmap(one)(states)
        return jnp.max(general), jnp.max(counted), jnp.max(size)

    general, counted, size = (float(part) for part in evaluate(setting.key("replay-mixture")))
    rounding = 4 * EPS * (MODEL.dim + size)  # log-densities of this size, from sums over d of numbers of order one
    return Finding(
        [
            Measurement("difference at λ from 0.001 to 0.99, 64 states, in units of rounding", general / rounding, "<=", 1.0),
            Measurement("the same of (91) − β⁻¹ log((M+1)/M) at λ = 1/(M+1)", beta * counted / rounding, "<=", 1.0),
        ]
    )


def _draw(series: Mapping[str, Mapping[str, Any]], figure: Any) -> None:
    (values,) = series.values()
    figure.set_size_inches(10.5, 3.6)
    panels = figure.subplots(1, 3)
    for axes, (name, points) in zip(panels, values["samples"].items(), strict=False):
        axes.plot(points["rise"]["cluster"], points["forgotten"]["cluster"], ".", markersize=2, color=CLUSTER, label="cluster")
        axes.plot(points["rise"]["outlier"], points["forgotten"]["outlier"], ".", markersize=2, color=OUTLIER, label="outlier")
        ends = np.array([min(points["rise"]["cluster"]), max(points["rise"]["cluster"])])
        axes.plot(ends, ends, color=NEUTRAL, linewidth=1)
        axes.set(xlabel="ΔE", ylabel="β⁻¹ log p₁/p₂, learned", title=name)
        axes.legend(markerscale=5)
    bars = values["gains"]
    for place, name in enumerate(bars):
        panels[2].errorbar(place, bars[name]["mean"], yerr=2 * bars[name]["error"], fmt="o", capsize=4, color=CLUSTER)
        panels[2].plot(place, bars[name]["predicted"], "_", markersize=26, color=OUTLIER)
    panels[2].set(xticks=range(len(bars)), xticklabels=list(bars), title="gain, target ← replayed", xlim=(-0.5, len(bars) - 0.5))


def _groups(values: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Of (replayed, seed, memory, …) values those of each kind of pair."""
    from_member, from_outlier = values
    return {
        "o ← o": from_outlier[:, -1],
        "c ← c": from_member[:, 0],
        "c ← c′": from_member[:, 1:-1],
        "c ← o": from_outlier[:, :-1],
        "o ← c": from_member[:, -1],
    }


@claim(
    "learned-forgetting",
    "Limitation (i)",
    "With enough memories and samples, continued training lowers the log-likelihood of Task-1 samples by βΔE: learning adds nothing.",
    draw=_draw,
    caption="Left and middle: held-out Task-1 samples of one run, energy rise against the exact change of log-density. Right: what replay "
    f"of a memory's samples saves with K + 2 memories ± 2 standard errors over {SEEDS} runs; lines: exact learning.",
)
def learned_forgetting(setting: Setting) -> Finding:
    measurements, notes = [], []
    task = _task(setting)
    for count in (TRUE, ROOMY):
        excess = forgotten(setting, count) - task.rise
        for name, part in (("outlier", slice(TRUE - 1, None)), ("cluster", slice(TRUE - 1))):
            difference, error = interval(excess[:, part])
            mean, _ = interval(task.rise[:, part])
            measurements.append(t_score(f"β⁻¹ log p₁/p₂ less ΔE, {name} samples, {count} memories", difference, error, SEEDS))
            notes.append(f"{name}, {count} memories: {(difference + mean) / mean:.3f} ± {error / mean:.3f}")
    samples = {
        f"{count} memories": {
            name: {"cluster": np.round(values[0, :-1, :60], 5).ravel(), "outlier": np.round(values[0, -1, :60], 5)}
            for name, values in (("rise", task.rise), ("forgotten", forgotten(setting, count)))
        }
        for count in (TRUE, TRUE - 1)
    }
    saved = {}
    for (name, learned), predicted in zip(_groups(gains(setting)).items(), _groups(task.predicted).values(), strict=True):
        mean, error = interval(learned)
        saved[name] = {"mean": mean, "error": error, "predicted": float(predicted.mean())}
    return Finding(measurements, {"samples": samples, "gains": saved}, note=f"Learned over predicted: {'; '.join(notes)}.")


@claim(
    "learned-replay",
    "Theorem 5.1, Limitation (i)",
    "With room for one memory more, replay of a memory's samples at fraction 1/(M+1) saves what the energy with that memory counted says.",
)
def learned_replay(setting: Setting) -> Finding:
    measurements, notes = [], []
    learned, predicted = _groups(gains(setting)), _groups(_task(setting).predicted)
    for name in learned:
        difference, error = interval(learned[name] - predicted[name])
        measurements.append(t_score(f"gain {name}, learned less predicted", difference, error, SEEDS))
        notes.append(f"{name} {1e3 * learned[name].mean():.2f} ± {1e3 * error:.2f} ({1e3 * predicted[name].mean():.2f})")
    for target, other in (("o ← o", "o ← c"), ("c ← c", "c ← c′")):
        difference, error = interval(learned[target].mean(axis=-1) - learned[other].reshape(SEEDS, -1).mean(axis=1))
        measurements.append(Measurement(f"z of gain {target} > {other}, learned", difference / error, ">=", 3.0, 1e-4))
    return Finding(measurements, note=f"Gains in 10⁻³, learned (predicted): {', '.join(notes)}.")


@claim(
    "learned-forgetting-crowded",
    "Limitation (i), beyond the paper",
    "The energy rise of the true memories still predicts what is forgotten when there is one memory too few.",
)
def learned_forgetting_crowded(setting: Setting) -> Finding:
    measurements, rise = [], _task(setting).rise
    for count in (TRUE - 1, TRUE):
        difference = np.mean(forgotten(setting, count) - rise, axis=2)
        ratio = np.sqrt(np.mean(difference**2)) / np.mean(rise)
        what = f"r.m.s. difference of a memory's samples in one run over mean ΔE, {count} memories"
        measurements.append(Measurement(what, float(ratio), "<=", 0.5))
    return Finding(
        measurements,
        note="With one memory too few two cluster members share one; which two is chosen by the data, and may change with the task.",
    )


@claim(
    "learned-forgetting-undertrained",
    "Limitation (i), beyond the paper",
    "A single EM step on the new task forgets as much as training to the end.",
)
def learned_forgetting_undertrained(setting: Setting) -> Finding:
    short, end = forgotten(setting, TRUE, ONE_STEP), forgotten(setting, TRUE)
    fraction = short.mean(axis=(1, 2)) / end.mean(axis=(1, 2))
    mean, error = interval(fraction)
    return Finding(
        [Measurement("β⁻¹ log p₁/p₂ after one step over that at the end, same samples", mean, ">=", 0.9)],
        note=f"{mean:.3f} ± {error:.3f} over {SEEDS} runs: overlapping memories take several steps to move.",
    )
