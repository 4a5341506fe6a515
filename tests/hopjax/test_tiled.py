"""Streaming energies against the one-shot formulas in extended precision: any shapes, tiles, orders, limits and places in memory."""

import functools
import itertools
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import hopjax
from hopjax import tiled
from hopjax.moments import QUANTITIES, Moments, empty, merge, of_tile
from hopjax.tiled import Tile
from tests.strategies import powers, seeds

# (states, memories, dimension, tile, dtype): tiles that divide and that do not, of one row, larger than the data.
CASES = (
    (1, 1, 1, Tile(1, 1), "float64"),
    (5, 1, 3, Tile(2, 4), "float64"),
    (1, 9, 2, Tile(8, 2), "float64"),
    (13, 40, 6, Tile(5, 7), "float64"),
    (40, 40, 50, Tile(16, 16), "float32"),
    (30, 100, 3, Tile(30, 1), "float32"),
    (64, 200, 8, Tile(64, 200), "float32"),
)
PLAIN = tuple(name for name, quantity in QUANTITIES.items() if not quantity.stored)


class Problem(NamedTuple):
    states: np.ndarray
    memories: np.ndarray
    beta: float
    own: np.ndarray | None
    tile: Tile

    @property
    def eps(self) -> float:
        return float(np.finfo(self.memories.dtype).eps)

    @property
    def radius(self) -> float:
        return float(max(np.linalg.norm(self.memories, axis=1).max(), np.linalg.norm(self.states, axis=1).max()))

    @property
    def logit_error(self) -> float:
        """A bound on a logit's error: 8 eps·βR² for the product and its rounding, 4 eps for each merge."""
        return self.eps * (8 * self.beta * self.radius**2 + 4 * (2 + np.log(len(self.memories)) + len(self.memories) / self.tile.memories))

    def found(self, names: tuple[str, ...], **options: Any) -> dict[str, np.ndarray]:
        return tiled.summarise(self.states, self.memories, self.beta, names, own=self.own, tile=self.tile, **options)


@st.composite
def problems(draw, stored: bool = False, most_steep: float = np.inf) -> Problem:
    """Norms from 1e-3 to 1e3, β from 1e-3 to 1e4, duplicates among the memories; states that are stored, near one, or anywhere."""
    count, total, dim, tile, dtype = draw(st.sampled_from(CASES))
    rng = np.random.default_rng(draw(seeds()))
    norm, beta = draw(powers(-3, 3)), draw(powers(-3, 4))
    beta = min(beta, most_steep / norm**2)
    memories = norm * rng.standard_normal((total, dim)) / np.sqrt(dim)
    if draw(st.booleans()):  # of unit norm, up to the scale: the theory's setting
        memories *= norm / np.linalg.norm(memories, axis=1, keepdims=True)
    if draw(st.booleans()):
        memories[-1] = memories[0]
    memories = memories.astype(dtype)
    chosen = rng.integers(total, size=count)
    states = memories[chosen] if stored else (memories[chosen] + norm * rng.standard_normal((count, dim)) / np.sqrt(dim)).astype(dtype)
    return Problem(states, memories, float(np.dtype(dtype).type(beta)), chosen if stored else None, tile)


def one_shot(problem: Problem) -> dict[str, np.ndarray]:
    """The printed formulas in 80-bit arithmetic, all n × m weights at once."""
    x, y, beta = problem.states.astype(np.longdouble), problem.memories.astype(np.longdouble), np.longdouble(problem.beta)
    square, dim = (x**2).sum(axis=1), x.shape[1]
    overlaps = x @ y.T
    logits = beta * overlaps
    top = logits.max(axis=1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    p = np.exp(logits - log_sum[:, None])
    mean = p @ y
    # About the mean: nothing cancels.
    spread = np.stack([w @ ((y - m) ** 2).sum(axis=1) for w, m in zip(p, mean, strict=True)])
    radial = (p * (overlaps - (p * overlaps).sum(axis=1, keepdims=True)) ** 2).sum(axis=1)
    slope = (x * (x - mean)).sum(axis=1)
    sharpness = (dim - 1) * square - beta * (square * spread - radial)
    found = {
        "energy": square / 2 - log_sum / beta,
        "excess": square - log_sum / beta,
        "entropy": -(p * np.where(p > 0, logits - log_sum[:, None], 0)).sum(axis=1),
        "update": mean,
        "slope": slope,
        "hessian_trace": dim - beta * spread,
        "sharpness": sharpness,
        "rise": sharpness - (dim - 1) * slope,
    }
    if problem.own is not None:
        rows = np.arange(len(x))
        others = logits.copy()
        others[rows, problem.own] = -np.inf
        top = np.where(len(y) > 1, others.max(axis=1, keepdims=True), 0)
        with np.errstate(divide="ignore"):
            log_others = top[:, 0] + np.log(np.exp(others - top).sum(axis=1))
        odds = log_others - beta * square
        found |= {"log_leakage": -np.logaddexp(0, -odds), "log_self_weight": -np.logaddexp(0, odds), "log_odds": odds}
        found |= {"leave_one_out": square / 2 - log_others / beta, "excess": -np.logaddexp(0, odds) / beta}
        # From the state, where its own memory is at zero: beyond 80 bits too, what departs from a perfect memory is a sum of small terms.
        away = y[None] - x[:, None]
        p[rows, problem.own] = 0
        pull = np.einsum("nm,nmd->nd", p, away)
        spread = np.einsum("nm,nmd->n", p, away**2) - (pull**2).sum(axis=1)
        found |= {"slope": -(x * pull).sum(axis=1), "hessian_trace": dim - beta * spread}
    return found


def bounds(problem: Problem) -> dict[str, float | np.ndarray]:
    """What rounding may do: an error δ of the logits changes a mean under the softmax by 2δ times its spread."""
    delta, eps, radius, beta, dim = problem.logit_error, problem.eps, problem.radius, problem.beta, problem.states.shape[1]
    spread = (2 * delta + 16 * eps) * 4 * radius**2
    trace = beta * spread + 4 * eps * dim
    return {
        "energy": delta / beta + 4 * eps * radius**2,
        "excess": delta / beta + 4 * eps * radius**2,
        "entropy": 2 * delta * (2 + np.log(len(problem.memories)) + 2 * beta * radius**2),
        "update": (2 * delta + 8 * eps) * 2 * radius,
        "slope": (2 * delta + 8 * eps) * 4 * radius**2,
        "hessian_trace": trace,
        "sharpness": 2 * radius**2 * (trace + 4 * eps * dim),
        "rise": 2 * radius**2 * (trace + 4 * eps * dim) + dim * (2 * delta + 8 * eps) * 4 * radius**2,
    }


@given(problems())
@settings(max_examples=120)
def test_one_pass_is_the_one_shot_formula(problem):
    found, expected, allowed = problem.found(PLAIN), one_shot(problem), bounds(problem)
    for name, bound in allowed.items():
        assert np.max(np.abs(found[name] - expected[name])) <= bound, name
    assert found["energy"].dtype == problem.memories.dtype


@given(problems(stored=True))
@settings(max_examples=120)
def test_stored_states_keep_the_digits_of_their_leakage(problem):
    found, expected = problem.found(tuple(QUANTITIES)), one_shot(problem)
    if len(problem.memories) == 1:
        for name in ("log_leakage", "leave_one_out"):
            assert np.all(np.isinf(found[name]))
        assert np.all(found["update"] == problem.states)
        return
    delta = 2 * problem.logit_error
    # log(1 + e^Λ) changes by at most as much as Λ does, absolutely; and relatively, where it underflows to nothing otherwise.
    for name in ("log_odds", "log_leakage", "log_self_weight"):
        assert np.all(np.abs(found[name] - expected[name]) <= delta), name
    relative = np.abs(found["excess"] - expected["excess"]) <= np.expm1(min(delta, 1)) * np.abs(expected["excess"]) * 2
    smallest = np.finfo(problem.memories.dtype).tiny * (1 + 1 / problem.beta)  # below it numbers are flushed to zero
    assert np.all(relative | (np.abs(expected["excess"]) <= 8 * smallest) | (delta > 0.5))
    assert np.all(np.abs(found["leave_one_out"] - expected["leave_one_out"]) <= delta / problem.beta + 4 * problem.eps * problem.radius**2)
    # What departs from a perfect memory is proportional to the leakage, and so is its error.
    leakage, radius = np.exp(expected["log_leakage"].astype(float)), problem.radius
    loss = ((4 * delta + 32 * problem.eps) * leakage + np.finfo(problem.memories.dtype).tiny) * 4 * radius**2
    trace = problem.states.shape[1]
    assert np.all(np.abs(found["hessian_trace"] - expected["hessian_trace"]) <= problem.beta * loss + 4 * problem.eps * trace)
    assert np.all(np.abs(found["slope"] - expected["slope"]) <= loss)


@given(problems(stored=True, most_steep=1e4))
@settings(max_examples=40)
def test_indices(problem):
    found = problem.found(("heaviest", "nearest", "distance"))
    x, y = problem.states.astype(np.longdouble), problem.memories.astype(np.longdouble)
    if len(y) == 1:
        assert np.all(found["heaviest"] == -1)
        assert np.all(found["nearest"] == -1)
        assert np.all(np.isinf(found["distance"]))
        return
    rows, slack = np.arange(len(x)), 32 * problem.eps * problem.radius**2
    overlaps, squares = x @ y.T, ((x[:, None] - y[None]) ** 2).sum(axis=2)
    overlaps[rows, problem.own], squares[rows, problem.own] = -np.inf, np.inf
    assert np.all(overlaps[rows, found["heaviest"]] >= overlaps.max(axis=1) - slack)
    assert np.all(squares[rows, found["nearest"]] <= squares.min(axis=1) + slack)
    assert np.all(np.abs(found["distance"] ** 2 - squares.min(axis=1)) <= slack)
    assert np.all(found["heaviest"] != problem.own)
    assert np.all(found["nearest"] != problem.own)


def test_ties_go_to_the_smallest_index_whatever_the_tile():
    memories = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    for tile in (Tile(2, 1), Tile(2, 5), Tile(2, 12)):
        found = tiled.summarise(memories[:2], memories, 3.0, ["heaviest", "nearest"], own=np.arange(2), tile=tile)
        assert list(found["heaviest"]) == list(found["nearest"]) == [1, 0]


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("tile", [Tile(500, 300), Tile(128, 64)])
def test_neighbours_and_their_distances_survive_a_common_offset(offset, tile):
    """In float32, squares of 10⁵ and more: expanded about the origin, distances would be rounding, and those of duplicates not zero."""
    rng = np.random.default_rng(0)
    memories = rng.standard_normal((500, 16))
    memories = (memories / np.linalg.norm(memories, axis=1, keepdims=True) + offset).astype(np.float32)
    memories[250:300] = memories[:50]
    found = tiled.summarise(memories, memories, 1e-4, ["nearest", "distance"], own=np.arange(500), tile=tile)
    wide = memories.astype(float)
    distances = np.linalg.norm(wide[:, None] - wide[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    # Shifted by the mean of a block's states, norms are near one.
    assert np.all(distances[np.arange(500), found["nearest"]] ** 2 <= distances.min(axis=1) ** 2 + 16 * 1.2e-7)
    np.testing.assert_array_equal(found["nearest"][:50], np.arange(250, 300))
    np.testing.assert_array_equal(found["distance"][:50], 0)
    np.testing.assert_allclose(found["distance"], distances[np.arange(500), found["nearest"]], rtol=4 * 1.2e-7)


def test_a_state_that_is_not_finite_leaves_the_others_their_neighbours():
    states = landscape(5, 3, seed=1)
    expected = tiled.summarise(states, landscape(9, 3), 2.0, ["nearest", "distance"])
    states[2], states[3, 1] = np.nan, np.inf
    found = tiled.summarise(states, landscape(9, 3), 2.0, ["nearest", "distance"])
    for name, values in found.items():
        np.testing.assert_array_equal(values[[0, 1, 4]], expected[name][[0, 1, 4]])
    assert list(found["nearest"][2:4]) == [-1, -1]


@given(problems(stored=True, most_steep=1e3), seeds())
@settings(max_examples=30)
def test_order_and_tiles_do_not_matter(problem, seed):
    names = ("energy", "entropy", "hessian_trace", "update")
    order = np.random.default_rng(seed).permutation(len(problem.memories))
    place = np.argsort(order)
    shuffled = problem._replace(memories=problem.memories[order], own=place[problem.own])
    allowed = bounds(problem)
    expected = problem.found(names)
    for other in (shuffled, problem._replace(tile=problem.tile._replace(memories=max(1, problem.tile.memories - 1)))):
        found = other.found(names)
        for name in names:
            assert np.max(np.abs(found[name] - expected[name])) <= 2 * allowed[name], name


# ---- Moments -------------------------------------------------------------------------------------------------------------

NEEDS = ("closest", "heaviest", "logit", "mean", "nearest", "radial", "square")


def moments_of(part: slice, states: np.ndarray, memories: np.ndarray, beta: float) -> Moments:
    some = jnp.asarray(memories[part])
    return of_tile(jnp.asarray(states), some, jnp.asarray(beta), jnp.zeros(len(some)), None, NEEDS, first=part.start)


@given(seeds(), powers(-2, 2.5))
@settings(max_examples=20)
def test_moments_merge_as_a_commutative_monoid(seed, beta):
    rng = np.random.default_rng(seed)
    states, memories = rng.standard_normal((4, 3)), rng.standard_normal((12, 3))
    a, b, c = (moments_of(slice(start, start + 4), states, memories, beta) for start in (0, 4, 8))
    whole = moments_of(slice(0, 12), states, memories, beta)
    neutral = empty(jnp.asarray(states), NEEDS)
    steep = beta * np.max(np.abs(states @ memories.T))
    scale = {"logit": 1 + steep, "mean": 5, "radial": 1e3, "square": 50}
    for merged in (
        merge(merge(a, b), c),
        merge(a, merge(b, c)),
        merge(c, merge(b, a)),
        merge(neutral, merge(merge(a, neutral), merge(b, c))),
    ):
        for name, expected in whole._asdict().items():
            # The weights are at most one each, twelve of them; logits differ by rounding of βR².
            tolerance = 0 if name in ("heaviest", "nearest") else 12 * scale.get(name, 1) * 16 * 2.3e-16 * (1 + steep)
            np.testing.assert_allclose(getattr(merged, name), expected, rtol=0, atol=tolerance, err_msg=name)
    for name, value in merge(a, neutral)._asdict().items():
        np.testing.assert_array_equal(value, getattr(a, name), err_msg=name)


def test_moments_keep_the_logit_when_the_top_moves():
    """The sum of w(l − top) about another top: a formula whose terms cancel if the shift has the wrong sign."""
    states, memories = np.array([[1.0, 0.0]]), np.array([[0.1, 3.0], [0.9, 0.0], [2.0, 1.0]])
    parts = [moments_of(slice(i, i + 1), states, memories, 4.0) for i in range(3)]
    for order in itertools.permutations(parts):
        logits = 4.0 * memories[:, 0]
        w = np.exp(logits - logits.max())
        merged: Any = functools.reduce(merge, order)
        np.testing.assert_allclose(merged.logit, [np.sum(w * (logits - logits.max()))], rtol=1e-15)


# ---- Variants ------------------------------------------------------------------------------------------------------------


def landscape(count: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) * np.linspace(0.5, 1.5, count)[:, None]


def test_priors_make_the_kernel_energy_and_the_mean():
    memories, beta = landscape(30, 5), 7.0
    states = landscape(11, 5, seed=1)
    kernel = tiled.summarise(states, memories, beta, ["energy"], log_prior=np.asarray(tiled.density_prior(jnp.asarray(memories), beta)))
    expected = jax.vmap(lambda x: hopjax.correspondence.kernel_energy(x, jnp.asarray(memories), beta))(states)
    np.testing.assert_allclose(kernel["energy"], expected, rtol=0, atol=32 * 2.3e-16 * (2.25 + np.log(30) / beta))
    mean = tiled.energies(jnp.asarray(states), jnp.asarray(memories), beta, log_prior=np.full(30, -np.log(30.0)))
    plain = tiled.energies(jnp.asarray(states), jnp.asarray(memories), beta)
    np.testing.assert_allclose(mean, plain + np.log(30) / beta, rtol=0, atol=1e-14)


def test_a_prior_weighs_a_stored_state_too():
    """π = 2 for one memory is that memory stored twice."""
    memories, beta = landscape(20, 4), 5.0
    names = ["energy", "update", "hessian_trace", "sharpness"]
    twice = np.concatenate([memories, memories[3:4]])
    prior = np.where(np.arange(20) == 3, np.log(2.0), 0.0)
    one = tiled.summarise(memories, memories, beta, names, own=np.arange(20), log_prior=prior, tile=Tile(6, 7))
    two = tiled.summarise(memories, twice, beta, names, own=np.arange(20), tile=Tile(6, 7))
    for name in names:
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-13, err_msg=name)


def test_energy_changes_between_sets_of_different_sizes():
    before, after = landscape(20, 4), landscape(33, 4, seed=2)
    found = tiled.energy_changes(before, before, after, 6.0, own=np.arange(20))
    expected = jax.vmap(lambda x: hopjax.energy_change(x, jnp.asarray(before), jnp.asarray(after), 6.0))(before)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_what_is_not_finite_is_not_a_number():
    memories = landscape(9, 3)
    memories[4, 1] = np.inf
    assert np.all(np.isnan(tiled.summarise(landscape(5, 3, seed=1), memories, 2.0, ["energy"], tile=Tile(4, 2))["energy"]))
    states = landscape(5, 3, seed=1)
    states[2, 0] = np.nan
    found = tiled.summarise(states, landscape(9, 3), 2.0, ["energy", "hessian_trace"])
    for values in found.values():
        assert list(np.isnan(values)) == [False, False, True, False, False]
    assert np.all(np.isnan(tiled.energies(jnp.asarray(landscape(4, 3)), jnp.asarray(landscape(9, 3)), -1.0)))


# ---- Derivatives ---------------------------------------------------------------------------------------------------------


def dense_energies(states, memories, beta, log_prior):
    logits = beta * states @ memories.T + log_prior[None]
    return 0.5 * jnp.sum(states**2, axis=1) - jax.nn.logsumexp(logits, axis=1) / beta


@given(seeds(), powers(-1, 2), st.sampled_from([Tile(1, 1), Tile(4, 5), Tile(100, 100)]))
@settings(max_examples=15)
def test_the_derivative_streams_to_the_same_numbers(seed, beta, tile):
    rng = np.random.default_rng(seed)
    arguments = (rng.standard_normal((7, 3)), rng.standard_normal((13, 3)), beta, rng.standard_normal(13))
    weight = jnp.asarray(rng.standard_normal(7))
    ours = jax.grad(lambda x, y, b, o: weight @ tiled.energies(x, y, b, log_prior=o, tile=tile), (0, 1, 2, 3))(*map(jnp.asarray, arguments))
    dense = jax.grad(lambda x, y, b, o: weight @ dense_energies(x, y, b, o), (0, 1, 2, 3))(*map(jnp.asarray, arguments))
    for found, expected in zip(ours, dense, strict=True):
        # Sums of 7 × 13 terms of size up to |x||ξ| ≈ 20 whose weights have a relative error of a few eps·βR².
        np.testing.assert_allclose(found, expected, rtol=0, atol=91 * 20 * 8 * 2.3e-16 * (1 + 20 * beta) / min(beta, 1.0) ** 2)


def test_the_derivative_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    states, memories, prior = rng.standard_normal((5, 3)), rng.standard_normal((8, 3)), rng.standard_normal(8)
    check_grads(
        jax.jit(lambda x, y, b, o: tiled.energies(x, y, b, log_prior=o, tile=Tile(2, 3))),
        (jnp.asarray(states), jnp.asarray(memories), jnp.asarray(1.5), jnp.asarray(prior)),
        order=1,
        modes=["rev"],
    )


def test_states_that_are_the_memories_get_both_parts_of_the_derivative():
    memories = jnp.asarray(landscape(9, 3))
    ours = jax.grad(lambda y: tiled.energies(y, y, 2.0, tile=Tile(4, 4)).sum())(memories)
    dense = jax.grad(lambda y: dense_energies(y, y, 2.0, jnp.zeros(9)).sum())(memories)
    np.testing.assert_allclose(ours, dense, rtol=0, atol=1e-14)


def test_left_out_memories_get_no_derivative_from_their_own_state():
    states = memories = jnp.asarray(landscape(6, 3))
    own = jnp.arange(6)

    def masked(x, y):
        return jax.nn.logsumexp(jnp.where(jnp.eye(6, dtype=bool), -jnp.inf, 2.0 * x @ y.T), axis=1).sum()

    ours = jax.grad(lambda x, y: tiled.log_sums(x, y, 2.0, own=own, tile=Tile(4, 4)).sum(), (0, 1))(states, memories)
    for found, expected in zip(ours, jax.grad(masked, (0, 1))(states, memories), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


SMOOTH = ("excess", "entropy", "others_entropy", "slope", "hessian_trace", "sharpness", "rise")


def dense_quantities(x, memories, beta, log_prior):
    """Of one state, from the softmax and the Hessian themselves."""
    p = jax.nn.softmax(beta * memories @ x + log_prior)
    pull = p @ memories - x
    hessian = jnp.eye(len(x)) - beta * (memories.T * p[None]) @ memories + beta * jnp.outer(p @ memories, p @ memories)
    entropy = -p @ jnp.log(p)
    sharpness = (x @ x) * jnp.trace(hessian) - x @ hessian @ x
    excess = x @ x - jax.nn.logsumexp(beta * memories @ x + log_prior) / beta
    slope = -x @ pull
    return jnp.stack([excess, entropy, entropy, slope, jnp.trace(hessian), sharpness, sharpness - (len(x) - 1) * slope])


def streamed(weight, names, x, memories, beta, own=None, log_prior=None):
    found = tiled.quantities(x, memories, beta, names, own=own, log_prior=log_prior, tile=Tile(4, 5))
    return jnp.sum(weight * jnp.stack([found[name] for name in names], axis=1))


def test_curvature_and_entropy_have_a_derivative_that_streams():
    rng = np.random.default_rng(0)
    arguments = [jnp.asarray(a) for a in (rng.standard_normal((7, 3)), rng.standard_normal((13, 3)), 1.5, rng.standard_normal(13))]
    weight = jnp.asarray(rng.standard_normal((7, len(SMOOTH))))

    def ours(x, memories, beta, log_prior):
        return streamed(weight, SMOOTH, x, memories, beta, log_prior=log_prior)

    def dense(x, memories, beta, log_prior):
        return jnp.sum(weight * jax.vmap(lambda one: dense_quantities(one, memories, beta, log_prior))(x))

    np.testing.assert_allclose(ours(*arguments), dense(*arguments), rtol=1e-12)
    for found, expected in zip(*(jax.grad(f, (0, 1, 2, 3))(*arguments) for f in (ours, dense)), strict=True):
        # Terms of size up to β²R⁴ ≈ 10³, of which 7 × 7 × 13 are added.
        np.testing.assert_allclose(found, expected, rtol=0, atol=637 * 1e3 * 8 * 2.3e-16)


def test_the_derivative_of_stored_states_is_that_of_their_memories():
    memories, own = jnp.asarray(landscape(9, 3)), jnp.arange(9)
    kept = [i for i, name in enumerate(SMOOTH) if name != "others_entropy"]  # `dense_quantities` leaves no memory out
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((9, len(kept))))

    def ours(y, beta):
        return streamed(weight, [SMOOTH[i] for i in kept], y, y, beta, own=own)

    def dense(y, beta):
        return jnp.sum(weight * jax.vmap(lambda one: dense_quantities(one, y, beta, jnp.zeros(9))[np.array(kept)])(y))

    for found, expected in zip(*(jax.grad(f, (0, 1))(memories, 2.0) for f in (ours, dense)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=567 * 1e3 * 8 * 2.3e-16)


def test_what_has_no_derivative_is_refused():
    with pytest.raises(ValueError, match=r"'nearest' has no derivative: ask `hopjax.tiled.summarise` for it"):
        tiled.quantities(jnp.asarray(landscape(5, 3)), jnp.asarray(landscape(9, 3)), 2.0, ["energy", "nearest"])


# ---- Memory, compilation, resuming ---------------------------------------------------------------------------------------


def temporary_bytes(function, *arguments, **static) -> int:
    analysis: Any = jax.jit(function, static_argnames=tuple(static)).lower(*arguments, **static).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def shaped(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("needs", [("mean", "radial", "square"), ("closest", "nearest"), ("closest", "mean", "nearest")])
def test_the_compiled_program_keeps_the_limit_at_60000_images(needs):
    count, dim = 60_000, 784
    memories = np.broadcast_to(np.float32(0), (count, dim))
    sizes = tiled.plan(count, memories, needs, tiled.MEMORY_LIMIT, None)
    states = jnp.zeros((sizes.states, dim), jnp.float32)
    moments = jax.eval_shape(lambda x: empty(x, needs), states)
    step: Any = tiled._step
    program = step.lower(
        moments, shaped(sizes.states, dim), shaped(sizes.memories, dim), shaped(), shaped(sizes.memories), None,
        needs=needs, rows=sizes.tile, first=0,
    )  # fmt: skip
    memory = program.compile().memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    # One more block of memories is on its way while this one is computed with.
    assert held + 4 * sizes.memories * dim <= tiled.MEMORY_LIMIT
    assert held < 4 * count * count / 10


@pytest.mark.parametrize("name", ["energy", "rise"])
def test_gradients_hold_tiles_not_pairs(name):
    count, dim = 20_000, 64
    beta, states, memories = jnp.float32(3.0), shaped(count, dim), shaped(count, dim)
    needed = temporary_bytes(
        lambda x, y: jax.grad(lambda x, y: tiled.quantities(x, y, beta, [name])[name].sum(), (0, 1))(x, y), states, memories
    )
    # Six tiles of 2048 × 1024 and twelve arrays of the inputs' size (XLA of jax 0.10 keeps nine, of jax 0.12 ten): pairs
    # would be 190 tiles.
    assert needed < 4 * (6 * 2048 * 1024 + 12 * count * dim)
    assert needed < 4 * count * count / 10


def test_memory_mapped_files_within_a_small_limit(tmp_path):
    """A process reads 200 MB of memories with a limit of 24 MiB: its own memory (mapped pages apart) stays within it."""
    script = """
        import re, sys
        import jax, numpy as np
        from hopjax import tiled

        def own_memory():  # of the process; pages of the mapped file are not counted
            return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

        memories = np.memmap(sys.argv[1], np.float32, "r", shape=(200_000, 256))
        states = np.array(memories[:512])
        tiled.summarise(states, memories[:20_000], 10.0, ["energy", "hessian_trace"], memory_limit=24 << 20)  # compiles, starts threads
        before, most = own_memory(), 0
        for _ in range(2):
            found = tiled.summarise(states, memories, 10.0, ["energy", "hessian_trace"], memory_limit=24 << 20, own=np.arange(512))
            most = max(most, own_memory() - before)
        np.save(sys.argv[2], found["energy"])
        print(most)
    """
    memories = np.memmap(tmp_path / "memories", np.float32, "w+", shape=(200_000, 256))
    rng = np.random.default_rng(0)
    for start in range(0, len(memories), 20_000):
        part = rng.standard_normal((20_000, 256), dtype=np.float32)
        memories[start : start + 20_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
    memories.flush()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "memories"), str(tmp_path / "energies.npy")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 24 << 20
    expected = np.asarray(tiled.energies(jnp.asarray(memories[:512]), jnp.asarray(memories), np.float32(10.0)))
    np.testing.assert_allclose(np.load(tmp_path / "energies.npy"), expected, rtol=0, atol=16 * 1.2e-7 * (1 + np.log(200_000) / 10))


def test_blocks_go_on_where_an_interrupted_run_stopped():
    memories = landscape(50, 6).astype(np.float32)
    options: dict[str, Any] = {"own": np.arange(50), "tile": Tile(16, 8)}
    blocks = list(tiled.stream(memories, memories, 9.0, ["energy", "sharpness"], **options))
    assert [(block.rows.start, block.rows.stop) for block in blocks] == [(0, 16), (16, 32), (32, 48), (48, 50)]
    again = list(tiled.stream(memories, memories, 9.0, ["energy", "sharpness"], start=32, **options))
    for block, expected in zip(again, blocks[2:], strict=True):
        assert block.rows == expected.rows
        for name, values in expected.values.items():
            np.testing.assert_array_equal(block.values[name], values)


def test_one_program_serves_all_blocks():
    memories = landscape(61, 7).astype(np.float32)
    step: Any = tiled._step
    tiled.summarise(memories, memories, 9.0, ["energy"], tile=Tile(16, 8), memory_limit=1 << 16)
    before = step._cache_size()
    tiled.summarise(memories, memories, 4.0, ["energy"], tile=Tile(16, 8), memory_limit=1 << 16)
    tiled.summarise(memories[:40], memories, 2.0, ["energy"], tile=Tile(16, 8), memory_limit=1 << 16)
    assert step._cache_size() == before


def test_a_limit_below_the_smallest_tile_is_refused_and_a_small_one_kept():
    memories = landscape(300, 50).astype(np.float32)
    with pytest.raises(ValueError, match=r"memory_limit=1000 is too small: tiles of \d+ × \d+ of dimension 50 need \d+ bytes"):
        tiled.stream(memories, memories, 1.0, ["energy"], memory_limit=1000)
    expected = tiled.summarise(memories, memories, 5.0, ["energy"])["energy"]
    found = tiled.summarise(memories, memories, 5.0, ["energy"], memory_limit=60_000)["energy"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=16 * 1.2e-7 * 3)


# ---- Errors --------------------------------------------------------------------------------------------------------------

X = np.eye(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], X, 1.0, ["energy"]), r"states have shape \(4,\)"),
        ((X, X[:0], 1.0, ["energy"]), r"memories have shape \(0, 4\)"),
        ((X[:, :3], X, 1.0, ["energy"]), "states have dimension 3 and memories 4"),
        ((X.astype(int), X, 1.0, ["energy"]), "states must be floating point, got int64"),
        ((X.astype(np.float64), X, 1.0, ["energy"]), "states are float64 and memories are float32"),
        ((X, X, 0.0, ["energy"]), "beta=0.0: need 0 < beta"),
        ((X, X, np.nan, ["energy"]), "beta=nan: need 0 < beta"),
        ((X, X, 1.0, ["enrgy"]), "no quantity is named 'enrgy': choose from energy"),
        ((X, X, 1.0, ["log_leakage"]), "'log_leakage' is defined for stored states only: give `own`"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_come_before_the_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiled.stream(*arguments)


@pytest.mark.usefixtures("unchecked")
def test_own_and_prior_must_fit():
    for own, message in (
        (np.arange(3), r"own has shape \(3,\): need \(4,\)"),
        (np.arange(4) + 1, "own holds 1 … 4: need indices of memories, 0 … 3"),
        (np.arange(4) - 1, "own holds -1 … 2"),
    ):
        with pytest.raises(ValueError, match=message):
            tiled.stream(X, X, 1.0, ["energy"], own=own)
        with pytest.raises(ValueError, match=message):
            tiled.quantities(jnp.asarray(X), jnp.asarray(X), 1.0, ["energy"], own=own)
    with pytest.raises(ValueError, match="own holds 1 … 4"):
        jax.jit(lambda x: tiled.log_sums(x, x, 1.0, own=np.arange(4) + 1))(X)
    assert np.all(np.isfinite(tiled.log_sums(jnp.asarray(X), jnp.asarray(X), 1.0, own=np.full(4, -1))))
    with pytest.raises(ValueError, match="state 2 is not its own memory 3"):
        tiled.summarise(X, X, 1.0, ["energy"], own=np.array([0, 1, 3, 2]))
    with pytest.raises(ValueError, match="state 2 is not its own memory 3"):
        tiled.quantities(jnp.asarray(X), jnp.asarray(X), 1.0, ["energy"], own=np.array([0, 1, 3, 2]))
    constant = jnp.asarray(X)
    for index in (jnp.array([0, 1, 3, 2]), jnp.arange(4) + 1):
        with pytest.raises(ValueError, match=r"state 2 is not its own memory 3|own holds 1 … 4"):
            jax.jit(lambda b, own=index: tiled.quantities(constant, constant, b, ["energy"], own=own))(1.0)
    with pytest.raises(ValueError, match=r"log_prior has shape \(3,\): need \(4,\)"):
        tiled.stream(X, X, 1.0, ["energy"], log_prior=np.zeros(3))
    with pytest.raises(ValueError, match=r"own has shape \(3,\): need \(4,\)"):
        tiled.log_sums(jnp.asarray(X), jnp.asarray(X), 1.0, own=jnp.arange(3))
