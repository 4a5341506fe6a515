"""`python -m benchmarks`: measures the subjects and prints one table.

Exit status: 0 when everything asked for was measured, goals met or not (the table says which); 2 for a wrong command line.
"""

import argparse
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import (
    boltzmann,
    kernels,
    likelihood,
    paper_sd,
    rotations,
    sampling,
    scalar_fixed_points,
    scaling,
    stable,
    startup,
    streaming,
    training_step,
    variance,
    verify,
)
from benchmarks.row import Bench, Goal, Row

SUBJECTS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        rotations,
        variance,
        scalar_fixed_points,
        streaming,
        scaling,
        boltzmann,
        training_step,
        stable,
        paper_sd,
        sampling,
        likelihood,
        startup,
        kernels,
        verify,
    )
}


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit == "s":
        scale = next((scale for scale in (1.0, 1e-3, 1e-6) if value >= scale), 1e-9)
        return f"{value / scale:.3g} {({1.0: 's', 1e-3: 'ms', 1e-6: 'µs', 1e-9: 'ns'})[scale]}" if value < 1000 else f"{value:,.0f} s"
    return f"{value / 2**30:.2f} GiB" if unit == "B" else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ×" if value < 10 else f"{float(f'{value:.3g}'):,.0f} ×"


def _goal(goal: Goal, row: Row) -> str:
    if goal.of == "ratio":
        return f"ratio {goal.relation} {goal.bound:,.3g}" if goal.bound < 1000 else f"ratio {goal.relation} {goal.bound:,.0f}"
    if goal.of == "error":
        return f"accuracy {goal.relation} {goal.bound:g}"
    return f"{goal.relation} {_quantity(goal.bound, row.unit)}"


def _table(rows: Sequence[tuple[str, Row]], load: float) -> Table:
    table = Table(
        "what",
        caption=f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before the start; "
        f"Python {platform.python_version()}, jax {jax.__version__} on {jax.default_backend()}; ratio: peer/ours",
        caption_justify="left",
    )
    for name in ("ours", "peer", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("goal", "met?", "accuracy"):
        table.add_column(name)
    before = None
    for subject, row in rows:
        if before not in (None, subject):
            table.add_section()
        before = subject
        table.add_row(
            row.what + (f"\n[dim]{escape(row.note)}[/]" if row.note else ""),
            _quantity(row.ours, row.unit),
            _quantity(row.peer, row.unit),
            _ratio(row.ratio),
            "\n".join(_goal(goal, row) for goal in row.goals) or "–",
            {True: "[green]yes[/]", False: "[bold red]no[/]", None: "–"}[row.met],
            "–" if row.error is None else f"{row.error:.2g} [dim]{row.error_of}[/]",
        )
    return table


def _progress(console: Console, name: str, show: Callable[[str], None] | None) -> Callable[[str], None]:
    """A line that follows the measurement on a terminal; elsewhere a line every five seconds."""
    last = -math.inf

    def progress(what: str) -> None:
        nonlocal last
        if show is not None:
            show(f"{name}: {what}")
        elif time.monotonic() - last > 5:
            last = time.monotonic()
            console.print(f"{name}: {what}")

    return progress


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time, memory and error of the kernels beside their peers.")
    parser.add_argument("--only", metavar="NAME", action="append", choices=SUBJECTS, help="measure this subject; may be given again")
    parser.add_argument("--list", action="store_true", help="list the subjects and stop")
    parser.add_argument("--quick", action="store_true", help="fewer runs: a look, not numbers to quote")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows there too")
    options = parser.parse_args(arguments)
    if options.list:
        for name, module in SUBJECTS.items():
            print(f"{name:20} {(module.__doc__ or '').splitlines()[0]}")
        return 0
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        parser.error(f"--json {options.json}: need a file in a folder that exists")

    jax.config.update("jax_enable_x64", True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that what was started is ended too
    errors = Console(stderr=True, highlight=False)
    load = os.getloadavg()[0]
    if load > 0.5:
        errors.print(
            f"load {load:.1f}: other work is running. NumPy and SciPy with several threads suffer most from it, which flatters the ratios."
        )
    rows: list[tuple[str, Row]] = []
    for name in dict.fromkeys(options.only or SUBJECTS):
        # Two refreshes a second: the line must not disturb what is being timed.
        with errors.status(name, refresh_per_second=2) as status:
            bench = Bench(options.quick, _progress(errors, name, status.update if errors.is_terminal else None))
            rows.extend((name, row) for row in SUBJECTS[name].measure(bench))

    wide = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    wide.print(_table(rows, load))
    missed = [row.what for _, row in rows if row.met is False]
    unmeasured = [row.what for _, row in rows if row.ours is None]
    wide.print(
        f"rows with goals: {sum(row.met is True for _, row in rows)} met, {len(missed)} missed"
        + "".join(f"\n  missed: {what}" for what in missed)
        + "".join(f"\n  not measured: {what}" for what in unmeasured)
    )
    if options.json is not None:
        environment = {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "backend": jax.default_backend(),
            "cores": os.cpu_count(),
            "load": load,
        }
        listed = [{"subject": name, **asdict(row), "ratio": row.ratio, "met": row.met} for name, row in rows]
        options.json.write_text(json.dumps({"environment": environment, "quick": options.quick, "rows": listed}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
