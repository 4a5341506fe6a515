"""Forgetting: exact changes, their second order, and Monte Carlo against quadrature over the rotations themselves."""

import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf
from scipy import integrate

import hopjax
from hopjax import Antithetic, ControlVariate, DenseLaw, Plain, PlanarLaw, cluster
from hopjax.rotation import generator_bound
from tests import oracles
from tests.strategies import DOUBLE, landscapes, powers

EPS = float(np.finfo(float).eps)
ESTIMATORS = (Plain(), Antithetic(), ControlVariate())
ASYMPTOTIC: dict[str, Any] = {"members": 10, "dim": 64, "cosine": 0.5}
energy, energy_change = jax.jit(hopjax.energy), jax.jit(hopjax.energy_change)
paired, second_order = jax.jit(hopjax.paired_energy_change), jax.jit(hopjax.second_order_rise)


def numpy_energy(states, memories, beta):
    """Eq. (1) of many states."""
    logits = beta * states @ memories.T
    top = logits.max(axis=-1)
    return 0.5 * np.sum(states**2, axis=-1) - (top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))) / beta


def plane_average(state, memories, beta, epsilon, sigma, observable=lambda rise: rise):
    """⟨f(ΔE)⟩ in two dimensions, where A is one Gaussian number: quadrature."""
    start = numpy_energy(state, memories, beta)

    def integrand(z):
        angle = epsilon * sigma * z
        turned = np.array(
            [math.cos(angle) * state[0] - math.sin(angle) * state[1], math.sin(angle) * state[0] + math.cos(angle) * state[1]]
        )
        return observable(numpy_energy(turned, memories, beta) - start) * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    return integrate.quad(integrand, -12, 12, epsabs=1e-13, limit=400)[0]


def space_average(state, memories, beta, epsilon, sigma, observable=lambda rise: rise):
    """⟨f(ΔE)⟩ in three dimensions, A = [ω]× with Gaussian ω: Rodrigues' formula under a Gauss–Hermite rule in each component."""
    nodes, shares = np.polynomial.hermite_e.hermegauss(40)
    omega = np.stack(np.meshgrid(nodes, nodes, nodes), -1).reshape(-1, 3)
    share = np.einsum("i,j,k->ijk", shares, shares, shares).reshape(-1) / (2 * math.pi) ** 1.5
    length = np.linalg.norm(omega, axis=1, keepdims=True)
    axis, angle = omega / length, epsilon * sigma * length
    turned = state * np.cos(angle) + np.cross(axis, state) * np.sin(angle) + axis * (axis @ state)[:, None] * (1 - np.cos(angle))
    return share @ observable(numpy_energy(turned, memories, beta) - numpy_energy(state, memories, beta))


# ---- Exact changes ------------------------------------------------------------------------------------------------------


@hypothesis.given(landscapes(DOUBLE))
def test_changes_are_differences_of_energies(landscape):
    """ΔE of E(after) − E(before), antisymmetric and additive over a third set of memories."""
    state, first, beta = landscape.arguments
    second, third = first + 0.3 * landscape.rng.standard_normal(first.shape) * landscape.radius, first[::-1] * 0.5
    radius = max(landscape.radius, float(np.linalg.norm(second, axis=1).max()))
    rounding = (8 + math.sqrt(len(state))) * EPS * (radius**2 + math.log(len(first)) / float(beta))
    there, back = float(energy_change(state, first, second, beta)), float(energy_change(state, second, first, beta))
    assert abs(there + back) <= 2 * rounding
    assert abs(there + float(energy_change(state, second, third, beta)) - float(energy_change(state, first, third, beta))) <= 3 * rounding
    assert abs(there - float(energy(state, second, beta)) + float(energy(state, first, beta))) <= 3 * rounding
    assert float(energy_change(state, first, first, beta)) == 0
    # m copies of every memory lower the energy by β⁻¹ log m.
    doubled = float(energy_change(state, first, np.concatenate([first, first]), beta))
    assert abs(doubled + math.log(2) / float(beta)) <= 3 * rounding


@hypothesis.given(landscapes(tuple(case for case in DOUBLE if case[0] * case[1] <= 21)), powers(-12, -1))
@hypothesis.settings(max_examples=30)
def test_small_moves_keep_their_digits(landscape, size):
    state, memories, beta = landscape.arguments
    moves = size * landscape.radius * landscape.rng.standard_normal(memories.shape)
    with mp.workdps(60):
        x, b = oracles.exact(state), mpf(float(beta))
        before = oracles.exact(memories)
        after = [[u + v for u, v in zip(*rows, strict=True)] for rows in zip(before, oracles.exact(moves), strict=True)]
        exact = float(oracles.energy(x, after, b) - oracles.energy(x, before, b))
        shifts = [abs(float(oracles.dot(row, x))) for row in oracles.exact(moves)]
    # Relative to the largest shift: its own rounding, and that of the weights.
    scale = max(np.linalg.norm(moves, axis=1).max() * np.linalg.norm(state), max(shifts))
    weight = min(1.0, 32 * EPS * (1 + landscape.steepness))
    assert abs(float(paired(state, memories, moves, beta)) - exact) <= (64 * EPS + 2 * weight) * scale + 16 * EPS * min(
        scale, 1 / float(beta)
    )


@pytest.mark.parametrize("exponent", [1e-9, 0.5, 0.999999, 1.000001, 30.0, 1e4])
def test_both_branches_of_the_rise_and_its_slope(exponent):
    p = np.array([0.3, 0.7 - 1e-12, 1e-12])
    shift = np.array([1.0, -0.4, 0.2]) * exponent / 2.0
    value, slope = jax.jit(jax.value_and_grad(hopjax.energy_rise, 1))(p, shift, 2.0)
    with mp.workdps(50):
        terms = [mpf(float(w)) * mp.exp(2 * mpf(float(s))) for w, s in zip(p, shift, strict=True)]
        total = mp.fsum(mpf(float(w)) for w in p)
        exact = -mp.log(mp.fsum(terms) + 1 - total) / 2 if exponent < 1 else -mp.log(mp.fsum(terms)) / 2
        slopes = [float(-term / mp.fsum(terms)) for term in terms]
    assert abs(mpf(float(value)) - exact) <= 8 * EPS * max(abs(float(exact)), float(np.max(np.abs(p * shift))))
    np.testing.assert_allclose(slope, slopes, rtol=64 * EPS * max(1, exponent), atol=1e-300)


def test_equal_norms_make_it_a_density_ratio():
    rng = np.random.default_rng(0)
    before, after, state = (
        rows / np.linalg.norm(rows, axis=-1, keepdims=True) for rows in (rng.standard_normal(s) for s in ((4, 3), (4, 3), (3,)))
    )
    density = jax.jit(hopjax.log_density)
    ratio = float(density(state, after, 5.0)) - float(density(state, before, 5.0))
    assert abs(float(energy_change(state, before, after, 5.0)) + ratio / 5) <= 64 * EPS


# ---- Second order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["plane", "space"])
def test_second_order_is_the_curvature_of_the_average(which):
    """⟨ΔE⟩ = ½ε²σ²[S − (d−1)x·∇E] + O(ε⁴), off a fixed point: halving ε divides the error by 16."""
    rng = np.random.default_rng(4)
    dim, average = (2, plane_average) if which == "plane" else (3, space_average)
    memories, state = rng.standard_normal((4, dim)), rng.standard_normal(dim)
    rise = jax.jit(lambda e: hopjax.second_order_rise(jnp.asarray(state), jnp.asarray(memories), 2.0, epsilon=e, sigma=0.7))
    errors = [average(state, memories, 2.0, e, 0.7) - float(rise(e)) for e in (0.08, 0.04)]
    assert abs(errors[0]) < 0.05 * abs(float(rise(0.08)))
    assert 14 < errors[0] / errors[1] < 18
    assert abs(float(rise(0.08)) / float(rise(0.04)) - 4) <= 8 * EPS


def test_second_order_without_the_gradient_is_wrong_off_a_fixed_point_and_right_on_one():
    rng = np.random.default_rng(4)
    memories, state = jnp.asarray(rng.standard_normal((4, 3))), jnp.asarray(rng.standard_normal(3))

    @jax.jit
    def compare(x):
        return hopjax.second_order_rise(x, memories, 2.0, epsilon=0.1, sigma=0.7), 0.5 * 0.07**2 * hopjax.sharpness(x, memories, 2.0)

    off = compare(state)
    assert abs(float(off[0] / off[1]) - 1) > 0.1
    on = compare(jax.jit(lambda x: hopjax.fixed_point(x, memories, 2.0).state)(state))
    assert abs(float(on[0] / on[1]) - 1) < 1e-11


# ---- Monte Carlo --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "count", "law"),
    [
        ("plane", 1, PlanarLaw()),
        ("space", 4, PlanarLaw()),
        ("space", 2, DenseLaw()),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("plane", 5, PlanarLaw()), ("space", 2, PlanarLaw()), ("plane", 5, DenseLaw()))
        ),
    ],
)
def test_estimates_are_unbiased(key, which, count, law):
    rng = np.random.default_rng(count)
    dim, average = (2, plane_average) if which == "plane" else (3, space_average)
    memories, state = rng.standard_normal((count, dim)), rng.standard_normal(dim)
    beta, epsilon, sigma = 1.5, 0.5, 0.8

    observables = (lambda rise: rise, np.exp, np.square)

    @jax.jit
    def estimate(key, state, memories):
        def run(estimator):
            return hopjax.rotation_average(
                *(key, state, memories, beta),
                epsilon=epsilon,
                sigma=sigma,
                draws=20_000,
                observable=lambda rise: jnp.stack([rise, jnp.exp(rise), rise**2]),
                estimator=estimator,
                law=law,
                batch=3000,  # the last batch is cut
            )

        return [run(estimator) for estimator in ESTIMATORS]

    estimates = estimate(key, state, memories)
    for i, observable in enumerate(observables):
        exact = average(state, memories, beta, epsilon, sigma, observable)
        for estimator, result in zip(ESTIMATORS, estimates, strict=True):
            # 54 comparisons: a false alarm in 1e7 runs.
            assert abs(float(result.mean[i]) - exact) <= 6 * float(result.standard_error[i]), (i, estimator)
            assert 0 < result.standard_error[i] < 0.05
    np.testing.assert_allclose(estimates[0].effective_draws, 20_000, rtol=64 * EPS)  # plain draws are what they are
    # Pairs help; the second order helps only where ε is small, and angles of 0.5 are not.
    assert estimates[1].effective_draws[0] > 20_000
    assert estimates[2].effective_draws[0] > 20_000


@pytest.mark.parametrize(
    "estimator", [ControlVariate(), *(pytest.param(one, marks=pytest.mark.slow) for one in (Plain(), Antithetic()))], ids=repr
)
def test_standard_errors_are_the_spread_of_the_estimates(key, estimator):
    rng = np.random.default_rng(7)
    memories, state = jnp.asarray(rng.standard_normal((3, 6))), jnp.asarray(rng.standard_normal(6))
    run = lambda key: hopjax.average_rise(key, state, memories, 1.0, epsilon=0.3, sigma=1.0, draws=400, estimator=estimator)  # noqa: E731
    results = jax.jit(jax.vmap(run))(jax.random.split(key, 400))
    # The spread of 400 estimates is known to 1/√800 = 3.5 %; five of them, and the errors' own scatter.
    assert abs(float(np.std(results.mean)) / float(np.sqrt(np.mean(np.square(results.standard_error)))) - 1) < 0.2
    plain = jax.jit(lambda key: hopjax.sample_rises(key, state, memories, 1.0, epsilon=0.3, sigma=1.0, draws=40_000))(key)
    expected = float(np.var(plain)) / float(np.mean(np.square(results.standard_error)))
    assert abs(float(np.median(results.effective_draws)) / expected - 1) < 0.25


def test_the_control_variate_sees_the_theorem(key):
    """Preset `asymptotic`, ε = 1e-2: a standard error at least 300 times smaller than plain rotations at the same count."""

    @jax.jit
    def estimate(key):
        rows = cluster.memories(**ASYMPTOTIC)
        state = hopjax.fixed_point(rows[0], rows, 20.0).state
        return [hopjax.average_rise(key, state, rows, 20.0, epsilon=1e-2, sigma=1.0, estimator=estimator) for estimator in ESTIMATORS]

    plain, antithetic, control = estimate(key)
    assert plain.standard_error >= 300 * control.standard_error
    assert 1e5 * 2000 < control.effective_draws < 1e7 * 2000
    exact = 0.5e-4 * 62.9680049
    assert abs(float(control.mean) / exact - 1) < 1e-2  # O(ε²) of the leading order
    assert abs(float(control.mean) - float(antithetic.mean)) <= 6 * float(antithetic.standard_error)


def test_the_residual_of_the_control_variate_is_of_fourth_order(key):
    rows = jax.jit(lambda: cluster.memories(**ASYMPTOTIC))()
    law = PlanarLaw(angle=generator_bound(64, 4e-3, 1.0))  # both ε in one program
    run = jax.jit(jax.vmap(lambda epsilon: hopjax.average_rise(key, rows[0], rows, 20.0, epsilon=epsilon, sigma=1.0, law=law)))
    errors = run(np.array([2e-3, 4e-3])).standard_error
    assert 12 < errors[1] / errors[0] < 20  # 2⁴


def test_odd_orders_cancel_in_pairs(key):
    """Off a fixed point the rise is linear in ε: the plain error is O(ε), that of pairs O(ε²)."""
    rng = np.random.default_rng(1)
    memories, state = jnp.asarray(rng.standard_normal((3, 6))), jnp.asarray(rng.standard_normal(6))
    law = PlanarLaw(angle=generator_bound(6, 2e-4, 1.0))

    @jax.jit
    @jax.vmap
    def errors(epsilon):
        options: dict[str, Any] = {"epsilon": epsilon, "sigma": 1.0, "law": law}
        return [
            hopjax.average_rise(key, state, memories, 1.0, estimator=estimator, **options).standard_error for estimator in ESTIMATORS[:2]
        ]

    ratios = [error[1] / error[0] for error in errors(np.array([1e-4, 2e-4]))]
    np.testing.assert_allclose(ratios, [2, 4], rtol=0.01)


def test_batches_and_laws_estimate_the_same(key):
    rows = jax.jit(lambda: cluster.memories(members=4, dim=8, cosine=0.3))()
    results = []
    for law, batch in ((PlanarLaw(), 7), (PlanarLaw(), 5000), (DenseLaw(), 100)):
        run = jax.jit(
            lambda key, law=law, batch=batch: hopjax.average_rise(key, rows[0], rows, 3.0, epsilon=0.2, sigma=1.0, law=law, batch=batch)
        )
        results.append(run(key))
    means, errors = np.array([r.mean for r in results]), np.array([r.standard_error for r in results])
    centre = np.average(means, weights=errors**-2)
    assert np.abs((means - centre) / errors).max() < 6
    np.testing.assert_allclose(errors / errors.mean(), 1, atol=0.35)  # six sigma of 1000 pairs with a kurtosis of a few


def test_vmap_over_states_is_a_loop(key):
    rows = jax.jit(lambda: cluster.memories(members=4, dim=8, cosine=0.3))()
    run = lambda key, state: hopjax.average_rise(key, state, rows, 3.0, epsilon=0.1, sigma=1.0, draws=40)  # noqa: E731
    many = jax.jit(jax.vmap(run, (None, 0)))(key, rows)
    single: Any = jax.jit(run)
    for i in range(5):
        # The same keys and the same terms: rounding of the rise 1e-16 against its fourth order.
        np.testing.assert_allclose(many.mean[i], single(key, rows[i]).mean, rtol=1e-9)
    assert single._cache_size() == 1


@pytest.mark.parametrize("cosine", [-0.25, 0.35])
def test_samples_have_the_mean_of_the_estimate(key, cosine):
    rows = jax.jit(lambda: cluster.memories(members=5, dim=30, cosine=cosine))()

    @jax.jit
    def both(key, rows):
        keys = jax.random.split(key)
        samples = hopjax.sample_rises(keys[0], rows[0], rows, 6.0, epsilon=0.05, sigma=1.0, draws=4000)
        return samples, hopjax.average_rise(keys[1], rows[0], rows, 6.0, epsilon=0.05, sigma=1.0)

    samples, estimate = both(key, rows)
    error = math.hypot(float(np.std(samples)) / math.sqrt(4000), float(estimate.standard_error))
    assert samples.shape == (4000,)
    assert abs(float(np.mean(samples)) - float(estimate.mean)) <= 6 * error


def test_a_state_at_the_origin_is_not_moved(key):
    rows = jnp.eye(3, 5)
    result = jax.jit(lambda key: hopjax.average_rise(key, jnp.zeros(5), rows, 2.0, epsilon=0.3, sigma=1.0, estimator=Plain()))(key)
    assert result.mean == 0
    assert result.standard_error == 0


def test_single_precision(key):
    single, double = (jax.jit(lambda d=d: cluster.memories(members=4, dim=8, cosine=0.3, dtype=d))() for d in (np.float32, np.float64))
    results = [
        jax.jit(lambda key, rows: hopjax.average_rise(key, rows[0], rows, 3.0, epsilon=0.1, sigma=1.0))(key, rows)
        for rows in (single, double)
    ]
    assert {part.dtype for part in results[0]} == {np.dtype(np.float32)}
    error = math.hypot(float(results[0].standard_error), float(results[1].standard_error))
    assert abs(float(results[0].mean) - float(results[1].mean)) <= 6 * error + 64 * float(np.finfo(np.float32).eps) * float(results[1].mean)


def test_memory_in_a_million_dimensions():
    count, dim = 13, 10**6
    state, memories = jax.ShapeDtypeStruct((dim,), np.float64), jax.ShapeDtypeStruct((count, dim), np.float64)
    run = jax.jit(lambda key, x, rows: hopjax.average_rise(key, x, rows, 8.0, epsilon=1e-5, sigma=1.0))
    analysis: Any = run.lower(jax.random.key(0), state, memories).compile().memory_analysis()
    assert analysis.temp_size_in_bytes <= 5 * 8 * count * dim  # a few copies of the memories, for their QR decomposition


@pytest.mark.slow
def test_memory_is_bounded_by_the_batch():
    state, memories = jax.ShapeDtypeStruct((30,), np.float64), jax.ShapeDtypeStruct((13, 30), np.float64)

    def temporary(draws, batch):
        run = jax.jit(lambda key, x, rows: hopjax.average_rise(key, x, rows, 8.0, epsilon=1e-2, sigma=1.0, draws=draws, batch=batch))
        analysis: Any = run.lower(jax.random.key(0), state, memories).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    few, many = temporary(4000, 500), temporary(40_000, 500)
    # What grows is two numbers a pair, and their copies; not the 6·m numbers of a rotation.
    assert many - few <= 18_000 * 8 * 8
    assert many <= temporary(40_000, 20_000) / 3


# ---- Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [0, 2, 3, 7])
def test_impossible_numbers_of_draws_raise(key, draws):
    with pytest.raises(ValueError, match=rf"draws={draws} must be at least 4 and a multiple of 2 for ControlVariate\(\)"):
        hopjax.average_rise(key, jnp.ones(3), jnp.eye(3), 1.0, epsilon=0.1, sigma=1.0, draws=draws)


def test_other_static_mistakes_raise(key):
    options: dict[str, Any] = {"epsilon": 0.1, "sigma": 1.0}
    with pytest.raises(ValueError, match="dim=1: rotations need at least 2 dimensions"):
        hopjax.average_rise(key, jnp.ones(1), jnp.ones((3, 1)), 1.0, **options)
    with pytest.raises(ValueError, match="at least one memory"):
        hopjax.average_rise(key, jnp.ones(3), jnp.ones((0, 3)), 1.0, **options)
    with pytest.raises(ValueError, match="at least one memory"):
        hopjax.energy_change(jnp.ones(3), jnp.ones((2, 3)), jnp.ones((0, 3)), 1.0)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_raise(key):
    with pytest.raises(ValueError, match=r"need \(3,\)"):
        hopjax.average_rise(key, jnp.ones(4), jnp.eye(3), 1.0, epsilon=0.1, sigma=1.0)
    with pytest.raises(ValueError, match=r"need \(2,\)"):
        hopjax.energy_change(jnp.ones(3), jnp.eye(3), jnp.ones((4, 2)), 1.0)
    with pytest.raises(ValueError, match="state is float32 and memories are float64"):
        hopjax.second_order_rise(jnp.ones(3, jnp.float32), jnp.eye(3), 1.0, epsilon=0.1, sigma=1.0)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_a_beta_that_is_no_temperature_gives_nan(key, beta):
    rows = jnp.eye(3, 4)

    @jax.jit
    def everything(key, beta):
        estimate = hopjax.average_rise(key, rows[0], rows, beta, epsilon=0.1, sigma=1.0, draws=4)
        return [
            *estimate,
            hopjax.energy_change(rows[0], rows, 2 * rows, beta),
            hopjax.paired_energy_change(rows[0], rows, rows, beta),
            hopjax.energy_rise(jnp.ones(3) / 3, jnp.ones(3), beta),
            hopjax.second_order_rise(rows[0], rows, beta, epsilon=0.1, sigma=1.0),
        ]

    assert np.isnan(everything(key, beta)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_memory_that_is_not_finite_gives_nan(key, value):
    rows = np.eye(3, 4)
    rows[2, 1] = value
    run = jax.jit(lambda key, rows: hopjax.average_rise(key, rows[0] + 0.5, rows, 2.0, epsilon=0.1, sigma=1.0, draws=4))
    assert np.isnan(run(key, rows)).all()
    assert np.isnan(energy_change(np.full(4, 0.5), np.eye(3, 4), rows, 2.0))
