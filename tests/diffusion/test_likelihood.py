"""Likelihood by the probability flow, on exact noise functions of normal data and of finite data sets, and on none of either."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from diffusion.likelihood import (
    Draws,
    ExactTrace,
    FlowLogDensity,
    Hutchinson,
    InBatches,
    LogDensity,
    bits_per_dimension,
    clean_log_density,
    intrinsic_forgetting,
)
from diffusion.samplers import ProbabilityFlow, probability_flow
from diffusion.schedules import CosineSchedule, LinearSchedule
from diffusion.variational import VariationalBound
from hopjax.correspondence import beta_at_timestep, kernel_energy, mixture_log_density, posterior_mean
from tests.compiled import quickly

# At its end α = 3e-7: there N(0, I) is off by α |x| |mean| ≈ 1e-6 nats.
NOISY = LinearSchedule(beta_end=0.06)
TIGHT = ProbabilityFlow(1e-9, 1e-9)
EXACT = FlowLogDensity(ExactTrace(), TIGHT)


def mixture_noise(memories, schedule=NOISY):
    """ε(x, t) = (x − α E[x₀|x])/σ of a finite data set."""

    def epsilon(noisy, timestep):
        alpha, sigma = schedule.alpha_sigma(timestep)
        clean = jax.vmap(posterior_mean, in_axes=(0, None, 0, 0))(noisy, memories, alpha, sigma**2)
        return (noisy - alpha[:, None] * clean) / sigma[:, None]

    return epsilon


def normal_noise(mean, covariance, schedule=NOISY):
    """ε(x, t) = σ (α² C + σ² I)⁻¹ (x − α m) of data N(m, C)."""
    values, vectors = np.linalg.eigh(covariance)

    def epsilon(noisy, timestep):
        alpha, sigma = schedule.alpha_sigma_of(timestep, noisy)
        basis = jnp.asarray(vectors, noisy.dtype)
        along = (noisy - alpha * jnp.asarray(mean, noisy.dtype)[None]) @ basis
        return (sigma * along / (alpha**2 * jnp.asarray(values, noisy.dtype)[None] + sigma**2)) @ basis.T

    return epsilon


MEAN = np.array([0.3, -0.5, 0.1, 0.8])
FACTOR = np.random.default_rng(0).normal(size=(4, 4)) / 2
COVARIANCE = FACTOR @ FACTOR.T


@functools.partial(quickly, static_argnames=("log_density", "schedule", "start"))
def normal_log_density(log_density, states, keys, *, start, schedule=NOISY):
    return log_density(normal_noise(MEAN, COVARIANCE, schedule), states, schedule, keys, start=start)


@functools.partial(quickly, static_argnames=("log_density", "schedule", "timestep"))
def clean_mixture(log_density, memories, clean, keys, *, timestep, schedule=NOISY):
    return clean_log_density(log_density, mixture_noise(memories, schedule), clean, schedule, keys, timestep=timestep)


def normal_states(key, count, start, schedule=NOISY):
    """States drawn from p_t, and log p_t of them by SciPy."""
    (alpha,), (sigma,) = schedule.alpha_sigma_float64(np.array([float(start)]))
    exact = scipy.stats.multivariate_normal(alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * np.eye(4))
    states = exact.mean + np.asarray(jax.random.normal(key, (count, 4))) @ np.linalg.cholesky(exact.cov).T
    return jnp.asarray(states), exact.logpdf(states)


@pytest.mark.parametrize(("schedule", "start"), [(NOISY, 0), (CosineSchedule(), 400.5)], ids=["linear", "cosine"])
def test_normal_data(schedule, start, key):
    states, exact = normal_states(key, 8, start, schedule)
    found = normal_log_density(EXACT, states, jax.random.split(key, 8), start=start, schedule=schedule)
    # A hundred steps of 1e-9, or the end of the schedule: α |x| |mean| = 5e-5 × 3 × 1 for the cosine.
    np.testing.assert_allclose(found.mean, exact, atol=3e-4 if schedule != NOISY else 3e-6)
    assert found.values.shape == (8, 1)
    assert np.isnan(found.standard_error).all()


@pytest.mark.parametrize("dim", [2, 8])
def test_finite_data_sets(dim, key):
    memories = jax.random.normal(key, (6, dim))
    clean = memories + 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (6, dim))
    found = clean_mixture(EXACT, memories, clean, jax.random.split(key, 6), timestep=150)
    (alpha,), (sigma,) = NOISY.alpha_sigma_float64(np.array([150.0]))
    exact = jax.vmap(mixture_log_density, in_axes=(0, None, None, None))(alpha * clean, memories, alpha, sigma**2)
    # As a density of clean images it is the data smoothed by σ/α.
    smoothed = jax.vmap(mixture_log_density, in_axes=(0, None, None, None))(clean, memories, 1.0, (sigma / alpha) ** 2)
    np.testing.assert_allclose(exact + dim * np.log(alpha), smoothed, atol=1e-11)
    np.testing.assert_allclose(found.mean, smoothed, atol=3e-6)


def test_any_network_by_the_determinant_of_its_flow(key):
    """A network that is nobody's score, with a derivative in reverse mode only: log p = log N(end) + log |∂end/∂y|."""
    schedule, mixing = LinearSchedule(), jnp.array([[0.9, -1.1], [0.4, 0.3]])

    @jax.custom_vjp
    def layer(x):
        return jnp.tanh(x @ mixing)

    layer.defvjp(lambda x: (layer(x), x), lambda x, v: ((v * (1 - jnp.tanh(x @ mixing) ** 2)) @ mixing.T,))

    def epsilon(x, t):
        return layer(x) * (t / 1000)[:, None]

    states, step = jax.random.normal(key, (5, 2)), 1e-4
    found = jax.jit(lambda x, k: EXACT(epsilon, x, schedule, k, start=100))(states, jax.random.split(key, 5))
    moved = states[:, None] + step * jnp.array([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])[None]
    flow = jax.jit(lambda x: ProbabilityFlow(1e-12, 1e-12).integrate(probability_flow(epsilon, schedule), x, schedule, start=100, stop=999))
    ends = np.asarray(flow(moved.reshape(-1, 2))[0]).reshape(5, 5, 2)
    jacobian = np.stack([ends[:, 1] - ends[:, 2], ends[:, 3] - ends[:, 4]], axis=2) / (2 * step)
    expected = scipy.stats.norm.logpdf(ends[:, 0]).sum(1) + np.log(np.abs(np.linalg.det(jacobian)))
    # Differences: h² third derivatives, and 1e-12 × steps / h.
    np.testing.assert_allclose(found.mean, expected, atol=1e-6)


def test_the_standard_error_of_two_draws():
    found = Draws(jnp.array([[1.0, 3.0], [2.0, 2.0]]), jnp.ones(2, int))
    np.testing.assert_array_equal(found.mean, [2, 2])
    np.testing.assert_allclose(found.standard_error, [1, 0], rtol=1e-15)  # √2/√2


def test_probes_are_unbiased_and_their_standard_error_is_right(key):
    count = 64
    states, exact = normal_states(key, count, 100)
    found = normal_log_density(FlowLogDensity(Hutchinson(32), ProbabilityFlow(1e-7, 1e-7)), states, jax.random.split(key, count), start=100)
    assert found.values.shape == (count, 32)
    assert float(found.standard_error.min()) > 0.01
    z = (found.mean - exact) / found.standard_error
    # Student's t of 31 degrees: the mean square of 64 is 1.07 ± 0.2; 5 deviations, for each and for the sum.
    assert float(jnp.abs(z).max()) < 5
    assert abs(float(z.mean())) < 5 / count**0.5
    assert 0.3 < float(jnp.mean(z**2)) < 2.1


def test_in_one_dimension_a_sign_is_exact(key):
    memories, clean = jax.random.normal(key, (4, 1)), jax.random.normal(jax.random.fold_in(key, 1), (5, 1))
    probed = clean_mixture(FlowLogDensity(Hutchinson(3), TIGHT), memories, clean, jax.random.split(key, 5), timestep=300)
    (alpha,), (sigma,) = NOISY.alpha_sigma_float64(np.array([300.0]))
    exact = jax.vmap(mixture_log_density, in_axes=(0, None, None, None))(clean, memories, 1.0, (sigma / alpha) ** 2)
    np.testing.assert_allclose(probed.values, np.broadcast_to(exact[:, None], (5, 3)), atol=3e-6)
    assert float(probed.standard_error.max()) < 1e-8


def test_an_image_has_the_random_numbers_of_its_key(key):
    """Whatever its place and its neighbours are, and whatever the model is."""
    estimate = FlowLogDensity()
    states, keys = jax.random.normal(key, (4, 4)), jax.random.split(key, 4)
    found, again = (normal_log_density(estimate, states, keys, start=200) for _ in range(2))
    np.testing.assert_array_equal(found.values, again.values)
    turned = normal_log_density(estimate, states[::-1], keys[::-1], start=200)
    np.testing.assert_allclose(turned.values[::-1], found.values, atol=1e-9)  # the same steps, as the batch is the same
    other = normal_log_density(estimate, states, keys[::-1], start=200)
    assert float(jnp.abs(other.values - found.values).max(axis=1).min()) > 1e-3
    same = intrinsic_forgetting(found, again, NOISY, timestep=200)
    assert float(jnp.abs(same.values).max()) == 0
    assert float(same.standard_error.max()) == 0


@pytest.fixture(scope="module")
def changed():
    """Memories before and after a change, states near the old ones, and their rise by hopjax's energies at timestep 300."""
    before = jax.random.normal(jax.random.key(1), (6, 3))
    after = jnp.concatenate([before[:4], jax.random.normal(jax.random.key(2), (5, 3))])
    clean = before + 0.05 * jax.random.normal(jax.random.key(3), (6, 3))
    beta = float(beta_at_timestep(300, NOISY.alphas_cumprod(jnp.float64)))
    energy = jax.vmap(kernel_energy, in_axes=(0, None, None))
    # Kernel energies are not normalised by the number of memories; densities are.
    rise = energy(clean, after, beta) - energy(clean, before, beta) + math.log(9 / 6) / beta
    return before, after, clean, np.asarray(rise)


@pytest.mark.parametrize(("divergence", "flow"), [(ExactTrace(), TIGHT), (Hutchinson(64), ProbabilityFlow())], ids=["exact", "probes"])
def test_intrinsic_forgetting_is_the_rise_of_the_energy(changed, divergence, flow, key):
    before, after, clean, rise = changed
    keys = jax.random.split(key, 6)
    old, new = (clean_mixture(FlowLogDensity(divergence, flow), data, clean, keys, timestep=300) for data in (before, after))
    found = intrinsic_forgetting(old, new, NOISY, timestep=300)
    np.testing.assert_array_equal(found.evaluations, old.evaluations + new.evaluations)
    if divergence == ExactTrace():
        np.testing.assert_allclose(found.mean, rise, atol=3e-6)
        return
    assert np.all(np.abs(found.mean - rise) < 5 * found.standard_error + 1e-3)
    # The point of equal keys: probes that are not shared would be as noisy as the two likelihoods together.
    apart = clean_mixture(FlowLogDensity(divergence, flow), after, clean, jax.random.split(jax.random.fold_in(key, 1), 6), timestep=300)
    unpaired = intrinsic_forgetting(old, apart, NOISY, timestep=300)
    assert float(jnp.median(found.standard_error / unpaired.standard_error)) < 0.8


def test_tolerances_are_kept_and_evaluations_counted(key):
    states, exact = normal_states(key, 8, 100)
    keys, first = jax.random.split(key, 8), 0
    for tolerance in (1e-3, 1e-6):
        found = normal_log_density(FlowLogDensity(ExactTrace(), ProbabilityFlow(tolerance, tolerance)), states, keys, start=100)
        evaluations = int(found.evaluations[0])
        # Each step's error is below tolerance × (1 + size), with sizes up to 10 nats.
        assert float(jnp.abs(found.mean - exact).max()) < 11 * tolerance * evaluations / 6 + 3e-6
        first = first or evaluations
    assert evaluations > first
    # Of order 5: three digits more for 10^(3/5) = 4 times the steps; of order 2 it would be 30 times.
    assert evaluations < 8 * first


def test_every_array_and_every_image_meets_the_tolerances():
    """Of four states only one moves: it decides on the steps."""
    moving = jnp.array([[0.0], [1.0]])

    def field(time, states):
        return jnp.cos(20 * time) * moving, jnp.zeros_like(states[1])

    solve = jax.jit(lambda *states: ProbabilityFlow(1e-8, 1e-8).integrate(field, states, NOISY, start=100, stop=900))
    (moved, still), _ = solve(jnp.zeros((2, 1)), jnp.ones((2, 3)))
    alphas, sigmas = NOISY.alpha_sigma_float64(np.array([100.0, 900.0]))
    first, last = np.sin(20 * np.log(alphas / sigmas)) / 20
    np.testing.assert_allclose(moved, (last - first) * moving, atol=1e-5)  # a thousand steps of 1e-8
    np.testing.assert_array_equal(still, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_images_of_any_shape_and_precision(dtype, key):
    called, shape = [], (4, 2, 2, 1)
    plain = normal_noise(MEAN, COVARIANCE)

    def epsilon(x, t):
        assert x.dtype == t.dtype == dtype
        jax.debug.callback(lambda: called.append(1))
        return plain(x.reshape(4, 4), t).reshape(shape)

    states, _ = normal_states(key, 4, 200)
    keys, estimate = jax.random.split(key, 4), FlowLogDensity()
    found = jax.jit(lambda x, k: estimate(epsilon, x, NOISY, k, start=200))(states.astype(dtype).reshape(shape), keys)
    jax.effects_barrier()
    assert found.values.dtype == found.mean.dtype == found.standard_error.dtype == dtype
    assert found.evaluations.shape == (4,)
    assert np.all(found.evaluations == len(called))
    flat = normal_log_density(estimate, states, keys, start=200)
    # Steps of 1e-5 × (1 + 10 nats), some ten of them; the rounding of float32 is below that.
    np.testing.assert_allclose(found.values, flat.values, atol=2e-3 if dtype == jnp.float32 else 1e-9)


def test_what_fails_is_not_a_number(key):
    states, keys = jax.random.normal(key, (4, 4)), jax.random.split(key, 4)
    short = FlowLogDensity(ExactTrace(), ProbabilityFlow(1e-9, 1e-9, max_steps=5))
    assert jnp.isnan(normal_log_density(short, states, keys, start=100).values).all()
    whole = normal_log_density(FlowLogDensity(), states, keys, start=200)
    broken = normal_log_density(FlowLogDensity(), states.at[2, 1].set(jnp.inf), keys, start=200)
    assert jnp.isnan(broken.values[2]).all()
    np.testing.assert_allclose(broken.mean[np.array([0, 1, 3])], whole.mean[np.array([0, 1, 3])], atol=1e-3)


def unused(x, t):
    raise AssertionError("the model is known")


@dataclasses.dataclass(frozen=True)
class Normal(LogDensity):
    """Independent pixels N(mean, width²) around α × mean: known, and no network needed."""

    mean: float
    width: float

    def __call__(self, epsilon, states, schedule, keys, *, start=0):
        (alpha,), (sigma,) = schedule.alpha_sigma_float64(np.array([float(start)]))
        deviation = math.hypot(alpha * self.width, sigma)
        logs = jax.scipy.stats.norm.logpdf(states, float(alpha) * self.mean, deviation)
        return Draws(jnp.sum(logs, axis=tuple(range(1, states.ndim)))[:, None], jnp.full(len(states), 7))


@pytest.mark.parametrize(("mean", "width", "timestep"), [(0.1, 0.4, 0), (-0.9, 0.003, 0), (0.1, 0.05, 80)])
def test_bits_of_bytes_against_quadrature(mean, width, timestep, key):
    """Bits per dimension of bytes under independent normal pixels, whose integrals over bins SciPy knows."""
    centre = round((mean + 1) * 127.5)
    images = np.clip(centre + np.arange(-8, 8).reshape(8, 2), 0, 255).astype(np.uint8)
    keys, draws = jax.random.split(key, 8), 400
    model = Normal(mean, width)
    found = jax.jit(lambda i, k: bits_per_dimension(model, unused, i, NOISY, k, timestep=timestep, draws=draws, dtype=jnp.float64))(
        jnp.asarray(images), keys
    )
    (alpha,), (sigma,) = NOISY.alpha_sigma_float64(np.array([float(timestep)]))
    pixel = scipy.stats.norm(mean, math.hypot(width, sigma / alpha))

    def bits(byte):
        low, high = (byte - 0.5) / 127.5 - 1, (byte + 0.5) / 127.5 - 1
        integral, _ = scipy.integrate.quad(pixel.logpdf, low, high)
        return -(integral / (high - low) + np.log(high - low)) / np.log(2), -np.log2(pixel.cdf(high) - pixel.cdf(low))

    expected, ideal = np.mean([[bits(int(byte)) for byte in row] for row in images], axis=1).T
    z = (np.asarray(found.mean) - expected) / np.asarray(found.standard_error)
    assert np.abs(z).max() < 5
    assert 0.1 < np.mean(z**2) < 3.5  # eight squares
    assert np.all(expected >= ideal - 1e-6)  # Jensen; the tails cancel in SciPy's differences
    assert found.values.shape == (8, draws)
    assert np.all(found.evaluations == 7 * draws)


def test_bits_by_the_flow(key):
    """The same number through the network: bytes, noise function, solver."""
    images = jax.random.randint(key, (3, 2, 2, 1), 90, 170).astype(jnp.uint8)
    keys = jax.random.split(key, 3)

    def epsilon(x, t):
        alpha, sigma = NOISY.alpha_sigma_of(t, x)
        return sigma * (x - alpha * 0.1) / (alpha**2 * 0.16 + sigma**2)

    def bits(log_density, dtype):  # two draws, of which each probes anew
        return jax.jit(lambda i, k: bits_per_dimension(log_density, epsilon, i, NOISY, k, draws=2, dtype=dtype))(images, keys)

    known, flow, single = (
        bits(Normal(0.1, 0.4), jnp.float64),
        bits(FlowLogDensity(Hutchinson(1), ProbabilityFlow(1e-7, 1e-7)), jnp.float64),
        bits(Normal(0.1, 0.4), jnp.float32),
    )
    np.testing.assert_allclose(flow.values, known.values, atol=1e-5)
    assert single.values.dtype == jnp.float32
    # Other random numbers in float32: a u of a bin among a hundred moves a pixel's log p by a hundredth of a nat.
    np.testing.assert_allclose(single.values, known.values, atol=0.02)


def test_batches_are_compiled_once_for_both_models(key, tmp_path):
    traced: list[tuple[int, ...]] = []
    seen: list[int] = []

    def measure(memories, images, keys):
        traced.append(images.shape)
        return clean_log_density(VariationalBound(8, 2), mixture_noise(memories), images, NOISY, keys, timestep=300)

    before, after = (jax.random.normal(jax.random.fold_in(key, i), (6, 3)) for i in range(2))
    file = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.float64, (7, 3))
    file[:] = jax.random.normal(key, (7, 3))
    over = InBatches(measure, 3)
    old, new = (over(data, file, key=key, progress=seen.append) for data in (before, after))
    assert traced == [(3, 3)]
    assert seen == 2 * [3, 3, 1]
    assert old.values.shape == (7, 2)
    assert float(jnp.abs(old.values - new.values).max()) > 0.1
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(7))
    whole = clean_mixture(VariationalBound(8, 2), before, jnp.asarray(file), keys, timestep=300)
    np.testing.assert_allclose(old.values, whole.values, rtol=1e-9)
    assert over(before, file[:1], key=key).values.shape == (1, 2)
    assert traced == [(3, 3), (1, 3)]  # fewer images than a batch are not filled up to one


def refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_requests_are_refused(key):
    x, keys = jnp.ones((2, 3)), jax.random.split(key, 2)
    draws = Draws(jnp.ones((2, 4)), jnp.ones(2, int))
    for start in (-1, 999, 1e6):
        refused("must be at least 0 and below 999", lambda start=start: FlowLogDensity()(lambda x, t: x, x, NOISY, keys, start=start))
        refused("must be at least 0 and below 999", lambda start=start: intrinsic_forgetting(draws, draws, NOISY, timestep=start))
    refused("at least 1 probe, got 0", lambda: Hutchinson(0))
    refused(
        r"shapes \(2, 4\) and \(2, 3\)", lambda: intrinsic_forgetting(draws, Draws(jnp.ones((2, 3)), draws.evaluations), NOISY, timestep=5)
    )
    refused("at least 1 draw, got 0", lambda: bits_per_dimension(Normal(0, 1), unused, jnp.zeros((2, 3), jnp.uint8), NOISY, keys, draws=0))
    refused("at least 1 image, got size = 0", lambda: InBatches(lambda p, x, k: draws, 0))
    over = InBatches[int](lambda p, x, k: draws, 2)
    refused("0 images in batches of 2: need one or more", lambda: over(0, np.ones((0, 3)), key=key))
