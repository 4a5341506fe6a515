"""Perturbation sharpness against its definition, its limit tr H, and its own error bars."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopjax import perturbation, tiled
from hopjax.perturbation import perturbation_sharpness
from hopjax.tiled import Tile
from tests.strategies import powers, seeds


def memories(count: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(seeds(), powers(-1, 4), powers(-5, 0), st.sampled_from([Tile(4, 3), Tile(7, 20)]))
@settings(max_examples=40)
def test_a_pair_is_its_definition(seed, beta, radius, tile):
    """½[E(x+δ) + E(x−δ)] − E(x) in 80-bit arithmetic for the same δ: small tilts, large ones, and both at once."""
    rows = memories(20, 4, seed)
    states = rows[:7] + 0.1 * memories(7, 4, seed + 1)
    key = jax.random.key(seed)
    found = perturbation_sharpness(key, states, rows, beta, draws=2, radius=radius, tile=tile).mean
    expected = []
    for first in range(0, 7, tile.states):
        low = max(0, min(first, 7 - tile.states))
        x = states[low : low + tile.states]
        one = jax.random.split(jax.random.fold_in(key, first), 1)
        delta = np.asarray(perturbation._directions(one, jnp.asarray(x), jnp.asarray(radius))[0]).astype(np.longdouble)
        np.testing.assert_allclose(np.linalg.norm(delta.astype(float), axis=1), radius * np.linalg.norm(x, axis=1), rtol=1e-12)
        x, wide = x.astype(np.longdouble), rows.astype(np.longdouble)

        def energy(state):
            return 0.5 * np.sum(state**2, axis=1) - np.logaddexp.reduce(beta * state @ wide.T, axis=1) / beta  # noqa: B023

        curved = (energy(x + delta) + energy(x - delta)) / 2 - energy(x)
        expected.append((curved / (0.5 * np.sum(delta**2, axis=1) / 4))[first - low :])
    # Of the pair: eps·β|ξ − x||δ| in the exponents, against ½β|δ|²/d; the reference's own rounding, 1e-19 over ½ρ².
    bound = 4 * (64 * 2.3e-16 * (2 + 4 / radius) + 1e-18 * (1 + 8 / beta) / radius**2)
    assert np.max(np.abs(found - np.concatenate(expected))) <= bound


@pytest.mark.parametrize("beta", [2.0, 20.0])
def test_its_limit_is_the_trace_of_the_hessian_not_the_sharpness_under_rotations(beta):
    rows = memories(200, 6)
    states = 0.8 * rows[:50]
    found = perturbation_sharpness(jax.random.key(1), states, rows, beta, draws=2000, radius=1e-4)
    exact = tiled.summarise(states, rows, beta, ["hessian_trace", "sharpness"])
    z = (found.mean - exact["hessian_trace"]) / found.standard_error
    assert np.max(np.abs(z)) < 5  # 50 states: a false alarm in 3e-5 of all seeds
    assert np.std(z) > 0.5
    assert np.max(np.abs((found.mean - exact["sharpness"]) / found.standard_error)) > 20


def test_float32_keeps_the_identity_part():
    rows = memories(100, 30).astype(np.float32)
    single = perturbation_sharpness(jax.random.key(0), rows, rows, np.float32(1e4), draws=4, radius=1e-3)
    # At large β the basin of a stored state is |x − ξ|²/2, up to a few eps/(ρ√d) times d.
    np.testing.assert_allclose(single.mean, 30, rtol=16 * 1.2e-7 / (1e-3 * np.sqrt(30)))


def test_pieces_of_memory_and_priors():
    rows = memories(60, 5).astype(np.float32)
    options: dict[str, Any] = {"draws": 4, "radius": 0.1}
    key = jax.random.key(3)
    whole = perturbation_sharpness(key, rows[:20], rows, 3.0, **options)
    pieces = perturbation_sharpness(key, rows[:20], rows, 3.0, memory_limit=60_000, tile=Tile(20, 7), **options)
    np.testing.assert_allclose(pieces.mean, whole.mean, rtol=1e-4)
    twice = np.concatenate([rows, rows[:1]])
    prior = np.where(np.arange(60) == 0, np.log(2), 0).astype(np.float32)
    np.testing.assert_allclose(
        perturbation_sharpness(key, rows[:20], rows, 3.0, log_prior=prior, **options).mean,
        perturbation_sharpness(key, rows[:20], twice, 3.0, **options).mean,
        rtol=1e-4,
    )


def test_pairs_share_their_passes_over_the_memories(monkeypatch):
    """Seven pairs, three states at a time of eight: a step for each piece of the memories and block of states, not for each pair."""
    rows, passes = memories(60, 5), []
    step = perturbation._step

    def counted(*arguments, **static):
        passes.append(1)
        return step(*arguments, **static)

    monkeypatch.setattr(perturbation, "_step", counted)
    options: dict[str, Any] = {"draws": 14, "radius": 0.3, "tile": Tile(3, 7)}
    together = perturbation_sharpness(jax.random.key(0), rows[:8], rows, 9.0, **options)
    assert len(passes) == 3
    monkeypatch.setattr(perturbation, "PAIRS", 3)
    apart = perturbation_sharpness(jax.random.key(0), rows[:8], rows, 9.0, **options)
    assert len(passes) == 3 + 3 * 3
    np.testing.assert_allclose(together.mean, apart.mean, rtol=1e-12)
    np.testing.assert_allclose(together.standard_error, apart.standard_error, rtol=1e-10)


def test_the_compiled_program_keeps_the_limit():
    count, dim, pairs = 60_000, 784, perturbation.PAIRS
    sizes = perturbation._sizes(count, np.broadcast_to(np.float32(0), (count, dim)), pairs, tiled.MEMORY_LIMIT, None)

    def shaped(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    sums = jax.eval_shape(lambda x: perturbation._none(x, pairs), shaped(sizes.states, dim))
    places = shaped(sizes.states, dim), shaped(pairs, sizes.states, dim), shaped(sizes.memories, dim), shaped(), shaped(sizes.memories)
    program: Any = perturbation._step
    memory = program.lower(sums, *places, rows=sizes.tile).compile().memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert held + 4 * sizes.memories * dim <= tiled.MEMORY_LIMIT


@pytest.mark.usefixtures("unchecked")
def test_errors():
    rows = memories(5, 3)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"draws": 3}, "draws=3: perturbations come in pairs"),
        ({"radius": 0.0}, "radius=0.0: need 0 < radius"),
        ({"beta": -1.0}, "beta=-1.0: need 0 < beta"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            perturbation_sharpness(jax.random.key(0), rows, rows, **{"beta": 1.0, **options})
    # A state without length has no perturbations of its size; the others keep theirs.
    found = perturbation_sharpness(jax.random.key(0), rows * (np.arange(5) != 2)[:, None], rows, 1.0, draws=2).mean
    np.testing.assert_array_equal(np.isnan(found), np.arange(5) == 2)
