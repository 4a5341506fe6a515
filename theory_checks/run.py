"""Running checks: which ones, with what setting, two at a time.

Checks run in processes, not threads: mpmath and python-flint keep their working precision in a global, so two checks in one process could
change each other's digits. A check's result depends on its setting alone, never on what runs beside it.
"""

import difflib
import fnmatch
import importlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from theory_checks.claim import PRESETS, REGISTRY, Claim, Finding, Measurement, Preset, Setting

# Modules that register claims, in the order of the paper.
MODULES = (
    "density",
    "rotations",
    "fixed_points",
    "onset",
    "localisation",
    "weights",
    "curvature",
    "theorem_4_1",
    "sharpness",
    "replay_identity",
    "theorem_5_1",
    "correspondence",
    "synthetic",
    "learned_memories",
    "learned_forgetting",
    "learned_ordering",
    "digits",
)

# Checks of one family share what a process computes once: an ensemble of rotations, learned memories, a data set. A family keeps to one
# process, and the longest begin, so that processes end together.
FAMILIES = (
    ("learned_memories",),
    ("digits",),
    ("learned_forgetting",),
    ("learned_ordering",),
    ("theorem_4_1", "replay_identity", "theorem_5_1"),
)


def _module(claim: Claim) -> str:
    return claim.check.__module__.rpartition(".")[2]


def _family(claim: Claim) -> tuple[str, ...]:
    module = _module(claim)
    return next((family for family in FAMILIES if module in family), (module,))


def load() -> Mapping[str, Claim]:
    """All claims of the paper that are checked, by name, in the order of `MODULES`, whichever was imported first."""
    for module in MODULES:
        importlib.import_module(f"theory_checks.{module}")
    return {name: claim for module in MODULES for name, claim in REGISTRY.items() if _module(claim) == module}


def select(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match a pattern, all of them if there is none, in their order.

    Raises: ValueError naming a pattern that matches nothing, and the names closest to it.
    """
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.4) or [name for name in names if pattern.strip("*?") in name][:4]
            hint = f"did you mean {', '.join(near)}?" if near else "--list names them all"
            raise ValueError(f"no claim is named {pattern!r}: {hint}")
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


class Job(NamedTuple):
    """One check to run: a claim's name, the preset's name ("" for a claim that is run once), the setting, and the claim's family."""

    claim: str
    preset: str
    setting: Setting
    family: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.claim} ({self.preset})" if self.preset else self.claim


def jobs(claims: Iterable[Claim], presets: Sequence[Preset], seed: int, rotations: int) -> list[Job]:
    """What to run. A claim that is run once gets the first of all presets, whichever are asked for, and must not look at it."""
    always = next(iter(PRESETS.values()))
    claims = sorted(claims, key=lambda claim: (*FAMILIES, _family(claim)).index(_family(claim)))
    return [
        Job(claim.name, preset.name if claim.per_preset else "", Setting(preset, seed, rotations), _family(claim))
        for claim in claims
        for preset in (presets if claim.per_preset else (always,))
    ]


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a finding, or what was raised instead, in one line."""

    job: Job
    finding: Finding | None
    error: str
    seconds: float

    @property
    def verdict(self) -> str:
        return "error" if self.finding is None else "holds" if self.finding.passed else "fails"


def _plain(value: Any) -> Any:
    """Numbers, strings, None, lists and dicts; NumPy's and JAX's values become Python's."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic) or hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    raise TypeError(f"series hold numbers, strings, None, lists and dicts, not {type(value).__name__}")


def measure(job: Job) -> Outcome:
    """Runs one check. What it raises is reported, so that the others go on."""
    start = time.perf_counter()
    finding, error = None, ""
    try:
        found = load()[job.claim].check(job.setting)
        if not found.measurements:
            raise ValueError("nothing was measured")
        measurements = [
            Measurement(str(what), float(value), relation, float(bound), float(false_alarm))
            for what, value, relation, bound, false_alarm in found.measurements
        ]
        finding = Finding(measurements, _plain(found.series), found.note)
    except (Exception, SystemExit) as exception:
        error = " ".join(f"{type(exception).__name__}: {exception}".split())[:300]
    return Outcome(job, finding, error, time.perf_counter() - start)


# ---- Processes ---------------------------------------------------------------------------------------------------------

Task = TypeVar("Task")
Result = TypeVar("Result")


class Lost(NamedTuple):
    """Stands for a result whose process ended before it was there."""

    status: int | None


def _serve(pipe: Connection, prepare: Callable[[], None]) -> None:
    """What a worker does: calls what comes through the pipe until it closes."""
    prepare()
    load()
    try:
        while True:
            function, task = pipe.recv()
            pipe.send(function(task))
    except (EOFError, OSError):  # the parent is gone
        return


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class _Worker:
    def __init__(self, prepare: Callable[[], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, prepare), daemon=True)
        with _interrupts_ignored():  # and so in the child: Ctrl-C is the parent's to handle
            self.process.start()
        theirs.close()

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def choose(families: Sequence[Hashable], mine: Hashable, others: Collection[Hashable]) -> int:
    """Which task a process takes: the first of its own family, else of one that no other process works on, else of another's."""
    return min(range(len(families)), key=lambda place: (families[place] != mine, families[place] in others))


class Pool:
    """Processes that run tasks; none means this one.

    Args:
        workers: how many processes.
        prepare: configures each.
    """

    def __init__(self, workers: int, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        self._workers = [_Worker(prepare) for _ in range(workers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def map(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        started: Callable[[Task], None] = lambda task: None,
        family: Callable[[Task], Hashable] = id,
    ) -> Iterator[tuple[Task, Result | Lost]]:
        """Tasks and their results in the order in which these come; `started` is called with each task that begins.

        Tasks of one family run in one process, until there is nothing else to do.
        """
        pending = list(tasks)
        if not self._workers:
            for task in pending:
                started(task)
                yield task, function(task)
            return
        busy: dict[Any, tuple[_Worker, Task]] = {}
        current: dict[int, Hashable] = {}
        while pending or busy:
            for place, worker in enumerate(self._workers):
                if worker.pipe not in busy and pending:
                    mine = current.pop(place, None)
                    task = pending.pop(choose([family(task) for task in pending], mine, set(current.values())))
                    current[place] = family(task)
                    busy[worker.pipe] = worker, task
                    with suppress(OSError):  # a process that has ended shows when its result is asked for
                        worker.pipe.send((function, task))
                    started(task)
            for pipe in wait(list(busy)):
                worker, task = busy.pop(pipe)
                try:
                    yield task, worker.pipe.recv()
                except (EOFError, OSError):
                    worker.stop()
                    self._workers[self._workers.index(worker)] = _Worker(self._prepare)
                    yield task, Lost(worker.process.exitcode)


def execute(pool: Pool, jobs: Sequence[Job], started: Callable[[Job], None]) -> Iterator[Outcome]:
    """Outcomes in the order in which they come."""
    for job, outcome in pool.map(measure, jobs, started, lambda job: job.family):
        yield (
            Outcome(job, None, f"the process that ran it ended with status {outcome.status}", 0.0) if isinstance(outcome, Lost) else outcome
        )
