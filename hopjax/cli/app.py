"""The commands, their options and help. What takes long to import is imported when a command runs."""

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from hopjax.cli.compilation import keep_programs
from hopjax.cli.options import BufferSize, Choice, Machine, Model, Reading, Temperature, UsageError, Whole, need
from hopjax.cli.output import check_apart, check_suffix, check_writable, write
from hopjax.cli.progress import Screen

if TYPE_CHECKING:
    from hopjax.cli.table import Table

Data = Annotated[
    str,
    Parameter(
        help="CIFAR-10 or CIFAR-100, MNIST, the hub's parquet files, .npy or .npz, a folder of pictures (of one folder per class), or a "
        "built-in set: digits, mnist-5k, photographs."
    ),
]

app = App(
    name="python -m hopjax",
    help="""Energies of your data in the modern Hopfield network of arXiv:2605.27975: what will be forgotten first, and what to replay.

Every sample of DATA is stored as a memory. The higher its energy, the less other samples hold it in place, and the more it loses when
something else is learnt next.

Example: a table and a page about 5,000 handwritten digits:

    python -m hopjax energies mnist-5k

The exit status is 0, 1 if a file could not be written, 2 if the command was misused, and 130 if it was interrupted: the same command
then goes on where it stopped.
""",
    help_format="plaintext",
    version=lambda: importlib.metadata.version("hopjax"),
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # it has something to say
)


def configure(machine: Machine) -> None:
    """The device and precision asked for, and compiled programs kept from run to run."""
    import jax

    if machine.device:
        jax.config.update("jax_platforms", "cuda" if machine.device == "gpu" else machine.device)
        try:
            found = jax.default_backend()
        except (RuntimeError, AssertionError) as error:  # jax 0.10 asserts that there is a backend
            found = str(error).partition(" (set JAX_PLATFORMS")[0] or "none is found"
        if found != machine.device:
            raise UsageError(f"--device {machine.device} is not to be had ({found}): take --device cpu, or leave it out")
    if machine.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    keep_programs()


def _checked(out: Path | None, page: Path | None, *sources: str | Path | None) -> Path:
    """The page to write; raises UsageError unless it and the table can be, and are none of what is read, before the work and not after."""
    from hopjax.data import SAMPLES

    page = page or (out or Path()).with_suffix(".html")
    read = [source for source in sources if source and source not in SAMPLES]
    if out is not None:
        check_suffix(out)
        check_apart("--out", out, read)
        check_writable("--out", out)
    check_apart("--page", page, read)
    check_writable("--page", page)
    if page == out:
        raise UsageError(f"--page {page} is the table's file as well: take --page {page.with_suffix('.html')}")
    return page


def _finish(screen: Screen, found: "Table", out: Path | None, draw: Callable[[], bytes], page: Path, lines: Sequence[str]) -> None:
    """Writes what was made, the table before the page is drawn, and says so."""
    from hopjax.cli import table

    if out is not None:
        table.write(out, found)
    with screen.working("drawing"):
        html = draw()
    write(page, html)
    for line in (*lines, *([f"table: {out}"] if out else []), f"page: {page}"):
        screen.say(line)


@app.command
def energies(
    data: Data,
    /,
    *,
    out: Annotated[Path, Parameter(help="Table to write: .parquet, .csv or .npz.")] = Path("results/energies.parquet"),
    page: Annotated[Path | None, Parameter(help="Page to write (default: OUT with .html).")] = None,
    choice: Choice = Choice(),
    temperature: Temperature = Temperature(),
    model: Model = Model(),
    variant: Annotated[
        Literal["paper", "mean", "density"],
        Parameter(group="Memories", help="Eq. (1) as printed, with a mean over memories in place of the sum, or of the kernel density."),
    ] = "paper",
    reading: Reading = Reading(),
    machine: Machine = Machine(),
) -> int:
    """Write a table with one row per sample, and a page that shows which will be forgotten first.

    Columns: index in DATA, file (of a folder), label, energy, excess (E + ½|x|²), log leakage, sharpness, predicted rise under a small
    rotation, log odds of the others' weight against a sample's own (which tell samples apart at every β), log self weight, nearest other
    sample and its distance, and the energy change ΔE where there is a Task 2.

    Example: CIFAR-10's animals, and what learning its other classes does to them:

        python -m hopjax energies cifar-10-batches-py --classes bird,cat,deer,dog,horse --task2-classes airplane,automobile,frog,ship,truck
    """
    page = _checked(out, page, data, choice.task2)
    configure(machine)
    screen = Screen()
    from hopjax.cli import energies as pictures
    from hopjax.cli.survey import survey
    from hopjax.cli.tasks import directed, load

    with screen.working(f"reading {data}"):
        tasks = directed(load(data, choice, reading), [model.normalise], skip=reading.skip_bad)
    found = survey("energies", tasks, temperature, model, variant, machine, out, screen)
    _finish(screen, found.table, out, lambda: pictures.page(found.table, tasks.task1), page, pictures.summary(found.table))
    found.partial.discard()
    return 0


@app.command
def buffer(
    data: Data,
    /,
    *,
    size: Annotated[BufferSize, Parameter(help="How many samples: a number, or a percentage of Task 1.")],
    policy: Annotated[
        Literal["highest", "lowest", "random", "stratified", "class-balanced", "coverage"],
        Parameter(
            help="Highest or lowest energies; at random; as many from each tenth of the energies; as many from each class, highest "
            "energies first; or each time the sample that saves most, which is the best and takes longest."
        ),
    ],
    seed: Annotated[Whole, Parameter(help="Seed of what is random.")] = 0,
    out: Annotated[Path, Parameter(help="Table to write: .parquet, .csv or .npz.")] = Path("results/buffer.parquet"),
    page: Annotated[Path | None, Parameter(help="Page to write (default: OUT with .html).")] = None,
    choice: Choice = Choice(),
    temperature: Temperature = Temperature(),
    model: Model = Model(),
    reading: Reading = Reading(),
    machine: Machine = Machine(),
) -> int:
    """Write the indices of the samples to replay, in order of choice, and a page that shows what that saves.

    Without a Task 2, what is to be saved is the predicted rise of the energies under a small rotation.

    Example: a tenth of the digits, those that are most needed while the same digits are learnt turned by 30 degrees:

        python -m hopjax buffer mnist-5k --size 10% --policy coverage --rotate 30
    """
    need(seed >= 0, "--seed", seed, "0 ≤ seed", 0)
    page = _checked(out, page, data, choice.task2)
    configure(machine)
    screen = Screen()
    from hopjax.cli import buffer as replay
    from hopjax.cli.survey import survey
    from hopjax.cli.tasks import directed, load

    with screen.working(f"reading {data}"):
        tasks = directed(load(data, choice, reading), [model.normalise], skip=reading.skip_bad)
    count = size.of(len(tasks.task1))
    replay.check(policy, tasks.task1)
    found = survey("buffer", tasks, temperature, model, "paper", machine, out, screen)
    rows = replay.kept(found, policy, count, seed, screen)
    chosen = replay.listed(found.table, rows, policy, seed)
    gained = replay.gains(found, rows, seed, screen)
    lines = replay.summary(chosen, gained)
    _finish(screen, chosen, out, lambda: replay.page(found.table, chosen, rows, gained, tasks.task1), page, lines)
    found.partial.discard()
    return 0


@app.command
def sensitivity(
    data: Data,
    /,
    *,
    perplexities: Annotated[
        str, Parameter(help="Rules for β to compare, P,Q,…: let the other samples that weigh in number so many on average.")
    ] = "5,30,100",
    out: Annotated[Path | None, Parameter(help="Table of all pairs to write: .parquet, .csv or .npz (default: none).")] = None,
    page: Annotated[Path, Parameter(help="Page to write.")] = Path("results/sensitivity.html"),
    choice: Choice = Choice(),
    reading: Reading = Reading(),
    machine: Machine = Machine(),
) -> int:
    """Rank the samples by energy under every normalisation and several β, and say how far these rankings agree.

    Example: does it matter for the digits?

        python -m hopjax sensitivity mnist-5k
    """
    page = _checked(out, page, data, choice.task2)
    configure(machine)
    screen = Screen()
    from hopjax.cli import sensitivity as study
    from hopjax.cli.resume import Partial
    from hopjax.cli.tasks import directed, load
    from hopjax.normalisation import NORMALISATIONS

    rules = study.numbers(perplexities)
    with screen.working(f"reading {data}"):
        tasks = directed(load(data, choice, reading), NORMALISATIONS, skip=reading.skip_bad)
    inputs = study.described(tasks, machine)
    partial = Partial(page, inputs)
    found = study.sensitivity(study.views(tasks, rules, machine, partial, screen), inputs)
    _finish(screen, study.table(found, tasks), out, lambda: study.page(found, tasks), page, study.summary(found))
    partial.discard()
    return 0


@app.command
def compare(
    a: Annotated[Path, Parameter(help="A table that `energies` wrote.")],
    b: Annotated[Path, Parameter(help="Another, of the same samples.")],
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Table of both ranks to write: .parquet, .csv or .npz (default: none).")] = None,
    page: Annotated[Path, Parameter(help="Page to write.")] = Path("results/compare.html"),
) -> int:
    """Say how far two tables of energies rank the same samples alike, who moved most, and what differs in the settings.

    Samples are recognised by their pixels, so the tables may differ in β, normalisation, variant, or in which other samples were stored.

    Example: does the ranking depend on β?

        python -m hopjax energies mnist-5k --perplexity 5 --out results/sharp.parquet
        python -m hopjax compare results/energies.parquet results/sharp.parquet
    """
    page = _checked(out, page, a, b)
    screen = Screen()
    from hopjax.cli import compare as comparison

    found = comparison.compare(a, b)
    _finish(screen, comparison.ranks_table(found), out, lambda: comparison.page(found, a, b), page, comparison.summary(found))
    return 0
