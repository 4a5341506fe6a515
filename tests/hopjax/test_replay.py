"""Replay: exact gains against energies, their laws, and their average over rotations."""

import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from mpmath import mp, mpf

import hopjax
from hopjax import cluster
from tests import oracles
from tests.strategies import DOUBLE, landscapes, powers

EPS = float(np.finfo(float).eps)
SIGNED = st.tuples(st.sampled_from((-1.0, 1.0)), powers(-12, 3)).map(lambda pair: pair[0] * pair[1])


@jax.jit
def gains(log_pi, rise, beta):
    slope = jax.grad(hopjax.gain, 1)
    return {
        "raw": hopjax.raw_gain(log_pi, rise, beta),
        "baseline": hopjax.baseline_gain(log_pi, beta),
        "gain": hopjax.gain(log_pi, rise, beta),
        "chi": hopjax.susceptibility(log_pi),
        "second": hopjax.second_order_gain(log_pi, rise, beta),
        "slope": slope(log_pi, rise, beta),
        "slope at zero": slope(log_pi, jnp.zeros_like(rise), beta),
    }


@hypothesis.given(st.floats(-2000, 50), SIGNED, powers(-3, 4))
@hypothesis.settings(max_examples=150)
def test_gains_agree_with_many_digits(log_pi, rise, beta):
    values = {name: float(value) for name, value in gains(log_pi, rise, beta).items()}
    with mp.workdps(1200):  # π = e^{−2000} is added to one
        pi, boost = mp.exp(mpf(log_pi)), mp.exp(mpf(beta) * mpf(rise)) if beta * rise < 1e5 else None
        baseline = mp.log1p(pi) / beta
        chi = pi / (1 + pi)
        if boost is None:
            raw = (mpf(log_pi) + mpf(beta) * rise) / beta  # the rest is below e^{−98000}
            slope = mpf(1)
        else:
            raw, slope = mp.log1p(pi * boost) / beta, pi * boost / (1 + pi * boost)
        exact = raw - baseline
    exponent = beta * rise
    tiny = 1e-307 / min(beta, 1)
    # An error of eps in an exponent of size s is s·eps: what the conditioning of e^s allows.
    spread = 8 * EPS * (1 + abs(log_pi) + abs(exponent))
    assert abs(values["raw"] - float(raw)) <= spread * abs(float(raw)) + tiny
    assert abs(values["baseline"] - float(baseline)) <= 8 * EPS * (1 + abs(log_pi)) * float(baseline) + tiny
    assert abs(values["chi"] - float(chi)) <= 8 * EPS * (1 + abs(log_pi)) * float(chi) + tiny
    if abs(exponent) < 1:
        # The docstring's few eps relative, given χ; χ itself has the condition |log π|.
        assert abs(values["gain"] - float(exact)) <= 8 * EPS * (1 + abs(log_pi)) * abs(float(exact)) + tiny
    else:
        assert abs(values["gain"] - float(exact)) <= 8 * EPS * (abs(rise) + (1 + abs(log_pi)) / beta)
    assert abs(values["slope"] - float(slope)) <= 2 * spread * max(float(slope), 1e-300) + 64 * EPS * (abs(exponent) >= 1) * float(slope)
    assert abs(values["slope at zero"] - values["chi"]) <= 8 * EPS * values["chi"]


@hypothesis.given(st.floats(-600, 50), st.floats(-600, 50), SIGNED, SIGNED, powers(-3, 4))
def test_laws_of_the_gain(log_pi, other, rise, higher, beta):
    """G = G_raw − baseline, of the sign of ΔE, increasing in ΔE, |G| increasing in π, and below |ΔE|."""
    values = gains(log_pi, rise, beta)
    scale = 8 * EPS * (abs(rise) + (1 + abs(log_pi)) / beta)
    assert abs(float(values["gain"]) - float(values["raw"]) + float(values["baseline"])) <= scale
    assert abs(float(values["gain"])) <= abs(rise) * (1 + 8 * EPS)
    if abs(beta * rise) < 1 and log_pi > -500:
        assert np.sign(values["gain"]) == np.sign(rise)
    low, high = sorted((rise, higher))
    rounding = 8 * EPS * (abs(low) + abs(high) + (1 + abs(log_pi)) / beta)
    assert float(gains(log_pi, low, beta)["gain"]) <= float(gains(log_pi, high, beta)["gain"]) + rounding
    low, high = sorted((log_pi, other))
    rounding = 8 * EPS * (abs(rise) + (1 + abs(low) + abs(high)) / beta)
    assert abs(float(gains(low, rise, beta)["gain"])) <= abs(float(gains(high, rise, beta)["gain"])) + rounding


@hypothesis.given(st.floats(-5, 5), powers(-2, 2))
def test_second_order_drops_the_third(log_pi, beta):
    """The remainder is β²χ(1−χ)(1−2χ)ΔE³/6: at βΔE = 1e-3, against fourth order 1e-12."""
    rise = 1e-3 / beta
    values = {name: float(value) for name, value in gains(log_pi, rise, beta).items()}
    chi = values["chi"]
    third = beta**2 * chi * (1 - chi) * (1 - 2 * chi) * rise**3 / 6
    assert abs(values["gain"] - values["second"] - third) <= (1e-12 / 6 + 8 * EPS) * chi / beta + 8 * EPS * chi * rise


@jax.jit
def replayed_energies(state, sample, memories, after, beta):
    log_pi = hopjax.log_replay_weight(state, sample, memories, beta)
    rise = hopjax.energy_change(state, memories, after, beta)
    direct = hopjax.energy(state, after, beta) - hopjax.energy(state, jnp.concatenate([after, sample[None]]), beta)
    return log_pi, hopjax.raw_gain(log_pi, rise, beta), direct


@hypothesis.given(landscapes(DOUBLE))
def test_raw_gain_is_the_energy_of_one_more_memory(landscape):
    """Eqs. (87) and (91): E(x; X₂) − E(x; X₂ ∪ {z}), with X₂ anything."""
    state, memories, beta = landscape.arguments
    sample = memories[0] + 0.1 * landscape.radius * landscape.rng.standard_normal(len(state)) / math.sqrt(len(state))
    after = landscape.rng.permuted(memories, axis=1)
    log_pi, raw, direct = (float(value) for value in replayed_energies(state, sample, memories, after, beta))
    radius = max(landscape.radius, float(np.linalg.norm(sample)), float(np.linalg.norm(after, axis=1).max()))
    rounding = (8 + math.sqrt(len(state))) * EPS * (radius**2 + (1 + math.log(len(memories) + 1)) / float(beta))
    assert abs(raw - direct) <= 6 * rounding
    with mp.workdps(50):
        x, z, b = oracles.exact(state), oracles.exact(sample), mpf(float(beta))
        exact = b * oracles.dot(z, x) - oracles.log_sum_exp([b * oracles.dot(row, x) for row in oracles.exact(memories)])
    assert abs(log_pi - float(exact)) <= 6 * rounding * float(beta) + 4 * EPS * abs(float(exact))


def test_a_stored_memory_weighs_its_softmax_weight():
    rows = jax.jit(lambda: cluster.memories(5, 8, 0.3))()
    state = jax.jit(lambda: hopjax.fixed_point(rows[1], rows, 6.0).state)()
    matrix = jax.jit(lambda: hopjax.log_weight_matrix(state[None], rows, rows, 6.0))()
    np.testing.assert_allclose(matrix[0], jax.jit(hopjax.log_weights)(state, rows, 6.0), rtol=64 * EPS)
    # A sample that is no memory may weigh more than one.
    assert jax.jit(hopjax.log_replay_weight)(state, 3 * state, rows, 6.0) > 0


def test_matrices_are_loops():
    rng = np.random.default_rng(0)
    targets, samples, memories = rng.standard_normal((3, 5)), rng.standard_normal((4, 5)), rng.standard_normal((6, 5))
    rises = np.array([0.1, -0.2, 1e-9])
    weights = np.asarray(jax.jit(hopjax.log_weight_matrix)(targets, samples, memories, 2.0))
    matrix = np.asarray(jax.jit(hopjax.gain_matrix)(targets, samples, memories, rises, 2.0))
    single: Any = jax.jit(lambda *row: hopjax.log_replay_weight(*row))  # caches of their own
    gain: Any = jax.jit(lambda *row: hopjax.gain(*row))
    assert weights.shape == matrix.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            log_pi = float(single(targets[i], samples[j], memories, 2.0))
            assert abs(weights[i, j] - log_pi) <= 64 * EPS * (1 + abs(log_pi))
            expected = float(gain(log_pi, rises[i], 2.0))
            assert abs(matrix[i, j] - expected) <= 128 * EPS * (1 + abs(log_pi)) * abs(expected)
    assert single._cache_size() == gain._cache_size() == 1


def test_average_gain_is_the_mean_over_rotated_memories(key):
    """⟨G⟩ from its definition: rotate the memories, add the sample, subtract energies and the baseline."""
    rng = np.random.default_rng(2)
    memories, state, beta, epsilon = rng.standard_normal((4, 5)), rng.standard_normal(5), 1.5, 0.3
    samples = np.stack([memories[0], memories[2], state])

    @jax.jit
    def direct(keys, state, memories, samples):
        def one(key):
            after = memories @ hopjax.rotation(hopjax.antisymmetric(key, 5, 0.8), epsilon).T
            alone = hopjax.energy(state, after, beta)
            raw = jax.vmap(lambda z: alone - hopjax.energy(state, jnp.concatenate([after, z[None]]), beta))(samples)
            pi = jnp.exp(beta * samples @ state) / jnp.sum(jnp.exp(beta * memories @ state))
            return raw - jnp.log(1 + pi) / beta

        return jax.vmap(one)(keys)

    keys = jax.random.split(key)
    values = np.asarray(direct(jax.random.split(keys[0], 10_000), state, memories, samples))
    run = jax.jit(lambda key, x, z, rows: hopjax.average_gain(key, x, z, rows, beta, epsilon=epsilon, sigma=0.8, draws=10_000))
    estimate = run(keys[1], state, samples, memories)
    error = np.hypot(values.std(axis=0) / 100, estimate.standard_error)
    assert estimate.mean.shape == (3,)
    assert np.abs((values.mean(axis=0) - estimate.mean) / error).max() < 6  # three Gaussians: a false alarm in 2e8
    assert (estimate.effective_draws > 10_000).all()


def test_average_gain_is_linear_response_at_a_fixed_point(key):
    """Eq. (97), at the preset `asymptotic`: ⟨G⟩ ≈ χ⟨ΔE⟩ while β⟨ΔE⟩ is small."""

    @jax.jit
    def both(key):
        rows = cluster.memories(10, 64, 0.5)
        state = hopjax.fixed_point(rows[0], rows, 20.0).state
        estimate = hopjax.average_gain(key, state, rows, rows, 20.0, epsilon=1e-3, sigma=1.0)
        chi = hopjax.susceptibility(hopjax.log_weight_matrix(state[None], rows, rows, 20.0)[0])
        return estimate.mean, chi * hopjax.second_order_rise(state, rows, 20.0, epsilon=1e-3, sigma=1.0)

    mean, linear = both(key)
    np.testing.assert_allclose(mean, linear, rtol=2e-3)  # β⟨ΔE²⟩/⟨ΔE⟩ ≈ β·⟨ΔE⟩ = 6e-4, times ½(1 − χ)·⟨ΔE²⟩/⟨ΔE⟩²


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_a_beta_that_is_no_temperature_gives_nan(beta):
    values = gains(-1.0, 0.1, beta)
    assert np.isnan([values[name] for name in ("raw", "baseline", "gain", "second")]).all()
    rows = np.eye(3)
    assert np.isnan(jax.jit(hopjax.log_replay_weight)(rows[0], rows[1], rows, beta))
    assert np.isnan(jax.jit(hopjax.gain_matrix)(rows, rows, rows, np.ones(3), beta)).all()


def test_single_precision_stays_single():
    values = gains(np.float32(-1.0), np.float32(0.1), np.float32(2.0))
    double = gains(-1.0, float(np.float32(0.1)), 2.0)
    for name, value in values.items():
        assert value.dtype == np.float32
        assert abs(float(value) - float(double[name])) <= 16 * float(np.finfo(np.float32).eps) * abs(float(double[name])), name


@pytest.mark.usefixtures("unchecked")
def test_static_mistakes_raise(key):
    rows = jnp.eye(3)
    with pytest.raises(ValueError, match=r"state of shape \(4,\).*need \(3,\)"):
        hopjax.log_replay_weight(rows[0], jnp.ones(4), rows, 1.0)
    with pytest.raises(ValueError, match=r"state of shape \(2,\).*need \(3,\)"):
        hopjax.log_replay_weight(jnp.ones(2), rows[0], rows, 1.0)
    with pytest.raises(ValueError, match="draws=5"):
        hopjax.average_gain(key, rows[0], rows, rows, 1.0, epsilon=0.1, sigma=1.0, draws=5)
