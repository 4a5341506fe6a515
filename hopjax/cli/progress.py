"""What the terminal shows: results on the standard output; progress, with the time that is left, on the other."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Where there is no terminal to draw in: seconds between two lines.
QUIET = 10.0
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def speed(rate: float, unit: str) -> str:
    """3.2 Gpairs/s."""
    scale, prefix = next(((scale, prefix) for scale, prefix in _PREFIXES if rate >= scale), (1.0, ""))
    return f"{rate / scale:.3g} {prefix}{unit}/s"


def duration(seconds: float) -> str:
    """3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Tell(Protocol):
    """To be told how many more are done, and what is to be said of them."""

    def __call__(self, more: int, note: str = "") -> None: ...


class Screen:
    """The terminal; without one, plain lines."""

    def __init__(self) -> None:
        self._errors = Console(stderr=True, highlight=False)
        self._live = self._errors.is_terminal and not self._errors.is_dumb_terminal

    def say(self, line: str) -> None:
        print(line, flush=True)

    def note(self, line: str) -> None:
        """What goes on, beside the results."""
        self._errors.print(line, markup=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        self._errors.print(f"warning: {line}", markup=False, soft_wrap=True)

    @contextmanager
    def working(self, words: str) -> Iterator[None]:
        """Something of unknown length is being done."""
        if self._live:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=self._errors, transient=True) as shown:
                shown.add_task(words, total=None)
                yield
        else:
            yield

    @contextmanager
    def counting(self, words: str, total: int, done: int, *, unit: str, each: int = 1) -> Iterator[Tell]:
        """Gives a function to be told how many more are done.

        Args:
            done: how many were done before, by an earlier run.
            unit: of the throughput, of which each of the total is so many.
        """
        start, at = time.monotonic(), done

        def rate() -> float:
            return (at - done) / max(time.monotonic() - start, 1e-9)

        if self._live:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            shown = Progress(*columns, TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), console=self._errors, transient=True)
            with shown:
                task = shown.add_task(words, total=total, completed=done, speed="")

                def draw(more: int, note: str = "") -> None:
                    nonlocal at
                    at += more
                    shown.update(task, completed=at, speed=speed(rate() * each, unit), description=", ".join(filter(None, (words, note))))

                yield draw
        else:
            last = start

            def tell(more: int, note: str = "") -> None:
                nonlocal at, last
                at += more
                if time.monotonic() - last >= QUIET and at < total:
                    last = time.monotonic()
                    left = duration((total - at) / rate())
                    pace = f"{speed(rate() * each, unit)}, {left} left"
                    self._errors.print(", ".join(filter(None, (f"{words}: {at:,} of {total:,}", note, pace))), soft_wrap=True)

            yield tell
