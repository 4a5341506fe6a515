"""Fixed points: what they satisfy, how fast they are found, and their derivatives."""

from dataclasses import dataclass
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf
from scipy import optimize

import hopjax
from hopjax import Anderson, Newton, Picard, cluster
from tests import oracles
from tests.strategies import CASES, landscapes

METHODS = (Picard(), Newton(), Anderson(), Anderson(depth=1))
EPS = float(np.finfo(float).eps)
PRESET: dict[str, Any] = {"members": 12, "dim": 50, "cosine": 0.35}


@jax.jit
def solve_all(state, memories, beta):
    results = [hopjax.fixed_point(state, memories, beta, method=method, max_steps=3000) for method in METHODS]
    energies = [hopjax.energy(point, memories, beta) for point in (state, *(result.state for result in results))]
    return results, energies


@hypothesis.given(landscapes(CASES[2:4] + CASES[-2:-1]))
@hypothesis.settings(max_examples=40)
def test_every_method_descends_and_reports_what_it_found(landscape):
    results, energies = solve_all(*landscape.arguments)
    memories, beta = np.asarray(landscape.memories, float), float(landscape.beta)
    largest = np.linalg.norm(memories, axis=1).max()
    # Energies round at 8 eps·(R² + log m/β), and each of up to 3000 guarded steps may climb by its own rounding of that size.
    slack = 32 * landscape.eps * (landscape.radius**2 + np.log(len(memories)) / beta)
    for method, result, energy in zip(METHODS, results, energies[1:], strict=True):
        assert float(energy) <= float(energies[0]) + slack * max(1, int(result.steps) ** 0.5), method
        bound = 450 * landscape.eps * largest
        assert bool(result.converged) == (float(result.residual) <= bound * (1 + 4 * landscape.eps)), method
        if result.converged:
            x = np.asarray(result.state, float)
            logits = beta * memories @ x
            p = np.exp(logits - logits.max())
            rounding = 32 * landscape.eps * (1 + landscape.steepness) * landscape.radius
            assert np.linalg.norm(x - p / p.sum() @ memories) <= bound + rounding, method
        else:
            assert result.steps == 3000, method


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_methods_reach_the_symmetric_fixed_points(method):
    memories = jax.jit(lambda: cluster.memories(**PRESET))()
    solve = jax.jit(lambda start: hopjax.fixed_point(start, memories, 8.0, method=method))
    at_member, at_outlier = solve(memories[0]), solve(memories[-1])
    assert at_member.converged
    assert at_outlier.converged
    member, outlier = jax.jit(lambda: (cluster.cluster_point(12.0, 0.35, 8.0), cluster.outlier_point(12.0, 0.35, 8.0)))()
    a, b, r = np.exp([member.log_self, member.log_other, member.log_outlier])
    p, q = np.exp([outlier.log_self, outlier.log_member])
    # A residual of 1e-13 is an error of 1e-13/λ in x, λ > 0.1 the smallest eigenvalue of H here.
    np.testing.assert_allclose(at_member.state, np.r_[a, np.full(11, b), r] @ memories, rtol=0, atol=1e-12)
    np.testing.assert_allclose(at_outlier.state, np.r_[np.full(12, q), p] @ memories, rtol=0, atol=1e-12)


def test_newton_is_fast_at_the_onset():
    members, cosine = 10.0, 0.5
    memories = jax.jit(lambda: cluster.memories(10, 16, 0.5))()
    beta = float(oracles.cluster_fold(members, cosine)) * (1 + 1e-4)
    start = memories[0]
    steps = {}
    for method in (Picard(), Newton(), Anderson()):
        found = jax.jit(lambda start, beta, method=method: hopjax.fixed_point(start, memories, beta, method=method))(start, beta)
        assert found.converged
        point = jax.jit(cluster.cluster_point)(members, cosine, beta)
        # Next to a fold the error is residual/λ, λ ≈ √1e-4.
        assert abs(float(found.state @ memories[-1]) - np.exp(float(point.log_outlier))) <= 1e-9
        steps[type(method).__name__] = int(found.steps)
    assert steps["Newton"] <= 12
    assert steps["Anderson"] < steps["Picard"] / 20
    assert steps["Picard"] > 1000


def test_picard_is_the_map():
    rng = np.random.default_rng(1)
    memories, start = jnp.asarray(rng.standard_normal((4, 6))), rng.standard_normal(6)
    result = jax.jit(lambda x: hopjax.fixed_point(x, memories, 0.9, method=Picard(), max_steps=3))(start)
    x = start
    for _ in range(3):
        p = np.exp(0.9 * memories @ x)
        x = p / p.sum() @ memories
    np.testing.assert_allclose(result.state, x, rtol=64 * EPS)
    assert result.steps == 3


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_giving_up_is_data(method):
    memories = jnp.eye(3, 4) + 0.2
    result = jax.jit(lambda x: hopjax.fixed_point(x, memories, 2.0, method=method, max_steps=1))(np.array([1.0, 0.3, 0.0, 0.1]))
    assert not result.converged
    assert result.steps == 1
    assert result.residual > 1e-6
    done = jax.jit(lambda x: hopjax.fixed_point(x, memories, 2.0, method=method))(result.state)
    again = jax.jit(lambda x: hopjax.fixed_point(x, memories, 2.0, method=method))(done.state)
    assert done.converged
    assert again.steps == 0
    np.testing.assert_array_equal(again.state, done.state)


def test_a_looser_tolerance_stops_earlier():
    memories = jax.jit(lambda: cluster.memories(**PRESET))()
    loose, tight = (
        jax.jit(lambda x, t=t: hopjax.fixed_point(x, memories, 8.0, method=Picard(), tolerance=t))(memories[0]) for t in (1e-3, 1e-12)
    )
    assert loose.steps < tight.steps
    assert 1e-12 < loose.residual <= 1e-3
    assert tight.residual <= 1e-12


def test_strangers_can_be_methods():
    @dataclass(frozen=True)
    class Damped:
        def start(self, state):
            return ()

        def step(self, state, memory, memories, beta):
            return 0.5 * (state + hopjax.update_map(state, memories, beta)), memory

    memories = jnp.asarray([[1.0], [-1.0]])
    result = jax.jit(lambda x: hopjax.fixed_point(x, memories, 2.0, method=Damped()))(np.array([0.3]))
    assert result.converged
    assert abs(float(result.state[0]) - optimize.brentq(lambda x: x - np.tanh(2 * x), 0.1, 1, xtol=1e-15)) <= 1e-12


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_derivatives_of_the_curie_weiss_magnet(method):
    """Memories ±s in one dimension: x = s tanh(βsx), whose derivatives mpmath takes from the root."""

    def magnetisation(scale, beta):
        memories = jnp.stack([scale, -scale])[:, None]
        return hopjax.fixed_point(jnp.ones(1), memories, beta, method=method).state[0]

    @jax.jit
    def derivatives(scale, beta):
        first = jax.grad(magnetisation, (0, 1))(scale, beta)
        second = jax.hessian(magnetisation, (0, 1))(scale, beta)
        return first, second, jax.grad(jax.grad(magnetisation, 1), 1)(scale, beta)

    scale, beta = 1.3, 0.9
    first, second, reverse_twice = derivatives(scale, beta)
    with mp.workdps(40):

        def root(s, b):
            return mp.findroot(lambda x: x - s * mp.tanh(b * s * x), mpf("1.1"))

        for got, order in ((first[0], (1, 0)), (first[1], (0, 1)), (second[0][0], (2, 0)), (second[0][1], (1, 1)), (second[1][1], (0, 2))):
            expected = float(mp.diff(root, (mpf(scale), mpf(beta)), order))
            # The root is known to 1e-13; the derivatives' condition, 1/λ³ with λ ≈ 0.5, adds a digit.
            assert abs(float(got) - expected) <= 1e-11 * max(1, abs(expected)), order
    assert abs(float(reverse_twice) - float(second[1][1])) <= 1e-11 * abs(float(reverse_twice))


@pytest.mark.parametrize("shape", [(4, 6), (7, 3)], ids=["fewer memories than dimensions", "more"])
def test_gradients_in_memories_and_beta_are_those_of_finite_differences(shape):
    rng = np.random.default_rng(5)
    memories, probe = rng.standard_normal(shape), rng.standard_normal(shape[1])
    direction, beta = rng.standard_normal(shape), 0.8

    @jax.jit
    def value(memories, beta):
        return jnp.vdot(hopjax.fixed_point(memories[0], memories, beta).state, probe)

    slope, beta_slope = jax.jit(jax.grad(value, (0, 1)))(memories, beta)
    forward = jax.jit(lambda m, b: jax.jvp(value, (m, b), (direction, 1.0))[1])(memories, beta)
    step = 1e-4  # five-point stencil: error step⁴ ≈ 1e-16·f⁽⁵⁾, and 1e-13/step from the root

    def difference(at):
        return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)

    in_memories = difference(lambda t: float(value(memories + t * direction, beta)))
    in_beta = difference(lambda t: float(value(memories, beta + t)))
    assert abs(np.vdot(slope, direction) - in_memories) <= 1e-8 * max(1, abs(in_memories))
    assert abs(float(beta_slope) - in_beta) <= 1e-8 * max(1, abs(in_beta))
    assert abs(float(forward) - in_memories - in_beta) <= 1e-8 * max(1, abs(in_memories) + abs(in_beta))


def test_gradients_are_those_of_the_scalar_equations():
    memories = jax.jit(lambda: cluster.memories(**PRESET))()

    @jax.jit
    def both(beta):
        dense = jax.grad(lambda b: hopjax.log_weights(hopjax.fixed_point(memories[0], memories, b).state, memories, b)[0])(beta)
        return dense, jax.grad(lambda b: cluster.cluster_point(12.0, 0.35, b).log_self)(beta)

    dense, scalar = both(8.0)
    assert abs(float(dense) - float(scalar)) <= 1e-11 * abs(float(scalar))  # the fixed point's 1e-13, times 1/λ twice


def test_where_the_iteration_started_carries_no_derivative():
    memories = jnp.eye(3, 4) + 0.1
    slope = jax.jit(jax.grad(lambda x: jnp.sum(hopjax.fixed_point(x, memories, 3.0).state)))(np.array([0.9, 0.1, 0.0, 0.0]))
    np.testing.assert_array_equal(slope, 0)
    residual = jax.jit(jax.grad(lambda b: hopjax.fixed_point(memories[0], memories, b).residual))(3.0)
    assert residual == 0


def test_batches_compile_once_and_agree_with_loops():
    rng = np.random.default_rng(2)
    memories, starts = rng.standard_normal((5, 4)), rng.standard_normal((3, 4))
    solve: Any = jax.jit(lambda *arguments: hopjax.fixed_point(*arguments))  # a cache of its own
    alone = [solve(start, memories, beta) for start, beta in zip(starts, (0.5, 1.0, 9.0), strict=True)]
    assert solve._cache_size() == 1
    many = jax.jit(jax.vmap(hopjax.fixed_point, (0, None, 0)))(starts, memories, np.array([0.5, 1.0, 9.0]))
    for i, result in enumerate(alone):
        np.testing.assert_allclose(many.state[i], result.state, rtol=0, atol=1e-11)  # both within 1e-13/λ of the root
        assert bool(many.converged[i]) == bool(result.converged)


def test_without_jit_the_numbers_are_the_same():
    memories, start = jnp.asarray([[1.0, 0.0], [0.0, 1.0]]), jnp.asarray([0.9, 0.2])
    compiled = jax.jit(hopjax.fixed_point)(start, memories, 3.0)
    eager = hopjax.fixed_point(start, memories, 3.0)
    np.testing.assert_allclose(eager.state, compiled.state, rtol=1e-14)
    assert eager.steps == compiled.steps


def test_single_precision_has_its_own_tolerance():
    memories = jax.jit(lambda: cluster.memories(**PRESET, dtype=np.float32))()
    single = jax.jit(hopjax.fixed_point)(memories[0], memories, 8.0)
    double = jax.jit(hopjax.fixed_point)(memories[0].astype(np.float64), memories.astype(np.float64), 8.0)
    assert single.state.dtype == single.residual.dtype == np.float32
    assert single.converged
    np.testing.assert_allclose(single.state, double.state, rtol=0, atol=10 * 450 * float(np.finfo(np.float32).eps))  # residual/λ


@pytest.mark.parametrize("beta", [0.0, -2.0, np.nan, np.inf])
def test_no_temperature_no_fixed_point(beta):
    memories = np.eye(3, 4)
    result = jax.jit(hopjax.fixed_point)(memories[0], memories, beta)
    assert np.isnan(result.residual)
    assert not result.converged


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_memory_that_is_not_finite_does_not_converge(value):
    memories = np.eye(3, 4)
    memories[1, 2] = value
    result = jax.jit(hopjax.fixed_point)(np.full(4, 0.5), memories, 2.0)
    assert np.isnan(result.residual)
    assert not result.converged


def test_static_mistakes_raise():
    memories = jnp.eye(3, 4)
    with pytest.raises(ValueError, match=r"max_steps=0 must be at least 1"):
        hopjax.fixed_point(memories[0], memories, 1.0, max_steps=0)
    with pytest.raises(ValueError, match=r"depth=0 must be at least 1"):
        Anderson(depth=0)
    with pytest.raises(ValueError, match="at least one memory"):
        hopjax.fixed_point(memories[0], memories[:0], 1.0)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_raise():
    with pytest.raises(ValueError, match=r"need \(4,\)"):
        hopjax.fixed_point(jnp.ones(3), jnp.eye(3, 4), 1.0)
