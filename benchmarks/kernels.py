"""The energy and its derivatives for 4,096 states against 4,096 memories, against NumPy and SciPy."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

import hopjax
from benchmarks.row import Bench, Row, compiled

STATES, MEMORIES, DIM, BETA = 4096, 4096, 64, 20.0
BATCH = 256  # the sharpness holds batch × m × d numbers


def _energy(states: np.ndarray, memories: np.ndarray) -> np.ndarray:
    return 0.5 * np.sum(states**2, axis=1) - scipy.special.logsumexp(BETA * (states @ memories.T), axis=1) / BETA


def _weights(states: np.ndarray, memories: np.ndarray) -> np.ndarray:
    return scipy.special.softmax(BETA * (states @ memories.T), axis=1)


def _gradient(states: np.ndarray, memories: np.ndarray) -> np.ndarray:
    return states - _weights(states, memories) @ memories


def _hessian_trace(states: np.ndarray, memories: np.ndarray) -> np.ndarray:
    p = _weights(states, memories)
    return DIM - BETA * (p @ np.sum(memories**2, axis=1) - np.sum((p @ memories) ** 2, axis=1))


def _sharpness(states: np.ndarray, memories: np.ndarray) -> np.ndarray:
    p, overlaps, squares = _weights(states, memories), states @ memories.T, np.sum(states**2, axis=1)
    mean = p @ memories
    total = p @ np.sum(memories**2, axis=1) - np.sum(mean**2, axis=1)
    along = np.sum(p * overlaps**2, axis=1) - np.sum(mean * states, axis=1) ** 2
    return (DIM - 1) * squares - BETA * (squares * total - along)


_PEERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "energy": _energy,
    "gradient": _gradient,
    "hessian_trace": _hessian_trace,
    "sharpness": _sharpness,
}


def _row(bench: Bench, name: str, states: np.ndarray, memories: np.ndarray) -> Row:
    kernel, peer = getattr(hopjax, name), _PEERS[name]
    label = f"{name}, {states.dtype.name}"
    bench.progress(f"{label}, compiling")
    device = jnp.asarray(states), jnp.asarray(memories)

    def batched(states: jax.Array, memories: jax.Array) -> jax.Array:
        return jax.lax.map(lambda state: kernel(state, memories, BETA), states, batch_size=BATCH)

    program, _ = compiled(batched, *device)
    ours, theirs = bench.medians(label, bench.size(5, 3), lambda: program(*device), lambda: peer(states, memories))
    # Both start from the same rounded inputs; the reference goes on in float64.
    reference = peer(states.astype(float), memories.astype(float))
    error, peer_error = (
        float(np.max(np.abs(np.asarray(found, float) - reference))) for found in (program(*device), peer(states, memories))
    )
    return Row(
        label,
        ours,
        theirs,
        error=error,
        error_of=f"largest (peer {peer_error:.1e})" if states.dtype == np.float32 else "largest difference",
        note=f"{STATES:,} states, {MEMORIES:,} memories, d = {DIM}, in batches of {BATCH}; peer: NumPy and SciPy",
    )


def measure(bench: Bench) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    memories = rng.normal(size=(MEMORIES, DIM))
    memories /= np.linalg.norm(memories, axis=1, keepdims=True)
    # Draws from the density p ∝ exp(−βE), the states that the kernels are meant for.
    states = memories[rng.integers(MEMORIES, size=STATES)] + rng.normal(size=(STATES, DIM)) / np.sqrt(BETA)
    for name in _PEERS:
        for dtype in (np.float32, np.float64):
            yield _row(bench, name, states.astype(dtype), memories.astype(dtype))
