"""Every check of the theory, start to end: time with an empty and a full compilation cache, and memory."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.row import Bench, Goal, Row


class _Memory(NamedTuple):
    """Bytes held by all processes of a session: pages that they share counted once, and counted in each process."""

    proportional: int
    resident: int


class _Run(NamedTuple):
    wall: float
    processor: float
    memory: _Memory
    status: int
    finished: bool
    message: str


def _memory(session: int) -> _Memory:
    totals = {"Pss": 0, "Rss": 0}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The second field of stat is the command in brackets, and may hold anything; the session is the sixth.
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            for line in (folder / "smaps_rollup").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in totals:
                    totals[name] += 1024 * int(rest.split()[0])
        except OSError:  # ended meanwhile, or somebody else's
            continue
    return _Memory(totals["Pss"], totals["Rss"])


def _processor_time() -> float:
    """Seconds of processor time of all children that have ended, with theirs."""
    times = os.times()
    return times.children_user + times.children_system


def _run(bench: Bench, what: str, folder: Path) -> _Run:
    """One run of the command with its caches and results under `folder`."""
    # The command's own choice of a compilation cache is what is measured; it follows the user's cache folder.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    command = [sys.executable, "-m", "theory_checks", "--out", str(folder / what)]
    peak, errors = _Memory(0, 0), folder / "errors.txt"
    before = _processor_time()
    with errors.open("w") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stream, start_new_session=True)
        try:
            while process.poll() is None:
                try:
                    process.wait(1)  # reading the memory of a process holds it up for milliseconds
                except subprocess.TimeoutExpired:
                    peak = _Memory(*map(max, peak, _memory(process.pid)))
                    bench.progress(f"{what}, {time.perf_counter() - start:.0f} s")
            wall = time.perf_counter() - start
        finally:
            if process.poll() is None:  # interrupted: its workers go with it
                os.killpg(process.pid, signal.SIGKILL)
    # A crash has status 1 as well as a verdict that is not the expected one; only a run that finished leaves results.
    finished = process.returncode in (0, 1) and any((folder / what).glob("**/*.json"))
    return _Run(
        wall, _processor_time() - before, peak, process.returncode, finished, (errors.read_text().strip() or "no message").splitlines()[-1]
    )


def measure(bench: Bench) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for what, bound in (("empty", 60.0), ("full", 30.0)):
            run = _run(bench, f"{what}-cache", Path(folder))
            if not run.finished:
                yield Row("python -m theory_checks", None, note=f"not measured: no results, status {run.status}: {run.message}")
                return
            runs.append(run)
            yield Row(
                f"python -m theory_checks, {what} compilation cache",
                run.wall,
                goals=(Goal("ours", "≤", bound),),
                note=f"one run, start to end; {run.processor:.1f} s of processor time"
                + ("; status 1: a verdict is not the expected one" if run.status else ""),
            )
        peak = _Memory(*map(max, *(run.memory for run in runs)))
        yield Row(
            "python -m theory_checks, peak memory",
            peak.proportional or None,
            unit="B",
            goals=(Goal("ours", "≤", 2.0 * 2**30),),
            note=f"all processes, sampled every second, shared pages counted once; {peak.resident / 2**30:.2f} GiB if counted in each"
            if peak.resident
            else "not measured: needs Linux's /proc",
        )
