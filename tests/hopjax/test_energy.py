"""Energies, curvature and density against mpmath and quadrature, and the laws that they obey."""

import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf
from scipy import integrate, special, stats

import hopjax
from tests import oracles
from tests.strategies import DOUBLE, SINGLE, SMALL, Landscape, landscapes, powers

KERNELS = {
    "energy": hopjax.energy,
    "log_weights": hopjax.log_weights,
    "weights": hopjax.weights,
    "update_map": hopjax.update_map,
    "gradient": hopjax.gradient,
    "hessian": hopjax.hessian,
    "hessian_trace": hopjax.hessian_trace,
    "sharpness": hopjax.sharpness,
    "log_density": hopjax.log_density,
}


@jax.jit
def observe(state, memories, beta, vector):
    values = {name: kernel(state, memories, beta) for name, kernel in KERNELS.items()}
    values["hessian_product"] = hopjax.hessian_product(state, vector, memories, beta)
    values["hessian_quadratic"] = hopjax.hessian_quadratic(state, vector, memories, beta)
    values["log_partition"] = hopjax.log_partition(memories, beta)
    return values


@jax.jit
def differentiate(state, memories, beta):
    return jax.grad(hopjax.energy)(state, memories, beta), jax.jacfwd(hopjax.gradient)(state, memories, beta)


def observed(landscape: Landscape, vector=None, **changes):
    """All observables as float64 numpy arrays; those of changed memories or state if given."""
    values = landscape._asdict() | changes
    vector = landscape.state if vector is None else vector
    return {
        name: np.asarray(value, np.float64)
        for name, value in observe(values["state"], values["memories"], values["beta"], vector.astype(landscape.state.dtype)).items()
    }


def energy_rounding(landscape: Landscape) -> float:
    """A unit of error of the energy, by its docstring eps·(R² + log m/β); ×(8 + √d) below: d products, rounded at random."""
    count, dim = landscape.memories.shape
    return (8 + math.sqrt(dim)) * landscape.eps * (landscape.radius**2 + math.log(count) / float(landscape.beta))


def weight_rounding(landscape: Landscape) -> float:
    """Error of a log-weight: that of two logits, each (8 + √d) eps·βR², and of log-sum-exp itself."""
    count, dim = landscape.memories.shape
    return (8 + math.sqrt(dim)) * landscape.eps * (1 + 2 * landscape.steepness + math.log(count))


# ---- Against mpmath -----------------------------------------------------------------------------------------------------


@hypothesis.given(landscapes(SMALL))
@hypothesis.settings(max_examples=30)
def test_kernels_agree_with_fifty_digits(landscape):
    values, (count, dim), radius = observed(landscape), landscape.memories.shape, landscape.radius
    with mp.workdps(50):
        x, rows, beta = oracles.exact(landscape.state), oracles.exact(landscape.memories), mpf(float(landscape.beta))
        p = oracles.weights(x, rows, beta)
        log_p = np.array([float(mp.log(w)) for w in p])
        mean = np.array(oracles.moved(p, rows), float)
        h = np.array(oracles.hessian(x, rows, beta), float)
        squares = [oracles.dot(row, row) for row in rows]
        log_z = mpf(dim) / 2 * mp.log(2 * mp.pi / beta) + oracles.log_sum_exp([beta * s / 2 for s in squares])
        expected = float(oracles.energy(x, rows, beta)), float(oracles.sharpness(x, rows, beta)), float(log_z)
        density = float(-beta * oracles.energy(x, rows, beta) - log_z)

    energy, sharpness, log_partition = expected
    assert abs(values["energy"] - energy) <= energy_rounding(landscape)
    weight = weight_rounding(landscape)
    np.testing.assert_array_less(abs(values["log_weights"] - log_p), weight + 4 * landscape.eps * abs(log_p))
    # An error δ in log p is expm1(δ) in p, and never more than 1; what underflows is below tiny.
    share = min(1.0, math.expm1(min(weight, 1.0)))
    np.testing.assert_array_less(abs(values["weights"] - np.exp(log_p)), share * np.exp(log_p) + 1e-37)
    drift = 2 * radius * (share + count * landscape.eps)
    assert np.linalg.norm(values["update_map"] - mean) <= drift
    assert np.linalg.norm(values["gradient"] - (np.asarray(landscape.state, float) - mean)) <= drift + 2 * landscape.eps * radius
    # Weights, centring and d or m additions: relative to βR², the size of what is summed.
    curved = (3 * share + (count + dim) * landscape.eps) * landscape.steepness
    assert np.linalg.norm(values["hessian"] - h, 2) <= 4 * curved + 4 * landscape.eps
    # The trace is d less at most 2βR²: it is the rounding of those two numbers besides.
    assert abs(values["hessian_trace"] - np.trace(h)) <= 4 * curved + 4 * landscape.eps * dim
    assert abs(values["sharpness"] - sharpness) <= radius**2 * (8 * curved + (dim + 4) * (dim + 4) ** 0.5 * landscape.eps)
    size = landscape.steepness + dim * abs(math.log(2 * math.pi / float(landscape.beta))) + math.log(count)
    assert abs(values["log_partition"] - log_partition) <= (8 + math.sqrt(dim)) * landscape.eps * size
    assert abs(values["log_density"] - density) <= 2 * (8 + math.sqrt(dim)) * landscape.eps * (2 * size + 1)


def test_density_of_a_state_on_its_memory_loses_nothing_at_large_beta():
    # −βE and log Z are both near 5e7 here, their difference near 20: subtracting them would cost seven digits.
    beta, memories = 1e4, 100 * np.eye(3)
    computed = float(jax.jit(hopjax.log_density)(memories[0], memories, beta))
    closed = 1.5 * math.log(beta / (2 * math.pi)) - math.log(3)
    assert abs(computed - closed) <= 8 * np.finfo(float).eps * abs(closed)


# ---- Laws ---------------------------------------------------------------------------------------------------------------


@hypothesis.given(landscapes())
def test_derivatives_are_derivatives(landscape):
    values, vector = observed(landscape, probe := landscape.rng.standard_normal(landscape.state.shape)), probe
    slope, bending = (np.asarray(value, float) for value in differentiate(*landscape.arguments))
    vector = vector.astype(landscape.state.dtype).astype(float)
    count, dim = landscape.memories.shape
    # The same logits on both sides; a fused multiply-add may round one of them differently: eps·βR² in every weight.
    rounding = 8 * (count + dim) * landscape.eps * (1 + landscape.steepness)
    assert np.linalg.norm(values["gradient"] - slope) <= rounding * landscape.radius
    bend = rounding * landscape.steepness + (8 + dim) * landscape.eps
    assert np.linalg.norm(values["hessian"] - bending) <= bend
    length = np.linalg.norm(vector)
    np.testing.assert_allclose(values["hessian"], values["hessian"].T, rtol=0, atol=bend)
    assert np.linalg.norm(values["hessian_product"] - values["hessian"] @ vector) <= bend * length
    assert abs(values["hessian_quadratic"] - vector @ values["hessian"] @ vector) <= bend * length**2
    assert abs(values["hessian_trace"] - np.trace(values["hessian"])) <= dim * bend
    x = np.asarray(landscape.state, float)
    by_matrix = x @ x * np.trace(values["hessian"]) - x @ values["hessian"] @ x
    assert abs(values["sharpness"] - by_matrix) <= 2 * dim * bend * landscape.radius**2
    np.testing.assert_array_equal(values["gradient"], (landscape.state - values["update_map"].astype(landscape.state.dtype)).astype(float))


@hypothesis.given(landscapes())
def test_energy_lies_between_its_temperature_limits(landscape):
    """−max ≤ soft maximum with sign: β → ∞ gives ½|x|² − max ξ·x, β → 0 the mean overlap and log m/β."""
    values, rounding = observed(landscape), energy_rounding(landscape)
    x, memories, beta = (np.asarray(part, float) for part in landscape.arguments)
    overlaps, half = memories @ x, x @ x / 2
    entropy = math.log(len(memories)) / beta
    assert half - overlaps.max() - entropy - rounding <= values["energy"] <= half - overlaps.max() + rounding
    assert values["energy"] <= half - overlaps.mean() - entropy + rounding  # Jensen: exp is convex
    assert abs(values["weights"].sum() - 1) <= 4 * len(memories) * landscape.eps
    assert (values["weights"] >= 0).all()
    # |p − 1/m| ≤ (e^{2β·spread} − 1)/m, the spread of the overlaps being all that tilts the weights.
    tilt = math.expm1(min(2 * float(beta) * np.ptp(overlaps) + 2 * weight_rounding(landscape), 700))
    assert np.abs(values["weights"] - 1 / len(memories)).max() <= tilt / len(memories) + landscape.eps
    runner_up = np.sort(overlaps)[-2] if len(memories) > 1 else -np.inf
    lead = float(beta) * (overlaps.max() - runner_up) - 2 * weight_rounding(landscape)
    if lead > 0:
        nearest = memories[np.argmax(overlaps)]
        away = 2 * landscape.radius * min(1.0, len(memories) * math.exp(-lead)) + 8 * len(memories) * landscape.eps * landscape.radius
        assert np.linalg.norm(values["update_map"] - nearest) <= away


@hypothesis.given(landscapes())
def test_curvature_is_bounded(landscape):
    """I − βR² ≤ H ≤ I, since 0 ≤ C ≤ R²; and the spectrum of C sums to at most R²."""
    values = observed(landscape)
    count, dim = landscape.memories.shape
    largest = float(np.linalg.norm(np.asarray(landscape.memories, float), axis=1).max())
    rounding = (8 + count + dim) * landscape.eps * (1 + float(landscape.beta) * largest**2)
    spectrum = np.linalg.eigvalsh(values["hessian"])
    assert spectrum.max() <= 1 + rounding
    assert spectrum.min() >= 1 - float(landscape.beta) * largest**2 - rounding
    assert dim - float(landscape.beta) * largest**2 - dim * rounding <= values["hessian_trace"] <= dim + dim * rounding


@hypothesis.given(landscapes())
def test_the_map_descends(landscape):
    values, rounding = observed(landscape), energy_rounding(landscape)
    moved = observed(landscape, state=values["update_map"].astype(landscape.state.dtype))
    # E(x) − E(T(x)) ≥ ½|x − T(x)|²: the concave part lies below its tangent.
    drop = np.sum(values["gradient"] ** 2) / 2
    slack = 2 * rounding + 8 * landscape.eps * landscape.radius**2 * len(landscape.memories)
    assert moved["energy"] <= values["energy"] - drop + slack + landscape.radius**2 * min(1.0, weight_rounding(landscape)) * 2


@hypothesis.given(landscapes(DOUBLE))
def test_symmetries(landscape):
    """Rotation, permutation, translation: E(Qx; XQᵀ) = E(x; X) = E(x; PX), and E(x; X + t) = E(x; X) − t·x."""
    rng, (count, dim) = landscape.rng, landscape.memories.shape
    values, rounding = observed(landscape), energy_rounding(landscape)
    loose = min(1.0, 4 * weight_rounding(landscape))

    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    turned = observed(landscape, state=turn @ landscape.state, memories=landscape.memories @ turn.T)
    # A rotation rounds each coordinate: eps·√d in every overlap, which energy_rounding allows for again.
    assert abs(turned["energy"] - values["energy"]) <= 3 * rounding
    assert np.linalg.norm(turned["update_map"] - turn @ values["update_map"]) <= 8 * landscape.radius * (loose + dim * landscape.eps)
    curved = landscape.steepness * (8 * loose + (count + dim) * 4 * landscape.eps) + 8 * dim * landscape.eps
    assert np.linalg.norm(turned["hessian"] - turn @ values["hessian"] @ turn.T) <= curved
    assert abs(turned["sharpness"] - values["sharpness"]) <= 2 * dim * curved * landscape.radius**2

    order = rng.permutation(count)
    permuted = observed(landscape, memories=landscape.memories[order])
    assert abs(permuted["energy"] - values["energy"]) <= 2 * rounding
    np.testing.assert_allclose(permuted["weights"], values["weights"][order], rtol=0, atol=loose)

    shift = landscape.radius * rng.standard_normal(dim) / math.sqrt(dim)
    shifted = landscape._replace(memories=landscape.memories + shift, radius=landscape.radius + float(np.linalg.norm(shift)))
    moved = observed(shifted)
    assert abs(moved["energy"] - (values["energy"] - shift @ landscape.state)) <= 3 * energy_rounding(shifted)
    loose = min(1.0, 4 * weight_rounding(shifted))
    assert np.linalg.norm(moved["update_map"] - values["update_map"] - shift) <= 8 * shifted.radius * (loose + dim * landscape.eps)
    curved = shifted.steepness * (8 * loose + (count + dim) * 4 * landscape.eps) + 8 * dim * landscape.eps
    assert np.linalg.norm(moved["hessian"] - values["hessian"]) <= curved


@hypothesis.given(landscapes(SINGLE))
def test_single_precision_stays_close_to_double(landscape):
    single = observed(landscape)
    double = observed(landscape._replace(memories=landscape.memories.astype(float), state=landscape.state.astype(float)), landscape.state)
    assert abs(single["energy"] - double["energy"]) <= energy_rounding(landscape)
    loose = min(1.0, math.expm1(min(1.0, weight_rounding(landscape))))
    np.testing.assert_allclose(single["weights"], double["weights"], rtol=0, atol=loose)
    assert np.linalg.norm(single["update_map"] - double["update_map"]) <= 2 * landscape.radius * (loose + 200 * landscape.eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_outputs_have_the_dtype_of_the_inputs(dtype):
    memories = np.eye(3, 4, dtype=dtype)
    outputs = jax.eval_shape(observe, memories[0], memories, 2.0, memories[0])
    assert {value.dtype for value in outputs.values()} == {np.dtype(dtype)}


# ---- The density --------------------------------------------------------------------------------------------------------


def test_partition_function_is_the_integral():
    memories, beta = np.array([[0.7], [-1.1], [2.0]]), 1.7
    energy, density = jax.jit(hopjax.energy), jax.jit(hopjax.log_density)
    integral, error = integrate.quad(lambda x: math.exp(-beta * float(energy(np.array([x]), memories, beta))), -12, 12, epsabs=1e-11)
    log_z = float(jax.jit(hopjax.log_partition)(memories, beta))
    assert abs(integral / math.exp(log_z) - 1) <= max(10 * error / integral, 1e-12)
    total, error = integrate.quad(lambda x: math.exp(float(density(np.array([x]), memories, beta))), -12, 12, epsabs=1e-11)
    assert abs(total - 1) <= max(10 * error, 1e-12)


def test_partition_function_is_the_integral_in_the_plane():
    memories, beta = np.array([[1.0, 0.2], [-0.5, 0.9], [0.1, -1.2]]), 3.0
    # The trapezoidal rule converges geometrically for a Gaussian mixture: σ = 0.58, step 0.1, tails cut at 10σ.
    grid = np.arange(-7, 7, 0.1)
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    energies = np.asarray(jax.jit(jax.vmap(hopjax.energy, (0, None, None)))(points, memories, beta))
    densities = np.asarray(jax.jit(jax.vmap(hopjax.log_density, (0, None, None)))(points, memories, beta))
    log_z = float(jax.jit(hopjax.log_partition)(memories, beta))
    assert abs(special.logsumexp(-beta * energies) + 2 * math.log(0.1) - log_z) <= 1e-11
    np.testing.assert_allclose(densities, -beta * energies - log_z, rtol=0, atol=1e-11)


def test_samples_follow_the_density(key):
    memories, beta, draws = np.array([[0.5], [-1.3]]), 2.5, 20_000
    samples = np.asarray(jax.jit(hopjax.sample_boltzmann, static_argnums=3)(key, memories, beta, (draws,)))
    assert samples.shape == (draws, 1)
    share = special.softmax(0.5 * beta * memories[:, 0] ** 2)

    def distribution(x):
        return sum(weight * stats.norm.cdf(x, centre, beta**-0.5) for weight, centre in zip(share, memories[:, 0], strict=True))

    assert stats.kstest(samples[:, 0], distribution).pvalue >= 1e-6  # the false-alarm rate


def test_samples_have_the_mixture_moments(key):
    rng = np.random.default_rng(3)
    memories, beta, draws = rng.standard_normal((4, 3)), 1.5, 40_000
    samples = np.asarray(jax.jit(hopjax.sample_boltzmann, static_argnums=3)(key, memories, beta, (draws // 8, 8)))
    assert samples.shape == (draws // 8, 8, 3)
    samples = samples.reshape(-1, 3)
    share = special.softmax(0.5 * beta * np.sum(memories**2, axis=1))
    products = np.einsum("ni,nj->nij", samples, samples).reshape(draws, 9)
    second = np.einsum("m,mi,mj->ij", share, memories, memories) + np.eye(3) / beta
    for terms, mean in ((samples, share @ memories), (products, second.reshape(9))):
        z = (terms.mean(axis=0) - mean) / (terms.std(axis=0) / math.sqrt(draws))
        assert np.abs(z).max() < 6  # twelve Gaussians: a false alarm in 4e7 runs


# ---- Compilation, memory, bad input -------------------------------------------------------------------------------------


def test_values_do_not_recompile_and_vmap_is_a_loop():
    rng = np.random.default_rng(0)
    states, memories = rng.standard_normal((4, 5)), rng.standard_normal((3, 5))
    compiled: Any = jax.jit(lambda state, memories, beta: [kernel(state, memories, beta) for kernel in KERNELS.values()])
    rows = [compiled(state, memories, beta) for state, beta in zip(states, (0.1, 1.0, 7.0, 1e3), strict=True)]
    assert compiled._cache_size() == 1
    many = jax.jit(jax.vmap(compiled, (0, None, 0)))(states, memories, np.array([0.1, 1.0, 7.0, 1e3]))
    for i, row in enumerate(rows):
        for alone, batched in zip(row, many, strict=True):
            # Another order of additions: a few eps of β|ξ||x| < 1e4 in the worst row.
            np.testing.assert_allclose(batched[i], alone, rtol=1e-11, atol=1e-11)


def test_without_jit_the_numbers_are_the_same():
    state, memories = jnp.asarray([0.3, -0.2]), jnp.asarray([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.5]])
    values = jax.jit(lambda: [kernel(state, memories, 4.0) for kernel in KERNELS.values()])()
    with jax.disable_jit():
        for kernel, value in zip(KERNELS.values(), values, strict=True):
            np.testing.assert_allclose(kernel(state, memories, 4.0), value, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["energy", "gradient", "hessian_trace", "sharpness", "log_density", "hessian_product"])
def test_no_square_matrix_in_high_dimension(name):
    count, dim = 13, 100_000
    vector, memories = jax.ShapeDtypeStruct((dim,), np.float64), jax.ShapeDtypeStruct((count, dim), np.float64)
    arguments = (vector, vector, memories, 2.0) if name == "hessian_product" else (vector, memories, 2.0)
    analysis: Any = jax.jit(getattr(hopjax, name)).lower(*arguments).compile().memory_analysis()
    # At most a few copies of the memories; a d × d matrix would take 8e10 bytes.
    assert analysis.temp_size_in_bytes <= 3 * 8 * count * dim


@pytest.mark.parametrize("beta", [0.0, -1.0, -0.0, math.nan, math.inf, -math.inf])
def test_a_beta_that_is_no_temperature_gives_nan(beta, key):
    memories = np.eye(3, 4)
    for name, value in observe(memories[0], memories, beta, memories[1]).items():
        assert np.isnan(value).any() if name == "hessian" else np.isnan(value).all(), name
    assert np.isnan(jax.jit(hopjax.sample_boltzmann)(key, memories, beta)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_memory_that_is_not_finite_gives_nan(value, dtype):
    memories = np.eye(3, 4, dtype=dtype)
    memories[2, 1] = value
    values = observe(np.full(4, 0.5, dtype), memories, 2.0, memories[0])
    for name in (
        "energy",
        "weights",
        "log_weights",
        "update_map",
        "gradient",
        "hessian_product",
        "hessian_trace",
        "sharpness",
        "log_density",
    ):
        assert np.isnan(values[name]).all(), name


def test_a_logit_that_overflows_gives_nan():
    memories = np.full((2, 2), 1e19, np.float32)
    assert np.isnan(jax.jit(hopjax.energy)(memories[0], memories, 10.0))


@hypothesis.given(powers(-3, 4))
@hypothesis.settings(max_examples=10)
def test_weights_that_underflow_have_logarithms(beta):
    log_weights = np.asarray(jax.jit(hopjax.log_weights)(np.array([1.0, 0.0]), np.array([[1.0, 0.0], [-1.0, 0.0]]), beta))
    # log p = −log(1 + e^{∓2β}); the sum of the weights is one and rounds absolutely.
    np.testing.assert_allclose(log_weights, -np.logaddexp(0, [-2 * beta, 2 * beta]), rtol=4e-16, atol=4e-16)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_static_mistakes_raise(name):
    kernel, memories = KERNELS[name], jnp.eye(3, 4)
    with pytest.raises(ValueError, match=r"at least one memory.*\(0, 4\)"):
        kernel(memories[0], jnp.zeros((0, 4)), 1.0)
    with pytest.raises(ValueError, match=r"state of shape \(3,\).*\(3, 4\).*need \(4,\)"):
        kernel(memories[:, 0], memories, 1.0)
    with pytest.raises(ValueError, match=r"floating point, got int"):
        kernel(jnp.arange(4), jnp.ones((3, 4), int), 1.0)
    with pytest.raises(ValueError, match=r"state is float32 and memories are float64"):
        kernel(memories[0].astype(jnp.float32), memories, 1.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kernel", [hopjax.log_partition, lambda rows, beta: hopjax.sample_boltzmann(jax.random.key(0), rows, beta)])
def test_static_mistakes_raise_without_a_state(kernel):
    with pytest.raises(ValueError, match="at least one memory"):
        kernel(jnp.zeros((0, 4)), 1.0)
    with pytest.raises(ValueError, match="floating point, got int"):
        kernel(jnp.ones((3, 4), int), 1.0)
