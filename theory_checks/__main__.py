"""Command line of the theory checks: `python -m theory_checks`.

Everything that takes long to import is imported when it is needed, so that --help and `point` start at once.
"""

import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from hopjax.cli.compilation import keep_programs
from hopjax.cli.options import Real, UsageError, Whole
from hopjax.cli.output import write

# scikit-learn takes 32 bits of seed.
LARGEST_SEED = 2**32 - 1
# Above, the dense reference law would hold gigabytes of rotation matrices.
MOST_ROTATIONS = 100_000


app = App(
    name="python -m theory_checks",
    help="""Hold every claim of the theory of arXiv:2605.27975 against numbers.

Without arguments all claims are checked and OUT gets report.html (to read), report.json (all numbers) and figures/.
The exit status is 0 if every claim that is expected to hold does, 1 if one does not, 2 if the command was misused.

Example: Theorem 4.1 alone, in a report of its own:

    python -m theory_checks --only 'theorem-4-1*' --out /tmp/t41
""",
    help_format="plaintext",
    version_flags=[],
)


def configure() -> None:
    """Double precision on the CPU, and compiled programs kept from run to run."""
    import jax

    jax.config.update("jax_enable_x64", True)
    if "JAX_PLATFORMS" not in os.environ:  # double precision, and the same numbers everywhere
        jax.config.update("jax_platforms", "cpu")
    keep_programs()


@app.default
def check(
    *,
    only: Annotated[
        list[str] | None, Parameter(negative="", help="Claims to check: NAME[,NAME…], repeatable; * and ? match any characters.")
    ] = None,
    preset: Annotated[Literal["paper", "asymptotic", "both"], Parameter(help="Parameters of the model.")] = "both",
    seed: Annotated[Whole, Parameter(help="Seed of everything random.")] = 0,
    rotations: Annotated[Whole, Parameter(help="Rotations per Monte Carlo mean, even.")] = 2000,
    out: Annotated[Path, Parameter(help="Folder for the report.")] = Path("results/theory"),
    list_claims: Annotated[bool, Parameter("--list", negative="", show_default=False, help="List the claims and stop.")] = False,
    readme: Annotated[Path | None, Parameter(help="Markdown file whose table of claims a complete run brings up to date.")] = None,
) -> int:
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"--seed {seed} is out of range: need 0 ≤ seed ≤ {LARGEST_SEED}; take --seed 0")
    if not 4 <= rotations <= MOST_ROTATIONS:
        raise UsageError(f"--rotations {rotations} is out of range: need 4 ≤ rotations ≤ {MOST_ROTATIONS}; take --rotations 2000")
    if rotations % 2:
        raise UsageError(f"--rotations {rotations} is odd: rotations come in pairs A, −A; take --rotations {rotations + 1}")
    if not list_claims:
        _check_writable(out)

    configure()
    from theory_checks import readme as readme_table
    from theory_checks import run
    from theory_checks.claim import PRESETS
    from theory_checks.report import Expectations
    from theory_checks.show import Screen

    claims = run.load()
    try:
        names = run.select(claims, [pattern for patterns in only or () for pattern in patterns.split(",")])
        if readme:
            readme_table.check_markers(readme)
    except ValueError as error:
        raise UsageError(str(error)) from None
    presets = list(PRESETS.values()) if preset == "both" else [PRESETS[preset]]
    expectations = Expectations.read()
    screen = Screen()
    if list_claims:
        screen.list_claims([claims[name] for name in names], [chosen.name for chosen in presets], expectations)
        return 0

    from theory_checks import figures, page, report

    jobs = run.jobs([claims[name] for name in names], presets, seed, rotations)
    outcomes: list[run.Outcome] = []
    try:
        # Starting processes takes as long as a few checks: a narrowed run goes without.
        with run.Pool(0 if only else min(2, os.cpu_count() or 1), configure) as pool, screen.running(len(jobs)) as progress:
            for outcome in run.execute(pool, jobs, progress.started):
                outcomes.append(outcome)
                progress.finished(outcome)
            found = report.assemble(
                outcomes,
                claims,
                expectations,
                presets=presets,
                seed=seed,
                rotations=rotations,
                complete=names == list(claims) and preset == "both",
            )
            content = report.to_json(found)
            found = json.loads(content)  # what follows sees what a reader of the file sees
            progress.note("drawing")
            drawn = figures.draw_all(found, claims, pool)
        files = {"report.json": content, "report.html": page.render(found, drawn).encode()}
        files |= {f"figures/{name}": picture for name, picture in drawn.files()}
        try:
            figures.remove_stale(out / "figures", drawn, claims)
            for name, part in files.items():
                write(out / name, part)
        except OSError as error:
            print(f"error: cannot write {error.filename or out}: {error.strerror}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        screen.interrupted(outcomes, len(jobs), out)
        return 130
    screen.table(found, {outcome.job.title: outcome.seconds for outcome in outcomes})
    screen.summary(found, out / "report.html")
    complaints = report.problems(found) + drawn.errors
    if readme:
        screen.say(readme_table.update(readme, found))
    for line in complaints:
        print(f"error: {line}", file=sys.stderr)
    return 1 if complaints else 0


def _check_writable(out: Path) -> None:
    """Finds out before the work, not after it."""
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for folder in (out, out / "figures"):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written ({error.strerror}): name a folder that can") from None


@app.command
def point(
    *,
    K: Annotated[Whole, Parameter("--K", help="Cluster members, K ≥ 2.")],
    cosine: Annotated[Real, Parameter(help="Cosine c between two members, −1/(K−1) ≤ c < 1.")],
    beta: Annotated[Real, Parameter(help="Inverse temperature β > 0.")],
    dim: Annotated[Whole, Parameter(help="Dimension d ≥ K + 1.")],
    as_json: Annotated[
        bool, Parameter("--json", negative="", show_default=False, help="Print JSON with all digits; null where nothing exists.")
    ] = False,
) -> int:
    """Print the theory at one parameter point: everything exact beside its asymptotic form, and the regime.

    Example: the paper's synthetic experiment:

        python -m theory_checks point --K 12 --cosine 0.35 --beta 8 --dim 50
    """
    configure()
    from theory_checks import point as at_point

    try:
        at_point.check_point(K, cosine, beta, dim)
    except ValueError as error:
        raise UsageError(str(error)) from None
    values = at_point.evaluate(K, cosine, beta, dim)
    print(json.dumps(values, allow_nan=False, ensure_ascii=False, indent=2) if as_json else at_point.render(values))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # β and ε, whatever the locale
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CycloptsError as error:
        print(f"error: {' '.join(str(error).split())} See --help.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader had seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status or 0


if __name__ == "__main__":
    # By its importable name, under which worker processes find `configure`.
    from theory_checks.__main__ import main as importable_main

    sys.exit(importable_main())
