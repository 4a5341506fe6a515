"""A line of the table: what was measured, of ours and of a peer in the same process, and the goals that it must meet."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax


class Goal(NamedTuple):
    """A bound on one of a row's numbers."""

    of: Literal["ours", "ratio", "error"]
    relation: Literal["≤", "≥"]
    bound: float


@dataclass(frozen=True)
class Row:
    """One thing measured.

    Attributes:
        what: what it is, in a few words.
        ours: our number, smaller is better; None if it could not be measured (the note says why).
        peer: the same of the peer, if there is one; `ratio` is peer/ours.
        unit: "s", "B", or "" for a plain number.
        goals: all of them must hold; none for a row that only reports.
        error: the accuracy that goes with the time.
        error_of: what `error` is.
        note: what a reader must know to judge.
    """

    what: str
    ours: float | None
    peer: float | None = None
    unit: Literal["s", "B", ""] = "s"
    goals: tuple[Goal, ...] = ()
    error: float | None = None
    error_of: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.peer / self.ours if self.peer is not None and self.ours else None

    @property
    def met(self) -> bool | None:
        """None if there is no goal, or nothing was measured."""
        if not self.goals or self.ours is None:
            return None
        return all(self._keeps(goal) for goal in self.goals)

    def _keeps(self, goal: Goal) -> bool:
        value = getattr(self, goal.of)
        if value is None:
            return False
        return value <= goal.bound if goal.relation == "≤" else value >= goal.bound


@dataclass(frozen=True)
class Bench:
    """How a subject is measured.

    Attributes:
        quick: fewer runs and smaller samples, for a look rather than a number to quote.
        progress: told what is going on, at least every few seconds.
    """

    quick: bool
    progress: Callable[[str], None]

    def size(self, usual: int, quick: int) -> int:
        return quick if self.quick else usual

    def medians(self, what: str, runs: int, *contenders: Callable[[], Any]) -> list[float]:
        """Median seconds of a call of each contender, taken in turns after one call each that is not counted.

        Turns, because on a machine that does other things too only times taken next to each other can be compared.
        """
        times: list[list[float]] = [[] for _ in contenders]
        for run in range(runs + 1):
            self.progress(f"{what}, {f'run {run} of {runs}' if run else 'warming up'}")
            for kept, contender in zip(times, contenders, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(contender())
                kept.append(time.perf_counter() - start)
        return [statistics.median(kept[1:]) for kept in times]


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], float]:
    """`function` compiled for these arguments, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return program, time.perf_counter() - start
