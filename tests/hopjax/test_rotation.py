"""The rotation ensemble: matrices, the planar law against closed forms and against the dense law, truncation, bounds."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy import linalg, stats

import hopjax
from hopjax import DenseLaw, PlanarLaw, cluster
from hopjax.rotation import Law, generator_bound
from tests.strategies import powers

EPS = float(np.finfo(float).eps)
LAWS: tuple[Law, ...] = (DenseLaw(), PlanarLaw())
LEVEL = 1e-6  # false-alarm rate of a Kolmogorov–Smirnov test


def planar(dim, epsilon, sigma=1.0, *, size=None, dtype=float):
    return jax.jit(lambda keys: jax.vmap(lambda k: hopjax.planar_rotation(k, dim, epsilon, sigma, size=size, dtype=dtype))(keys))


def lanczos_size(dim, epsilon, sigma, dtype=float):
    return hopjax.lanczos_size(dim, generator_bound(dim, epsilon, sigma), dtype)


def entries(keys, dim, size):
    """The χ-distributed entries below the diagonal that `planar_rotation` draws from these keys at σ = 1."""
    freedom = jnp.asarray(range(dim - 1, dim - size, -1), float)
    return np.asarray(jax.jit(jax.vmap(lambda key: jnp.sqrt(jax.random.chisquare(key, freedom, (size - 1,)))))(keys))


def assert_same_mean(a, b):
    """Two-sample z below 6: a false alarm in 5e8 comparisons."""
    assert abs(a.mean() - b.mean()) <= 6 * math.sqrt(a.var() / len(a) + b.var() / len(b))


# ---- Matrices -----------------------------------------------------------------------------------------------------------


def test_scales_and_displacement():
    assert hopjax.unit_entries(7) == 1
    assert hopjax.unit_displacement(5) == 0.5
    assert hopjax.half_difference(9) == math.sqrt(0.5)
    assert hopjax.displacement(50, 0.02, math.sqrt(0.5)) == pytest.approx(0.02 * math.sqrt(49 / 2), rel=4 * EPS)
    assert hopjax.displacement(10**6, 0.3, hopjax.unit_displacement(10**6)) == pytest.approx(0.3, rel=4 * EPS)
    with pytest.raises(ValueError, match="dim=1: rotations need at least 2 dimensions"):
        hopjax.unit_displacement(1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_generators_are_antisymmetric_with_the_variance_asked_for(key, dtype):
    generator = np.asarray(jax.jit(lambda key: hopjax.antisymmetric(key, 200, 0.3, dtype=dtype))(key))
    assert generator.dtype == dtype
    np.testing.assert_array_equal(generator, -generator.T)
    above = generator[np.triu_indices(200, 1)]
    assert stats.kstest(above, stats.norm(0, 0.3).cdf).pvalue >= LEVEL


def test_half_difference_is_the_law_of_a_difference(key):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((300, 300))
    omega = ((w - w.T) / 2)[np.triu_indices(300, 1)]
    drawn = np.asarray(jax.jit(lambda key: hopjax.antisymmetric(key, 300, hopjax.half_difference(300)))(key))
    assert stats.ks_2samp(omega, drawn[np.triu_indices(300, 1)]).pvalue >= LEVEL


@pytest.mark.parametrize("epsilon", [0.01, 3.0])
def test_rotations_are_matrix_exponentials(key, epsilon):
    generator = jax.jit(lambda key: hopjax.antisymmetric(key, 12))(key)
    turn = np.asarray(jax.jit(hopjax.rotation)(generator, epsilon))
    size = epsilon * np.linalg.norm(generator, 2)
    np.testing.assert_allclose(turn, linalg.expm(epsilon * np.asarray(generator)), rtol=0, atol=64 * EPS * max(1, size))
    np.testing.assert_allclose(turn @ turn.T, np.eye(12), rtol=0, atol=64 * EPS * max(1, size))
    assert np.linalg.det(turn) > 0


@functools.cache
def law_of_energy(dim):
    @jax.jit
    def compare(key, state, memories, beta, epsilon):
        turn = hopjax.rotation(hopjax.antisymmetric(key, dim), epsilon)
        return hopjax.energy(state, memories @ turn.T, beta), hopjax.energy(turn.T @ state, memories, beta)

    return compare


@hypothesis.given(st.sampled_from([2, 5, 16]), st.integers(0, 2**32 - 1), powers(-3, 4), powers(-3, 3), powers(-8, 1))
def test_rotating_memories_is_rotating_the_state_back(dim, seed, beta, norm, epsilon):
    """Eq. (17): E(x; RX) = E(Rᵀx; X), for orthogonal R to the rounding of an expm."""
    rng = np.random.default_rng(seed)
    memories, state = norm * rng.standard_normal((4, dim)), norm * rng.standard_normal(dim)
    rotated, turned = law_of_energy(dim)(jax.random.key(seed % 2**31), state, memories, beta, epsilon)
    radius = max(np.linalg.norm(memories, axis=1).max(), np.linalg.norm(state))
    # expm is orthogonal to 64 eps·max(1, ε‖A‖), as the test above holds it to; ‖A‖ < 2√d + 6.
    slack = 64 * EPS * max(1, epsilon * (2 * math.sqrt(dim) + 6)) * dim
    assert abs(float(rotated) - float(turned)) <= slack * (radius**2 + math.log(4) / beta)


# ---- The planar law -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-8, 1.5])
def test_in_the_plane_the_angle_is_the_entry(key, epsilon):
    draw = planar(2, epsilon, 0.7)(jax.random.split(key, 1000))
    angle = epsilon * np.asarray(draw.speed)
    # Angles of 30·3 are exponentiated in stages, each of which rounds.
    stages = 1 + epsilon * 0.7 * 9
    np.testing.assert_allclose(draw.versine, 2 * np.sin(angle / 2) ** 2, rtol=64 * EPS if epsilon <= 0.1 else 0, atol=32 * EPS * stages)
    np.testing.assert_allclose(draw.sine, np.abs(np.sin(angle)), rtol=0, atol=32 * EPS * stages)
    assert stats.kstest(np.asarray(draw.speed) / 0.7, stats.chi(1).cdf).pvalue >= LEVEL


def test_in_space_it_is_rodrigues(key):
    epsilon, keys = 1.2, jax.random.split(key, 4000)
    draw, (across, along) = planar(3, epsilon)(keys), entries(keys, 3, 3).T
    # A = [ω]×: |Ax|² = |ω|² − (ω·x)², so versine = (1 − cos ε|ω|)·|Ax|²/|ω|².
    omega = np.hypot(across, along)
    versine = 2 * np.sin(epsilon * omega / 2) ** 2 * (across / omega) ** 2
    np.testing.assert_allclose(draw.versine, versine, rtol=0, atol=256 * EPS)
    # The law, from Gaussian ω without any tridiagonal matrix.
    w = np.random.default_rng(0).standard_normal((4000, 3))
    length = np.linalg.norm(w, axis=1)
    independent = 2 * np.sin(epsilon * length / 2) ** 2 * (1 - (w[:, 0] / length) ** 2)
    assert stats.ks_2samp(draw.versine, independent).pvalue >= LEVEL


@pytest.mark.parametrize(("dim", "epsilon"), [(5, 1.0), (10**6, 5e-3)])
def test_cosine_and_sine_are_those_of_one_angle(key, dim, epsilon):
    draw = planar(dim, epsilon)(jax.random.split(key, 200))
    versine, sine = np.asarray(draw.versine), np.asarray(draw.sine)
    bound = epsilon * (2 * math.sqrt(dim) + 6)
    # sin² = versine·(2 − versine), relatively while the angle is small; stages round one after the other.
    np.testing.assert_allclose(sine**2, versine * (2 - versine), rtol=0, atol=256 * EPS * max(1, bound) * min(1, bound**2))
    assert (versine >= 0).all()
    assert (versine <= 2 + 64 * EPS * max(1, bound)).all()
    assert (sine >= 0).all()


@pytest.mark.parametrize(("dim", "epsilon"), [(50, 1e-8), (10**6, 1e-8), (20, 0.6)])
def test_versines_keep_their_relative_accuracy(key, dim, epsilon):
    keys = jax.random.split(key, 8)
    size = lanczos_size(dim, epsilon, 1.0)
    # More vectors for the reference: truncation must not show.
    reference_size = min(dim, size + 6)
    draw, drawn = planar(dim, epsilon)(keys), entries(keys, dim, reference_size)
    np.testing.assert_allclose(draw.speed, drawn[:, 0], rtol=4 * EPS)
    for versine, sine, row in zip(np.asarray(draw.versine), np.asarray(draw.sine), drawn, strict=True):
        with mp.workdps(50):
            block = mp.zeros(reference_size)
            for i, entry in enumerate(row):
                block[i + 1, i], block[i, i + 1] = mpf(float(entry)) * mpf(epsilon), -mpf(float(entry)) * mpf(epsilon)
            column = mp.expm(block)[:, 0]
            exact, length = 1 - column[0], mp.sqrt(mp.fsum(column[i] ** 2 for i in range(1, reference_size)))
        # Terms of both signs are added: e^{angle} of them per stage, few stages.
        bound = max(1, epsilon * (2 * math.sqrt(dim) + 6))
        assert abs(mpf(float(versine)) - exact) <= 128 * EPS * bound**2 * exact
        assert abs(mpf(float(sine)) - length) <= 128 * EPS * bound * max(length, mpf(0.01) * bound * epsilon)


@pytest.mark.parametrize(("dim", "epsilon"), [(1000, 0.01), pytest.param(64, 0.2, marks=pytest.mark.slow)])
def test_more_lanczos_vectors_change_nothing(key, dim, epsilon):
    keys, size = jax.random.split(key, 50), lanczos_size(dim, epsilon, 1.0)
    assert size < dim
    draw, longer = planar(dim, epsilon)(keys), planar(dim, epsilon, size=size + 4)(keys)
    np.testing.assert_array_equal(draw.speed, longer.speed)
    bound = max(1.0, epsilon * (2 * math.sqrt(dim) + 6))
    np.testing.assert_allclose(draw.versine, longer.versine, rtol=256 * EPS * bound)
    np.testing.assert_allclose(draw.sine, longer.sine, rtol=0, atol=64 * EPS * bound)
    # And fewer do: the size is needed, not generous beyond use.
    shorter = planar(dim, epsilon, size=max(2, size // 2))(keys)
    assert np.abs(np.asarray(shorter.versine) / np.asarray(draw.versine) - 1).max() > 256 * EPS * bound


@hypothesis.given(st.integers(2, 10**6), powers(-8, 0.5), powers(-3, 0))
def test_sizes_are_within_their_bounds(dim, displacement, sigma):
    epsilon = displacement / (sigma * math.sqrt(dim - 1))
    size = lanczos_size(dim, epsilon, sigma)
    assert 2 <= size <= dim
    assert lanczos_size(dim, epsilon, sigma, np.float32) <= size
    if size < dim:
        angle = epsilon * sigma * (2 * math.sqrt(dim) + 6)
        # (angle)^{2m}/(2m)! against the versine's leading angle²/2.
        assert 2 * size * math.log(angle) - math.lgamma(2 * size + 1) <= math.log(EPS * angle**2 / 2) + 1e-9


def test_single_precision(key):
    keys = jax.random.split(key, 100)
    draw = planar(50, 0.02, dtype=jnp.float32)(keys)
    assert {part.dtype for part in draw} == {np.dtype(np.float32)}
    angle_squared = np.asarray(draw.versine, float) * (2 - np.asarray(draw.versine, float))
    np.testing.assert_allclose(np.asarray(draw.sine, float) ** 2, angle_squared, rtol=64 * float(np.finfo(np.float32).eps))


# ---- Both laws ----------------------------------------------------------------------------------------------------------

SETTINGS = {  # (memories, state scale, ε): fewer memories than dimensions, exactly d − 1, as many, more, d = 2, duplicates, large angles
    "fewer": ((3, 8), 0.15),
    "one less": ((4, 5), 0.4),
    "as many": ((5, 5), 0.4),
    "more": ((9, 4), 0.3),
    "plane": ((1, 2), 0.8),
    "large angles": ((3, 6), 1.2),
    "duplicates": ((4, 9), 0.2),
}


def setting(name):
    shape, epsilon = SETTINGS[name]
    rng = np.random.default_rng(len(name))
    memories, state = rng.standard_normal(shape), rng.standard_normal(shape[1])
    if name == "duplicates":
        memories[1:3] = memories[0]
    return memories, state, epsilon


# Those that are quickest to tell the laws apart stand for the others in the fast tests.
FEW = ("fewer", "more", "plane")


@pytest.mark.parametrize("name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS])
def test_the_two_laws_agree(key, name):
    memories, state, epsilon = setting(name)

    @jax.jit
    def moves(key, state, memories):
        keys = jax.random.split(key)
        return [law.sampler(state, memories, epsilon=epsilon, sigma=0.8)(k, 4000) for law, k in zip(LAWS, keys, strict=True)]

    dense, flat = ([np.asarray(part) for part in law] for law in moves(key, state, memories))
    probe = np.random.default_rng(1).standard_normal(len(memories))  # a joint statistic of all memories
    for a, b in zip(dense[:2], flat[:2], strict=True):
        for project in (lambda part: part[:, 0], lambda part: part @ probe):
            assert stats.ks_2samp(project(a), project(b)).pvalue >= LEVEL
        assert_same_mean(a[:, 0] ** 2, b[:, 0] ** 2)
        assert_same_mean(a[:, -1] * a[:, 0], b[:, -1] * b[:, 0])
    # Twins share their law with −A; jointly with A only the first order is the same, as the planar twin mirrors all of v.
    assert_same_mean((dense[2] @ probe) ** 2, (flat[2] @ probe) ** 2)
    # A²x enters through its mean given the plane: only the mean is the same.
    assert_same_mean(dense[3] @ probe, flat[3] @ probe)
    # Lemma B.5 and ⟨A²⟩ = −(d−1)σ².
    dim, direction = len(state), memories.T @ probe
    expected = 0.8**2 * (state @ state * (direction @ direction) - (state @ direction) ** 2)
    for law in (dense, flat):
        for terms, mean in (((law[2] @ probe) ** 2, expected), (law[3] @ probe, -(0.8**2) * (dim - 1) * (direction @ state))):
            assert abs(terms.mean() - mean) <= 6 * terms.std() / math.sqrt(len(terms)) + 1e-12


@pytest.mark.parametrize("name", ["fewer", "plane", "large angles"])
@pytest.mark.parametrize("law", [DenseLaw(), PlanarLaw()], ids=repr)
def test_overlaps_are_those_of_one_rotated_vector(key, name, law):
    """Gram test: x + shift, seen by memories that span the space, has the length of x."""
    memories, state, epsilon = setting(name)
    basis = np.concatenate([np.eye(len(state)), memories])
    moves = jax.jit(lambda key: law.sampler(jnp.asarray(state), jnp.asarray(basis), epsilon=epsilon, sigma=1.0)(key, 100))(key)
    for shift in (moves.shift, moves.mirrored):
        rotated = state + np.asarray(shift)[:, : len(state)]
        np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), np.linalg.norm(state), rtol=1e-12)  # expm's and QR's eps·d·‖εA‖
        np.testing.assert_allclose(np.asarray(shift)[:, len(state) :], (rotated - state) @ memories.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("law", [DenseLaw(), PlanarLaw()], ids=repr)
@pytest.mark.parametrize("shape", [(2, 5), (7, 3)])
def test_a_state_at_the_origin_stays(key, law, shape):
    memories = jnp.asarray(np.random.default_rng(0).standard_normal(shape))
    moves = jax.jit(lambda key: law.sampler(jnp.zeros(shape[1]), memories, epsilon=0.3, sigma=1.0)(key, 10))(key)
    for part in moves:
        np.testing.assert_array_equal(part, np.zeros_like(part))


@pytest.mark.parametrize("cosine", [-0.25, 0.35])
def test_dependent_memories_are_no_obstacle(key, cosine):
    """c = −1/(K−1): the members sum to zero, and so must their shifts."""
    rows = jax.jit(lambda: cluster.memories(5, 40, cosine))()
    moves = jax.jit(lambda key, rows: PlanarLaw().sampler(rows[0], rows, epsilon=0.05, sigma=1.0)(key, 200))(key, rows)
    total = np.asarray(moves.shift)[:, :5].sum(axis=1)
    if cosine < 0:
        np.testing.assert_allclose(total, 0, atol=1e-14)
    else:
        assert np.abs(total).max() > 1e-3
    assert np.isfinite(np.asarray(moves.shift)).all()


def test_planar_law_takes_its_size(key):
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, 20)))
    draw = {
        size: jax.jit(lambda key, s=size: PlanarLaw(size=s).sampler(rows[0], rows, epsilon=0.3, sigma=1.0)(key, 4000))(key)
        for size in (2, 12, 20)
    }
    assert stats.ks_2samp(draw[12].shift[:, 0], draw[20].shift[:, 0]).pvalue >= LEVEL
    assert stats.ks_2samp(draw[2].shift[:, 0], draw[20].shift[:, 0]).pvalue < LEVEL  # ε‖A‖ = 2.7: two vectors do not do


def test_rotations_of_traced_size_need_a_bound(key):
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, 20)))

    def shift(law, epsilon):
        return law.sampler(rows[0], rows, epsilon=epsilon, sigma=1.0)(key, 5).shift

    epsilons = np.array([0.01, 0.1, 0.3])
    bound = generator_bound(20, 0.3, 1.0)
    ladder = np.asarray(jax.jit(jax.vmap(lambda epsilon: shift(PlanarLaw(angle=bound), epsilon)))(epsilons))
    alone = np.asarray(jax.jit(lambda: shift(PlanarLaw(), 0.3))())
    np.testing.assert_allclose(ladder[2], alone, rtol=0, atol=64 * EPS * bound * float(jnp.sum(rows[0] ** 2)))
    assert np.isfinite(ladder).all()
    # Under common random numbers the first order is proportional to ε: 1 − cosθ ~ ε² is what is left.
    assert np.abs(ladder[0]).max() < 0.2 * np.abs(ladder[1]).max()
    assert np.isnan(jax.jit(lambda epsilon: shift(PlanarLaw(angle=bound), epsilon))(0.31)).all()  # not covered
    with pytest.raises(ValueError, match="epsilon or sigma is traced: give `angle`"):
        jax.jit(lambda epsilon: shift(PlanarLaw(), epsilon))(0.3)


def test_static_mistakes_raise(key):
    with pytest.raises(ValueError, match="dim=1: rotations need at least 2 dimensions"):
        hopjax.planar_rotation(key, 1, 0.1, 1.0)
    for size in (1, 6):
        with pytest.raises(ValueError, match=rf"size={size} Lanczos vectors: need 2 ≤ size ≤ dim=5"):
            hopjax.planar_rotation(key, 5, 0.1, 1.0, size=size)
    for law in (DenseLaw(), PlanarLaw()):
        with pytest.raises(ValueError, match="at least one memory"):
            law.sampler(jnp.ones(3), jnp.ones((0, 3)), epsilon=0.1, sigma=1.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("law", [DenseLaw(), PlanarLaw()], ids=repr)
def test_shapes_that_do_not_fit_raise(law):
    with pytest.raises(ValueError, match=r"need \(3,\)"):
        law.sampler(jnp.ones(4), jnp.ones((2, 3)), epsilon=0.1, sigma=1.0)
