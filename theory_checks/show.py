"""What a run shows in the terminal: progress, table, summary."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from theory_checks.claim import Claim
from theory_checks.report import Expectations, headline, number, title
from theory_checks.run import Job, Outcome

_STYLE = {"holds": "green", "fails": "yellow", "error": "red"}


def verdict_text(result: Mapping[str, Any]) -> Text:
    """The verdict in a word or two; alarming only where it was not expected."""
    verdict, surprise = result["verdict"], result["surprise"]
    words = str(verdict)
    if surprise and verdict != "error":
        words += ", unexpected"
    elif verdict == "fails":
        words += ", as expected"
    return Text(words, style="bold red" if surprise and verdict != "holds" else _STYLE[verdict])


class Progress:
    """Lines for finished checks, and under them, in a terminal that can, what runs now."""

    def __init__(self, console: Console, status: Status | None, total: int) -> None:
        self._console, self._status, self._total = console, status, total
        self._running: list[str] = []
        self._done = 0

    def started(self, job: Job) -> None:
        self._running.append(job.title)
        self._refresh()

    def finished(self, outcome: Outcome) -> None:
        self._running.remove(outcome.job.title)
        self._done += 1
        line = Text(f"{self._done:>{len(str(self._total))}}/{self._total}  ", style="dim")
        line.append(f"{outcome.verdict:<6}", style=_STYLE[outcome.verdict])
        line.append(f" {outcome.job.title}", style="default")
        line.append(f"  {outcome.seconds:.1f} s", style="dim")
        if outcome.error:
            line.append(f"  {outcome.error}", style="red")
        self._console.print(line, soft_wrap=True)
        self._refresh()

    def note(self, words: str) -> None:
        if self._status:
            self._status.update(words)

    def _refresh(self) -> None:
        self.note(f"{self._done}/{self._total}  {', '.join(self._running)}")


class Screen:
    """The terminal; without one, plain lines wide enough for the table."""

    def __init__(self) -> None:
        console = Console(highlight=False)
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._console = console if self._live else Console(highlight=False, width=160, color_system=None)

    @contextmanager
    def running(self, total: int) -> Iterator[Progress]:
        if self._live:
            with self._console.status("starting") as status:
                yield Progress(self._console, status, total)
        else:
            yield Progress(self._console, None, total)

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def list_claims(self, claims: Sequence[Claim], presets: Sequence[str], expectations: Expectations) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("claim", no_wrap=True)  # people copy it
        for column in ("paper", "presets", "expected"):
            table.add_column(column, overflow="fold")
        for claim in claims:
            runs = presets if claim.per_preset else ("",)
            verdicts = [expectations.verdicts.get((claim.name, preset), "?") for preset in runs]
            table.add_row(claim.name, Text(claim.source), ", ".join(runs) or "any", ", ".join(verdicts))
        self._console.print(table)

    def table(self, report: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("claim", overflow="fold")
        table.add_column("statistic", overflow="fold")
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("bound", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        table.add_column("s", justify="right", no_wrap=True)
        for entry in report["claims"]:
            for result in entry["results"]:
                name, shown = title(entry, result), headline(result)
                cells = (
                    (shown["what"], number(shown["value"]), f"{'≤' if shown['relation'] == '<=' else '≥'} {number(shown['bound'])}")
                    if shown
                    else (result["error"], "", "")
                )
                table.add_row(name, *map(Text, cells), verdict_text(result), f"{seconds[name]:.1f}")
        self._console.print(table)

    def summary(self, report: Mapping[str, Any], page: Path) -> None:
        for entry in report["claims"]:
            for result in entry["results"]:
                if result["surprise"]:
                    why = f": {result['explanation']}" if result["explanation"] else ""
                    self.say(f"surprise: {title(entry, result)} {result['verdict']}, expected {result['expected'] or 'nothing'}{why}")
        for warning in report["warnings"]:
            self.say(f"warning: {warning}")
        self.say(summary_line(report))
        self.say(f"report: {page}")

    def interrupted(self, outcomes: Sequence[Outcome], total: int, out: Path) -> None:
        done = ", ".join(outcome.job.title for outcome in outcomes) or "none"
        self.say(f"interrupted after {len(outcomes)} of {total} checks ({done}); what {out} held before is untouched")


def summary_line(report: Mapping[str, Any]) -> str:
    """The run in one line."""
    counts = report["summary"]
    total = counts["holds"] + counts["fails"] + counts["errors"]
    errors = f", {counts['errors']} could not be checked" if counts["errors"] else ""
    surprises = f"{counts['surprises']} not as expected" if counts["surprises"] else "all as expected"
    return (
        f"{total} verdicts: {counts['holds']} hold, {counts['fails']} fail{errors}; {surprises}. "
        f"Chance of a false alarm in the whole run: at most {number(report['false_alarm'])}."
    )
