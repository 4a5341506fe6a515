"""Samplers on the exact noise function of finite data sets, whose memories, weights and trajectories are known."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from diffusion.samplers import (
    DDIM,
    PNDM,
    Ancestral,
    DPMSolver,
    Listed,
    ProbabilityFlow,
    noise_function,
    stepwise,
    uniform_log_snr,
    uniform_timesteps,
)
from diffusion.schedules import CosineSchedule, LinearSchedule, Prediction
from hopjax.correspondence import mixture_score, posterior_mean
from tests.compiled import quickly

SCHEDULE = LinearSchedule()
DETERMINISTIC = (
    DDIM(7),
    DDIM(7, grid=uniform_log_snr),
    PNDM(7),
    DPMSolver(7),
    DPMSolver(7, grid=uniform_timesteps),
    ProbabilityFlow(1e-9, 1e-9),
)
EVERY = (*DETERMINISTIC, DDIM(7, eta=0.5), Ancestral(7), Ancestral(7, widest=True))


def label(value):
    """A name that is the same in every process: functions are printed with their addresses."""
    return re.sub(r"<function (\w+) at \w+>", r"\1", repr(value))


def exact_noise(memories, schedule=SCHEDULE):
    """ε(x, t) = (x − α E[x₀|x])/σ of the data set."""

    def epsilon(noisy, timestep):
        alpha, sigma = schedule.alpha_sigma(timestep)
        clean = jax.vmap(posterior_mean, in_axes=(0, None, 0, 0))(noisy, memories, alpha, sigma**2)
        return (noisy - alpha[:, None] * clean) / sigma[:, None]

    return epsilon


@functools.partial(quickly, static_argnames=("sampler", "start", "stop", "denoise", "schedule"))
def sample(sampler, memories, noisy, key=None, schedule=SCHEDULE, **options):
    return sampler(exact_noise(memories, schedule), noisy, schedule, key=key, **options)


def nearest(images, memories, within=1e-6):
    distances = np.linalg.norm(np.asarray(images)[:, None] - np.asarray(memories)[None], axis=2)
    # The denoised end of a trajectory is a memory: the others weigh exp(−distance²/2σ²), σ = 0.01.
    assert distances.min(1).max() < within
    return distances.argmin(1)


@pytest.fixture(scope="module")
def basins():
    """Memories, starting noise, where the exact trajectories land, and which of them start away from a boundary."""
    memories = jax.random.normal(jax.random.key(1), (8, 4))
    noisy = jax.random.normal(jax.random.key(2), (400, 4))
    reference = ProbabilityFlow(1e-10, 1e-10)
    land = nearest(sample(reference, memories, noisy).images, memories)
    interior = np.ones(len(noisy), bool)
    for direction in 0.1 * np.concatenate([np.eye(4), -np.eye(4)]):
        interior &= nearest(sample(reference, memories, noisy + direction[None]).images, memories) == land
    assert interior.mean() > 0.6
    assert len(set(land)) == 8
    return memories, noisy, land, interior


@pytest.mark.parametrize(
    ("sampler", "everywhere"),
    [(DDIM(50), 0.98), (DDIM(200), 0.99), (PNDM(50), 0.98), (DPMSolver(20), 0.98), (DPMSolver(50), 0.99), (ProbabilityFlow(), 1.0)],
)
def test_deterministic_samplers_land_on_the_memory_of_the_exact_trajectory(basins, sampler, everywhere, record_property):
    """All of the states that are 0.1 away from a boundary in eight directions, and nearly all of the others."""
    memories, noisy, land, interior = basins
    # The last step of PNDM is not to the denoised image: it extrapolates from four noise estimates.
    within = 1.0 if isinstance(sampler, PNDM) else 1e-6
    agree = nearest(sample(sampler, memories, noisy).images, memories, within) == land
    record_property("fraction", float(agree.mean()))
    assert agree[interior].all()
    assert agree.mean() >= everywhere


def test_the_probability_flow_is_that_of_the_score():
    """The equation in another form, dx/d log α = x + score, solved by SciPy: nothing shared but the score."""
    memories = jax.random.normal(jax.random.key(1), (8, 4))
    noisy = jax.random.normal(jax.random.key(2), (3, 4))
    score = jax.jit(lambda x, a: jax.vmap(mixture_score, in_axes=(0, None, None, None))(x, memories, a, 1 - a**2))
    (first, last), _ = SCHEDULE.alpha_sigma_float64(np.array([999.0, 150.0]))

    def slope(log_alpha, x):
        x = x.reshape(3, 4)
        return np.ravel(x + np.asarray(score(x, np.exp(log_alpha))))

    solution = scipy.integrate.solve_ivp(slope, np.log([first, last]), np.ravel(noisy), method="DOP853", rtol=1e-11, atol=1e-11)
    found = sample(ProbabilityFlow(1e-10, 1e-10), memories, noisy, stop=150, denoise=False)
    # A step's error is 1e-10; some hundreds of steps are taken, and trajectories diverge by a factor of ten or so.
    np.testing.assert_allclose(np.ravel(found.images), solution.y[:, -1], atol=1e-7)


SPAN = {"start": 900, "stop": 300, "denoise": False}


@pytest.fixture(scope="module")
def trajectories(basins):
    """Memories, states at the start of SPAN and where they are at its end."""
    memories, noisy, *_ = basins
    return memories, noisy, sample(ProbabilityFlow(1e-11, 1e-11), memories, noisy, **SPAN).images


def uneven(schedule, start, stop, count):
    """Long and short steps in turn: with equal ones a two-step method need not look at their lengths."""
    nodes = uniform_log_snr(schedule, start, stop, count)
    nodes[1:-1:2] += (nodes[2::2] - nodes[1:-1:2]) / 2
    return nodes


@pytest.mark.parametrize(
    ("method", "order", "grid"),
    [
        *((method, order, grid) for method, order in ((DDIM, 1), (DPMSolver, 2)) for grid in (uniform_log_snr, uniform_timesteps, uneven)),
        (PNDM, 2, uniform_timesteps),
    ],
)
def test_orders_of_convergence(trajectories, method, order, grid):
    memories, noisy, exact = trajectories
    steps = np.array([50, 100, 200])
    errors = [float(jnp.sqrt(jnp.mean((sample(method(int(n), grid=grid), memories, noisy, **SPAN).images - exact) ** 2))) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    # The next order contributes O(1/n) of the error: a few per cent of the slope at these n.
    assert abs(slope - order) < 0.12, (slope, errors)


def test_dpm_solver_is_the_published_algorithm(trajectories):
    """Algorithm 2 of Lu et al. 2022 step by step, on steps of changing length."""
    memories, noisy, _ = trajectories
    nodes = uneven(SCHEDULE, 900.0, 300.0, 8)
    (alphas, sigmas), epsilon = SCHEDULE.alpha_sigma_float64(nodes), jax.jit(exact_noise(memories))
    levels = np.log(alphas / sigmas)
    x, before = np.asarray(noisy), None
    for i in range(7):
        clean = (x - sigmas[i] * np.asarray(epsilon(x, np.full(len(x), nodes[i])))) / alphas[i]
        span, data = levels[i + 1] - levels[i], clean
        if before is not None:
            ratio = (levels[i] - levels[i - 1]) / span
            data = (1 + 1 / (2 * ratio)) * clean - 1 / (2 * ratio) * before
        x, before = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * (np.exp(-span) - 1) * data, clean
    found = sample(DPMSolver(7, grid=uneven), memories, noisy, **SPAN).images
    np.testing.assert_allclose(found, x, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_pndm_is_the_published_algorithm(trajectories, steps):
    """Adams-Bashforth formulas for dz/ds = ε in z = x/α and s = σ/α, where Liu et al. 2022 have them, after an improved Euler step."""
    memories, noisy, _ = trajectories
    nodes = np.linspace(900.0, 300.0, steps + 1)
    (alphas, sigmas), epsilon = SCHEDULE.alpha_sigma_float64(nodes), jax.jit(exact_noise(memories))
    times = sigmas / alphas

    def noise(z, i):
        return np.asarray(epsilon(alphas[i] * z, np.full(len(z), nodes[i])))

    z = np.asarray(noisy) / alphas[0]
    seen: list[np.ndarray] = []
    for i in range(steps):
        seen.insert(0, noise(z, i))
        match seen:
            case [a]:
                mean = (a + noise(z + (times[1] - times[0]) * a, 1)) / 2 if steps > 1 else a
            case [a, b]:
                mean = (3 * a - b) / 2
            case [a, b, c]:
                mean = (23 * a - 16 * b + 5 * c) / 12
            case [a, b, c, d, *_]:
                mean = (55 * a - 59 * b + 37 * c - 9 * d) / 24
        z = z + (times[i + 1] - times[i]) * mean
    found = sample(PNDM(steps), memories, noisy, **SPAN).images
    np.testing.assert_allclose(found, alphas[-1] * z, atol=1e-10)


def test_listed_timesteps_are_the_nodes(trajectories):
    memories, noisy, _ = trajectories
    listed = DDIM(4, grid=Listed((900, 750, 600, 450, 300)))
    np.testing.assert_allclose(sample(listed, memories, noisy, **SPAN).images, sample(DDIM(4), memories, noisy, **SPAN).images, atol=1e-12)


@pytest.mark.parametrize("sampler", [Ancestral(), DDIM(500, eta=1.0)], ids=label)
def test_ancestral_sampling_reproduces_the_weights_of_a_mixture(sampler, key):
    """Memory k stands k + 1 times among the data."""
    places = jnp.array([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5], [0.3, 0.4]])
    multiplicities = np.array([1, 2, 3, 4])
    memories = jnp.repeat(places, multiplicities, axis=0, total_repeat_length=10)
    count = 4000
    noisy, steps = jax.random.split(key)
    found = sample(sampler, memories, jax.random.normal(noisy, (count, 2)), steps)
    assert int(found.evaluations) == (1000 if sampler == Ancestral() else 500)
    seen = np.bincount(nearest(found.images, places), minlength=4)
    weights = multiplicities / 10
    z = (seen - count * weights) / np.sqrt(count * weights * (1 - weights))
    # Four two-sided tests at 4.5 standard errors: a false alarm in 37,000 (the seed is fixed: never twice).
    assert np.abs(z).max() < 4.5, z


@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=label)
@pytest.mark.parametrize("schedule", [SCHEDULE, CosineSchedule()], ids=label)
def test_one_memory_is_solved_exactly_in_any_number_of_steps(sampler, schedule, key):
    """ε is constant along the trajectory x = α μ + σ ε."""
    memory, noise = jax.random.normal(key, (2, 5, 3))
    memory = memory[:1]
    begin, end = (schedule.alpha_sigma_of(jnp.full(5, float(t)), noise) for t in (800, 70))
    found = sample(sampler, memory, begin[0] * memory + begin[1] * noise, schedule=schedule, start=800, stop=70, denoise=False)
    np.testing.assert_allclose(found.images, end[0] * memory + end[1] * noise, atol=1e-7 if isinstance(sampler, ProbabilityFlow) else 1e-11)


@pytest.mark.parametrize("sampler", [DDIM(6, eta=0.5), DDIM(6, eta=1.0), Ancestral(6)], ids=label)
def test_stochastic_samplers_keep_the_marginal_of_one_memory(sampler, key):
    """Whatever η and the steps are, x_s is N(α_s μ, σ_s²) exactly."""
    count = 100_000
    start, steps = jax.random.split(key)
    memory = jnp.array([[0.7]])
    (alpha, end), (sigma, spread) = SCHEDULE.alpha_sigma_float64(np.array([900.0, 200.0]))
    noisy = alpha * memory + sigma * jax.random.normal(start, (count, 1))
    x = np.asarray(sample(sampler, memory, noisy, steps, start=900, stop=200, denoise=False).images)[:, 0]
    # Five standard errors of mean and variance: a false alarm in 900,000 for the two.
    assert abs(x.mean() - end * 0.7) < 5 * spread / count**0.5
    assert abs(x.var() / spread**2 - 1) < 5 * (2 / count) ** 0.5


def test_the_widest_noise_keeps_the_marginal_of_normal_data(key):
    """Of clean images N(0, 1) every x_t is N(0, 1), and E[ε|x] = σ x."""
    count = 100_000
    start, steps = jax.random.split(key)

    def epsilon(x, t):
        return SCHEDULE.alpha_sigma_of(t, x)[1] * x

    noisy = jax.random.normal(start, (count, 1))
    x = jax.jit(lambda k: Ancestral(8, widest=True)(epsilon, noisy, SCHEDULE, key=k, stop=200, denoise=False).images)(steps)
    assert abs(float(jnp.mean(x))) < 5 * count**-0.5
    assert abs(float(jnp.var(x)) - 1) < 5 * (2 / count) ** 0.5


@pytest.mark.parametrize(
    ("sampler", "dtype"), [*((s, jnp.float64) for s in EVERY), (DPMSolver(7), jnp.float32), (ProbabilityFlow(), jnp.float32)], ids=label
)
def test_samplers_share_one_interface(sampler, dtype, key):
    """Images of any shape, dtype kept, evaluations counted as they happen, the noise function traced once or twice."""
    traced, called = [], []
    noisy = jax.random.normal(key, (3, 4, 4, 1), dtype)

    def epsilon(x, t):
        traced.append(x.shape)
        assert x.dtype == t.dtype == dtype
        jax.debug.callback(lambda: called.append(1))
        return jnp.tanh(x) * (t / 1000)[:, None, None, None]

    run = jax.jit(lambda x, k: sampler(epsilon, x, SCHEDULE, key=k))
    found = run(noisy, key)
    traces = len(traced)
    jax.effects_barrier()
    assert found.images.shape == noisy.shape
    assert found.images.dtype == dtype
    assert int(found.evaluations) == len(called)
    if isinstance(sampler, PNDM):
        assert len(called) == sampler.steps + 1 == 8
        assert traces == 1
    elif hasattr(sampler, "steps"):
        assert len(called) == sampler.steps == 7
        assert traces == 2
    again = run(noisy, key)
    other = run(noisy, jax.random.fold_in(key, 1))
    assert len(traced) == traces
    np.testing.assert_array_equal(found.images, again.images)
    assert np.array_equal(found.images, other.images) == (sampler in (*DETERMINISTIC, ProbabilityFlow()))


@pytest.mark.parametrize("prediction", Prediction)
def test_any_parameterisation_gives_the_same_images(prediction, key):
    memories = jax.random.normal(key, (4, 3))
    epsilon = exact_noise(memories)

    def network(x, t):
        alpha, sigma = SCHEDULE.alpha_sigma_of(t, x)
        clean, noise = Prediction.NOISE.split(epsilon(x, t), x, alpha, sigma)
        return prediction.target(clean, noise, alpha, sigma)

    noisy = jax.random.normal(jax.random.fold_in(key, 1), (16, 3))
    expected = sample(DDIM(10), memories, noisy, stop=200, denoise=False).images
    same = noise_function(network, SCHEDULE, prediction)
    found = jax.jit(lambda x: DDIM(10)(same, x, SCHEDULE, stop=200, denoise=False).images)(noisy)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    clipped = jax.jit(lambda x: DDIM(10)(noise_function(network, SCHEDULE, prediction, clip=0.1), x, SCHEDULE).images)(noisy)
    assert float(jnp.abs(clipped).max()) < 0.1 + 1e-9


def test_too_few_steps_of_the_ode_are_not_an_answer(basins):
    memories, noisy, *_ = basins
    assert jnp.isnan(sample(ProbabilityFlow(1e-9, 1e-9, max_steps=5), memories, noisy).images).all()


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (DDIM(0), {}, "at least 1 step, got 0"),
        (DDIM(5, eta=2.0), {}, "eta must lie between 0 and 1"),
        (DDIM(5, eta=0.5), {}, "needs a key"),
        (Ancestral(), {}, "needs a key"),
        (PNDM(0), {}, "at least 1 step, got 0"),
        (DDIM(3, grid=Listed((900, 400, 10))), {"start": 900}, "3 timesteps from 900 to 10 are listed, 3 from 900 to 0 are needed"),
        (DDIM(3, grid=Listed((900, 400, 10))), {"start": 900, "stop": 10, "denoise": False}, "are listed, 4 from 900 to 10 are needed"),
        (DPMSolver(), {"start": 1000}, "999, the schedule's last timestep; got 0 and 1000"),
        (ProbabilityFlow(), {"start": 10, "stop": 20}, "need 0 ≤ stop ≤ start"),
    ],
)
def test_bad_requests_are_refused(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(lambda x, t: x, jnp.ones((2, 3)), SCHEDULE, **options)


def test_samplers_are_values():
    assert dataclasses.replace(DDIM(), steps=7) == DDIM(7)
    assert hash(DPMSolver()) == hash(DPMSolver())


@pytest.mark.parametrize("sampler", [DDIM(7), DDIM(7, eta=0.5), Ancestral(7), PNDM(7), DPMSolver(7), DDIM(1), PNDM(1)], ids=label)
@pytest.mark.parametrize("denoise", [True, False])
def test_steps_from_python_are_the_same_steps(sampler, denoise, key):
    """And the noise function is called with values, once for each evaluation."""
    memories = jax.random.normal(key, (5, 3))
    noisy = jax.random.normal(jax.random.fold_in(key, 1), (2, 3))
    times = []

    def epsilon(x, timestep):
        times.append(float(timestep[0]))
        return exact_noise(memories)(x, timestep)

    found = dataclasses.replace(sampler, scan=stepwise)(epsilon, noisy, SCHEDULE, key=key, denoise=denoise)
    expected = sample(sampler, memories, noisy, key, denoise=denoise)
    np.testing.assert_allclose(found.images, expected.images, rtol=1e-9, atol=1e-9)
    assert found.images.dtype == noisy.dtype
    assert len(times) == int(found.evaluations) == int(expected.evaluations)
    assert times[0] == 999
