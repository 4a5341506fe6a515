"""The control variate against plain Monte Carlo: standard error and time of 2,000 rotations."""

import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

import hopjax
from benchmarks.row import Bench, Goal, Row, compiled

MEMBERS, DIM, COSINE, BETA = 10, 64, 0.5, 20.0
EPSILON, SIGMA = 1e-2, hopjax.unit_entries(DIM)
ROTATIONS = 2000


def _compiled_average(
    state: jax.Array, memories: jax.Array, estimator: hopjax.Plain | hopjax.ControlVariate
) -> Callable[..., hopjax.Estimate]:
    def mean(key: jax.Array) -> hopjax.Estimate:
        return hopjax.average_rise(key, state, memories, BETA, epsilon=EPSILON, sigma=SIGMA, draws=ROTATIONS, estimator=estimator)

    return compiled(mean, jax.random.key(0))[0]


def _rows(bench: Bench, name: str, start: int) -> Iterator[Row]:
    bench.progress(f"{name}, compiling")
    memories = hopjax.cluster.memories(MEMBERS, DIM, COSINE)
    state = jax.jit(lambda m: hopjax.fixed_point(m[start], m, BETA).state)(memories)
    controlled, plain = (_compiled_average(state, memories, estimator) for estimator in (hopjax.ControlVariate(), hopjax.Plain()))

    # Separate keys for the two, so that their means are independent; of each standard error the median over its keys.
    runs = bench.size(15, 5)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), start), 2 * runs)
    ours, peer = [controlled(key) for key in keys[:runs]], [plain(key) for key in keys[runs:]]
    errors = [float(np.median([estimate.standard_error for estimate in estimates])) for estimates in (ours, peer)]
    means = [float(np.mean([estimate.mean for estimate in estimates])) for estimates in (ours, peer)]
    yield Row(
        f"standard error of {ROTATIONS:,} rotations, {name}",
        errors[0],
        errors[1],
        unit="",
        goals=(Goal("ratio", "≥", 300.0), Goal("error", "≤", 3.0)),
        error=abs(means[0] - means[1]) / (math.hypot(*errors) / math.sqrt(runs)),
        error_of="|z| of the means",
        note="ours: control variate; peer: plain Monte Carlo",
    )
    controlled_time, plain_time = bench.medians(name, runs, lambda: controlled(keys[0]), lambda: plain(keys[0]))
    yield Row(
        f"time of a rotation, {name}",
        controlled_time / ROTATIONS,
        plain_time / ROTATIONS,
        note="the same two; an antithetic pair is one draw for two rotations",
    )


def measure(bench: Bench) -> Iterator[Row]:
    yield from _rows(bench, "outlier", MEMBERS)
    yield from _rows(bench, "cluster member", 0)
