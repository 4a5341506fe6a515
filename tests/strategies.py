"""What property tests draw: values freely, shapes from a dozen, so that an example costs no compilation."""

import functools
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

# (memories, dimensions, dtype): one memory, fewer memories than dimensions, as many, more, many.
CASES = (
    (1, 4, "float64"),
    (2, 2, "float64"),
    (3, 7, "float64"),
    (7, 3, "float64"),
    (13, 50, "float64"),
    (200, 3, "float64"),
    (4, 200, "float64"),
    (2, 1, "float32"),
    (3, 7, "float32"),
    (7, 3, "float32"),
    (13, 50, "float32"),
)
DOUBLE = tuple(case for case in CASES if case[2] == "float64")
SINGLE = tuple(case for case in CASES if case[2] == "float32")
SMALL = tuple(case for case in CASES if case[0] * case[1] <= 650)


class Landscape(NamedTuple):
    """Memories, a state and a β in one dtype, and `radius`, the largest norm of them all."""

    memories: np.ndarray
    state: np.ndarray
    beta: np.floating
    radius: float
    rng: np.random.Generator

    @property
    def eps(self) -> float:
        return float(np.finfo(self.memories.dtype).eps)

    @property
    def steepness(self) -> float:
        """βR²: what the rounding of an overlap becomes in an exponent."""
        return float(self.beta) * self.radius**2

    @property
    def arguments(self) -> tuple[np.ndarray, np.ndarray, np.floating]:
        return self.state, self.memories, self.beta


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    """Log-uniform floats between 10^low and 10^high."""
    return st.floats(low, high).map(lambda exponent: float(10**exponent))


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**32 - 1)


@st.composite
def landscapes(draw: Any, cases: tuple[tuple[int, int, str], ...] = CASES) -> Landscape:
    """Gaussian memories of norm about 1e-3 … 1e3, β from 1e-3 to 1e4; among them duplicates, and states that are zero or a memory."""
    count, dim, name = draw(st.sampled_from(cases))
    dtype = np.dtype(name).type
    rng = np.random.default_rng(draw(seeds()))
    norm, beta = draw(powers(-3, 3)), draw(powers(-3, 4))
    memories = (norm / np.sqrt(dim) * rng.standard_normal((count, dim))).astype(dtype)
    if draw(st.booleans()):
        memories[-1] = memories[0]
    kind = draw(st.sampled_from(("far", "near", "memory", "mean", "zero")))
    noise = norm / np.sqrt(dim) * rng.standard_normal(dim)
    state = {"far": noise, "near": memories[0] + 0.1 * noise, "memory": memories[0], "mean": memories.mean(axis=0), "zero": 0 * noise}[kind]
    radius = float(max(np.linalg.norm(memories, axis=1).max(), np.linalg.norm(state)))
    return Landscape(memories, state.astype(dtype), dtype(beta), radius, rng)


@functools.cache
def member_counts() -> st.SearchStrategy[float]:
    """K from 2 to 10⁹, small ones as often as large ones."""
    return st.one_of(st.integers(2, 200).map(float), powers(np.log10(2), 9).map(np.floor))


@st.composite
def clusters(draw: Any, counts: st.SearchStrategy[float] | None = None) -> tuple[float, float]:
    """(K, c) with c over its whole range: the bounds, zero, next to zero and next to one included."""
    members = draw(member_counts() if counts is None else counts)
    lowest = -1 / (members - 1)
    cosine = draw(
        st.one_of(
            st.sampled_from((lowest, 0.0, 1e-9)),
            st.floats(0, 1).map(lambda share: lowest * share),
            st.floats(0, 0.99),
            powers(-6, -1).map(lambda apart: 1 - apart),
        )
    )
    return members, cosine
